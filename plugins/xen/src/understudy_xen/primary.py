"""The guest on the primary's host for the length of one session: copied, checkpointed, and let go again.

The stream is made by libxc, in a thread (loop.py); each checkpoint suspends the guest through its own drivers, and lets
it run on before the rest of the stream is written. What it sends meanwhile belongs to the next epoch, and what it sent
before is released only when the secondary's agent has said that it holds the checkpoint whole.

Source: tools/libs/light/libxl_dom_save.c, libxl_remus.c of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from understudy.device import Gate, Mode, Progress, ReplicationMode
from understudy.errors import HypervisorError
from understudy.group import DeviceGroup
from understudy.hypervisor import DomainEvent, Phases, PrimaryDomain
from understudy.report import Checkpoint
from understudy.services import GUEST_PAUSE, Channels, Services
from understudy_xen.devicemodel import DeviceModel
from understudy_xen.libs import Stream, Way, Xen, save
from understudy_xen.live import SUSPEND_S, LiveGuest
from understudy_xen.loop import RemusLoop
from understudy_xen.outlet import LinkOutlet, Outlet
from understudy_xen.pauses import PauseNotes, Pauses
from understudy_xen.streams.formats import LibxlType
from understudy_xen.streams.writer import joined, libxl_header, preamble, record
from understudy_xen.watching import DomainWatch

__all__ = ["CHANNEL", "GATES", "PrimaryParts", "XenPrimary", "stream_head"]

_log = logging.getLogger(__name__)

CHANNEL: Final = "xen-stream"  #: name of the stream between the two hosts

#: At which phases a guest really waits for its devices, by mode.
GATES: Mapping[Mode, frozenset[Gate]] = {Mode.REMUS: frozenset({Gate.POSTSUSPEND, Gate.PRERESUME})}

_CONNECT_S: Final = 10.0
_LET_GO_S: Final = 60.0
_RETURN_S: Final = SUSPEND_S + 10.0  # for libxc to let go of the guest after the stream was cut


@dataclass(frozen=True, slots=True)
class PrimaryParts:
    """What a session on the primary is made of.

    `config` returns the domain's configuration, libxl's JSON; `let_go` takes its interfaces off the network, then
    destroys it and sees it gone, in this order; `pauses` outlives the agent; `may_suspend` is told that the guest may
    suspend yet, and is not waited for.
    """

    xen: Xen
    domid: int
    pages: int  #: of the guest
    model: DeviceModel | None
    way: Way | None  #: how the guest is asked to suspend; ``None``: the best that it offers
    compress: bool
    config: Callable[[], Awaitable[bytes]]
    let_go: Callable[[], Awaitable[None]]
    pauses: PauseNotes
    may_suspend: Callable[[], None]


def stream_head(config: bytes) -> bytes:
    """Return what comes before libxc's records: xl's preamble with the configuration, and libxl's first records."""
    return preamble(config) + libxl_header() + joined(record(LibxlType.LIBXC_CONTEXT))


