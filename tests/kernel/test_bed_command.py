"""The command line of the kernel bed, as developers use it: in a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.testbeds.bed import need
from tests.testbeds.kernel.machine import missing_for_kernel

ROOT = Path(__file__).parents[2]
BED = (sys.executable, "-m", "tests.testbeds.kernel", "--memory", "128")


@pytest.fixture(autouse=True)
def needed() -> None:
    need("kernel", missing_for_kernel())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BED, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_output_and_status_of_the_command() -> None:
    done = run("sh", "-c", 'seq 30000; pwd; echo "$1"; exit 7', "sh", "an 'odd' word")
    assert done.returncode == 7
    assert done.stdout.splitlines() == [*map(str, range(1, 30001)), str(ROOT), "an 'odd' word"]
    assert done.stderr == ""


def test_a_kernel_that_dies_is_told_from_a_command_that_fails() -> None:
    done = run("sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60")
    assert done.returncode == 125
    assert "died before its command ended" in done.stderr
    assert "Kernel panic - not syncing: sysrq triggered crash" in done.stderr


def test_the_time_is_limited() -> None:
    done = run("--timeout", "5", "sleep", "3600")
    assert done.returncode == 125
    assert "was killed: its command did not end within 5 s" in done.stderr


def test_a_terminal_is_one_inside_too(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    termios.tcsetwinsize(theirs, (40, 120))
    said = b""
    process = subprocess.Popen(
        [*BED, "sh", "-c", "stty size; read word; echo got $word; read word"],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.set_blocking(ours, False)

    def says(text: bytes) -> Callable[[], bool]:
        def read() -> bool:
            nonlocal said
            try:
                said += os.read(ours, 4096)
            except BlockingIOError:
                time.sleep(0.02)
            return text in said

        return read

    try:
        until(says(b"40 120"))
        os.write(ours, b"this\n")
        until(says(b"got this"))
        os.write(ours, b"\x03")  # Ctrl-C reaches the command inside, not the bed
        assert process.wait(30) == 130
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline, "it did not become so"
