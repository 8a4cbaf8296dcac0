"""The secondary's half under a copy that runs ahead, on a real DRBD pair; the copy is played, its disk is real."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import socket
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.drbdpair import (
    BLOCK_BYTES,
    BLOCKS,
    PRIMARY,
    SECONDARY,
    Disk,
    DrbdPair,
    Session,
    Straight,
    differences,
)
from tests.kernel.test_drbd_contract import Bed
from tests.kernel.thinpool import run
from tests.testbeds.rounds import LONG, rounds
from understudy.device import OpenContext, Peer, ProtectedDevice, ReplicationMode, SweepContext, Verdict
from understudy.errors import StateError
from understudy.services import SPECULATION, Services
from understudy.testing.subkind_kit import SubkindBed, check_subkind
from understudy_drbd.copydevice import CopyDevice
from understudy_drbd.dm import MapperRefused, Target
from understudy_drbd.subkind import DRBD
from understudy_drbd.thin import InUse

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

NAME = "understudy-drbd1"
NETLINK_KOBJECT_UEVENT = 15  # linux/netlink.h; Python has no name for it


class Copy:
    """What a hypervisor tells of its copy, and the copy's way to its disk, which stays open."""

    def __init__(self) -> None:
        self.loaded = 0
        self.parked = 0
        self.written = 0
        self.settled = False
        self.path: Path | None = None
        self._fd = -1

    async def park(self) -> None:
        self.parked += 1

    async def writes(self, device: str) -> int:
        assert device == "disk0"
        return self.written

    async def settle(self, device: str) -> None:
        assert device == "disk0"
        self.settled = True
        self.close()

    def begin(self, device: ProtectedDevice) -> None:
        """Be launched."""
        self.path = device.copy_path
        assert self.path is not None
        self._fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)

    def differences(self, expected: dict[int, bytes]) -> list[int]:
        """Return the blocks that are not as expected, read as QEMU reads."""
        with mmap.mmap(-1, BLOCKS * BLOCK_BYTES) as buffer:
            assert os.preadv(self._fd, [buffer], 0) == len(buffer)
            data = bytes(buffer)
        blocks = (data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES))
        return [n for n, block in enumerate(blocks) if block != expected.get(n, bytes(BLOCK_BYTES))]

    def write(self, block: int, content: bytes) -> None:
        with mmap.mmap(-1, BLOCK_BYTES) as buffer:
            buffer[:] = content
            os.pwritev(self._fd, [buffer], block * BLOCK_BYTES)
        self.written += 1

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@pytest.fixture
def copy() -> Iterator[Copy]:
    made = Copy()
    yield made
    made.close()


async def opened(pair: DrbdPair, copy: Copy) -> Session:
    there, back = Straight(), Straight()
    context = replace(pair.context(SECONDARY, back), services=Services((SPECULATION, copy)))
    secondary = await DRBD.open(context)
    assert isinstance(secondary, ProtectedDevice), secondary
    there.other = secondary
    primary = await DRBD.open(pair.context(PRIMARY, there))
    assert isinstance(primary, ProtectedDevice), primary
    back.other = primary
    copy.begin(secondary)
    await primary.start(PRIMARY)
    await secondary.start(SECONDARY)
    return Session(primary, secondary)


async def checkpoint(session: Session, copy: Copy) -> None:
    """Take a checkpoint: the copy loads it between the cut and the news of it."""
    session.epoch += 1
    await session.primary.postsuspend(session.epoch)
    copy.loaded += 1
    for step in ("checkpoint", "error", "commit"):
        for each in (session.primary, session.secondary):
            await (each.error() if step == "error" else getattr(each, step)(session.epoch))


def is_there(pair: DrbdPair) -> bool:
    with suppress(MapperRefused):
        return bool(pair.pool.mapper.status(NAME).number)
    return False


async def test_the_copy_has_the_disk_of_its_checkpoint(pair: DrbdPair, copy: Copy) -> None:
    disk = Disk(pair.devices[PRIMARY], random.Random(1))
    disk.write(4)
    session = await opened(pair, copy)
    # The guest stood still when the copy of its memory began.
    assert not copy.differences(disk.expected)
    for _ in range(rounds(4, 20)):
        before = dict(disk.expected)
        disk.write(4)
        assert not copy.differences(before)
        await checkpoint(session, copy)
        assert not copy.differences(disk.expected)
    assert copy.parked == 1 + session.epoch
    await session.secondary.stop(failover=False)
    with pytest.raises(InUse):
        await session.secondary.teardown(Verdict.DISCARD)
    copy.close()
    await session.secondary.teardown(Verdict.DISCARD)
    await session.primary.teardown(Verdict.KEEP)
    assert not is_there(pair)
    assert (await pair.state(PRIMARY)).mirrored


@pytest.mark.parametrize(("loaded", "writes"), [(0, 0), (1, 0), (1, 1), *[(0, 1)] * rounds(0, 1)])
async def test_memory_decides_which_disk_it_gets(
    pair: DrbdPair, copy: Copy, loaded: int, writes: int
) -> None:
    disk = Disk(pair.devices[PRIMARY], random.Random(2))
    session = await opened(pair, copy)
    disk.write(4)
    await checkpoint(session, copy)
    written = random.Random(3).randbytes(BLOCK_BYTES)
    expected = dict(disk.expected)
    if writes and not loaded:
        copy.write(7, written)
    disk.write(4)
    # The last one is cut. Whether it is loaded, the primary does not live to hear.
    await session.primary.postsuspend(session.epoch + 1)
    copy.loaded += loaded
    if loaded:
        expected = dict(disk.expected)
    if writes and loaded:
        copy.write(7, written)
    if writes:
        expected[7] = written
    disk.write(4)
    session.secondary.sever()
    await session.secondary.stop(failover=True)
    assert not copy.differences(expected)
    # What the copy wrote DRBD has not seen.
    behind = (await pair.state(SECONDARY)).out_of_sync_bytes
    assert behind == (int(run("blockdev", "--getsize64", pair.devices[SECONDARY])) if writes else 0)
    await session.primary.stop(failover=True)
    await session.secondary.teardown(Verdict.KEEP)
    assert copy.settled
    assert not is_there(pair)
    await session.primary.teardown(Verdict.DISCARD)
    await pair.mirrored()
    for side in (PRIMARY, SECONDARY):
        assert not differences(pair.lower[side], expected)


