"""Blocking calls with a deadline, in threads that never hold up the end of the process.

A call into the kernel may hang for ever: a file server that is gone, a lock that somebody else holds. The threads of
asyncio's executors are joined when the interpreter exits, so a single such call would keep the agent alive; and it
keeps its place in the pool, so a few of them stop all others. Here every call has a daemon thread of its own. One that
hangs is left behind, and while too many do, no further one is started.

Source: Python Lib/concurrent/futures/thread.py (_python_exit), Lib/asyncio/base_events.py (shutdown_default_executor).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

__all__ = ["MAX_HUNG", "ThreadsHang", "TimedThreads"]

T = TypeVar("T")

MAX_HUNG: Final = 4  # threads past their deadline before further calls fail at once


class ThreadsHang(TimeoutError):
    """So many earlier calls still hang that this one was not begun."""


class TimedThreads:
    """Runs blocking calls, each in a thread of its own.

    Args:
        name: Of the threads, for debuggers.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._late: list[Future[object]] = []

    @property
    def hung(self) -> int:
        """How many calls go on although nobody waits for them any more."""
        self._late = [outcome for outcome in self._late if not outcome.done()]
        return len(self._late)

    async def run(self, call: Callable[..., T], *arguments: object, timeout_s: float) -> T:
        """Return what `call` returns; what it raises is raised.

        Args:
            call: May block; must touch nothing of the event loop's.
            arguments: Passed to it.
            timeout_s: How long to wait, seconds.

        Raises:
            TimeoutError: No answer in time. The call may still be under way, and end much later.
            ThreadsHang: It was not begun, because `MAX_HUNG` earlier ones have not ended yet.

        Guarantees:
            Ends at the deadline or the caller's cancellation at the latest, whatever the call does.
        """
        if self.hung >= MAX_HUNG:
            raise ThreadsHang(f"{self.hung} earlier calls still hang")
        outcome: Future[T] = Future()
        outcome.set_running_or_notify_cancel()  # a caller that goes away ends nothing in the kernel
        work = (outcome, call, arguments)
        threading.Thread(target=_settle, args=work, name=self._name, daemon=True).start()
        answer = asyncio.wrap_future(outcome)
        try:
            done, _ = await asyncio.wait([answer], timeout=timeout_s)
            if not done:
                raise TimeoutError(f"no answer within {timeout_s:g} s")
            return answer.result()
        finally:
            answer.cancel()
            if not outcome.done():
                self._late.append(outcome)  # type: ignore[arg-type]


def _settle(outcome: Future[T], call: Callable[..., T], arguments: tuple[object, ...]) -> None:
    try:
        outcome.set_result(call(*arguments))
    except Exception as error:  # noqa: BLE001 - the caller raises it
        outcome.set_exception(error)
