"""One gate: closed, a barrier at the end of every epoch, one release for every barrier, and nothing else ever leaves.

A plug qdisc counts packets, and believes what it is told. What that leaves open is closed here:

* It remembers one barrier: a second one before the release of the first would make it forget how much the first held.
  Here barriers and releases alternate; an epoch whose predecessor was not released joins it.
* It keeps its counters when its interface is brought down and loses the packets; the next release would let as many
  packets of a later epoch out. Here every change by somebody else (`Wire`) makes the gate *lost*: nothing is released
  any more, and a plug with fresh counters takes its place. What was held is lost as on a busy network.
* Its counters are changed without a lock. Here it is told to release only when what was released before has left.
* It drops what exceeds its limit. Here that is counted, and told.

Every answer of the kernel counts what has left so far. It must never be more than what was released: if it is, the gate
cannot be trusted and `check` says so.

Source: Linux net/sched/sch_plug.c (plug_change, plug_dequeue); Cully et al., Remus (NSDI 2008), section 4.4.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from understudy.device import Verdict
from understudy.errors import HypervisorError
from understudy.threads import TimedThreads
from understudy_netbuffer import installation
from understudy_netbuffer.installation import Claim, Installed
from understudy_netbuffer.rtnetlink import (
    INGRESS,
    INGRESS_HANDLE,
    RTM_DELACTION,
    RTM_DELLINK,
    RTM_DELTFILTER,
    RTM_NEWACTION,
    RTM_NEWLINK,
    RTM_NEWTFILTER,
    Action,
    Event,
    KernelRefused,
    Stats,
    change_message,
    fresh_message,
    read_message,
)
from understudy_netbuffer.wire import Wire, wire_of

__all__ = ["Gate", "in_thread"]

T = TypeVar("T")

log = logging.getLogger(__name__)

_DEADLINE_S: Final = 10.0  # for one piece of work in the thread; pyroute2 alone takes seconds on a slow host
_LIBRARY: Final = "pyroute2"
_IMPORT_S: Final = 30.0
_EMPTY_S: Final = 2.0  # for what was released to leave
_POLL_S: Final = 0.001
_TRIES: Final = 3
_threads = TimedThreads("netbuffer")


class Gate:
    """The gate of one interface.

    Args:
        installed: What stands in the kernel.
        limit_bytes: How much it may hold.
        wire: The guest's way to the kernel.

    Make one with `open`.
    """

    def __init__(self, installed: Installed, limit_bytes: int, wire: Wire) -> None:
        self.claim = installed.claim
        self.failure: Exception | None = None  #: why it is no gate any more
        self.lost_count = 0  #: how often it was lost and made anew
        self.dropped_packets = 0  #: packets that exceeded the limit since it was opened
        self.held_packets = 0  #: that the last barrier put behind itself
        self.held_bytes = 0
        self._limit_bytes = limit_bytes
        self._wire = wire
        self._closed = False  # it is to hold
        self._armed = False  # it holds: what leaves without a release is a breach
        self._dropped_before = 0  # by plugs that are no more
        self._lost = False
        self._touched = False  # by somebody else, since it was made anew
        self._mending: asyncio.Task[None] | None = None
        self._ending = False
        self._parting = False  # a barrier was put whose answer nobody has looked at
        self._draining = False  # what was released before is still on its way out
        self._emptied = False  # it was, and has left since
        self._stand(installed)

    @classmethod
    async def open(cls, claim: Claim, limit_bytes: int) -> Gate:
        """Make a gate that lets everything pass; the guest runs behind it.

        Raises:
            HypervisorError: It cannot be made; nothing of it is left.
        """
        gate = None
        try:
            installed = await in_thread(installation.install, claim, limit_bytes)
            gate = cls(installed, limit_bytes, wire_of(claim.guest, claim.session))
            gate._wire.join(gate)
            # What others changed before this moment is seen by looking, what they change from here on is heard.
            if problem := await in_thread(installation.right, installed):
                raise HypervisorError(f"the gate of {claim.interface} is not what was made: {problem}")
        except BaseException:
            if gate is not None:
                gate._wire.leave(gate)
            # The thread cannot be called back, but it has ended: what it made is taken away.
            with suppress(HypervisorError):
                await _ended(in_thread(installation.remove, claim, Verdict.KEEP))
            raise
        return gate

    @property
    def interfaces(self) -> Collection[int]:
        """Index numbers of the guest's interface and of the IFB."""
        return (self.installed.index, self.installed.ifb_index)

    @property
    def stands(self) -> bool:
        """Whether it holds what it has to, as far as is known: not lost, not being made anew, not given up."""
        return not self._lost and self.failure is None

    # --- The cycle ---------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Begin to hold; the guest is stopped.

        Guarantees:
            What it had sent before has left; nothing that it sends from now on does.
        """
        await self._whole()
        self._closed = True
        until = asyncio.get_running_loop().time() + _EMPTY_S
        while not await self._shut():
            # Packets that were on their way belong to no epoch: each release would come short by as many.
            if asyncio.get_running_loop().time() > until:
                raise HypervisorError(
                    f"{self.installed.ifb} does not become empty: the guest's interface sends on"
                )
            await self._wire.ask(self._all, lambda _: None)
            await asyncio.sleep(_POLL_S)
        self._armed = True

    async def _shut(self) -> bool:
        left: list[Stats] = []
        await self._wire.ask(self._buffer, lambda answer: left.append(Stats.of(answer)))
        self._may_leave_bytes, self._may_leave_packets = left[0].sent_bytes, left[0].sent_packets
        return left[0].held_packets == 0

    async def end_epoch(self, epoch: int) -> None:
        """Put a barrier behind what was sent in `epoch`; the guest is stopped.

        Guarantees:
            Nothing leaves. With a barrier still outstanding no other one is put: what came since joins the next.
        """
        if self._mending is not None:
            await self._whole()
        if self._parting:
            self._wire.drain()  # nobody has looked whether the last one was put
        if not self._barrier:
            self._parting = True
            await self._wire.ask(self._buffer, partial(self._parted, epoch), refused=self._refused)

    async def release(self, epoch: int) -> None:
        """Let out what was sent up to the barrier of `epoch`, or of an epoch before it: it is acknowledged.

        Guarantees:
            Nothing of a later epoch leaves. After a loss of the gate, which is looked for in the moment before, nothing
            does.
        """
        if self._mending is not None:
            await self._whole()
        if self.failure is not None:
            raise self.failure
        await self._release(epoch)
        if self._draining and await self._empty():
            await self._release(epoch)

    async def _release(self, epoch: int) -> None:
        try:
            await self._wire.ask(self._one, self._released, unless=partial(self._holds_back, epoch))
        except KernelRefused as refused:
            self._wire.drain()
            self._refused(refused)

    def _holds_back(self, epoch: int) -> bool:
        # In the moment before the release: everything that the kernel had to say until now has been heard.
        self._draining = False
        if not 0 < self._barrier <= epoch:
            return True
        stats = self._parted_stats()
        self._draining = stats.sent_bytes != self._may_leave_bytes and not self._emptied
        return self._draining or not self.stands

    async def look(self) -> Stats:
        """Ask for the counters."""
        seen: list[Stats] = []
        await self._wire.ask(self._read, lambda answer: seen.append(self._seen(answer)))
        return seen[0]

    async def count(self) -> None:
        """Take in what the kernel has counted, and what others have changed, until now or until the barrier just put.

        Guarantees:
            What the gate has dropped before the last barrier, or before this call if no barrier was put since the one
            before, is known.
        """
        self._wire.drain()
        if self._barrier and self._barrier_stats is None:
            self._parted_stats()
        elif self.stands:
            with suppress(HypervisorError, KernelRefused):  # it is lost, which the wire tells
                await self.look()

    def check(self) -> None:
        """Raise why this is no gate any more, if it is known to be none."""
        if self.failure is not None:
            raise self.failure

    # --- The end -----------------------------------------------------------------------------------------------------

    async def remove(self, verdict: Verdict) -> None:
        """Remove the gate; what it holds leaves first (KEEP), or never (DISCARD). Idempotent.

        Raises:
            HypervisorError: The kernel refuses; it may be asked again.
        """
        self._ending = True
        if self._mending is not None:
            self._mending.cancel()
            await asyncio.wait({self._mending})
            self._mending = None
        self._wire.leave(self)
        await in_thread(installation.remove, self.claim, verdict)

    # --- What the kernel says ----------------------------------------------------------------------------------------

    def _stand(self, installed: Installed) -> None:
        # A new plug stands: the messages are encoded once, its counters begin anew.
        self.installed = installed
        where = installed.ifb_index, installed.handle
        self._buffer = change_message(*where, Action.BUFFER)
        self._one = change_message(*where, Action.RELEASE_ONE)
        self._all = change_message(*where, Action.RELEASE_INDEFINITE)
        self._read = read_message(*where)
        self._barrier = 0  # the epoch that ends at the outstanding barrier, 0 without one
        self._parting = self._draining = self._emptied = False
        self._barrier_answer = b""
        self._barrier_stats: Stats | None = None
        self._may_leave_bytes = 0  # of all that has ever entered this plug: what was let out
        self._may_leave_packets = 0
        self._dropped_before = self.dropped_packets

    def _parted(self, epoch: int, answer: bytes) -> None:
        # Decoded when the guest runs again.
        self._parting = self._emptied = False
        if self._lost:
            return  # it was put into a plug that is being replaced
        self._barrier = epoch
        self._barrier_stats = None
        self._barrier_answer = answer

    def _refused(self, error: Exception) -> None:
        # What was put there is not there any more, or is something else: that is a loss as any other.
        self._parting = False
        self._lose(f"cannot be told anything: {error}")

    def _parted_stats(self) -> Stats:
        stats = self._barrier_stats
        if stats is None:
            stats = self._barrier_stats = self._seen(self._barrier_answer)
            # What was released before may still be on its way out; by packets that is exact but for segmented ones.
            self.held_bytes = stats.entered_bytes - self._may_leave_bytes
            gone = stats.sent_bytes == self._may_leave_bytes
            self.held_packets = (
                stats.held_packets if gone else stats.entered_packets - self._may_leave_packets
            )
        return stats

    def _released(self, _: bytes) -> None:
        at_barrier = self._parted_stats()
        self._barrier = 0
        self._may_leave_bytes, self._may_leave_packets = at_barrier.entered_bytes, at_barrier.entered_packets

    def _seen(self, answer: bytes) -> Stats:
        stats = Stats.of(answer)
        self.dropped_packets = self._dropped_before + stats.dropped_packets
        if self._armed and stats.sent_bytes > self._may_leave_bytes and not self._lost:
            more = stats.sent_bytes - self._may_leave_bytes
            self.fail(f"{self.installed.ifb} has let out {more} bytes that were not acknowledged")
        return stats

    async def _empty(self) -> bool:
        # Until what was released before has left. While a barrier is outstanding nothing else can.
        until = asyncio.get_running_loop().time() + _EMPTY_S
        while (await self.look()).sent_bytes < self._may_leave_bytes:
            if self._lost or not self._barrier:
                return False
            if asyncio.get_running_loop().time() > until:
                self.fail(f"{self.installed.ifb} does not let out what was released")
                return False
            await asyncio.sleep(_POLL_S)
        self._emptied = self.failure is None
        return self._emptied

    # --- What others change ------------------------------------------------------------------------------------------

    def heard(self, event: Event) -> None:
        """Take note of a change by somebody else: the gate may be lost. As `Listener.heard`."""
        gate = self.installed
        if event.index == gate.ifb_index:
            # An interface that is up tells of its carrier, its queue and its name, too.
            lost = not (event.kind == RTM_NEWLINK and event.up)
        elif event.kind == RTM_DELLINK:
            self.fail(f"the interface {self.claim.interface} is gone")
            return
        else:
            of_ingress = event.parent in {INGRESS, INGRESS_HANDLE, INGRESS_HANDLE | 0xFFF2}
            actions = event.kind in {RTM_NEWACTION, RTM_DELACTION}
            filters = event.kind in {RTM_NEWTFILTER, RTM_DELTFILTER}
            lost = actions or (event.kind != RTM_NEWLINK and (of_ingress or filters))
        if lost:
            who = gate.ifb if event.index == gate.ifb_index else self.claim.interface
            self._lose(f"{who} {event}")

    def deaf(self) -> None:
        """Take note that changes may have been missed. As `Listener.deaf`."""
        self._lose("the kernel had more to tell than its queue holds")

    def _lose(self, why: str) -> None:
        self._touched = True
        if self._ending or self._lost or self.failure is not None:
            return
        self._lost = True
        self._barrier = 0
        self.lost_count += 1
        # First what takes effect at once: an empty plug, closed, for the one whose counters may be wrong.
        gate = self.installed
        spare = gate.handle ^ 0x80000000
        self._wire.tell(fresh_message(gate.ifb_index, spare, self._limit_bytes))
        log.error(
            "guest %s: the gate of %s is lost, somebody else touched it: %s; what it held is lost, and output may have "
            "left before it was acknowledged; it is made anew",
            self.claim.guest,
            self.claim.interface,
            why,
        )
        self._mending = asyncio.get_running_loop().create_task(
            self._mend(), name=f"{self.claim.guest}: gate of {self.claim.interface}"
        )

    async def _mend(self) -> None:
        try:
            for left in reversed(range(_TRIES)):
                try:
                    await self._renew()
                except HypervisorError as error:
                    if not left:
                        self.fail(str(error))
                else:
                    if not self._touched:
                        self._lost = False
                        return
            self.fail(f"the gate of {self.claim.interface} is touched again and again")
        finally:
            self._mending = None

    async def _renew(self) -> None:
        mending = partial(installation.repair, closed=self._closed)
        self._stand(await in_thread(mending, self.installed, self._limit_bytes))
        self._wire.join(self)
        # What was heard so far may be our own changes; what others changed meanwhile is seen by looking, what they
        # change from here on is heard.
        self._wire.drain()
        self._touched = False
        if problem := await in_thread(installation.right, self.installed):
            raise HypervisorError(f"the gate of {self.claim.interface} is not what was made: {problem}")

    async def _whole(self) -> None:
        # Until the gate stands again, if it was lost.
        while (mending := self._mending) is not None:
            await asyncio.wait({mending})

    def fail(self, problem: str) -> None:
        """Give the gate up: it stays as it is, `check` and `release` raise; the first problem stands."""
        if not self._ending and self.failure is None:
            self._barrier = 0
            self.failure = HypervisorError(problem)
            log.error("guest %s: %s", self.claim.guest, problem)


async def in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """Run a call that may wait for the kernel.

    Raises:
        HypervisorError: As the call; or it did not return in time, and may still do its work.

    Guarantees:
        However it ends, the call has ended, too, or has passed its deadline.
    """
    if _LIBRARY not in sys.modules:
        # The first call waits for a large library's import, too; on a busy host that takes longer than the kernel may.
        try:
            await _threads.run(importlib.import_module, _LIBRARY, timeout_s=_IMPORT_S)
        except TimeoutError as error:
            raise HypervisorError(f"{_LIBRARY} was not loaded within {_IMPORT_S:g} s") from error
    working = asyncio.ensure_future(_threads.run(call, *arguments, timeout_s=_DEADLINE_S))
    try:
        return await asyncio.shield(working)
    except BaseException as error:
        # Whatever ends the waiting: the thread goes on, and what comes next must find its work done.
        if not working.done():
            with suppress(Exception):
                await _ended(asyncio.wait({working}))
        elif isinstance(error, TimeoutError):
            raise HypervisorError(f"the kernel did not answer within {_DEADLINE_S:g} s") from error
        raise


async def _ended(work: Coroutine[Any, Any, T]) -> T:
    # To its end, however often the caller is cancelled meanwhile.
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return task.result()
