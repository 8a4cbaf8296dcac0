"""Guests that suspend when nobody waits for it any more: whoever asked has given up, or is dead. They are resumed.

A guest that has taken up a request to suspend cannot be told to forget it. Linux may take long to stop its processes
(20 s, by default, and then it gives up), and a host that is short of time makes it longer.

Source: Linux drivers/xen/manage.c (do_suspend), kernel/power/process.c (freeze_timeout_msecs).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

from understudy.errors import HypervisorError
from understudy_xen.claim import ClaimTaken
from understudy_xen.libs import Xen
from understudy_xen.savers import saved_by

__all__ = ["LATE_S", "LateSuspends"]

_log = logging.getLogger(__name__)

LATE_S: Final = 120.0  #: for how long a guest that may suspend is looked at
_LOOK_S: Final = 0.1
_AGAIN_S: Final = 1.0  # when it could not be resumed


class LateSuspends:
    """Looks at domains that may suspend yet, and has them resumed.

    Args:
        xen: Returns the hypervisor.
        resume: Lets a suspended domain run on, unless somebody else has the claim on it.
        late_s: For how long one is looked at, seconds.
    """

    def __init__(
        self, xen: Callable[[], Xen], resume: Callable[[int], Awaitable[None]], *, late_s: float = LATE_S
    ) -> None:
        self._xen = xen
        self._resume = resume
        self._late_s = late_s
        self._watched: dict[int, tuple[asyncio.Event, asyncio.Task[None]]] = {}

    def expect(self, domid: int) -> None:
        """Look at a domain from now on, for a time. Idempotent."""
        watched = self._watched.get(domid)
        if watched is None or watched[1].done():
            off = asyncio.Event()
            task = asyncio.get_running_loop().create_task(
                self._watch(domid, off), name=f"xen: late suspend of domain {domid}"
            )
            self._watched[domid] = off, task
            task.add_done_callback(partial(self._forget, domid))

    def _forget(self, domid: int, task: asyncio.Task[None]) -> None:
        if self._watched[domid][1] is task:
            del self._watched[domid]

    async def call_off(self, domid: int) -> None:
        """Look at a domain no more: who begins to work on it resumes it. Idempotent.

        Guarantees:
            Afterwards nothing is done to the domain; what was being done has come to its end.
        """
        watched = self._watched.get(domid)
        if watched is not None:
            off, task = watched
            off.set()
            await asyncio.wait({task})

    async def _watch(self, domid: int, off: asyncio.Event) -> None:
        until = time.monotonic() + self._late_s
        problem = ""
        while not off.is_set() and time.monotonic() < until:
            try:
                if await self._is_settled(domid):
                    return
                problem = ""
            except HypervisorError as error:
                # Xenstored or the device model may be late; and whoever has the claim may die.
                if str(error) != problem:
                    problem = str(error)
                    log = _log.info if isinstance(error, ClaimTaken) else _log.warning
                    log("domain %d has suspended late, and is not resumed yet: %s", domid, problem)
            with suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S if problem else _LOOK_S):
                    await off.wait()
        if problem and not off.is_set():
            _log.error("domain %d may have suspended late, and stays so: %s", domid, problem)

    async def _is_settled(self, domid: int) -> bool:
        info = self._xen().domain(domid)
        if info is None or info.dying:
            return True
        if not info.suspended:
            return False
        if saver := saved_by(domid):
            _log.info("domain %d is suspended while another toolstack saves it (pid %d)", domid, saver)
            return True
        await self._resume(domid)
        _log.warning("domain %d has suspended when nobody waited for it any more: resumed", domid)
        return True
