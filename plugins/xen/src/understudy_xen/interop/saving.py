"""Save a guest to a file that ``xl restore`` reads.

Memory and state are libxc's, as with ``xl save``; what stands around them is written here. With `keep` the guest runs
while most of its memory is copied, where ``xl save -c`` suspends it for all of that time.

Source: tools/xl/xl_saverestore.c (save_domain), tools/libs/light/libxl_dom_save.c and libxl_stream_write.c of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from understudy.errors import GuestNotFound, HypervisorError
from understudy_xen import inventory, toolstack
from understudy_xen.devicemodel import DeviceModel
from understudy_xen.interop.ending import whole
from understudy_xen.libs import DomainType, Precopy, PrecopyStats, Stream, Xen, open_xen, save
from understudy_xen.live import SUSPEND_S, LiveGuest
from understudy_xen.primary import stream_head
from understudy_xen.xenstore import XenStore

__all__ = ["save_to"]

_FEW_PAGES: Final = 50  # libxc's own bounds of a live copy
_MOST_ROUNDS: Final = 5
_DRAFT: Final = ".part"


async def save_to(name: str, file: Path, *, keep: bool) -> int:
    """Save a running guest to a file.

    Args:
        name: Of the guest's domain.
        file: Gets the stream; replaced if it is there.
        keep: Let the guest run on. Its disks then change under what was saved.

    Returns:
        The file's size in bytes.

    Raises:
        GuestNotFound: There is no such domain.
        HypervisorError: It could not be saved, or the file not be written.

    Guarantees:
        `file` is whole and on its disk, or as it was before; never a part. Only then the guest is destroyed. On failure
        and on cancellation it runs on.
    """
    with open_xen() as xen:
        async with await XenStore.open() as store:
            domain = await inventory.find(store, xen, name)
        if domain is None:
            raise GuestNotFound(f"there is no domain {name} on this host")
        head = stream_head(await toolstack.configuration(domain.domid))
        model = DeviceModel(domain.domid) if domain.kind is DomainType.HVM else None
        live = LiveGuest(xen, domain.domid, model)
        draft = file.with_name(file.name + _DRAFT)
        saving = _Saving(live, keep=keep)
        work = asyncio.ensure_future(asyncio.to_thread(_write, xen, saving, draft, head))
        try:
            await asyncio.shield(work)
            size = await asyncio.to_thread(_put, draft, file)
        except BaseException:
            saving.given_up = True
            await whole(_undo(live, work, draft))
            raise
        try:
            if keep:
                await whole(asyncio.to_thread(live.bring_back, SUSPEND_S))
            else:
                await whole(toolstack.destroy(xen, domain.domid))
        finally:
            live.close()
        return size


async def _undo(live: LiveGuest, work: asyncio.Future[None], draft: Path) -> None:
    try:
        await asyncio.wait({work})
        with suppress(OSError):
            await asyncio.to_thread(draft.unlink, missing_ok=True)
        await asyncio.to_thread(live.bring_back, SUSPEND_S)
    finally:
        live.close()


class _Saving:
    # libxc's callbacks; a stream without checkpoints asks for few of them.

    given_up = False

    def __init__(self, live: LiveGuest, *, keep: bool) -> None:
        self.live = live
        self.keep = keep

    def suspend(self) -> None:
        if self.given_up:
            raise HypervisorError("the save was given up")
        self.live.suspend()

    def precopy(self, stats: PrecopyStats) -> Precopy:
        if self.given_up:
            return Precopy.ABORT
        few = stats.dirty_pages is not None and stats.dirty_pages < _FEW_PAGES
        return Precopy.STOP if few or stats.iteration >= _MOST_ROUNDS else Precopy.CONTINUE

    def postcopy(self) -> None:
        raise AssertionError("a stream without checkpoints has no such step")

    def checkpoint(self) -> bool:
        raise AssertionError("a stream without checkpoints has no such step")

    def wait_checkpoint(self) -> bool:
        raise AssertionError("a stream without checkpoints has no such step")

    def switch_qemu_logdirty(self, domid: int, *, enable: bool) -> None:  # noqa: ARG002 - libxc's signature
        self.live.log_dirty(enable=enable)


def _write(xen: Xen, saving: _Saving, draft: Path, head: bytes) -> None:
    try:
        with draft.open("wb") as file:
            file.write(head)
            file.flush()
            call = partial(save, xen, saving.live.domid, stream=Stream.PLAIN, live=saving.keep)
            call(file.fileno(), saving)
            # libxc wrote by the descriptor, which the file object does not know.
            file.seek(0, os.SEEK_END)
            for record in saving.live.last_records():
                file.write(record)
            file.flush()
            os.fsync(file.fileno())
    except OSError as failed:
        raise HypervisorError(f"{draft} cannot be written: {failed}") from failed


def _put(draft: Path, file: Path) -> int:
    # Moves the whole file to its place, and returns its size.
    try:
        size = draft.stat().st_size
        draft.replace(file)
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return size
    except OSError as failed:
        raise HypervisorError(f"{file} cannot be written: {failed}") from failed
