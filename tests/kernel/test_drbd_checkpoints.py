"""The ioctls of DRBD's Remus fork, against a stand-in for its device, and against stock DRBD, which has none."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.standin import StandIn
from understudy.errors import UnderstudyError
from understudy_drbd.checkpoints import CheckpointRefused, Checkpoints
from understudy_drbd.control import threads

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def made() -> StandIn:
    return StandIn()


@pytest.fixture
def device(made: StandIn) -> StandIn:
    made.renew()
    return made


@pytest.fixture
def checkpoints(device: StandIn) -> Iterator[Checkpoints]:
    opened = Checkpoints(device.path)
    yield opened
    opened.close()


async def test_a_barrier_and_its_acknowledgement(device: StandIn, checkpoints: Checkpoints) -> None:
    assert await checkpoints.send(timeout_s=10)
    await checkpoints.wait(timeout_s=10)
    assert device.calls == [20, 30]


async def test_without_writes_there_is_nothing_to_wait_for(device: StandIn, checkpoints: Checkpoints) -> None:
    device.written = False
    assert not await checkpoints.send(timeout_s=10)


async def test_an_error_is_an_error(device: StandIn, checkpoints: Checkpoints) -> None:
    device.connected = False
    for call, name in ((checkpoints.send, "SEND_CHECKPOINT"), (checkpoints.wait, "WAIT_CHECKPOINT_ACK")):
        with pytest.raises(CheckpointRefused, match="the other host is not connected") as caught:
            await call(timeout_s=10)
        assert caught.value.ioctl == f"DRBD_{name}"
        assert caught.value.errno == errno.EPROTO
        assert caught.value.device == device.path
    device.protocol = "C"
    with pytest.raises(CheckpointRefused, match="does not use protocol D"):
        await checkpoints.send(timeout_s=10)


async def test_a_connection_lost_while_waiting_ends_the_wait(
    device: StandIn, checkpoints: Checkpoints
) -> None:
    device.answers = False
    waiting = asyncio.create_task(checkpoints.wait(timeout_s=30))
    assert await asyncio.to_thread(device.waiting.wait, 10)
    device.acknowledge(errno.EPROTO)
    with pytest.raises(CheckpointRefused, match="not connected"):
        await waiting


async def test_a_wait_is_bounded(device: StandIn, checkpoints: Checkpoints) -> None:
    device.answers = False
    with pytest.raises(TimeoutError):
        await checkpoints.wait(timeout_s=0.05)
    assert threads.hung == 1
    # It holds up nothing else, and ends when DRBD ends it.
    assert await checkpoints.send(timeout_s=10)
    assert await asyncio.to_thread(device.waiting.wait, 10)
    device.acknowledge()
    async with asyncio.timeout(10):
        while threads.hung:  # noqa: ASYNC110 - a thread that ends tells nobody
            await asyncio.sleep(0.01)


async def test_a_wait_can_be_called_off(device: StandIn, checkpoints: Checkpoints) -> None:
    device.answers = False
    waiting = asyncio.create_task(checkpoints.wait(timeout_s=30))
    assert await asyncio.to_thread(device.waiting.wait, 10)
    waiting.cancel()
    done, _ = await asyncio.wait({waiting}, timeout=5)
    assert done
    assert waiting.cancelled()
    device.acknowledge()


async def test_a_closed_device_and_one_that_is_none(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.close()
    checkpoints.close()
    with pytest.raises(CheckpointRefused) as caught:
        await checkpoints.send(timeout_s=10)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(UnderstudyError, match="cannot be opened: No such file"):
        Checkpoints(tmp_path / "drbd0")


async def test_another_device_has_no_checkpoints() -> None:
    other = Checkpoints(Path("/dev/null"))
    try:
        with pytest.raises(CheckpointRefused, match="this DRBD has no checkpoints") as caught:
            await other.send(timeout_s=10)
        assert caught.value.errno == errno.ENOTTY
    finally:
        other.close()
