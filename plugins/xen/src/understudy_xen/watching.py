"""What happens to a domain without being asked for: it shuts down, crashes, is gone, or somebody else saves it.

xenstored tells all that watch ``@releaseDomain`` when any domain shuts down or goes; what it was the hypervisor says.
Other toolstacks that save it are seen by savers.py.

Source: docs/misc/xenstore.txt (@releaseDomain), xen/include/public/sched.h (SHUTDOWN_*) of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Final, Self

from understudy.errors import HypervisorError
from understudy.hypervisor import DomainEvent, DomainEventKind
from understudy_xen.libs import ShutdownReason, Xen
from understudy_xen.savers import Savers
from understudy_xen.xenstore import XenStore, XenStoreError

__all__ = ["DomainWatch"]

_log = logging.getLogger(__name__)

_LOOK_S: Final = 1.0  # also without a word of xenstored, which may be dead
_AGAIN_S: Final = 0.5
_EXEC_S: Final = 0.005  # for a process that has begun to execute a program to look like it

_MEANING: Final[Mapping[ShutdownReason, tuple[DomainEventKind, str]]] = {
    ShutdownReason.POWEROFF: (DomainEventKind.SHUTDOWN, "the guest has shut down"),
    ShutdownReason.REBOOT: (DomainEventKind.SHUTDOWN, "the guest has shut down to reboot; start it again"),
    ShutdownReason.CRASH: (DomainEventKind.PANIC, "the guest has crashed"),
    ShutdownReason.WATCHDOG: (DomainEventKind.PANIC, "the guest's watchdog has expired"),
    ShutdownReason.SOFT_RESET: (
        DomainEventKind.SHUTDOWN,
        "the guest asks for a soft reset, which ends its domain",
    ),
    ShutdownReason.UNKNOWN: (DomainEventKind.PANIC, "the guest was shut down for a reason that is not known"),
}


class DomainWatch:
    """Looks after one domain.

    Args:
        xen: The hypervisor.
        domid: The domain.
    """

    def __init__(self, xen: Xen, domid: int) -> None:
        self._xen = xen
        self._domid = domid
        self._queue: asyncio.Queue[DomainEvent] = asyncio.Queue()
        self._told: set[DomainEventKind] = set()
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._savers = Savers(domid, self._saved)

    @classmethod
    def begin(cls, xen: Xen, domid: int) -> Self:
        """Look after a domain from now on."""
        watch = cls(xen, domid)
        watch._task = watch._loop.create_task(watch._look_after(), name=f"xen: domain {domid}")
        if (told := watch._savers.fileno()) >= 0:
            watch._loop.add_reader(told, watch._look_for_savers)
        return watch

    def intact(self) -> None:
        """See that nobody else has begun to save the domain since this object was made; from any thread.

        Raises:
            HypervisorError: Somebody has, and was ended. What libxc read of the domain since may lack pages.
        """
        if found := self._savers.look():
            raise HypervisorError(found)

    async def events(self) -> AsyncIterator[DomainEvent]:
        """Yield what happens, each thing once."""
        while True:
            yield await self._queue.get()

    async def close(self) -> None:
        """End looking. Idempotent."""
        if (told := self._savers.fileno()) >= 0:
            self._loop.remove_reader(told)
        self._savers.close()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait(
                {task}
            )  # whatever it has ended with, it keeps nobody from letting go of the rest

    async def _look_after(self) -> None:
        while True:
            try:
                async with await XenStore.open() as store, store.watch("@releaseDomain") as watch:
                    while True:
                        await self._look_for_destroyer(store)
                        self._look()
                        await watch.next(_LOOK_S)
            except XenStoreError as lost:
                # The domain is looked at all the same; nothing of the checkpoint's own way goes through here.
                _log.warning("domain %d is looked after without xenstored: %s", self._domid, lost)
            self._look()
            await asyncio.sleep(_AGAIN_S)

    def _look_for_savers(self) -> None:
        self._savers.look()
        if self._savers.waiting:
            self._loop.call_later(_EXEC_S, self._look_for_savers)

    def _saved(self, found: str) -> None:
        # In whatever thread has found it.
        with suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._tell, DomainEventKind.STREAM_LOST, found)

    async def _look_for_destroyer(self, store: XenStore) -> None:
        # libxl pauses a domain, has its interfaces closed, and then destroys it. The kernel closes an interface when
        # the last packet has left its gate: waited for, the end would be told when a suspend is overdue.
        try:
            info = self._xen.domain(self._domid)
        except HypervisorError:
            return  # told by whoever looks next
        if info is None or not info.paused:
            return
        backends = f"/local/domain/0/backend/vif/{self._domid}"
        for devid in await store.children(backends):
            if await store.get(f"{backends}/{devid}/online") == "0":
                self._tell(DomainEventKind.GONE, f"domain {self._domid} is being destroyed")

    def _look(self) -> None:
        self._savers.look()
        try:
            info = self._xen.domain(self._domid)
        except HypervisorError as error:
            _log.warning("domain %d cannot be looked at: %s", self._domid, error)
            return
        if info is None or info.dying:
            self._tell(DomainEventKind.GONE, f"domain {self._domid} is gone")
        elif info.shutdown is not None and (meaning := _MEANING.get(info.shutdown)) is not None:
            # A suspend is no event: it is a checkpoint's, or an administrator's, who destroys the domain next.
            self._tell(*meaning)

    def _tell(self, kind: DomainEventKind, detail: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._queue.put_nowait(DomainEvent(kind, detail))
