"""A disk of a guest on both hosts of the Xen bed: DRBD, with a thin volume below it on disks that outlive the hosts.

What the guest does with it: a program in its shell writes blocks, each to a place and with a content that it draws from
the clock, so that what it does again after a takeover is never what it did before. It keeps in memory what it wrote,
and says so on one connection, whose other end is outside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.testbeds.xen.guests import GUEST, SHELL_PORT
from tests.testbeds.xen.pair import XenPair, XenPlace

__all__ = ["DEVICE", "DISKS_MIB", "Mirror", "Write", "Writer", "blocks", "expected"]

DEVICE: Final = Path("/dev/drbd0")
DISKS_MIB: Final = (4, 64)  #: of each host: the pool's metadata and data
BLOCK_BYTES: Final = 4096
_VOLUME: Final = Path("/dev/mapper/volume")
_VOLUME_MIB: Final = 16
_BLOCKS: Final = (_VOLUME_MIB - 1) * 256  # DRBD's metadata takes a little of the last MiB
_MIB_SECTORS: Final = 2048
_STEP_S: Final = 90.0

# Nodes are made by hand: there is no udev.
_BELOW: Final = f"""
modprobe -a dm-mod dm-thin-pool
modprobe drbd usermode_helper=/bin/true
dmsetup create pool \
    --table "0 {DISKS_MIB[1] * _MIB_SECTORS} thin-pool /dev/vdc /dev/vdd 128 0 1 skip_block_zeroing"
dmsetup mknodes
test "$1" != first || dmsetup message pool 0 "create_thin 1"
dmsetup create volume --table "0 {_VOLUME_MIB * _MIB_SECTORS} thin /dev/mapper/pool 1"
dmsetup mknodes
cat >/etc/drbd.conf
test "$1" = first || exit 0
# Laid out at once: of blocks that it lays out later a pool may not know any more when its host has died.
dd if=/dev/zero of={_VOLUME} bs=1M count={_VOLUME_MIB} oflag=direct status=none
drbdadm create-md --force r0
"""
# Time limits for hosts that are emulated, and share two processors.
_DRBD: Final = f"""
global {{ usage-count no; }}
common {{
  net {{ protocol C; timeout 30; ping-int 4; ping-timeout 20; connect-int 4; }}
  disk {{ resync-rate 200M; c-plan-ahead 0; }}
}}
resource r0 {{ device minor 0; disk {_VOLUME}; meta-disk internal;
  on alpha {{ address 10.9.0.1:7788; }}
  on beta {{ address 10.9.0.2:7788; }} }}
"""
_WRITER: Final = f"""
n=0
while :; do
    if [ -e /rest ]; then
        echo rests
        while [ -e /rest ]; do sleep 0.1; done
    fi
    n=$((n + 1))
    {{ read -r _; read -r _; read -r _ _ now _; }} </proc/timer_list
    at=$((now / 1000 % {_BLOCKS}))
    echo "$n $now" | dd of=/dev/xvda bs={BLOCK_BYTES} seek=$at conv=sync,notrunc oflag=direct 2>/dev/null ||
        echo "write $n failed"
    echo "$n $at $now" >>/log
    echo "$n $at $now"
done
"""


class Mirror:
    """The disk on both hosts.

    Args:
        pair: The hosts, with disks of `DISKS_MIB`.
    """

    def __init__(self, pair: XenPair) -> None:
        self._pair = pair

    async def make(self, primary: XenPlace) -> None:
        """Make it: the same on both hosts, and `primary` DRBD's primary."""
        places = (self._pair.alpha, self._pair.beta)
        await asyncio.gather(*(self.lay(place, first=True) for place in places))
        await asyncio.gather(*(self.bring_up(place) for place in places))
        await primary.run("sh", "-ec", "until [ $(drbdadm cstate r0) = Connected ]; do sleep 0.2; done")
        await primary.run("sh", "-ec", "drbdadm new-current-uuid --clear-bitmap r0; drbdadm primary r0")
        await self.whole(primary)

    async def lay(self, place: XenPlace, *, first: bool = False) -> None:
        """Lay the thin volume on a host, and DRBD's configuration; DRBD does not use it yet."""
        await place.run("sh", "-ec", _BELOW, "sh", "first" if first else "again", text=_DRBD)

    async def bring_up(self, place: XenPlace) -> None:
        """Bring DRBD up on a host; it looks for the other one."""
        await place.run("drbdadm", "up", "r0")

    async def whole(self, place: XenPlace) -> None:
        """Wait until every write is on both hosts."""
        ready = "until drbdadm dstate r0 | grep -q ^UpToDate/UpToDate; do sleep 0.2; done"
        await place.run("sh", "-ec", ready, timeout_s=_STEP_S)

    async def upper(self, place: XenPlace) -> bytes:
        """Return the guest's disk as DRBD's primary has it."""
        return await self._read(place, DEVICE)

    async def lower(self, place: XenPlace) -> bytes:
        """Return the same from below DRBD; a DRBD that is secondary lets nobody read."""
        return await self._read(place, _VOLUME)

    async def _read(self, place: XenPlace, device: Path) -> bytes:
        copy = place.directory / "copy"
        words = ("dd", f"if={device}", f"of={copy}", "bs=1M", f"count={_VOLUME_MIB - 1}", "iflag=direct")
        await place.run(*words)
        return copy.read_bytes()

    def promoted_at(self, place: XenPlace) -> int:
        """Return the checkpoint that the disk went back to at a host's last takeover, as its agent says."""
        logs = sorted(place.directory.glob("agent-*.log"), key=lambda path: path.stat().st_mtime)
        said = logs[-1].read_text().split("DRBD resource r0 is primary at checkpoint ")[1:]
        return int(said[-1].split()[0])


