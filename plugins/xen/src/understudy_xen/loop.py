"""The primary's checkpoint loop around libxc's save, in a thread of its own.

libxc blocks the thread that saves a domain and calls back at fixed points. What blocks is done there, in the
callbacks: the guest is suspended and resumed, libxl's records are written, the answer is awaited. What belongs to
others, the phases of the devices, is handed to the event loop. The order is that of libxl's Remus with one step more,
the answer::

    libxc      suspend ────── pages, CHECKPOINT ── postcopy ───── checkpoint ──────────────────── suspend …
    the guest  is stopped     copied               runs again     device model and CHECKPOINT_END
    devices    postsuspend                         preresume      written, then acknowledged; the thread
                                                                  rests until the next one is asked for

The domain's log-dirty mode is on for as long as the loop lives; libxc turns it off when it returns, whatever the cause.

Source: tools/libs/guest/xg_sr_save.c (save, send_domain_memory_live), tools/libs/light/libxl_remus.c and
libxl_dom_save.c of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Protocol

from understudy.errors import HypervisorError, StateError
from understudy_xen.libs import Precopy, PrecopyStats, XenCallFailed

if TYPE_CHECKING:
    from understudy.device import Progress
    from understudy.hypervisor import Phases
    from understudy_xen.outlet import Outlet
    from understudy_xen.streams.cursor import Buffer
    from understudy_xen.wire import Ack

__all__ = ["LoopGuest", "RemusLoop", "Save", "Taken"]

_log = logging.getLogger(__name__)

Phase = Callable[[], Coroutine[Any, Any, None]]

_PAGE_BYTES: Final = 4096
_FEW_PAGES: Final = 50  # libxc's own target: with so few dirty the guest is stopped for the rest
_MOST_ROUNDS: Final = 5  # libxc's own bound of the live copy
_BROKEN: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF, errno.ETIMEDOUT})
_ACK_S: Final = 30.0
_COPY_ACK_S: Final = 120.0  # the first copy is passed through, at the speed of the other host's libxl


class LoopGuest(Protocol):
    """The guest as the loop sees it; called in libxc's thread, and may block."""

    def suspend(self) -> None:
        """Have the guest suspend and see it suspended, its device model stopped and its state captured."""

    def resume(self) -> None:
        """Let the suspended guest and its device model run on."""

    def records(self) -> Sequence[Buffer]:
        """Return libxl's part of the checkpoint: the device model as it was at the last `suspend`, and the end."""

    def log_dirty(self, *, enable: bool) -> None:
        """Have the device model note which pages it writes, or not any more."""


class Save(Protocol):
    """libxc's save of one domain; blocks until the loop ends."""

    def __call__(self, fd: int, callbacks: RemusLoop) -> None:
        """Save to `fd`, calling back. Raises what a callback raised, or how libxc failed."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One acknowledged checkpoint; times of `time.monotonic_ns`."""

    asked_ns: int  #: when the guest was asked to suspend
    stopped_ns: int  #: when it was seen suspended
    resumed_ns: int
    acknowledged_ns: int
    ack: Ack
    parts_ns: dict[str, int]


class _Order(Enum):
    # What libxc's thread is told between two checkpoints.
    GO_ON = "make the next one"
    REST = "wait for the next order"
    END = "make no more"


@dataclass(slots=True)
class _Pace:
    # Checkpoints that follow each other without the event loop.
    interval_s: float
    left: int  # 0: without end
    tell: Callable[[Taken], None] | None


@dataclass(slots=True)
class _Round:
    # What the checkpoint that is under way belongs to, or all those of a pace.
    answer: asyncio.Future[Taken]
    # ``None``: there is nothing to do, and the event loop need not be waited for.
    stopped: Phase | None = None
    resuming: Phase | None = None
    resumed: Phase | None = None
    pace: _Pace | None = None
    marks_ns: dict[str, int] = field(default_factory=dict)
    after: Future[None] | None = None

    def mark(self, name: str) -> None:
        self.marks_ns[name] = time.monotonic_ns()

    def taken(self, ack: Ack, now_ns: int) -> Taken:
        marks = self.marks_ns
        parts = {
            "suspend": marks["stopped"] - marks["asked"],
            "postsuspend": marks["barriers"] - marks["stopped"],
            "copy": marks["copied"] - marks["barriers"],
            "preresume": marks["permitted"] - marks["copied"],
            "resume": marks["resumed"] - marks["permitted"],
        }
        return Taken(marks["asked"], marks["stopped"], marks["resumed"], now_ns, ack, parts)


def _fine() -> None:
    pass


async def _run(phase: Callable[[int], Awaitable[None]], epoch: int) -> None:
    await phase(epoch)


