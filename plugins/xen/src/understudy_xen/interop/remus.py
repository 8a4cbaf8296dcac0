"""Our checkpoint loop without agents and without a record: to a stock receiver, or into a blackhole.

The stock receiver answers nothing, so nothing here is acknowledged, and no output is held: it is what ``xl remus`` is,
with this plugin's loop. `understudy protect` is the safe way; this one is for hosts that have only xl on the other
side, and to measure.

One thing is better than with xl: the end of a stream is a stock receiver's takeover, also when the sender was merely
interrupted and the guest runs on, then twice. Here the receiver is told to drop its copy where that is possible.

Source: tools/xl/xl_migrate.c (main_remus, create_migration_child, the banner) of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final

from understudy.device import no_progress
from understudy.errors import GuestNotFound, HypervisorError
from understudy_xen import inventory, toolstack
from understudy_xen.claim import claimed
from understudy_xen.devicemodel import DeviceModel
from understudy_xen.interop.ending import BACK_S, Outcome, standing, whole
from understudy_xen.libs import DomainType, Stream, SuspendFailed, Xen, open_xen, save_claimed
from understudy_xen.live import LiveGuest
from understudy_xen.loop import RemusLoop, Taken
from understudy_xen.outlet import Blackhole, Outlet, ProgramOutlet
from understudy_xen.primary import stream_head
from understudy_xen.savers import Savers
from understudy_xen.streams.writer import abandonment
from understudy_xen.xenstore import XenStore

__all__ = ["BANNER", "Fate", "RemusFigures", "run_remus"]

#: What a stock receiver says first. Source: tools/xl/xl_migrate.c (migrate_receiver_banner).
BANNER: Final = b"xl migration receiver ready, send binary domain data.\n"
_BANNER_S: Final = 60.0  # ssh may ask for a key first
_JOIN_S: Final = BACK_S  # a device model that does not answer may have libxc wait for most of it
_LAST_S: Final = 60.0  # for the checkpoint that is under way when the command is interrupted
_RECEIVER_S: Final = (
    60.0  # for the receiver's takeover, or the end of its copy; a hotplug script alone may take 40 s
)


class Fate(Enum):
    """What became of the receiver's copy."""

    NONE = "there is no copy"
    DROPPED = "the receiver has dropped its copy"
    TAKES_OVER = "the guest is gone here: the receiver goes on with its last whole checkpoint"
    UNKNOWN = "the receiver may have taken over with its copy: see that the guest does not run on both hosts"


@dataclass(frozen=True, slots=True)
class RemusFigures:
    """One checkpoint, milliseconds."""

    checkpoint: int
    suspend_ms: float  #: from the request until the guest was seen suspended
    pause_ms: float  #: from then until it ran again
    written_ms: float  #: until all of it was handed to the receiver
    cycle_ms: float  #: since the checkpoint before


async def run_remus(
    name: str,
    *,
    command: list[str] | None,
    interval_ms: float,
    count: int,
    tell: Callable[[RemusFigures], None] | None,
    outcome: Outcome,
) -> None:
    """Checkpoint a running guest until cancelled.

    Args:
        name: Of the guest's domain.
        command: The receiver; ``None`` for a blackhole.
        interval_ms: How long the guest runs between two checkpoints, counted from the end of one, as with xl.
        count: How many checkpoints after the first copy, 0 = without end.
        tell: Told of each; ``None``: nobody is.
        outcome: Kept true; at the end it says what became of the copy, too, and is good if there is none any more.

    Raises:
        GuestNotFound: There is no such domain.
        ClaimTaken: It is being protected or saved already; nothing was done.
        HypervisorError: The receiver is gone, or the guest cannot be saved, or is gone itself.

    Guarantees:
        The guest, where it still is, runs on afterwards, also on failure and on cancellation. A checkpoint that was
        begun is brought to its end before that, if it can be.
    """
    with open_xen() as xen:
        async with await XenStore.open() as store:
            domain = await inventory.find(store, xen, name)
        if domain is None:
            raise GuestNotFound(f"there is no domain {name} on this host")
        head = stream_head(await toolstack.configuration(domain.domid))
        model = DeviceModel(domain.domid) if domain.kind is DomainType.HVM else None
        with claimed(domain.domid):
            sender = _Sender(xen, await LiveGuest.open(xen, domain.domid, model, has_claim=True))
            try:
                await sender.begin(command, head, domain.info.pages)
                await sender.checkpoints(interval_ms, count, tell)
            finally:
                await whole(sender.end(name, outcome))


