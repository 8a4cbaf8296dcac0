"""The phases of ``make test``: what runs beside other tests, and what has the machine for itself.

Most tests do not measure time, or have a kernel or a Xen host on a CPU of its own; a worker for each CPU runs them,
always a whole module, because its tests share a kernel or a laboratory. Tests of two guests, which are slow enough
already, are marked ``alone`` and run one at a time afterwards. Those with two Xen hosts come last, one at a time, too.

As a plugin of pytest this module marks the tests by where they stand, and runs one phase of them with ``--phase``.
``python -m tests.phases ARGUMENTS`` runs all phases, each with ARGUMENTS for pytest, and closes as one pytest does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

TESTS: Final = Path(__file__).parent

#: What has the machine for itself: files and directories.
ALONE: Final = (
    "qemu",
    "kernel/test_drbd_crash.py",  # two kernels with guests in them need both CPUs
    "kernel/test_drbd_stack.py",
    "kernel/test_netbuffer_contract.py",  # deadlines of single steps
    "kernel/test_netbuffer_limit.py",  # a controller must be quicker than a flood
)

#: What boots two Xen hosts.
PAIRS: Final = tuple(
    f"xen/test_{name}.py"
    for name in ("bad_input", "bed_command", "bed_pair", "drbd", "endings", "takeover", "takeover_hvm")
)

#: Of those that run beside others the modules that take longest, the longest first: none may begin as the last one.
LONGEST: Final = (
    "xen/test_interop.py",
    "xen/test_cuts.py",
    "xen/test_binding.py",
    "xen/test_vif_script.py",
    "xen/test_binding_restorer.py",
    "xen/test_xenstore.py",
    "kernel/test_bed_plugin.py",
    "kernel/test_guest_behind_plug.py",
    "kernel/test_hotplug_scripts.py",
    "kernel/test_netbuffer_claims.py",
    "kernel/test_drbd_contract.py",
    "kernel/test_drbd_checkpoints.py",
    "hotplug/test_remus_netbuf_setup.py",
    "sim/test_walk.py",
    "unit/test_agent.py",
)

#: What pytest is told for each phase.
PHASES: Final[dict[str, tuple[str, ...]]] = {
    "beside": ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"),
    "alone": (),
    "xen": (),
}

_WORDS: Final = ("failed", "passed", "skipped", "xfailed", "xpassed", "error")
_BAD: Final = ("failed", "error")
_REASON_CHARACTERS: Final = 500


def phase_of(path: Path) -> str:
    """Return the phase of the tests in a file."""
    if any(path == TESTS / place for place in PAIRS):
        return "xen"
    return "alone" if any(path.is_relative_to(TESTS / place) for place in ALONE) else "beside"


# --- The plugin ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our options."""
    group = parser.getgroup("understudy")
    group.addoption("--phase", choices=tuple(PHASES), help="run the tests of this phase of `make test`")
    group.addoption("--tally", metavar="FILE", help="write how the tests ended, for the sum of all phases")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import what belongs to another phase; pytest does all the same with files that are named to it."""
    phase = config.getoption("phase")
    if phase is None or collection_path.suffix != ".py" or phase_of(collection_path) == phase:
        return None
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests; of a phase keep its own, the longest modules first."""
    for item in items:
        if phase_of(item.path) == "alone":
            item.add_marker(pytest.mark.alone)
    phase = config.getoption("phase")
    if phase is None:
        return
    if others := [item for item in items if phase_of(item.path) != phase]:
        config.hook.pytest_deselected(items=others)
    order = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items[:] = sorted(
        (item for item in items if phase_of(item.path) == phase),
        key=lambda item: order.get(item.path, len(order)),
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Write the tally."""
    if config.getoption("tally") is None:
        return
    ended = {word: [_line(report) for report in terminalreporter.getreports(word)] for word in _WORDS}
    Path(config.getoption("tally")).write_text(json.dumps(ended))


def _line(report: Any) -> str:
    # As in the summary of pytest, which cuts it off at the width of a terminal.
    told = report.longrepr if report.outcome == "failed" else None
    crash = getattr(told, "reprcrash", None)
    reason = shortened(str(crash.message if crash else told or ""))
    return f"{report.nodeid} - {reason}" if reason else str(report.nodeid)


def shortened(reason: str) -> str:
    """Return why a test failed as one line of `_REASON_CHARACTERS` at most; it begins with what pytest shows first."""
    line = " ".join(reason.split())
    return line if len(line) <= _REASON_CHARACTERS else f"{line[: _REASON_CHARACTERS - 1]}…"


# --- All phases ------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Run all phases, whatever becomes of each, and return pytest's exit status for the whole.

    Args:
        arguments: For pytest, in every phase.
    """
    began = time.monotonic()
    counts: Counter[str] = Counter()
    bad: list[str] = []
    statuses = []
    with tempfile.TemporaryDirectory(prefix="understudy-phases-") as place:
        for phase, own in PHASES.items():
            print(f"\nPhase {phase!r}:", flush=True)  # noqa: T201 - a program's words
            tally = Path(place, phase)
            command = (
                sys.executable,
                "-m",
                "pytest",
                f"--phase={phase}",
                f"--tally={tally}",
                *own,
                *arguments,
            )
            statuses.append(subprocess.run(command, check=False).returncode)
            if tally.exists():
                ended = json.loads(tally.read_text())
                counts.update({word: len(tests) for word, tests in ended.items()})
                bad += [f"{word.upper()} {test}" for word in _BAD for test in ended[word]]
            if statuses[-1] == pytest.ExitCode.INTERRUPTED:
                break
    print(*(["\nIn all phases:", *bad]), sep="\n")  # noqa: T201
    print(closing_line(counts, time.monotonic() - began))  # noqa: T201
    return whole_status(statuses)


def whole_status(statuses: list[int]) -> int:
    """Return the exit status that stands for those of the phases; one without tests is no failure, all are."""
    found = [status for status in statuses if status != pytest.ExitCode.NO_TESTS_COLLECTED]
    if not found:
        return pytest.ExitCode.NO_TESTS_COLLECTED
    return next((status for status in found if status), 0)


def closing_line(counts: Mapping[str, int], took_s: float) -> str:
    """Return the line that pytest closes with, for these tests and seconds."""
    plural = {"error": "errors"}
    parts = [
        f"{counts[word]} {word if counts[word] == 1 else plural.get(word, word)}"
        for word in _WORDS
        if counts.get(word)
    ]
    long = f" ({timedelta(seconds=int(took_s))})" if took_s >= 60 else ""
    return f" {', '.join(parts) or 'no tests ran'} in {took_s:.2f}s{long} ".center(80, "=")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