class XenPrimary(PrimaryDomain):
    """A running domain under protection.

    Args:
        parts: What it is made of.
        watch: Tells what happens to the domain; begun already.
    """

    def __init__(self, parts: PrimaryParts, watch: DomainWatch) -> None:
        self._parts = parts
        self._watch = watch
        self._outlet: Outlet | None = None
        self._live: LiveGuest | None = None
        self._loop: RemusLoop | None = None
        self._pauses = Pauses(parts.xen, parts.domid, parts.pauses)
        self._services = Services((GUEST_PAUSE, self._pauses))

    @property
    def gates(self) -> frozenset[Gate]:
        """The phases at which the guest waits."""
        return GATES[Mode.REMUS]

    @property
    def services(self) -> Services:
        """The pause: the guest runs on before its checkpoint is acknowledged."""
        return self._services

    # --- Into protection and the cycle -------------------------------------------------------------------------------

    async def replicate(self, group: DeviceGroup, channels: Channels, progress: Progress) -> None:
        """Copy the running guest's memory and begin the checkpoints.

        Raises:
            HypervisorError: The copy failed.

        Guarantees:
            As the contract: after a failure or cancellation the guest runs here again, confirmed.
        """
        parts = self._parts
        try:
            config = await parts.config()
            sock = await channels.connect(CHANNEL, timeout_s=_CONNECT_S)
            outlet = self._outlet = LinkOutlet(sock, compress=parts.compress)
            await asyncio.to_thread(outlet.write, stream_head(config))
            self._loop = await self._begin(outlet)
            await self._loop.copy(partial(group.start_all, ReplicationMode.PRIMARY), progress)
        except BaseException:
            # Nobody asks again: it is waited for as long as a start of devices, which is cancelled, may take to end.
            await whole(self._run_again(_LET_GO_S))
            raise

    async def _begin(self, outlet: Outlet) -> RemusLoop:
        parts = self._parts
        live = self._live = await LiveGuest.open(parts.xen, parts.domid, parts.model, way=parts.way)
        _log.info("domain %d is asked to suspend by %s", parts.domid, live.way.value)
        saving = partial(save, parts.xen, parts.domid, stream=Stream.REMUS)
        return RemusLoop(live, outlet, saving, total_pages=parts.pages, intact=self._watch.intact)

    async def checkpoint(self, epoch: int, phases: Phases) -> Checkpoint:
        """Make the next checkpoint and see it acknowledged.

        Raises:
            HypervisorError: Nothing was acknowledged: the stream is broken, the secondary refused, the deadline
                passed, or the guest did not suspend.
        """
        if self._loop is None:
            raise HypervisorError("no checkpoint can be taken: the first copy has not been made")
        taken = await self._loop.take(epoch, phases)
        await phases.checkpoint(epoch)
        return Checkpoint(
            epoch=epoch,
            stopped_ns=taken.stopped_ns,
            resumed_ns=taken.resumed_ns,
            acknowledged_ns=taken.acknowledged_ns,
            gated=True,
            transferred_bytes=taken.ack.stream_bytes,
            dirty_pages=taken.ack.pages,
            parts_ns=taken.parts_ns,
        )

    # --- Out of protection -------------------------------------------------------------------------------------------

    async def sever(self, reason: str) -> None:
        """Cut the stream at once; nothing counts as acknowledged any more, whatever is still on its way."""
        self._cut(reason)

    def _cut(self, reason: str) -> None:
        if self._loop is not None:
            self._loop.cut(reason)
        elif self._outlet is not None:
            self._outlet.cut(reason)

    async def resume_alone(self, group: DeviceGroup) -> None:
        """Leave replication and run without the secondary; see the contract.

        Raises:
            ExceptionGroup: A device could not be stopped; the guest runs all the same.
            HypervisorError: The guest does not run.
        """
        failed: Exception | None = None
        try:
            await group.stop_all(failover=True)
        except Exception as error:  # noqa: BLE001 - told below; a device's failure must not stop the guest
            failed = error
        await self._run_again()
        if failed is not None:
            raise failed

    async def _run_again(self, return_s: float = _RETURN_S) -> None:
        self._cut("going on alone")
        if self._loop is not None:
            await self._loop.join(return_s)
        if self._live is not None:
            await asyncio.to_thread(self._live.bring_back, SUSPEND_S)
            if self._live.late:
                self._parts.may_suspend()
        await self._pauses.end()
        info = self._parts.xen.domain(self._parts.domid)
        if info is None or info.dying:
            raise HypervisorError(f"domain {self._parts.domid} is gone")

    async def freeze(self) -> None:
        """Pause the domain: it is fenced. Its output stays held."""
        self._cut("the guest is fenced")
        await self._pauses.freeze()

    async def retire(self) -> None:
        """Leave replication with a domain that has shut down; it stays, dead, with its interfaces on their bridges.

        So what its gates hold can still leave.

        Raises:
            HypervisorError: libxc does not let go of it.
        """
        self._cut("the guest has shut down")
        if self._loop is not None:
            await self._loop.join(_RETURN_S)

    async def discard(self) -> None:
        """Take its interfaces off the network, then destroy the domain and see it gone."""
        self._cut("the guest is discarded")
        await self._parts.let_go()

    def watch(self) -> AsyncIterator[DomainEvent]:
        """Yield what happens unasked, until `close`."""
        return self._watch.events()

    async def close(self) -> None:
        """Let go of this session's handles; the guest stays as it is. Idempotent.

        Guarantees:
            What libxc's thread still uses stays open until it has come back; nobody waits for that any longer.
        """
        self._cut("closed")
        await self._watch.close()
        if self._loop is not None:
            with suppress(HypervisorError):
                await self._loop.join(_RETURN_S)
            if self._loop.busy:
                later = asyncio.get_running_loop().create_task(self._close_later(self._loop))
                _closing.add(later)
                later.add_done_callback(_closing.discard)
                return
        await self._close_stream()

    async def _close_later(self, loop: RemusLoop) -> None:
        await loop.ended.wait()
        await self._close_stream()

    async def _close_stream(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.close()
        outlet, self._outlet = self._outlet, None
        if outlet is not None:
            await asyncio.to_thread(outlet.close)


_closing: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks only weakly


async def whole(work: Coroutine[Any, Any, None]) -> None:
    """Bring `work` to its end whatever happens to the caller; what fails is logged: the first cause is on its way."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.error("after a failed start of replication: %s", error)
