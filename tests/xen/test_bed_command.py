"""The command line of the Xen bed, and what is left when it, or a test, is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytestmark = [pytest.mark.xen, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
BED = (sys.executable, "-m", "tests.testbeds.xen")


@contextmanager
def started(tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    # Its run directory is made in TMPDIR: so it can be told from others', and so can its QEMU, whose command names it.
    process = subprocess.Popen(
        [*BED, *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def emulators(tmp_path: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes()
            if words.startswith(b"qemu-system-x86_64") and str(tmp_path).encode() in words:
                found.append(path.parent.name)
    return found


def left(tmp_path: Path) -> list[str]:
    # The turns that processes with Xen hosts take are files that stay.
    return [path.name for path in tmp_path.iterdir() if not path.name.startswith("understudy-xen-turns-")]


def until(tmp_path: Path, *, running: bool) -> None:
    deadline = time.monotonic() + 60
    while bool(emulators(tmp_path)) is not running:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_output_and_status_of_the_command(tmp_path: Path) -> None:
    script = 'seq 20000; pwd; hostname; python3 -m understudy --version; echo "$1"; exit 7'
    with started(tmp_path, "--", "sh", "-c", script, "sh", "an 'odd' word") as process:
        said, errors = process.communicate(timeout=280)
    assert process.returncode == 7, errors
    lines = said.splitlines()
    assert lines[:20000] == [*map(str, range(1, 20001))]
    assert lines[20000:20002] == [str(ROOT), "alpha"]
    assert lines[20002].startswith("understudy ")
    assert lines[20003] == "an 'odd' word"
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_runs_on_when_its_maker_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, "--hosts", "2", "--", "sleep", "3600") as process:
        until(tmp_path, running=True)
        process.send_signal(number)
        process.communicate(timeout=60)
    until(tmp_path, running=False)
    if number is signal.SIGINT:
        assert process.returncode == 128 + signal.SIGINT
        assert left(tmp_path) == []


def test_a_host_that_dies_is_told_from_a_command_that_fails(tmp_path: Path) -> None:
    crash = "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 60"
    with started(tmp_path, "--", "sh", "-c", crash) as process:
        _, errors = process.communicate(timeout=280)
    assert process.returncode == 125
    assert "died before its command ended; the end of its console:" in errors
    assert "Hardware Dom0 crashed" in errors
