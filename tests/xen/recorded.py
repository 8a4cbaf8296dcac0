"""A checkpoint stream of a real guest, made by our own primary's side, and where it may be cut.

What the guest's memory was at each checkpoint is known from the stream itself: its pages, put together.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Final

from tests.testbeds.xen.guests import LIFE_CYCLE, tiny
from tests.xen.memory import read_pages
from understudy.device import no_progress
from understudy_xen import inventory, toolstack
from understudy_xen.devicemodel import DeviceModel
from understudy_xen.libs import Stream, Way, open_xen, save
from understudy_xen.live import LiveGuest
from understudy_xen.loop import RemusLoop
from understudy_xen.outlet import Outlet
from understudy_xen.primary import stream_head
from understudy_xen.streams.formats import RECORD_HEADER_BYTES, Layer, LibxcType
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.frames import Frame
from understudy_xen.streams.pages import PageData
from understudy_xen.streams.reader import read_record
from understudy_xen.wire import Ack
from understudy_xen.xenstore import XenStore

__all__ = ["BIOS", "CHECKPOINTS", "NAME", "RAM_PAGES", "TINY", "Counting", "Point", "Recorded", "record"]

NAME: Final = "tiny"
RAM_PAGES: Final = 0x400  # 4 MiB; above lie pages that libxl itself writes to when it makes the domain
CHECKPOINTS: Final = 4
_CREATE_S: Final = 60.0
_COPY_S: Final = 120.0
_PAIR_BYTES: Final = 8  # head of a PAGE_DATA: of how many pages, and a reserved field
_ENTRY_BYTES: Final = 8
_COUNTS_S: Final = 0.1  # for the guest to count on: a tick of the timer takes 55 ms

Memory = Mapping[int, bytes]


@dataclass(frozen=True)
class Counting:
    """A guest without any driver, and where in its memory it counts.

    Args:
        config: for xl.
        pfn: of the page with its counter.
        at: where in that page, 4 bytes.
        emulated: whether it has a device model.
    """

    config: str
    pfn: int
    at: int
    emulated: bool

    def count(self, memory: Memory) -> int:
        """Return how far it has counted."""
        return int.from_bytes(memory[self.pfn][self.at : self.at + 4], "little")


TINY: Final = Counting(tiny(NAME, preserve=True), 0x200, 0, emulated=False)
#: SeaBIOS that finds nothing to boot, and counts the timer's ticks in its data area. One of 32 MiB xl itself can save,
#: but not restore: "Failed to populate physmap".
BIOS: Final = Counting(
    f'name="{NAME}"\ntype="hvm"\nmemory=64\nvga="none"\nvnc=0\nsdl=0\nusb=0\ntsc_mode="native"\n'
    + "".join(f'{event}="preserve"\n' for event in LIFE_CYCLE),
    0,
    0x46C,
    emulated=True,
)


@dataclass(frozen=True)
class Point:
    """A place in a stream, by the record in which it lies.

    Args:
        checkpoint: 0 is the first copy, with all headers.
        name: of the record, the first one of this name.
        place: ``start``; ``header`` (4 bytes in); ``body`` (its first byte); ``middle``; ``last`` (one byte before its
            end); ``end``.
    """

    checkpoint: int
    name: str
    place: str

    def __str__(self) -> str:
        return f"{self.checkpoint}-{self.name}-{self.place}"


@dataclass(frozen=True, eq=False)
class Recorded:
    """A stream from its preamble on, which ends with a whole checkpoint."""

    guest: Counting
    stream: bytes
    frames: Sequence[Frame]

    @classmethod
    def of(cls, guest: Counting, stream: bytes) -> Recorded:
        """Find the records."""
        framer = Framer()
        frames = framer.feed(stream)
        framer.finish()
        return cls(guest, stream, tuple(frames))

    @property
    def ends(self) -> list[int]:
        """Offsets one past each whole checkpoint; the first is the first copy's."""
        return [frame.end for frame in self.frames if frame.ends_checkpoint]

    def whole(self, cut: int) -> int:
        """Return how many checkpoints are whole in so many bytes, the first copy counted."""
        return sum(end <= cut for end in self.ends)

    def of_checkpoint(self, number: int) -> list[Frame]:
        """Return the records of one checkpoint, those of both layers."""
        bounds = [0, *self.ends]
        return [frame for frame in self.frames if bounds[number] < frame.end <= bounds[number + 1]]

    def offset(self, point: Point) -> int:
        """Return where a point is."""
        frame = next(frame for frame in self.of_checkpoint(point.checkpoint) if frame.name == point.name)
        return {
            "start": frame.start,
            "header": frame.start + 4,
            "body": frame.start + RECORD_HEADER_BYTES,
            "middle": frame.start + (frame.end - frame.start) // 2,
            "last": frame.end - 1,
            "end": frame.end,
        }[point.place]

    @cached_property
    def _memories(self) -> Sequence[Memory]:
        pages: dict[int, bytes] = {}
        memories: list[Memory] = []
        for frame in self.frames:
            if frame.ends_checkpoint:
                memories.append(dict(pages))
            if frame.layer is not Layer.LIBXC or frame.type != LibxcType.PAGE_DATA:
                continue
            body = memoryview(self.stream)[frame.start + RECORD_HEADER_BYTES :][: frame.length]
            if frame.length == _PAIR_BYTES + _ENTRY_BYTES * int.from_bytes(body[:4], "little"):
                continue  # a first copy names a million pages that are not there
            data = read_record(frame.layer, frame.type, body, "little")
            assert isinstance(data, PageData)
            pages |= {
                page.pfn: bytes(page.contents)
                for page in data.pages()
                if page.contents and page.pfn < RAM_PAGES
            }
        return memories

    def memory(self, number: int) -> Memory:
        """Return the guest's memory at a checkpoint: its RAM's pages by number."""
        return self._memories[number]

    def count(self, number: int) -> int:
        """Return how far the guest had counted at a checkpoint."""
        return self.guest.count(self.memory(number))


