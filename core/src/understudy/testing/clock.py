"""An event loop with virtual time: when every task waits, the clock jumps to the next timer.

Hours pass in milliseconds, and the order of events is the same in every run, because nothing depends on how fast the
machine is. Real file descriptors still work (ready ones are served before time moves), and so do threads, but what
they do is not virtual: a test that uses them is only as deterministic as they are.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

__all__ = ["NothingHappens", "TasksLeft", "VirtualLoop", "in_virtual_time", "run"]

T = TypeVar("T")
P = ParamSpec("P")

Ready = list[tuple[selectors.SelectorKey, int]]


class NothingHappens(Exception):
    """Every task waits, no timer is set, and nothing came from outside: the program under test is stuck."""


class TasksLeft(AssertionError):
    """The main coroutine ended but tasks that it started run on."""


class _JumpingSelector(selectors.DefaultSelector):
    # Asked to wait, it moves the clock instead.

    def __init__(self, patience_s: float) -> None:
        super().__init__()
        self.now = 1000.0
        self.patience_s = patience_s

    def select(self, timeout: float | None = None) -> Ready:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is not None:
            self.now += timeout
            return ready
        # No timer: only a thread or another process can wake us.
        ready = super().select(self.patience_s)
        if not ready:
            raise NothingHappens(f"no timer is set and nothing came in {self.patience_s:g} s of real time")
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose time is virtual.

    Args:
        patience_s: Real seconds to wait for a thread or a file descriptor when no timer is set.
    """

    def __init__(self, patience_s: float = 5.0) -> None:
        self._jumping = _JumpingSelector(patience_s)
        super().__init__(self._jumping)

    def time(self) -> float:
        """Return the virtual time, seconds; it begins at 1000."""
        return self._jumping.now


def run(main: Coroutine[Any, Any, T], *, patience_s: float = 5.0, strict: bool = True) -> T:
    """Run a coroutine in virtual time and return its result; `asyncio.run` for tests.

    Args:
        main: What to run.
        patience_s: As for `VirtualLoop`.
        strict: Refuse tasks that are left when `main` has returned.

    Raises:
        TasksLeft: `main` returned, and tasks that it started run on, or ignore their cancellation; they are named.
        NothingHappens: The program is stuck.
    """

    async def watched() -> T:
        result = await main
        # A task that is done but for its last callback is not left behind.
        await asyncio.sleep(0)
        left = sorted(
            str(task.get_coro()) for task in asyncio.all_tasks() if task is not asyncio.current_task()
        )
        if left and strict:
            raise TasksLeft(f"{len(left)} tasks run on: {', '.join(left)}")
        return result

    loop = VirtualLoop(patience_s)
    try:
        return loop.run_until_complete(watched())
    finally:
        try:
            _end_all(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()


def _end_all(loop: VirtualLoop) -> None:
    # Unlike asyncio.run, which waits for ever for a task that swallows its cancellation.
    for _ in range(10):
        if not (left := asyncio.all_tasks(loop)):
            return
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.wait(left, timeout=60))
    deaf = ", ".join(str(task.get_coro()) for task in asyncio.all_tasks(loop))
    raise TasksLeft(f"tasks that ignore their cancellation: {deaf}")


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Turn an ``async def`` test into a plain one that runs in virtual time; any test runner can call it."""

    @functools.wraps(test)
    def runs(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(test(*args, **kwargs))

    return runs
