"""Our checkpoint loop without agents and without a record: to a stock receiver, or into a blackhole.

The stock receiver answers nothing, so nothing here is acknowledged, and no output is held: it is what ``xl remus`` is,
with this plugin's loop. `understudy protect` is the safe way; this one is for hosts that have only xl on the other
side, and to measure.

Source: tools/xl/xl_migrate.c (main_remus, create_migration_child, the banner) of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from understudy.device import no_progress
from understudy.errors import GuestNotFound, HypervisorError
from understudy_xen import inventory, toolstack
from understudy_xen.devicemodel import DeviceModel
from understudy_xen.libs import DomainType, Stream, open_xen, save
from understudy_xen.live import SUSPEND_S, LiveGuest
from understudy_xen.loop import RemusLoop, Taken
from understudy_xen.outlet import Blackhole, Outlet, ProgramOutlet
from understudy_xen.primary import stream_head
from understudy_xen.xenstore import XenStore

__all__ = ["BANNER", "RemusFigures", "run_remus"]

#: What a stock receiver says first. Source: tools/xl/xl_migrate.c (migrate_receiver_banner).
BANNER: Final = b"xl migration receiver ready, send binary domain data.\n"
_BANNER_S: Final = 60.0  # ssh may ask for a key first
_JOIN_S: Final = SUSPEND_S + 10.0


@dataclass(frozen=True, slots=True)
class RemusFigures:
    """One checkpoint, milliseconds."""

    checkpoint: int
    suspend_ms: float  #: from the request until the guest was seen suspended
    pause_ms: float  #: from then until it ran again
    written_ms: float  #: until all of it was handed to the receiver
    cycle_ms: float  #: since the checkpoint before


class _NoDevices:
    # Nothing is held and nothing is replicated: there are no phases.

    async def postsuspend(self, epoch: int) -> None:
        pass

    async def checkpoint(self, epoch: int) -> None:
        pass

    async def preresume(self, epoch: int) -> None:
        pass

    async def postresume(self, epoch: int) -> None:
        pass


async def run_remus(
    name: str,
    *,
    command: list[str] | None,
    interval_ms: float,
    count: int,
    tell: Callable[[RemusFigures], None],
) -> None:
    """Checkpoint a running guest until cancelled.

    Args:
        name: Of the guest's domain.
        command: The receiver; ``None`` for a blackhole.
        interval_ms: How long the guest runs between two checkpoints, counted from the end of one, as with xl.
        count: How many checkpoints after the first copy, 0 = without end.
        tell: Told of each.

    Raises:
        GuestNotFound: There is no such domain.
        HypervisorError: The receiver is gone, or the guest cannot be saved.

    Guarantees:
        The guest runs on afterwards, also on failure and on cancellation.
    """
    with open_xen() as xen:
        async with await XenStore.open() as store:
            domain = await inventory.find(store, xen, name)
        if domain is None:
            raise GuestNotFound(f"there is no domain {name} on this host")
        head = stream_head(await toolstack.configuration(domain.domid))
        model = DeviceModel(domain.domid) if domain.kind is DomainType.HVM else None
        live = LiveGuest(xen, domain.domid, model)
        outlet: Outlet | None = None
        loop: RemusLoop | None = None
        try:
            outlet = await asyncio.to_thread(_outlet, command)
            await asyncio.to_thread(outlet.write, head)
            saving = partial(save, xen, domain.domid, stream=Stream.REMUS)
            loop = RemusLoop(live, outlet, saving, total_pages=domain.info.pages)
            await loop.copy(_nothing, no_progress)
            await _checkpoints(loop, interval_ms, count, tell)
            await loop.end()
        finally:
            await asyncio.shield(_end(loop, live, outlet))


async def _checkpoints(
    loop: RemusLoop, interval_ms: float, count: int, tell: Callable[[RemusFigures], None]
) -> None:
    number, before_ns = 0, time.monotonic_ns()
    while not count or number < count:
        await asyncio.sleep(interval_ms / 1000)
        number += 1
        taken = await loop.take(number, _NoDevices())
        tell(_figures(number, taken, before_ns))
        before_ns = taken.acknowledged_ns


def _figures(number: int, taken: Taken, before_ns: int) -> RemusFigures:
    return RemusFigures(
        checkpoint=number,
        suspend_ms=(taken.stopped_ns - taken.asked_ns) / 1e6,
        pause_ms=(taken.resumed_ns - taken.stopped_ns) / 1e6,
        written_ms=(taken.acknowledged_ns - taken.resumed_ns) / 1e6,
        cycle_ms=(taken.acknowledged_ns - before_ns) / 1e6,
    )


def _outlet(command: list[str] | None) -> Outlet:
    if command is None:
        return Blackhole()
    outlet = ProgramOutlet(command)
    try:
        said = outlet.read_exactly(len(BANNER), _BANNER_S)
        if said != BANNER:
            raise HypervisorError(f"{command[0]!r} is no receiver of xl: it said {said!r}")
    except BaseException:
        outlet.cut("no receiver")
        outlet.close()
        raise
    return outlet


async def _end(loop: RemusLoop | None, live: LiveGuest, outlet: Outlet | None) -> None:
    try:
        if loop is not None:
            await loop.end()
            if not loop.ended.is_set() and not loop.resting:
                loop.cut("ended")
            await loop.join(_JOIN_S)
        await asyncio.to_thread(live.bring_back, SUSPEND_S)
    finally:
        live.close()
        if outlet is not None:
            await asyncio.to_thread(outlet.close)


async def _nothing() -> None:
    pass