class _Sender:
    # What there is to be ended, as far as it has come.

    def __init__(self, xen: Xen, live: LiveGuest) -> None:
        self._xen = xen
        self._live = live
        self._outlet: Outlet | None = None
        self._loop: RemusLoop | None = None
        self._savers = Savers(live.domid, lambda _: None)

    def _intact(self) -> None:
        if found := self._savers.look():
            raise HypervisorError(found)

    async def begin(self, command: list[str] | None, head: bytes, pages: int) -> None:
        outlet = self._outlet = Blackhole() if command is None else ProgramOutlet(command)
        if isinstance(outlet, ProgramOutlet):
            await _greeted(outlet)
        await asyncio.to_thread(outlet.write, head)
        saving = partial(save_claimed, self._xen, self._live.domid, stream=Stream.REMUS)
        self._loop = RemusLoop(self._live, outlet, saving, total_pages=pages, intact=self._intact)
        await self._loop.copy(None, no_progress)

    async def checkpoints(
        self, interval_ms: float, count: int, tell: Callable[[RemusFigures], None] | None
    ) -> None:
        loop = self._loop
        assert loop is not None  # noqa: S101 - `begin` came before
        interval_s = interval_ms / 1000
        # The first copy counts as a checkpoint: the guest runs for an interval after it, too.
        await asyncio.sleep(interval_s)
        pacing = loop.run(interval_s, count, None if tell is None else _Teller(tell).tell)
        late: list[asyncio.TimerHandle] = []

        def leave() -> None:
            # Only between two checkpoints can the receiver be told anything. One that does not read any more would
            # keep the guest suspended.
            loop.rest()
            if not late:
                why = f"the receiver has not taken the last checkpoint within {_LAST_S:g} s"
                late.append(asyncio.get_running_loop().call_later(_LAST_S, loop.cut, why))

        try:
            await whole(pacing, cancelled=leave)
        finally:
            for timer in late:
                timer.cancel()

    async def end(self, name: str, outcome: Outcome) -> None:
        outcome.said = f"{name} may be suspended; {Fate.UNKNOWN.value}"
        try:
            if self._loop is not None:
                at_rest = self._loop.resting
                await self._loop.end()
                if not at_rest and not self._loop.ended.is_set():
                    self._loop.cut("ended")
                await self._loop.join(_JOIN_S)
            await asyncio.to_thread(self._live.bring_back, BACK_S)
            outcome.said = f"{name} {standing(self._xen, self._live)}; {Fate.UNKNOWN.value}"
            fate = await asyncio.to_thread(self._part)
            outcome.said = f"{name} {standing(self._xen, self._live)}; {fate.value}"
            outcome.good = fate in {Fate.NONE, Fate.DROPPED}
        finally:
            self._live.close()
            self._savers.close()
            if self._outlet is not None:
                await asyncio.to_thread(self._outlet.close)

    def _part(self) -> Fate:
        outlet, loop = self._outlet, self._loop
        if loop is None or not isinstance(outlet, ProgramOutlet):
            return Fate.NONE
        if outlet.reason:
            return Fate.UNKNOWN
        info = self._xen.domain(self._live.domid)
        if info is None or info.dying or info.shutdown is not None:
            outlet.finish(_RECEIVER_S)
            return Fate.TAKES_OVER
        # A guest that did not suspend: libxc has written nothing since the checkpoint before.
        if loop.failure is None or isinstance(loop.failure, SuspendFailed):
            with suppress(HypervisorError):
                outlet.write(abandonment())
                if outlet.finish(_RECEIVER_S):
                    return Fate.DROPPED
        return Fate.UNKNOWN


class _Teller:
    # Tells of each checkpoint in milliseconds.

    def __init__(self, tell: Callable[[RemusFigures], None]) -> None:
        self._tell = tell
        self._number = 0
        self._before_ns = time.monotonic_ns()

    def tell(self, taken: Taken) -> None:
        self._number += 1
        self._tell(
            RemusFigures(
                checkpoint=self._number,
                suspend_ms=(taken.stopped_ns - taken.asked_ns) / 1e6,
                pause_ms=(taken.resumed_ns - taken.stopped_ns) / 1e6,
                written_ms=(taken.acknowledged_ns - taken.resumed_ns) / 1e6,
                cycle_ms=(taken.acknowledged_ns - self._before_ns) / 1e6,
            )
        )
        self._before_ns = taken.acknowledged_ns


async def _greeted(program: ProgramOutlet) -> None:
    greeting = asyncio.ensure_future(asyncio.to_thread(_need_banner, program))
    try:
        await asyncio.shield(greeting)
    except asyncio.CancelledError:
        program.cut("interrupted")  # ssh may wait for a person
        await asyncio.wait({greeting})
        raise


def _need_banner(program: ProgramOutlet) -> None:
    try:
        said = program.read_exactly(len(BANNER), _BANNER_S)
        if said != BANNER:
            raise HypervisorError(f"{program.command[0]!r} is no receiver of xl: it said {said!r}")
    except BaseException:
        program.cut("no receiver")
        raise