class _File(Outlet):
    # Everything is acknowledged that is written: who asks then is not the guest.

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb", buffering=0)

    @property
    def fd(self) -> int:
        return self._file.fileno()

    def acknowledged(self, count: int, timeout_s: float) -> Ack:
        return Ack(count, 0, 0)

    def close(self) -> None:
        self._file.close()


class _NoDevices:
    async def postsuspend(self, epoch: int) -> None:
        pass

    async def checkpoint(self, epoch: int) -> None:
        pass

    async def preresume(self, epoch: int) -> None:
        pass

    async def postresume(self, epoch: int) -> None:
        pass


def record(path: Path, guest: Counting) -> Recorded:
    """Start the guest, save it into a file for so many checkpoints, and destroy it."""
    config = path.with_suffix(".cfg")
    config.write_text(guest.config)
    asyncio.run(_record(path, config, guest))
    # libxc and libxl each end a stream that ends in peace; a host that dies does not.
    framer = Framer()
    stream = path.read_bytes()
    framer.feed(stream)
    path.unlink()
    return Recorded.of(guest, stream[: framer.checkpoint_end])


async def _record(path: Path, config: Path, guest: Counting) -> None:
    create = ["xl", "create", "-q", "-e", "-p", str(config)]
    await asyncio.to_thread(
        partial(subprocess.run, create, check=True, timeout=_CREATE_S, stdout=subprocess.DEVNULL)
    )
    with open_xen() as xen:
        async with await XenStore.open(deadline_s=_CREATE_S) as store:
            domain = await inventory.find(store, xen, NAME)
        assert domain is not None
        try:
            head = stream_head(await toolstack.configuration(domain.domid))
            outlet = _File(path)
            # It has no driver that could be asked to suspend.
            model = DeviceModel(domain.domid) if guest.emulated else None
            live = await LiveGuest.open(xen, domain.domid, model, way=Way.OUTSIDE)
            try:
                outlet.write(head)
                loop = RemusLoop(live, outlet, partial(save, xen, domain.domid, stream=Stream.REMUS))
                xen.unpause(domain.domid)  # it needs all of a processor
                async with asyncio.timeout(_COPY_S):
                    await asyncio.to_thread(_counts, guest, domain.domid)
                    await loop.copy(_nothing, no_progress)
                    for number in range(1, CHECKPOINTS + 1):
                        await asyncio.sleep(_COUNTS_S)
                        await loop.take(number, _NoDevices())
                await loop.end()
                await loop.join(_COPY_S)
            finally:
                live.close()
                outlet.close()
        finally:
            await toolstack.destroy(xen, domain.domid)


def _counts(guest: Counting, domid: int) -> None:
    # A firmware that is still making its tables could not be taken over; nobody protects one.
    deadline = time.monotonic() + _COPY_S
    while not guest.count(read_pages(domid, [guest.pfn])):
        assert time.monotonic() < deadline, "the guest does not count"
        time.sleep(_COUNTS_S)


async def _nothing() -> None:
    pass
