"""Two DRBD nodes in one kernel, connected over loopback, with what a test does to them: for the kernel bed.

The node of the primary writes to a loop device, that of the secondary to a thin volume. Their resources have different
names, because both stand in one configuration.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kernel.thinpool import Pool, loop_device, run, thin_pool
from understudy.device import DeviceInfo, Kind, OpenContext, Peer, ProtectedDevice, ReplicationMode
from understudy.testing.subkind_kit import open_context
from understudy_drbd.control import Control
from understudy_drbd.status import PROC, UNCONFIGURED, State, read_proc
from understudy_drbd.subkind import DRBD

BLOCK_BYTES = 4096
SIZE_MIB = 8
BLOCKS = (SIZE_MIB - 1) * 256  # the metadata takes a little of the last MiB

PRIMARY, SECONDARY = ReplicationMode.PRIMARY, ReplicationMode.SECONDARY

CONFIGURATION = """
global {{ usage-count no; }}
common {{
  net {{ protocol C; ping-int 1; ping-timeout 5; timeout 10; connect-int 1; {net} }}
  disk {{ resync-rate 200M; c-plan-ahead 0; }}
}}
resource alpha {{ device minor 0; meta-disk internal;
  on {host} {{ disk {first}; address 127.0.0.1:7001; }}
  on elsewhere {{ disk /dev/null; address 127.0.0.1:7002; }} }}
resource beta {{ device minor 1; meta-disk internal;
  on {host} {{ disk {second}; address 127.0.0.1:7002; }}
  on elsewhere {{ disk /dev/null; address 127.0.0.1:7001; }} }}
"""


@dataclass
class DrbdPair:
    """Both nodes; DRBD's primary is the node of the guest."""

    pool: Pool
    lower: Mapping[ReplicationMode, Path]
    devices: Mapping[ReplicationMode, Path] = field(
        default_factory=lambda: {PRIMARY: Path("/dev/drbd0"), SECONDARY: Path("/dev/drbd1")}
    )

    async def control(self, side: ReplicationMode) -> Control:
        found = await Control.find(self.devices[side])
        assert found is not None
        return found

    async def state(self, side: ReplicationMode) -> State:
        return await (await self.control(side)).state()

    async def begin(self) -> None:
        """Be as at the beginning: mirrored, the guest's node DRBD's primary, nothing but zeros on it."""
        state = await self.state(PRIMARY)
        if not state.mirrored or state.role != "Primary":
            await self.renew()
        run("blkdiscard", "--zeroout", self.devices[PRIMARY])

    async def renew(self) -> None:
        """Make both nodes anew, whatever became of them."""
        down()
        for name in ("alpha", "beta"):
            run("drbdadm", "create-md", "--force", name)
            run("drbdadm", "up", name)
        await (await self.control(PRIMARY)).until("Connected", timeout_s=20)
        run("drbdadm", "new-current-uuid", "--clear-bitmap", "alpha")
        run("drbdadm", "primary", "alpha")
        await self.mirrored()

    async def mirrored(self) -> None:
        """Wait until every write is on both nodes."""
        control = await self.control(PRIMARY)
        async with asyncio.timeout(20):
            while not (await control.state()).mirrored:  # noqa: ASYNC110 - DRBD tells nobody
                await asyncio.sleep(0.05)

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        properties = {"path": str(self.devices[side])}
        device = DeviceInfo(Kind.DISK, "disk0", 0, "sim", properties=properties)
        return open_context(device, side, peer)


@contextmanager
def drbd_pair(directory: Path, *, net: str = "") -> Iterator[DrbdPair]:
    """Make the pair: connected, up to date, the guest's node DRBD's primary."""
    run("modprobe", "drbd", "usermode_helper=/bin/true")
    with ExitStack() as stack:
        pool = stack.enter_context(thin_pool(directory, 4 * SIZE_MIB))
        first = stack.enter_context(loop_device(directory / "alpha", SIZE_MIB))
        second = stack.enter_context(pool.volume("understudy-beta", 2, SIZE_MIB))
        text = CONFIGURATION.format(net=net, host=os.uname().nodename, first=first, second=second)
        Path("/etc/drbd.conf").write_text(text)
        stack.callback(down)
        pair = DrbdPair(pool, {PRIMARY: first, SECONDARY: second})
        asyncio.run(pair.renew())
        yield pair


def down() -> None:
    # A tool whose caller was cancelled may still be at a device.
    until = time.monotonic() + 20
    for minor, name in enumerate(("alpha", "beta")):
        while True:
            said = run("drbdadm", "down", name, check=False)
            if read_proc(PROC.read_text(), minor) == UNCONFIGURED:
                break
            assert time.monotonic() < until, f"drbdadm down {name}: {said}\n{PROC.read_text()}"
            time.sleep(0.1)


class Straight:
    """The way to the other half, in the same process."""

    def __init__(self) -> None:
        self.other: ProtectedDevice | None = None

    async def request(self, method: str, params: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        assert self.other is not None
        async with asyncio.timeout(timeout_s):
            return await self.other.serve(method, params)


@dataclass
class Session:
    """Both halves of the disk, open and started."""

    primary: ProtectedDevice
    secondary: ProtectedDevice
    epoch: int = 0

    @classmethod
    async def open(cls, pair: DrbdPair) -> Session:
        there, back = Straight(), Straight()
        secondary = await DRBD.open(pair.context(SECONDARY, back))
        assert isinstance(secondary, ProtectedDevice), secondary
        there.other = secondary
        primary = await DRBD.open(pair.context(PRIMARY, there))
        assert isinstance(primary, ProtectedDevice), primary
        back.other = primary
        await secondary.start(SECONDARY)
        await primary.start(PRIMARY)
        return cls(primary, secondary)

    async def checkpoint(self, *, commit: bool = True) -> None:
        """Take the checkpoint that ends the next epoch, as an engine does; the guest is stopped meanwhile."""
        self.epoch += 1
        both = (self.primary, self.secondary)
        for step in ("postsuspend", "checkpoint"):
            await asyncio.gather(*(getattr(each, step)(self.epoch) for each in both))
        await self.primary.preresume(self.epoch)
        for each in both:
            await each.error()
        if commit:
            await asyncio.gather(*(each.commit(self.epoch) for each in both))


class Disk:
    """What a guest writes to a device, and what it must hold.

    Args:
        device: The block device.
        chance: Where and what it writes.
    """

    def __init__(self, device: Path, chance: random.Random) -> None:
        self.device = device
        self.chance = chance
        self.expected: dict[int, bytes] = {}

    def write(self, count: int) -> None:
        """Write `count` random blocks; all have ended when this returns."""
        fd = os.open(self.device, os.O_RDWR)
        try:
            for _ in range(count):
                block = self.chance.randrange(BLOCKS)
                self.expected[block] = self.chance.randbytes(16).ljust(BLOCK_BYTES, b"\1")
                os.pwrite(fd, self.expected[block], block * BLOCK_BYTES)
            os.fsync(fd)
        finally:
            os.close(fd)


def differences(device: Path, expected: Mapping[int, bytes]) -> list[int]:
    """Return the blocks of a device that are not as expected; blocks that are not named must be zero."""
    run("blockdev", "--flushbufs", device)
    with device.open("rb") as file:
        data = file.read(BLOCKS * BLOCK_BYTES)
    blocks = (data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES))
    return [
        number for number, block in enumerate(blocks) if block != expected.get(number, bytes(BLOCK_BYTES))
    ]