class RemusLoop:
    """One checkpointed save of a domain.

    The methods `suspend`, `precopy`, `postcopy`, `checkpoint` and `switch_qemu_logdirty` are libxc's callbacks and run
    in its thread; all others belong to the event loop.

    Args:
        guest: What is saved.
        outlet: Where to. Whoever made it closes it, after the loop has ended.
        save: Calls libxc.
        total_pages: Of the guest, for progress.
        intact: Called in libxc's thread when it has read pages; raises if it cannot have read all of them.
    """

    def __init__(
        self,
        guest: LoopGuest,
        outlet: Outlet,
        save: Save,
        *,
        total_pages: int = 0,
        intact: Callable[[], None] = _fine,
    ) -> None:
        self._guest = guest
        self._outlet = outlet
        self._save = save
        self._total_pages = total_pages
        self._intact = intact
        self._progress: Progress | None = None
        self._loop = asyncio.get_running_loop()
        self._orders: SimpleQueue[_Order] = SimpleQueue()
        self._round: _Round | None = None
        self._count = 0
        self._resting = False
        self._stopping: Future[None] | None = None  # the devices' phases before the pages are copied
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()
        self.failure: BaseException | None = None  #: why the loop ended, ``None``: as it was told to
        self.cut_reason = ""  #: why the stream was cut, ``""``: it is not

    @property
    def ended(self) -> asyncio.Event:
        """Set when libxc has returned."""
        return self._ended

    @property
    def busy(self) -> bool:
        """Whether libxc is at work, or may come back to it."""
        return self._thread is not None and not self._ended.is_set()

    @property
    def resting(self) -> bool:
        """Whether it waits to be asked for the next checkpoint."""
        return self._resting

    # --- The event loop's side ---------------------------------------------------------------------------------------

    async def copy(self, stopped: Phase | None, progress: Progress) -> Ack:
        """Begin: copy the running guest, and stop it for the rest.

        Args:
            stopped: Awaited while the guest is stopped, before the last of its pages are copied; ``None``: nothing is.
            progress: Told how much is copied.

        Raises:
            HypervisorError: The copy failed. The guest may be suspended.

        Returns:
            The receiver's answer to the whole copy. The guest runs.
        """
        if self._thread is not None:
            raise StateError("this loop was begun before")
        self._progress = progress
        self._thread = threading.Thread(target=self._run, name="xen: save", daemon=True)
        taken = await self._await(_Round(self._loop.create_future(), stopped), self._thread.start)
        return taken.ack

    async def take(self, epoch: int, phases: Phases | None) -> Taken:
        """Make one checkpoint and wait for its acknowledgement.

        Args:
            epoch: Number of the epoch that it ends.
            phases: Called at their times: postsuspend and preresume while the guest is stopped, postresume after;
                ``None`` where there are no devices.

        Raises:
            HypervisorError: Nothing was acknowledged. The guest may be suspended.
        """
        ours = _Round(self._loop.create_future())
        if phases is not None:
            ours.stopped = partial(_run, phases.postsuspend, epoch)
            ours.resuming = partial(_run, phases.preresume, epoch)
            ours.resumed = partial(_run, phases.postresume, epoch)
        taken = await self._next(ours)
        if ours.after is not None:
            await asyncio.wrap_future(ours.after)
        return taken

    async def run(self, interval_s: float, count: int, tell: Callable[[Taken], None] | None = None) -> None:
        """Make checkpoints one after the other in libxc's thread alone, for a guest whose devices need not be told.

        Args:
            interval_s: How long the guest runs between two, counted from the end of one, seconds.
            count: How many, 0 = until told to `rest`.
            tell: Told of each, in the event loop; ``None``: nobody is, and the event loop has nothing to do.

        Raises:
            HypervisorError: The last one was not acknowledged. The guest may be suspended.

        Guarantees:
            Afterwards it rests between two checkpoints, unless it failed. Where this is cancelled nobody waits for the
            checkpoints any more, and the loop ends with the next one; `rest` is the way to stop.
        """
        pace = _Pace(interval_s, count, tell)
        await self._next(_Round(self._loop.create_future(), pace=pace))

    def rest(self) -> None:
        """Have `run` return when the checkpoint that is under way, if one is, has come to its end. Idempotent."""
        self._orders.put(_Order.REST)

    def cut(self, reason: str) -> None:
        """End the stream in the middle, whatever is under way; nothing counts as acknowledged any more. Idempotent.

        The guest may be left suspended; `join` says when libxc has let go of it.
        """
        if self.cut_reason:
            return
        self.cut_reason = reason
        self._resting = False
        self._outlet.cut(reason)
        stopping = self._stopping  # libxc's thread may let go of it meanwhile
        if stopping is not None:
            stopping.cancel()
        self._orders.put(_Order.END)
        if self._round is not None and not self._round.answer.done():
            self._round.answer.set_exception(HypervisorError(f"the checkpoint stream was cut: {reason}"))

    async def end(self) -> None:
        """End at rest, as planned: the guest runs on, and the stream ends with the last whole checkpoint."""
        if self._resting:
            self._resting = False
            self._orders.put(_Order.END)

    async def join(self, timeout_s: float) -> None:
        """Wait until libxc has returned.

        Raises:
            HypervisorError: It has not, in time.
        """
        if self._thread is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            raise HypervisorError(
                f"libxc's save of the guest did not return within {timeout_s:g} s"
            ) from None

    async def _next(self, ours: _Round) -> Taken:
        if not self._resting:
            raise HypervisorError(f"no checkpoint can be taken: {self._why()}")
        self._resting = False
        return await self._await(ours, partial(self._orders.put, _Order.GO_ON))

    async def _await(self, ours: _Round, begin: Callable[[], None]) -> Taken:
        self._round = ours
        begin()
        try:
            return await ours.answer
        finally:
            self._round = None

    def _acknowledged(self, ack: Ack, now_ns: int) -> None:
        self._resting = True
        ours = self._round
        if ours is None or ours.answer.done():
            return
        ours.answer.set_result(ours.taken(ack, now_ns))

    def _over(self, failure: BaseException | None) -> None:
        self.failure = failure
        self._resting = False
        ours = self._round
        if ours is not None and not ours.answer.done():
            error = failure if isinstance(failure, Exception) else HypervisorError(self._why())
            ours.answer.set_exception(error)
        self._ended.set()

    def _why(self) -> str:
        if self.cut_reason:
            return f"the stream was cut: {self.cut_reason}"
        if self._thread is None:
            return "the first copy has not been made"
        if self._ended.is_set():
            return f"the save has ended: {self.failure or 'as it was told'}"
        return "another one is under way"

    def _need_round(self) -> _Round:
        if self._round is None:
            raise HypervisorError(f"nobody waits for this checkpoint: {self.cut_reason or 'it was given up'}")
        return self._round

    # --- libxc's thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._save(self._outlet.fd, self)
        except XenCallFailed as error:
            # Of a write that fails libxc knows only the errno; the outlet knows why it is broken.
            failure = self._outlet.broken(error) if error.errno in _BROKEN else error
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            failure = error
        with suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._over, failure)

    def suspend(self) -> None:
        """Stop the guest and set the barriers."""
        self._need_stream()
        ours = self._need_round()
        ours.mark("asked")
        self._guest.suspend()
        ours.mark("stopped")
        if ours.stopped is not None:
            self._stop_devices(ours.stopped)
        ours.mark("barriers")
        self._need_stream()

    def _need_stream(self) -> None:
        if self.cut_reason:
            raise HypervisorError(f"the stream was cut: {self.cut_reason}")

    def _stop_devices(self, stopped: Phase) -> None:
        self._need_stream()
        stopping = self._stopping = self._in_loop(stopped())
        if self.cut_reason:  # between the look and now
            stopping.cancel()
        try:
            stopping.result()
        except CancelledError:
            raise HypervisorError(f"the stream was cut: {self.cut_reason}") from None
        finally:
            self._stopping = None

    def precopy(self, stats: PrecopyStats) -> Precopy:
        """Decide after each round of the live copy whether the guest is to be stopped for the rest."""
        if self.cut_reason:
            return Precopy.ABORT
        self._intact()
        if self._progress is not None and self._total_pages:
            done = min(stats.written_pages, self._total_pages) * _PAGE_BYTES
            self._loop.call_soon_threadsafe(self._progress, "memory", done, self._total_pages * _PAGE_BYTES)
        few = stats.dirty_pages is not None and stats.dirty_pages < _FEW_PAGES
        return Precopy.STOP if few or stats.iteration >= _MOST_ROUNDS else Precopy.CONTINUE

    def postcopy(self) -> None:
        """Let the guest run on: libxc has written all of the checkpoint."""
        ours = self._need_round()
        ours.mark("copied")
        if ours.resuming is not None:
            self._in_loop(ours.resuming()).result()
        ours.mark("permitted")
        self._guest.resume()
        ours.mark("resumed")
        if ours.resumed is not None:
            # Beside the rest of the stream: the acknowledgement must not wait for it.
            ours.after = self._in_loop(ours.resumed())

    def checkpoint(self) -> bool:
        """Write what libxl's layer adds, wait for the acknowledgement, rest until told to go on.

        Returns:
            Whether another checkpoint is to follow.
        """
        self._intact()  # or the checkpoint never becomes whole on the other host
        self._count += 1
        for record in self._guest.records():
            self._outlet.write(record)
        ack = self._outlet.acknowledged(self._count, _COPY_ACK_S if self._count == 1 else _ACK_S)
        now_ns = time.monotonic_ns()
        ours = self._round
        if ours is not None and ours.pace is not None:
            order = self._paced(ours, ours.pace, ack, now_ns)
            if order is not _Order.REST:
                return order is _Order.GO_ON
        self._loop.call_soon_threadsafe(self._acknowledged, ack, now_ns)
        while (order := self._orders.get()) is _Order.REST:
            pass
        return order is _Order.GO_ON

    def _paced(self, ours: _Round, pace: _Pace, ack: Ack, now_ns: int) -> _Order:
        if pace.tell is not None:
            self._loop.call_soon_threadsafe(pace.tell, ours.taken(ack, now_ns))
        pace.left -= 1
        if not pace.left:
            return _Order.REST
        try:
            return self._orders.get(timeout=pace.interval_s)
        except Empty:
            return _Order.GO_ON

    def switch_qemu_logdirty(self, domid: int, *, enable: bool) -> None:  # noqa: ARG002 - libxc's signature
        """Tell the device model, which writes to the guest's memory, too."""
        self._guest.log_dirty(enable=enable)

    def _in_loop(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)