@dataclass(frozen=True, slots=True)
class Write:
    """A block that the guest has written: its `number`-th, at block `at`, when its clock said `now`."""

    number: int
    at: int
    now: int

    @classmethod
    def of(cls, line: str) -> Self:
        """Read a line of the guest's."""
        return cls(*map(int, line.split()))

    @property
    def content(self) -> str:
        """What the block begins with."""
        return f"{self.number} {self.now}"


class Writer:
    """The guest's program, and the outer end of its connection. An asynchronous context manager.

    Args:
        pair: The network.
    """

    def __init__(self, pair: XenPair) -> None:
        self._pair = pair
        #: What this connection was told of: acknowledged, if the guest is protected.
        self.told: list[Write] = []
        self.ended = ""  #: why the connection is no more, ``""``: it is
        self._rests = 0
        self._came = asyncio.Condition()
        self._listening: asyncio.Task[None] | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        reader, writer = self._streams = await self._connect()
        writer.write(_WRITER.encode())
        self._listening = asyncio.create_task(self._listen(reader))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])
        if self._streams is not None:
            self._streams[1].transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = await asyncio.to_thread(self._pair.client.connect, GUEST, SHELL_PORT, 10.0)
        return await asyncio.open_connection(sock=sock)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        ended = "the guest closed the connection"
        try:
            while line := (await reader.readline()).decode().strip():
                async with self._came:
                    self._hear(line)
                    self._came.notify_all()
        except (OSError, ValueError, TypeError) as error:
            ended = str(error)
        async with self._came:
            self.ended = ended
            self._came.notify_all()

    def _hear(self, line: str) -> None:
        if line == "rests":
            self._rests += 1
            return
        write = Write.of(line)  # or it says that a write failed
        if write.number != len(self.told) + 1:
            raise ValueError(f"{line!r} follows {self.told[-1:]}")
        self.told.append(write)

    async def more(self, count: int, *, timeout_s: float) -> None:
        """Be told of `count` further writes."""
        wanted = len(self.told) + count
        async with asyncio.timeout(timeout_s), self._came:
            await self._came.wait_for(lambda: self.ended or len(self.told) >= wanted)
        assert not self.ended, self.ended

    async def rest(self, *, timeout_s: float) -> list[Write]:
        """Let it write no more, hear all that it has said, and return what the guest's memory says it wrote."""
        rests = self._rests
        async with asyncio.timeout(timeout_s):
            await self.say("touch /rest")
            async with self._came:
                await self._came.wait_for(lambda: self.ended or self._rests > rests)
            assert not self.ended, self.ended
            return [Write.of(line) for line in (await self.say("cat /log")).splitlines()]

    async def go_on(self, *, timeout_s: float) -> None:
        """Let it write on."""
        async with asyncio.timeout(timeout_s):
            await self.say("rm /rest")

    async def say(self, words: str) -> str:
        """Have another shell of the guest do something, and return what it says."""
        reader, writer = await self._connect()
        try:
            writer.write(f"{words}; exit\n".encode())
            return (await reader.read(-1)).decode()
        finally:
            writer.transport.abort()


def blocks(disk: bytes) -> dict[int, str]:
    """Return what is in the blocks of a disk, but for those of zeros."""
    parts = (disk[at : at + BLOCK_BYTES] for at in range(0, len(disk), BLOCK_BYTES))
    return {at: part.rstrip(b"\0").decode().strip() for at, part in enumerate(parts) if part.strip(b"\0")}


def expected(writes: list[Write]) -> Mapping[int, str]:
    """Return what `blocks` of a disk must be with exactly these writes on it."""
    return {write.at: write.content for write in writes}
