"""Helpers of other toolstacks are told from all else, and the one that saves the domain is ended."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy_xen.savers import Savers, saves

HELPER = "/usr/lib/xen-4.17/bin/libxl-save-helper"


def _line(*words: str) -> bytes:
    return b"".join(word.encode() + b"\0" for word in words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((HELPER, "--save-domain", "8", "9", "7", "0", "1"), True),
        (("libxl-save-helper", "--save-domain", "8", "9", "7"), True),
        ((HELPER, "--save-domain", "8", "9", "70"), False),
        ((HELPER, "--save-domain", "7", "7", "8"), False),
        ((HELPER, "--restore-domain", "8", "9", "7"), False),
        ((HELPER, "--save-domain"), False),
        (("vi", HELPER, "--save-domain", "8", "9", "7"), False),
        ((), False),
    ],
)
def test_a_command_line_is_told(words: tuple[str, ...], expected: bool) -> None:
    assert saves(_line(*words), 7) is expected


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as running:
        yield running
        running.kill()


def _place(proc: Path, pid: int, domid: int) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cmdline").write_bytes(_line(HELPER, "--save-domain", "8", "9", str(domid), "0"))


def test_one_that_runs_already_is_ended_and_told_once(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    _place(tmp_path, process.pid, 7)
    told: list[str] = []
    savers = Savers(7, told.append, proc=tmp_path)
    try:
        found = savers.look()
        assert process.wait(10) == -9
        assert f"begun to save domain 7 (libxl-save-helper, pid {process.pid})" in found
        assert (savers.look(), told) == (found, [found])  # nobody may forget it
    finally:
        savers.close()
        savers.close()
    assert savers.fileno() == -1


def test_one_of_another_domain_goes_on(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    _place(tmp_path, process.pid, 8)
    (tmp_path / "self").mkdir()
    savers = Savers(7, pytest.fail, proc=tmp_path)
    try:
        assert savers.look() == ""
        assert process.poll() is None
    finally:
        savers.close()
