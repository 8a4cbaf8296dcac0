"""Who has a domain paused: the hypervisor only counts, and an administrator may pause it, too.

How many of the pauses are this agent's is noted beside the domain, in xenstore, so that an agent which is started
later takes back those of its predecessor, and no others. Without xenstored a pause holds all the same; it is only not
noted.

Source: xen/common/domain.c (domain_pause_by_systemcontroller: controller_pause_count) of Xen 4.17.
"""

from __future__ import annotations

import logging
from typing import Protocol

from understudy_xen.libs import Xen
from understudy_xen.xenstore import XenStore, XenStoreError

__all__ = ["PauseNotes", "Pauses", "StoredPauses"]

_log = logging.getLogger(__name__)


class PauseNotes(Protocol):
    """Where the number of pauses is kept that are not an administrator's."""

    async def read(self) -> int:
        """Return it, 0 where nothing is noted or can be read."""

    async def write(self, count: int) -> None:
        """Note it, if possible."""


class StoredPauses:
    """The number of a domain's pauses that are an agent's, in xenstore; it goes with the domain.

    Args:
        domid: Of the domain.
    """

    def __init__(self, domid: int) -> None:
        self._path = f"/local/domain/{domid}/understudy/pauses"

    async def read(self) -> int:
        """Return it, 0 where nothing is noted or can be read."""
        try:
            async with await XenStore.open() as store:
                noted = await store.get(self._path) or ""
        except XenStoreError as error:
            _log.warning("how often a domain was paused is not known: %s", error)
            return 0
        return int(noted) if noted.isdecimal() else 0

    async def write(self, count: int) -> None:
        """Note it, if possible."""
        try:
            async with await XenStore.open() as store:
                await (store.write(self._path, str(count)) if count else store.rm(self._path))
        except XenStoreError as error:
            _log.warning("how often a domain is paused could not be noted: %s", error)


class Pauses:
    """The pauses of one session; for its devices the service `understudy.services.GuestPause`.

    Args:
        xen: The hypervisor.
        domid: Of the domain.
        notes: What outlives this object.
    """

    def __init__(self, xen: Xen, domid: int, notes: PauseNotes) -> None:
        self._xen = xen
        self._domid = domid
        self._notes = notes
        self._held = False  # for a device
        self._frozen = False  # fenced

    async def pause(self) -> None:
        """Stop the guest; it may be stopped already."""
        if not self._held:
            self._xen.pause(self._domid)
            self._held = True
            await self._note()

    async def proceed(self) -> None:
        """Let it run again, unless something else keeps it stopped."""
        if self._held:
            self._held = False
            self._xen.unpause(self._domid)
            await self._note()

    async def freeze(self) -> None:
        """Stop the guest: it is fenced. One that an earlier life of this agent has stopped is so already."""
        if self._frozen:
            return
        info = self._xen.domain(self._domid)
        if info is not None and not info.dying:
            earlier = await self._notes.read() - self._held
            if info.paused and earlier > 0:
                return  # stopped and noted by that life, however often
            self._xen.pause(self._domid)
        self._frozen = True
        await self._note()

    async def end(self) -> None:
        """Take back all pauses of this session and of an earlier life of this agent; an administrator's stay."""
        count = max(await self._notes.read(), self._held + self._frozen)
        self._held = self._frozen = False
        for _ in range(count):
            info = self._xen.domain(self._domid)
            if info is not None and info.paused and not info.dying:
                self._xen.unpause(self._domid)
        if count:
            await self._notes.write(0)

    async def _note(self) -> None:
        await self._notes.write(self._held + self._frozen)
