"""The ioctls of DRBD's Remus fork, against a stand-in for its device, and against stock DRBD, which has none."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.standin import StandIn
from understudy.device import (
    Decline,
    DeviceInfo,
    Finding,
    Kind,
    OpenContext,
    Peer,
    ProbeContext,
    ProtectedDevice,
    ReplicationMode,
    Verdict,
)
from understudy.errors import UnderstudyError
from understudy.testing.subkind_kit import CHECKS, SubkindBed, check_subkind, open_context
from understudy_drbd.checkpoints import CheckpointRefused, Checkpoints
from understudy_drbd.control import threads
from understudy_drbd.fork import DRBD_CHECKPOINT, ForkPrimary, answering
from understudy_drbd.status import State

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


UP = State("Connected", "Primary", "Secondary", "UpToDate", "UpToDate", "D")


async def mirrored() -> State:
    return UP


async def test_a_checkpoint_waits_before_the_guest_runs_on(device: StandIn) -> None:
    disk = await answering(Checkpoints(device.path), mirrored)
    assert isinstance(disk, ForkPrimary)
    device.renew()
    await disk.postsuspend(1)
    assert device.calls == [20]
    with pytest.raises(CheckpointRefused, match="WAIT_CHECKPOINT_ACK"):
        await disk.error()  # nothing has been acknowledged yet
    await disk.preresume(1)
    assert device.calls == [20, 30]
    await disk.error()
    await disk.postsuspend(2)  # the guest wrote nothing
    await disk.preresume(2)
    assert device.calls == [20, 30, 20]
    await disk.error()
    assert disk.counters() == {"empty_epoch_count": 1}
    await disk.teardown(Verdict.KEEP)


async def test_an_epoch_that_did_not_arrive_is_never_acknowledged(device: StandIn) -> None:
    disk = await answering(Checkpoints(device.path), mirrored)
    assert isinstance(disk, ForkPrimary)
    device.renew()
    await disk.postsuspend(1)
    device.connected = False
    with pytest.raises(CheckpointRefused, match="not connected"):
        await disk.preresume(1)
    with pytest.raises(CheckpointRefused, match="not connected"):
        await disk.error()
    await disk.teardown(Verdict.DISCARD)


async def test_only_a_device_that_answers_is_taken(device: StandIn) -> None:
    other = Checkpoints(Path("/dev/null"))
    answer = await answering(other, mirrored)
    assert isinstance(answer, Decline)
    assert "this DRBD has no checkpoints" in answer.reason
    device.connected = False
    broken = Checkpoints(device.path)
    with pytest.raises(CheckpointRefused, match="not connected"):
        await answering(broken, mirrored)
    for each in (other, broken):
        with pytest.raises(CheckpointRefused, match="EBADF"):
            await each.send(timeout_s=10)


class Bed(SubkindBed):
    """The primary's half on the stand-in; the secondary's has nothing to do but at a takeover."""

    def __init__(self, device: StandIn) -> None:
        self.device = device
        self.subkind = replace(DRBD_CHECKPOINT, open=self.open, probe=self.probe)

    async def open(self, context: OpenContext) -> ProtectedDevice | Decline:
        if context.side is ReplicationMode.SECONDARY:
            return ProtectedDevice()
        return await answering(Checkpoints(self.device.path), self.demand)

    async def probe(self, context: ProbeContext) -> Sequence[Finding]:
        return ()

    async def demand(self) -> State:
        if not self.device.connected:
            raise UnderstudyError("not connected")
        return UP

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        return open_context(DeviceInfo(Kind.DISK, "disk0", 0, "sim"), side, peer)


async def disconnect(bed: SubkindBed) -> None:
    assert isinstance(bed, Bed)
    bed.device.connected = False


async def test_the_contract(made: StandIn) -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[SubkindBed]:
        made.renew()
        yield Bed(made)

    ran = await check_subkind(make, broken=disconnect)
    assert set(CHECKS) - set(ran) == {"output-commit"}
