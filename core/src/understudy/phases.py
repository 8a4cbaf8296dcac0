"""Run one step of every device: start all, let all finish, enforce one deadline, tell every failure.

Three rules that asyncio's `TaskGroup` does not have, which is why it is not used here:

* A sibling's failure never cancels a step: it may be in the middle of a qdisc change or an ioctl.
* A step that swallows its cancellation is waited for a bounded time and then left behind, by name. That is also why
  a lone step gets a task of its own: awaited directly, it could swallow the caller's cancellation and hang it.
* Every failure is kept, the first in time leads, each names device, subkind, phase and epoch.

Source: libxl's multidev (tools/libs/light/libxl_device.c) lets siblings finish likewise, but keeps the return code of
the last failing device in array order and has no deadline at this layer; QEMU's replication.c stops at the first error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.errors import DeviceError, PhaseTimeout, UnderstudyError

__all__ = ["Deadlines", "Step", "first_failure", "in_words", "run_phase"]

log = logging.getLogger(__name__)

# Steps that would not end: kept referenced until they do, so that their end is still seen and logged.
_abandoned: set[asyncio.Task[None]] = set()


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each step of a guest's devices may take, seconds; at a deadline the step is cancelled."""

    setup_s: float = 120.0  #: without any progress told; an initial copy that moves may take hours
    start_s: float = 30.0  #: the guest is stopped meanwhile
    postsuspend_s: float = 5.0  #: the guest is stopped meanwhile
    checkpoint_s: float = 5.0  #: the guest may be stopped meanwhile
    preresume_s: float = 5.0  #: the guest is stopped meanwhile
    postresume_s: float = 5.0
    error_s: float = 5.0
    commit_s: float = 5.0
    stop_s: float = 30.0
    teardown_s: float = 30.0
    serve_s: float = 60.0  #: for the answer to a request of the other half
    grace_s: float = 1.0  #: how long a cancelled step may take to end before it is left behind


@dataclass(frozen=True, slots=True)
class Step:
    """One device's part of a phase, resolved once when the device was opened."""

    device: str  #: e.g. ``"disk0"``
    subkind: str  #: e.g. ``"drbd"``
    call: Callable[..., Coroutine[Any, Any, None]]  #: usually a bound method of the device


async def run_phase(
    phase: str,
    steps: Sequence[Step],
    *arguments: object,
    epoch: int | None = None,
    deadline_s: float,
    grace_s: float = 1.0,
    all_or_nothing: bool = False,
    progressed: Callable[[], float] | None = None,
) -> None:
    """Start every step, let every step finish, then raise all that failed.

    Args:
        phase: Name for errors, e.g. ``"postsuspend"``.
        steps: One per device that has this phase; with none the call costs nothing.
        arguments: Passed to every step.
        epoch: For errors; ``None`` outside the cycle.
        deadline_s: Seconds until steps that still run are cancelled.
        grace_s: Seconds that cancelled steps may take to end before they are left behind.
        all_or_nothing: Cancel the other steps at the first failure; for opening, which may take hours and must be
            cancellable anyway.
        progressed: Returns the loop time of the last progress; the deadline then counts from there.

    Raises:
        ExceptionGroup: Of `DeviceError`, first failure in time first, the cause kept in ``__cause__``. A step that was
            late is a `PhaseTimeout`, also when it returned after its cancellation.
        asyncio.CancelledError: The caller was cancelled; the steps were cancelled and have ended, or were left behind.

    Guarantees:
        Ends at most `grace_s` after the deadline or the cancellation, whatever the steps do. No step runs afterwards
        but those that were left behind, which are named in the error (or, on cancellation, in the log).
    """
    if not steps:
        return
    race = _Race(asyncio.get_running_loop(), deadline_s, all_or_nothing, progressed)
    race.start(steps, arguments)
    interrupted = False
    try:
        await race.waiter
    except asyncio.CancelledError:
        interrupted = True
    race.timer.cancel()
    late: list[asyncio.Task[None]] = []
    if race.running:
        late = [task for task in race.owner if not task.done()]
        interrupted |= await _end(late, grace_s)
    failures = race.failures(phase, epoch, late, grace_s)
    if interrupted:
        # The caller's cancellation goes on as what it is; what failed beside it is told here or nowhere.
        for failure in failures:
            log.warning("%s, while the phase was being cancelled", failure)
        raise asyncio.CancelledError(f"{phase} cancelled")
    if failures:
        raise ExceptionGroup(f"{phase} failed: {failures[0]}", failures)


def first_failure(error: BaseException) -> BaseException:
    """Return the failure that leads a (nested) group of them: what the user is told first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def in_words(error: BaseException) -> str:
    """Return an error's text for the user; a foreign one with its type, because its text alone may be ``'x'``."""
    text = str(error)
    return text if isinstance(error, UnderstudyError) else f"{type(error).__name__}: {text}".rstrip(": ")


