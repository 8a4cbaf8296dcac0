"""Bring an end to its end, whoever is cancelled, and know what to say of it: nothing else remembers what was done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from understudy.errors import HypervisorError
from understudy_xen.libs import Xen
from understudy_xen.live import LiveGuest

__all__ = ["BACK_S", "Outcome", "standing", "whole"]

T = TypeVar("T")

#: For a guest to do what it was asked for and nobody waits for any more; nobody would resume it after this process.
BACK_S: Final = 60.0


@dataclass(slots=True)
class Outcome:
    """What a command has done so far, for whoever interrupts it or finds it failed.

    It is true at any time: what may be left half-way is said before the step, and what is done after it.
    """

    said: str = "nothing was done"  #: what is the case now, one clause
    good: bool = False  #: what the command is for is done


def standing(xen: Xen, live: LiveGuest) -> str:
    """Return what a guest does that was let go, a verb."""
    try:
        info = xen.domain(live.domid)
    except HypervisorError as error:
        return f"is in a state that is not known ({error})"
    if info is None or info.dying:
        return "is gone"
    if info.suspended:
        return "is suspended"
    if info.shutdown is not None:
        return "has shut down"
    if info.paused:
        return "is paused"
    return "runs on" + (", but may suspend yet: it has taken up the request to" if live.late else "")


def _nothing() -> None:
    pass


async def whole(work: Coroutine[Any, Any, T], *, cancelled: Callable[[], None] = _nothing) -> T:
    """Await `work`, and let no cancellation of the caller reach it, however often; a second Ctrl-C is one.

    Args:
        work: Has deadlines of its own.
        cancelled: Called at each cancellation, to have it come to its end soon.

    Raises:
        BaseException: What `work` raises, also if the caller was cancelled meanwhile.
        CancelledError: The caller was cancelled meanwhile; `work` has come to a good end before.
    """
    task = asyncio.ensure_future(work)
    give_up = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            give_up = True
            cancelled()
    result = task.result()
    if give_up:
        raise asyncio.CancelledError
    return result
