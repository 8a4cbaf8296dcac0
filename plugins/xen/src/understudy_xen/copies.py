"""Which copies an agent of this host has made: noted in xenstore before libxl makes the domain.

A later agent takes no other copy for what a dead one has left: the one that ``understudy xen receive`` holds is none of
its own. And it finds what has no name yet: libxl makes a domain first, and names it when some more of it is made. A
note is gone with a restart of the host, like the domains.

Source: docs/misc/xenstore-paths.pandoc (/tool), tools/libs/light/libxl_create.c (libxl__domain_make) of Xen 4.17.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Final

from understudy_xen.xenstore import XenStore

__all__ = ["forget", "note", "noted"]

_NOTES: Final = "/tool/understudy/copies"  # UUID of the domain -> name of the guest


async def note(name: str, known: uuid.UUID) -> None:
    """Note that an agent begins to make a copy of a guest.

    Args:
        name: Of the guest.
        known: The UUID that its domain will have.
    """
    async with await XenStore.open() as store:
        await store.write(f"{_NOTES}/{known}", name)


async def noted(name: str) -> set[uuid.UUID]:
    """Return the UUIDs of the copies of a guest that agents have begun to make, and nobody has seen the end of."""
    async with await XenStore.open() as store:
        return set(await _noted(store, name))


async def forget(name: str) -> None:
    """Note that no agent has a copy of a guest any more. Idempotent."""
    async with await XenStore.open() as store:
        for known in await _noted(store, name):
            await store.rm(f"{_NOTES}/{known}")


async def _noted(store: XenStore, name: str) -> list[uuid.UUID]:
    found = []
    for each in await store.children(_NOTES):
        if await store.get(f"{_NOTES}/{each}") == name:
            with suppress(ValueError):
                found.append(uuid.UUID(each))
    return found
