"""The phases of ``make test`` miss no test, and the whole ends as one pytest would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import phases

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("place", [*phases.ALONE, *phases.PAIRS, *phases.LONGEST])
def test_places_are_there(place: str) -> None:
    assert (phases.TESTS / place).exists()


def test_every_module_is_in_one_phase() -> None:
    assert {phases.phase_of(path) for path in phases.TESTS.rglob("test_*.py")} <= {*phases.PHASES}
    assert phases.phase_of(phases.TESTS / "xen" / "test_takeover.py") == "xen"
    assert phases.phase_of(phases.TESTS / "xen" / "test_cuts.py") == "beside"
    assert phases.phase_of(phases.TESTS / "qemu" / "test_hosts.py") == "alone"
    assert phases.phase_of(Path(__file__)) == "beside"


def test_what_boots_two_hosts_runs_alone() -> None:
    boots = {
        path
        for path in (phases.TESTS / "xen").glob("test_*.py")
        if re.search(r"\bXenPair\b|\bSite\(|xen_pair|--hosts", path.read_text())
    }
    assert boots == {phases.TESTS / place for place in phases.PAIRS}


@pytest.mark.parametrize(
    ("statuses", "whole"),
    [([0, 0, 5], 0), ([0, 1, 0], 1), ([2], 2), ([5, 5, 5], 5), ([5, 0, 5], 0), ([5, 3, 1], 3)],
)
def test_status(statuses: list[int], whole: int) -> None:
    assert phases.whole_status(statuses) == whole


def test_closing_line() -> None:
    counts = {"passed": 1680, "skipped": 1, "error": 2}
    assert (
        phases.closing_line(counts, 1019.5).strip("=")
        == " 1680 passed, 1 skipped, 2 errors in 1019.50s (0:16:59) "
    )
    assert phases.closing_line({}, 1).strip("=") == " no tests ran in 1.00s "


def test_a_reason_is_one_line_of_limited_length() -> None:
    assert phases.shortened("E: first\n\n  second ") == "E: first second"
    assert phases.shortened("x" * 500) == "x" * 500
    assert phases.shortened("x" * 501) == "x" * 499 + "…"


@pytest.mark.slow
def test_a_failure_is_named_at_the_end_although_later_phases_have_no_tests(tmp_path: Path) -> None:
    module = tmp_path / "test_bad.py"
    why = "why, in words longer than a terminal is wide, " * 3
    module.write_text(
        "import pytest\n"
        f"def test_bad(): raise ValueError({why!r} + '\\n and a second line')\n"
        "@pytest.fixture\ndef world(): raise OSError('no world')\n"
        "def test_worldless(world): pass\n"
    )
    command = [sys.executable, "-m", "tests.phases", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    command += [str(module), f"{Path(__file__)}::test_closing_line"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    *_, failed, error, closing = done.stdout.splitlines()
    assert failed == f"FAILED ::test_bad - ValueError: {why}and a second line"
    assert error == "ERROR ::test_worldless - OSError: no world"
    assert closing.strip("=").startswith(" 1 failed, 1 passed, 1 error in ")
