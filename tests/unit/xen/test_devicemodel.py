"""The device model's monitor: a real QEMU's, one client at a time, and sockets that say nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.testbeds.bed import need
from understudy.errors import HypervisorError, MonitorSilent
from understudy_xen import devicemodel as module
from understudy_xen.devicemodel import DeviceModel

DOMID = 7
MAGIC = b"QEVM"  # of a saved state, QEMU migration/savevm.h


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
async def qemu(tmp_path: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
    need("qemu", [] if shutil.which("qemu-system-x86_64") else ["the program qemu-system-x86_64"])
    socket_path = tmp_path / f"qmp-libxl-{DOMID}"
    argv = ["qemu-system-x86_64", "-machine", "none", "-S", "-display", "none", "-nodefaults"]
    process = subprocess.Popen(  # noqa: ASYNC220 - tests have the loop to themselves
        [*argv, "-qmp", f"unix:{socket_path},server=on,wait=off"], start_new_session=True
    )
    try:
        async with asyncio.timeout(30):
            while not listens(socket_path):
                assert process.poll() is None
                await asyncio.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def model(qemu: subprocess.Popen[bytes], tmp_path: Path) -> DeviceModel:
    return DeviceModel(DOMID, tmp_path)


@pytest.fixture
async def silent(tmp_path: Path) -> AsyncIterator[DeviceModel]:
    """A monitor that takes clients and says nothing."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / f"qmp-libxl-{DOMID}"))
        server.listen()
        yield DeviceModel(DOMID, tmp_path)


@contextmanager
def impatient() -> Iterator[None]:
    """Only where silence is waited for: a busy machine is slow to greet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CONNECT_S", 0.2)
        patch.setattr(module, "_COMMAND_S", 0.2)
        yield


async def test_a_checkpoint_of_a_real_device_model(model: DeviceModel, tmp_path: Path) -> None:
    assert model.exists
    await model.connect()
    await model.connect()
    await model.stop()
    state = await model.state()
    assert state.startswith(MAGIC)
    await model.proceed()
    assert (await model.execute("query-status"))["running"]
    await model.release()
    await model.release()
    assert os.listdir(tmp_path) == [f"qmp-libxl-{DOMID}"]  # noqa: PTH208 - I6: no state is left


async def test_dirty_log_is_known_to_qemu(model: DeviceModel) -> None:
    # What it marks can be seen under Xen only; a command or an argument that QEMU does not know is refused.
    for enable in (True, False):
        await model.log_dirty(enable=enable)


async def test_one_command_lets_the_socket_go(model: DeviceModel, tmp_path: Path) -> None:
    other = DeviceModel(DOMID, tmp_path)
    for _ in range(3):
        assert not (await model.execute("query-status"))["running"]
        assert not (await other.execute("query-status"))["running"]


async def test_one_client_at_a_time(model: DeviceModel, tmp_path: Path) -> None:
    other = DeviceModel(DOMID, tmp_path)
    await model.connect()
    with impatient(), pytest.raises(MonitorSilent, match=r"within 0.2 s .*an xl command may hold it"):
        await other.connect()
    await model.execute("query-status")  # it was not disturbed
    await model.release()
    await other.connect()
    await other.release()


async def test_a_waiting_client_comes_next(model: DeviceModel, tmp_path: Path) -> None:
    other = DeviceModel(DOMID, tmp_path)
    await model.connect()
    waiting = asyncio.create_task(other.connect())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await model.release()
    await waiting
    assert await other.execute("query-name") == {}
    await other.release()


async def test_refused(model: DeviceModel) -> None:
    await model.connect()
    with pytest.raises(HypervisorError, match=r"of domain 7 refused xen-nonsense: .*has not been found"):
        await model.execute("xen-nonsense")
    assert (await model.execute("query-status"))["status"]  # the connection is as good as before
    await model.release()


async def test_commands_at_the_same_time(model: DeviceModel) -> None:
    # None of them takes the connection from under another.
    found = await asyncio.gather(*(model.execute("query-status") for _ in range(8)), model.release())
    assert len(found) == 9
    assert model._client is None


async def test_i6_a_state_that_cannot_be_saved_leaves_nothing(model: DeviceModel, tmp_path: Path) -> None:
    model._state = tmp_path / "no directory" / "state"
    with pytest.raises(HypervisorError, match="refused xen-save-devices-state"):
        await model.state()
    model._state = tmp_path / "state"
    await model.connect()
    model._client, client = None, model._client
    with impatient(), pytest.raises(MonitorSilent):
        await model.state()
    assert not (tmp_path / "state").exists()
    model._client = client
    await model.release()


async def test_killed_in_the_middle(model: DeviceModel, qemu: subprocess.Popen[bytes]) -> None:
    await model.connect()
    qemu.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(model.stop())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    qemu.kill()
    with pytest.raises(MonitorSilent, match="closed its socket while it ran stop"):
        await waiting
    with pytest.raises(MonitorSilent, match="cannot be reached"):
        await model.proceed()
    await model.release()


async def test_i4_a_device_model_that_hangs(model: DeviceModel, qemu: subprocess.Popen[bytes]) -> None:
    await model.connect()
    qemu.send_signal(signal.SIGSTOP)
    with impatient():
        with pytest.raises(MonitorSilent, match=r"did not answer stop within 0.2 s"):
            await model.stop()
        with pytest.raises(MonitorSilent, match="does not answer"):
            await model.stop()
    qemu.send_signal(signal.SIGCONT)
    # It answers the command that was given up to nobody, and the next client is greeted.
    assert not (await model.execute("query-status"))["running"]


async def test_a_cancelled_command_lets_the_socket_go(
    model: DeviceModel, qemu: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    await model.connect()
    qemu.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(model.stop())
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    qemu.send_signal(signal.SIGCONT)
    assert (await DeviceModel(DOMID, tmp_path).execute("query-status"))["status"]
    await model.release()


async def test_i4_a_socket_that_says_nothing(silent: DeviceModel) -> None:
    async with asyncio.timeout(5):
        with impatient(), pytest.raises(MonitorSilent, match=r"does not answer on .* within 0.2 s"):
            await silent.connect()
        with impatient(), pytest.raises(MonitorSilent, match=r"does not answer on .* within 0.2 s"):
            await silent.execute("stop")
    await silent.release()


async def test_cancelled_while_nothing_is_said(silent: DeviceModel) -> None:
    for _ in range(3):
        waiting = asyncio.create_task(silent.connect())
        await asyncio.sleep(0.02)
        waiting.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await waiting


async def test_no_device_model(tmp_path: Path) -> None:
    model = DeviceModel(DOMID, tmp_path)
    assert not model.exists
    with pytest.raises(MonitorSilent, match=r"cannot be reached on .*qmp-libxl-7"):
        await model.connect()
    await model.release()


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400\r\n", b'{"return": {}, "id": "libxl-1"}\r\n'])
async def test_a_socket_that_is_no_monitor(tmp_path: Path, says: bytes) -> None:
    async def served(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(served, tmp_path / f"qmp-libxl-{DOMID}"):
        async with asyncio.timeout(5):
            with impatient(), pytest.raises(MonitorSilent):
                await DeviceModel(DOMID, tmp_path).connect()
