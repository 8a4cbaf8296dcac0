"""Processes: known by their pidfile argument, never mistaken, seen dead."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from understudy.errors import HypervisorError
from understudy_qemu.process import QemuProcess

# A stand-in for QEMU: says something, then waits; takes any argument.
WAITS = "import sys; print('ready', file=sys.stderr, flush=True); sys.stdin.read() or __import__('time').sleep(60)"


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[QemuProcess]:
    argv = [sys.executable, "-c", WAITS, "-pidfile", str(tmp_path / "pid")]
    made = QemuProcess.start(argv, stderr=tmp_path / "stderr", environment={})
    async with asyncio.timeout(10):
        # Its arguments can be read a moment after it was started.
        while made.last_words() != "ready":  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    yield made
    if made.alive:
        await made.kill()
    made.close()


async def test_kill_and_see_dead(process: QemuProcess) -> None:
    assert process.describe() == ""
    await process.kill()
    assert not process.alive
    assert process.exit_status == -9
    assert process.describe().startswith("QEMU was killed by SIGKILL")
    await process.kill()


async def test_adopted_by_its_pidfile_argument(process: QemuProcess, tmp_path: Path) -> None:
    pidfile, stderr = tmp_path / "pid", tmp_path / "stderr"
    assert QemuProcess.adopt(pidfile, stderr=stderr) is None
    pidfile.write_text(f"{os.getpid()}\n")
    assert QemuProcess.adopt(pidfile, stderr=stderr) is None
    pidfile.write_text(f"{process.pid}\n")
    (tmp_path / "other").write_text(f"{process.pid}\n")
    found = QemuProcess.adopt(pidfile, stderr=stderr)
    assert found is not None
    assert found.pid == process.pid
    assert QemuProcess.adopt(tmp_path / "other", stderr=tmp_path / "stderr") is None
    await found.kill()
    assert not process.alive
    assert found.exit_status is None
    assert "is gone" in found.describe()
    found.close()
    found.close()
    assert QemuProcess.adopt(tmp_path / "pid", stderr=tmp_path / "stderr") is None


async def test_suspend_and_resume(process: QemuProcess) -> None:
    def state() -> str:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    async with asyncio.timeout(10):
        process.resume()  # it was never stopped
        process.suspend()
        while state() != "T":  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.005)
        process.resume()
        while state() == "T":  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
    await process.kill()
    process.resume()
    process.close()
    process.resume()


async def test_last_words(tmp_path: Path) -> None:
    words = "import sys; print('no such machine', file=sys.stderr); sys.exit(3)"
    argv = [sys.executable, "-c", words, "-pidfile", str(tmp_path / "pid")]
    process = QemuProcess.start(argv, stderr=tmp_path / "stderr", environment={})
    assert await process.wait(10)
    assert process.describe() == "QEMU ended with status 3; it said: no such machine"
    process.close()


async def test_wait_ends_at_its_deadline(process: QemuProcess) -> None:
    assert not await process.wait(0.05)
    assert process.alive


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="/no/such/qemu cannot be started: No such file"):
        QemuProcess.start(["/no/such/qemu"], stderr=tmp_path / "stderr", environment={})
