"""Watches: what changed, without a loss and without a queue that grows for ever.

A watch says *look again here*, not what is there now, and xenstored may say so more often than something changed. So a
path that waits to be looked at is kept once, however often it is told. Where more different paths wait than are kept,
they become one: the path that is watched, which by the protocol stands for anything below it.

Source: Xen docs/misc/xenstore.txt ("Watches", WATCH_EVENT).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from understudy_xen.xenstore.errors import XenStoreLost

__all__ = ["PATHS_KEPT", "Watch"]

PATHS_KEPT = 1024  #: different paths that may wait


class Watch(AsyncIterator[str]):
    """The changes at one path and below, as an endless iterator of paths; made by `XenStore.watch`.

    The first path comes at once: it is the watched one. What comes afterwards is a path at which something changed
    since it came last, or the watched path itself for *anything below*.

    Args:
        path: What is watched.
        kept: How many different paths may wait before they become one.

    Guarantees:
        A change is never lost: after it, its path or the watched one comes. When the connection is lost the iterator
        raises at once, whatever still waits.
    """

    def __init__(self, path: str, *, kept: int = PATHS_KEPT) -> None:
        self.path = path
        self.collapses = 0  #: how often waiting paths became one
        self._kept = kept
        self._waiting: dict[str, None] = {}
        self._come = asyncio.Event()
        self._lost: XenStoreLost | None = None

    def tell(self, path: str) -> None:
        """Take note of an event; called by the client."""
        if len(self._waiting) >= self._kept and path not in self._waiting:
            self._waiting.clear()
            self.collapses += 1
            path = self.path
        self._waiting[path] = None
        self._come.set()

    def lose(self, cause: XenStoreLost) -> None:
        """End with an error; called by the client."""
        self._lost = cause
        self._come.set()

    async def next(self, timeout_s: float) -> str | None:
        """Return the next path, or ``None`` if none comes in time.

        Args:
            timeout_s: How long to wait, seconds.

        Raises:
            XenStoreLost: The connection is gone.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await anext(self)
        except TimeoutError:
            return None

    async def __anext__(self) -> str:
        await self._come.wait()
        if self._lost is not None:
            raise XenStoreLost(str(self._lost)) from self._lost
        path = next(iter(self._waiting))
        del self._waiting[path]
        if not self._waiting:
            self._come.clear()
        return path
