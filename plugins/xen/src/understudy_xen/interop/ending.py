"""Bring an end to its end: what must not be left half-way, whoever is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

__all__ = ["whole"]

T = TypeVar("T")


def _nothing() -> None:
    pass


async def whole(work: Coroutine[Any, Any, T], *, cancelled: Callable[[], None] = _nothing) -> T:
    """Await `work`, and let no cancellation of the caller reach it, however often; a second Ctrl-C is one.

    Args:
        work: Has deadlines of its own.
        cancelled: Called at each cancellation, to have it come to its end soon.

    Raises:
        BaseException: What `work` raises.
        CancelledError: The caller was cancelled meanwhile; `work` has come to its end before.
    """
    task = asyncio.ensure_future(work)
    give_up = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            give_up = True
            cancelled()
    if give_up:
        with suppress(Exception):
            task.result()
        raise asyncio.CancelledError
    return task.result()
