"""Inject a fault at every await of a piece of work, one after the other, until every one has been hit.

An *await point* is a place where the work's own task really gives control back to the event loop: only there can a
cancellation arrive, and there a reply can turn out to be an error. For work that is deterministic (see
`understudy.testing.clock`) the same number always means the same point, so a failing one can be repeated.

::

    for fault in at_every_await(Cancel()):
        world = make_world()
        try:
            await fault.strike(work(world))
        except asyncio.CancelledError:
            pass
        assert world.is_clean(), fault
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

__all__ = ["Cancel", "Fault", "InjectedFault", "Raise", "at_every_await", "at_random_awaits", "count_awaits"]

T = TypeVar("T")


class InjectedFault(Exception):
    """The error that an injection raises where the work awaits something."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel the task while it waits, the way asyncio does it."""


@dataclass(frozen=True, slots=True)
class Raise:
    """Make the await raise."""

    error: Callable[[], Exception] = field(default=lambda: InjectedFault("injected"))


class Fault:
    """One fault, to be injected at one await point.

    Args:
        what: What happens there.
        point: Which await point, from 1.
    """

    def __init__(self, what: Cancel | Raise, point: int) -> None:
        self.what = what
        self.point = point
        self.struck = False  #: whether the work reached the point
        self.struck_at = 0.0  #: when, by the loop's clock, seconds
        self.passed = 0  #: how many await points the work has passed

    def __repr__(self) -> str:
        return f"<{type(self.what).__name__} at await {self.point}, {'struck' if self.struck else 'not reached'}>"

    async def strike(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the work in this task with the fault in its way.

        Returns:
            What the work returned, if it was over before the point, or coped with the fault.

        Raises:
            asyncio.CancelledError: The cancellation went through the work. The calling task is not cancelled any
                more afterwards and may go on.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - coroutines of asyncio run in a task
        before = task.cancelling()
        try:
            return await _Struck(self, work, task)
        finally:
            while task.cancelling() > before:
                task.uncancel()


class _Struck(Generic[T]):
    # Hands every value between the work and the event loop on, counts, and strikes once.

    def __init__(self, fault: Fault, work: Coroutine[Any, Any, T], task: asyncio.Task[Any]) -> None:
        self.fault = fault
        self.work = work
        self.task = task

    def __await__(self) -> Generator[Any, Any, T]:
        step: Callable[[], Any] = lambda: self.work.send(None)  # noqa: E731 - rebound below
        while True:
            try:
                waits_for = step()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            self.fault.passed += 1
            if self.fault.passed == self.fault.point:
                self.fault.struck = True
                self.fault.struck_at = asyncio.get_running_loop().time()
                if isinstance(self.fault.what, Raise):
                    error = self.fault.what.error()
                    step = _thrower(self.work, error)
                    _let_go(waits_for)
                    continue
                asyncio.get_running_loop().call_soon(self.task.cancel)
            try:
                yield waits_for
            except BaseException as error:  # noqa: BLE001 - handed to the work, whose business it is
                step = _thrower(self.work, error)
            else:
                step = lambda: self.work.send(None)  # noqa: E731


def _thrower(work: Coroutine[Any, Any, Any], error: BaseException) -> Callable[[], Any]:
    return lambda: work.throw(error)


def _let_go(waits_for: Any) -> None:
    # Nobody awaits this future any more; what it brings later is not an error that was overlooked.
    if isinstance(waits_for, asyncio.Future):
        waits_for._asyncio_future_blocking = False  # noqa: SLF001 - the protocol of awaiting a future
        waits_for.add_done_callback(lambda done: done.cancelled() or done.exception())


async def count_awaits(work: Coroutine[Any, Any, object]) -> int:
    """Run the work without a fault and return how many await points it has."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - coroutines of asyncio run in a task
    fault = Fault(Cancel(), 0)
    await _Struck(fault, work, task)
    return fault.passed


def at_every_await(what: Cancel | Raise, *, limit: int = 10_000) -> Iterator[Fault]:
    """Yield a fault for await point 1, 2, … until the work is over before its point is reached.

    Args:
        what: What happens at the point.
        limit: Give up after this many, in case the work never ends.
    """
    for point in itertools.count(1):
        fault = Fault(what, point)
        yield fault
        if not fault.struck:
            return
        if point >= limit:
            raise AssertionError(f"the work has more than {limit} await points")


def at_random_awaits(what: Cancel | Raise, *, points: int, rounds: int, seed: int) -> Iterator[Fault]:
    """Yield faults at random points, for work that has too many to try them all.

    Args:
        what: What happens at the point.
        points: How many await points the work has (`count_awaits`).
        rounds: How many faults to yield.
        seed: The same seed gives the same points; print it.
    """
    chosen = random.Random(seed)  # noqa: S311 - to be repeatable, not secret
    for _ in range(rounds):
        yield Fault(what, chosen.randint(1, max(1, points)))