class _Race:
    # One phase under way: who runs, who ended in which order, the deadline, and the future that wakes the caller.

    __slots__ = (
        "all_or_nothing",
        "broken",
        "deadline_s",
        "ended",
        "expired",
        "loop",
        "owner",
        "progressed",
        "running",
        "timer",
        "waiter",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deadline_s: float,
        all_or_nothing: bool,  # noqa: FBT001 - private
        progressed: Callable[[], float] | None,
    ) -> None:
        self.loop = loop
        self.deadline_s = deadline_s
        self.all_or_nothing = all_or_nothing
        self.progressed = progressed
        self.waiter: asyncio.Future[None] = loop.create_future()
        self.timer: asyncio.TimerHandle = loop.call_later(deadline_s, self.expire)
        self.owner: dict[asyncio.Task[None], Step] = {}
        self.ended: list[asyncio.Task[None]] = []
        self.broken: list[tuple[Step, Exception]] = []
        self.running = 0
        self.expired = False

    def start(self, steps: Sequence[Step], arguments: tuple[object, ...]) -> None:
        self.running = len(steps)
        for step in steps:
            try:
                task = self.loop.create_task(step.call(*arguments))
            except Exception as error:  # noqa: BLE001 - a step that is no coroutine function; its siblings go on
                self.broken.append((step, error))
                self.one_less(failed=True)
            else:
                self.owner[task] = step
                task.add_done_callback(self.end)

    def one_less(self, *, failed: bool) -> None:
        self.running -= 1
        if not self.running or (failed and self.all_or_nothing):
            self.wake()

    def end(self, task: asyncio.Task[None]) -> None:
        self.ended.append(task)
        self.one_less(failed=self.all_or_nothing and (task.cancelled() or task.exception() is not None))

    def wake(self) -> None:
        if not self.waiter.done():
            self.waiter.set_result(None)

    def expire(self) -> None:
        again_at = (self.progressed() + self.deadline_s) if self.progressed is not None else 0.0
        if again_at > self.loop.time():
            self.timer = self.loop.call_at(again_at, self.expire)
        else:
            self.expired = True
            self.wake()

    def failures(
        self, phase: str, epoch: int | None, late: list[asyncio.Task[None]], grace_s: float
    ) -> list[DeviceError]:
        # In the order of time: what could not be started, what ended, what was left behind.
        found = [_wrap(step, phase, epoch, error) for step, error in self.broken]
        if self.running:
            # The caller was woken early: a task may be done whose callback has not run yet.
            seen = set(self.ended)
            self.ended += [task for task in self.owner if task.done() and task not in seen]
        for task in self.ended:
            step = self.owner[task]
            error = None if task.cancelled() else task.exception()
            if task in late and self.expired:
                problem = f"not finished after {self.deadline_s:g} s, cancelled"
                timeout = PhaseTimeout(step.device, step.subkind, phase, epoch, problem)
                timeout.__cause__ = error
                found.append(timeout)
            elif error is not None:
                found.append(_wrap(step, phase, epoch, error))
            elif task.cancelled() and task not in late:
                problem = "it was cancelled, but not by the core"
                found.append(DeviceError(step.device, step.subkind, phase, epoch, problem))
        for task in late:
            if not task.done():
                step = self.owner[task]
                problem = f"it did not end within {grace_s:g} s after it was cancelled and was left behind"
                if self.expired:
                    problem = f"not finished after {self.deadline_s:g} s; {problem}"
                found.append(PhaseTimeout(step.device, step.subkind, phase, epoch, problem))
        return found


async def _end(late: list[asyncio.Task[None]], grace_s: float) -> bool:
    # Cancel what still runs and wait for its end, not longer than the grace, however often the caller is cancelled
    # meanwhile. Tells whether it was.
    for task in late:
        task.cancel()
    loop = asyncio.get_running_loop()
    until = loop.time() + grace_s
    interrupted = False
    waiting = set(late)
    while waiting and (left := until - loop.time()) > 0:
        try:
            _, waiting = await asyncio.wait(waiting, timeout=left)
        except asyncio.CancelledError:
            interrupted = True
    for task in late:
        if not task.done():
            _abandoned.add(task)
            task.add_done_callback(_gone_at_last)
    return interrupted


def _gone_at_last(task: asyncio.Task[None]) -> None:
    _abandoned.discard(task)
    how = "cancelled" if task.cancelled() else repr(task.exception() or "returned")
    log.warning("a step that had been left behind has ended: %s: %s", task.get_coro(), how)


def _wrap(step: Step, phase: str, epoch: int | None, error: BaseException) -> DeviceError:
    # Wrapped once: an error that already names this device and phase is handed on as it is.
    if isinstance(error, DeviceError) and error.device == step.device and error.phase == phase:
        return error
    wrapped = DeviceError(step.device, step.subkind, phase, epoch, in_words(error))
    wrapped.__cause__ = error
    return wrapped
