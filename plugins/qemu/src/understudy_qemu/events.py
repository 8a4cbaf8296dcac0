"""Follow a QEMU through a session by its events: which checkpoints are whole, and when no more can follow.

QEMU gives its checkpoints neither a number nor an event of their own; STOP and RESUME tell:

* On the primary STOP is the epoch's boundary, and the RESUME after it comes when the secondary has loaded the
  checkpoint: it is the acknowledgement.
* On the secondary STOP means that a checkpoint begins to arrive, and the RESUME after it that it is loaded.
* The RESUME that ends COLO's start, on either side, is no checkpoint.
* After COLO_EXIT, or a final MIGRATION status, no STOP or RESUME is a checkpoint any more: those that follow are the
  takeover's. Whatever came before it did happen, because events are in order.

Source: QEMU migration/colo.c, colo_do_checkpoint_transaction and colo_process_incoming_thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from understudy.errors import HypervisorError, MonitorSilent, UnderstudyError
from understudy.hypervisor import DomainEvent, DomainEventKind
from understudy.services import Monitor, MonitorEvent

__all__ = ["Cycle", "Follower", "Stage", "Timeline"]

T = TypeVar("T")

_FINAL = frozenset({"failed", "completed", "cancelled"})

# Events that concern the guest's own fate. RESET is left out of the secondary's by its domain.
_FATES = {
    "SHUTDOWN": DomainEventKind.SHUTDOWN,
    "RESET": DomainEventKind.RESET,
    "GUEST_PANICKED": DomainEventKind.PANIC,
}


@dataclass(frozen=True, slots=True)
class Cycle:
    """One whole checkpoint as one QEMU's events showed it; both times by that host's realtime clock."""

    stopped_ns: int
    resumed_ns: int


class Stage(Enum):
    """How far the stream is."""

    COPYING = "copying"  #: no stream yet, or the initial copy is under way
    STARTING = "starting"  #: COLO has begun; the guest has not been resumed yet
    CHECKPOINTS = "checkpoints"  #: every STOP and RESUME from here is a checkpoint
    ENDED = "ended"  #: nothing more will be acknowledged or loaded


class Follower:
    """What the events of one session mean; pure, fed in order."""

    __slots__ = ("left", "loaded", "reason", "running", "stage", "status", "stopped_ns", "stops")

    def __init__(self) -> None:
        self.stage = Stage.COPYING
        self.status = "none"  #: the last MIGRATION status
        self.reason = ""  #: why the stage is `Stage.ENDED`
        self.left = False  #: QEMU itself has ended the stream: by COLO_EXIT, or by a final status
        self.loaded = 0  #: whole checkpoints so far
        self.running = True  #: as far as STOP and RESUME tell
        self.stopped_ns = 0  #: the last STOP
        self.stops = 0  #: how many STOP events there were

    def feed(self, event: MonitorEvent) -> Cycle | None:
        """Take the next event; return the checkpoint that it completed, if it did."""
        match event.name:
            case "MIGRATION":
                self._status(str(event.data.get("status", "")))
            case "COLO_EXIT":
                self.left = True
                self.end(f"QEMU left COLO ({event.data.get('reason', '?')})")
            case "STOP":
                self.running = False
                self.stopped_ns = event.host_ns
                self.stops += 1
            case "RESUME":
                return self._resume(event.host_ns)
            case _:
                pass
        return None

    def end(self, reason: str) -> None:
        """Note that the stream is over; the first reason stays."""
        if self.stage is not Stage.ENDED:
            self.stage = Stage.ENDED
            self.reason = reason

    def _status(self, status: str) -> None:
        self.status = status
        if status == "colo" and self.stage is Stage.COPYING:
            self.stage = Stage.STARTING
        elif status in _FINAL:
            self.left = True
            self.end(f"the migration is {status}")

    def _resume(self, now_ns: int) -> Cycle | None:
        was_stopped = not self.running
        self.running = True
        if self.stage is Stage.STARTING:
            self.stage = Stage.CHECKPOINTS
        elif self.stage is Stage.CHECKPOINTS and was_stopped:
            self.loaded += 1
            return Cycle(self.stopped_ns, now_ns)
        return None


class Timeline:
    """A monitor's events of one session, kept in order, with somebody waiting for what they lead to.

    Args:
        ignored: Fates of the guest that are not told on, because this side's copy only speculates.
        count_checkpoints: Whether each whole checkpoint is a `DomainEvent` (the secondary).
        gone: Called when the monitor is lost.
    """

    def __init__(
        self,
        *,
        ignored: frozenset[DomainEventKind] = frozenset(),
        count_checkpoints: bool = False,
        gone: Callable[[], None] = lambda: None,
    ) -> None:
        self.follower = Follower()
        self.cycles: deque[Cycle] = deque(maxlen=1000)  #: whole checkpoints that nobody has taken yet
        self.shut_down = False  #: the guest has shut itself down
        self.severed = False  #: we have cut the stream ourselves
        self._ignored = ignored
        self._count = count_checkpoints
        self._gone = gone
        self._told: asyncio.Queue[DomainEvent | None] = asyncio.Queue()
        self._waiting: list[asyncio.Future[None]] = []
        self._pump: asyncio.Task[None] | None = None

    async def open(self, monitor: Monitor) -> None:
        """Begin to listen to `monitor`.

        Guarantees:
            No event is missed from the moment this returns.
        """
        ready = asyncio.Event()
        self._pump = asyncio.create_task(self._listen(monitor, ready), name="events of a session")
        await ready.wait()

    async def close(self) -> None:
        """Stop listening and end `watch`. Idempotent."""
        if self._pump is not None:
            self._pump.cancel()
            with suppress(asyncio.CancelledError):
                await self._pump
            self._pump = None
            self._told.put_nowait(None)

    async def watch(self) -> AsyncIterator[DomainEvent]:
        """Yield what happens unasked, until `close`; for one reader."""
        while (event := await self._told.get()) is not None:
            yield event
        self._told.put_nowait(None)

    async def until(self, found: Callable[[], T | None], *, timeout_s: float, what: str) -> T:
        """Wait until `found` returns something, asking it again after every event.

        Args:
            found: Looks at the follower; ``None`` means not yet, and it may raise.
            timeout_s: Deadline, seconds.
            what: What is waited for, for the error.

        Raises:
            HypervisorError: The deadline passed, or the monitor is gone.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (answer := found()) is None:
                    if self._pump is None or self._pump.done():
                        raise HypervisorError(f"{what}: {self.follower.reason or 'the monitor is gone'}")
                    changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiting.append(changed)
                    await changed
                return answer
        except TimeoutError:
            raise HypervisorError(f"{what}: nothing within {timeout_s:g} s") from None

    def lose(self, reason: str) -> None:
        """Tell that QEMU does not answer any more, although its connection stands."""
        self._tell(DomainEventKind.GONE, reason)

    def wake(self) -> None:
        """Let everybody who waits look again."""
        waiting, self._waiting = self._waiting, []
        for changed in waiting:
            if not changed.done():
                changed.set_result(None)

    def sever(self, reason: str) -> None:
        """Note that we cut the stream: nothing that comes later is an acknowledgement."""
        self.severed = True
        self.follower.end(reason)
        self.cycles.clear()
        self.wake()

    async def _listen(self, monitor: Monitor, ready: asyncio.Event) -> None:
        try:
            async with monitor.events() as events:
                ready.set()
                async for event in events:
                    self._take(event)
        except UnderstudyError as error:
            self.follower.end(str(error))
            self._gone()
            # After the cut a monitor that a dead peer held is asked again on a new connection: its silence is no death.
            if not (self.severed and isinstance(error, MonitorSilent)):
                self._tell(DomainEventKind.GONE, str(error))
        finally:
            ready.set()
            # Those who wait ask whether this task is done: they look once it is.
            asyncio.get_running_loop().call_soon(self.wake)

    def _take(self, event: MonitorEvent) -> None:
        before = self.follower.stage
        cycle = self.follower.feed(event)
        if cycle is not None:
            self.cycles.append(cycle)
            if self._count:
                self._tell(DomainEventKind.CHECKPOINT, count=self.follower.loaded)
        if self.follower.stage is Stage.ENDED and before is not Stage.ENDED and not self.severed:
            self._tell(DomainEventKind.STREAM_LOST, self.follower.reason)
        fate = _FATES.get(event.name)
        if fate is DomainEventKind.SHUTDOWN and not event.data.get("guest", True):
            fate = None  # `quit` or a signal: no decision of the guest; the end of the process follows
        if fate is not None and fate not in self._ignored:
            if fate is DomainEventKind.SHUTDOWN:
                self.shut_down = True
            self._tell(fate, str(event.data.get("reason", event.data.get("action", ""))))
        self.wake()

    def _tell(self, kind: DomainEventKind, detail: str = "", count: int = 0) -> None:
        self._told.put_nowait(DomainEvent(kind, detail, count))