async def test_a_checkpoint_that_nobody_cut_is_not_promoted(pair: DrbdPair, copy: Copy) -> None:
    session = await opened(pair, copy)
    await checkpoint(session, copy)
    copy.loaded += 1
    with pytest.raises(StateError, match="loaded 2 checkpoints since the cut of epoch 1"):
        await session.secondary.stop(failover=True)
    assert (await pair.state(SECONDARY)).mirrored
    copy.close()
    await session.secondary.teardown(Verdict.DISCARD)
    await session.primary.teardown(Verdict.KEEP)


async def test_a_takeover_before_the_first_checkpoint_is_refused(pair: DrbdPair, copy: Copy) -> None:
    session = await opened(pair, copy)
    await session.primary.postsuspend(1)
    with pytest.raises(StateError, match="no checkpoint"):
        await session.secondary.stop(failover=True)
    copy.close()
    await session.secondary.teardown(Verdict.DISCARD)
    await session.primary.teardown(Verdict.KEEP)
    assert (await pair.state(PRIMARY)).mirrored


async def test_the_janitor_removes_the_device_of_a_copy_that_is_dead(pair: DrbdPair, copy: Copy) -> None:
    assert DRBD.sweep is not None
    session = await opened(pair, copy)
    await checkpoint(session, copy)
    context = SweepContext("contract", [pair.context(SECONDARY, Straight()).device], Verdict.DISCARD)
    copy.close()
    first, second = await DRBD.sweep(context)
    assert first == "removed the device that a copy had in place of DRBD resource beta"
    assert "removed the checkpoints" in second
    assert not is_there(pair)
    assert await DRBD.sweep(context) == []
    await session.primary.teardown(Verdict.KEEP)


async def test_a_session_begins_where_a_dead_agent_left_one(pair: DrbdPair, copy: Copy) -> None:
    session = await opened(pair, copy)
    await checkpoint(session, copy)
    copy.close()
    again = Copy()
    other = await opened(pair, again)
    await checkpoint(other, again)
    again.close()
    await other.secondary.teardown(Verdict.DISCARD)
    await other.primary.teardown(Verdict.KEEP)


async def test_udev_is_told_to_leave_the_device_alone(pair: DrbdPair) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT) as events:
        events.bind((0, 1))
        events.settimeout(10)
        device = CopyDevice(pair.pool.mapper, 1)
        node = device.make(Target(0, 2048, "error"), 2048)
        try:
            named = b"DEVNAME=" + node.name.encode()
            words: list[bytes] = []
            while not {b"ACTION=change", named} <= set(words):
                words = events.recv(4096).split(b"\0")
        finally:
            device.remove()
    [cookie] = [int(word.partition(b"=")[2]) for word in words if word.startswith(b"DM_COOKIE=")]
    flags = run("dmsetup", "udevflags", f"{cookie:#x}")
    assert "DM_UDEV_DISABLE_OTHER_RULES_FLAG='1'" in flags
    assert "DM_UDEV_DISABLE_DISK_RULES_FLAG='1'" in flags


async def test_a_late_cut_does_not_come_between(pair: DrbdPair) -> None:
    device = CopyDevice(pair.pool.mapper, 1)
    path = await asyncio.to_thread(device.make, Target(0, 2048, "error"), 2048)
    try:
        device.fail()
        with pytest.raises(StateError):
            device.show(Target(0, 2048, "error"))
        fd = os.open(path, os.O_RDONLY)
        with pytest.raises(InUse):
            device.remove()
        os.close(fd)
    finally:
        assert device.remove()
    assert not device.remove()
    assert not path.exists()


class SpeculatingBed(Bed):
    """The contract's bed with a copy that runs."""

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        made = super().context(side, peer)
        return made if side is PRIMARY else replace(made, services=Services((SPECULATION, Ahead())))

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        found = [*await super().traces(side)]
        return [*found, NAME] if side is SECONDARY and is_there(self.pair) else found


class Ahead(Copy):
    """A copy that loads every checkpoint that is cut."""

    async def writes(self, device: str) -> int:
        # Asked for when it stands still for a cut: it loads that next. The first cut is no checkpoint's.
        self.loaded = self.parked - 1
        return await super().writes(device)


# The other half's checks, and what else does not depend on the copy, are in test_drbd_contract.
LONG_CHECKS = ("life", "unknown-request", "teardown-twice", "error-told") if LONG else ()


@pytest.mark.parametrize("check", ["failover", *LONG_CHECKS])
async def test_the_contract(made: DrbdPair, check: str) -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[SubkindBed]:
        await made.begin()
        yield SpeculatingBed(made)

    async def broken(bed: SubkindBed) -> None:
        assert isinstance(bed, SpeculatingBed)
        await (await bed.pair.control(SECONDARY)).disconnect()

    ran = await check_subkind(make, broken=broken, epochs=1, faults=2, only={check})
    assert ran == (check,)
