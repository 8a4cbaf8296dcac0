"""A deadline for work that may take hours as long as it moves: it counts from the last progress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from understudy.errors import HypervisorError

if TYPE_CHECKING:
    from understudy.device import Progress

__all__ = ["unless_stalled"]


async def unless_stalled(
    work: Callable[[Progress], Awaitable[None]], progress: Progress, limit_s: float, what: str
) -> None:
    """Do the work, and cancel it when it has told no progress for too long.

    Args:
        work: Called with the progress to tell.
        progress: Told everything that the work tells.
        limit_s: How long it may tell the same, seconds.
        what: Completes the sentence "… has not moved for".

    Raises:
        HypervisorError: It stood still; it was cancelled and has ended.
    """
    loop = asyncio.get_running_loop()
    seen: dict[str, int] = {}
    limit = asyncio.timeout(limit_s)

    def told(what: str, done_bytes: int, total_bytes: int) -> None:
        if seen.get(what) != done_bytes and not limit.expired():
            seen[what] = done_bytes
            limit.reschedule(loop.time() + limit_s)
        progress(what, done_bytes, total_bytes)

    try:
        async with limit:
            await work(told)
    except TimeoutError as late:
        if not limit.expired():
            raise
        raise HypervisorError(f"{what} has not moved for {limit_s:g} s") from late
