"""Blocking calls with a deadline, in threads that never hold up the end of the process.

A call into the kernel may hang for ever: a file server that is gone, a lock that somebody else holds. The threads of
asyncio's executors are joined when the interpreter exits, so a single such call would keep the agent alive; and it
keeps its place in the pool, so a few of them stop all others. Here every call has a daemon thread to itself. One that
hangs is left behind, and while too many do, no further call is begun. One that has ended is used again, because who
starts a thread stands still, and with it the event loop, until the thread has had its first turn on a processor.

Source: Python Lib/concurrent/futures/thread.py (_python_exit), Lib/asyncio/base_events.py (shutdown_default_executor).
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Final, TypeVar

__all__ = ["MAX_HUNG", "ThreadsHang", "TimedThreads"]

T = TypeVar("T")
_Work = tuple[Future[Any], Callable[..., Any], tuple[object, ...]]
_Mailbox = SimpleQueue[_Work | None]  # of one thread; ``None`` ends it

MAX_HUNG: Final = 4  # threads past their deadline before further calls fail at once


class ThreadsHang(TimeoutError):
    """So many earlier calls still hang that this one was not begun."""


class TimedThreads:
    """Runs blocking calls, each in a thread that it has to itself.

    Args:
        name: Of the threads, for debuggers.

    Guarantees:
        The threads end when nobody holds this object any more; those that hang then, when they do not any more.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._late: list[Future[object]] = []
        self._idle = _Idle()
        weakref.finalize(self, self._idle.dismiss)

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
        mailbox = self._idle.take()
        if mailbox is None:
            mailbox = SimpleQueue()
            threading.Thread(target=_serve, args=(mailbox, self._idle), name=self._name, daemon=True).start()
        mailbox.put((outcome, call, arguments))
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


class _Idle:
    # The threads that wait for a call. They know this and not the `TimedThreads`, which may go while they work. Without
    # a lock, because `dismiss` may be called by the garbage collector, in the middle of the others.

    def __init__(self) -> None:
        self._mailboxes: list[_Mailbox] = []
        self._dismissed = False

    def take(self) -> _Mailbox | None:
        try:
            return self._mailboxes.pop()
        except IndexError:
            return None

    def give(self, mailbox: _Mailbox) -> None:
        self._mailboxes.append(mailbox)
        if self._dismissed:
            mailbox.put(None)

    def dismiss(self) -> None:
        self._dismissed = True
        for mailbox in list(self._mailboxes):
            mailbox.put(None)


def _serve(mailbox: _Mailbox, idle: _Idle) -> None:
    while (work := mailbox.get()) is not None:
        outcome, call, arguments = work
        error = result = None
        try:
            result = call(*arguments)
        except Exception as problem:  # noqa: BLE001 - the caller raises it
            error = problem
        # Ready for the next call before the caller can make one.
        idle.give(mailbox)
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)
        del work, outcome, call, arguments, error, result  # nothing of a call lives on while the thread waits
