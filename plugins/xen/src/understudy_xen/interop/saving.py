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
from understudy_xen.claim import claimed
from understudy_xen.devicemodel import DeviceModel
from understudy_xen.interop.ending import BACK_S, Outcome, standing, whole
from understudy_xen.libs import DomainType, Precopy, PrecopyStats, Stream, Xen, open_xen, save_claimed
from understudy_xen.live import LiveGuest
from understudy_xen.primary import stream_head
from understudy_xen.xenstore import XenStore

__all__ = ["save_to"]

_FEW_PAGES: Final = 50  # libxc's own bounds of a live copy
_MOST_ROUNDS: Final = 5
_DRAFT: Final = ".part"


async def save_to(name: str, file: Path, outcome: Outcome, *, keep: bool) -> int:
    """Save a running guest to a file.

    Args:
        name: Of the guest's domain.
        file: Gets the stream; replaced if it is there.
        outcome: Kept true.
        keep: Let the guest run on. Its disks then change under what was saved.

    Returns:
        The file's size in bytes.

    Raises:
        GuestNotFound: There is no such domain.
        ClaimTaken: It is being protected or saved already; nothing was done.
        HypervisorError: It could not be saved, or the file not be written; or it was, and the domain was not destroyed,
            or not resumed. `outcome` says which.

    Guarantees:
        `file` is whole and on its disk, or as it was before; never a part. Only then the guest is destroyed. On failure
        and on cancellation before the file is in its place the guest runs on; a cancellation after that changes
        nothing.
    """
    outcome.said = f"nothing was done: {file} is as it was"
    with open_xen() as xen:
        async with await XenStore.open() as store:
            domain = await inventory.find(store, xen, name)
        if domain is None:
            raise GuestNotFound(f"there is no domain {name} on this host")
        head = stream_head(await toolstack.configuration(domain.domid))
        model = DeviceModel(domain.domid) if domain.kind is DomainType.HVM else None
        # To the end: let go by somebody else while its file goes to the disk, it would be destroyed after it ran on.
        with claimed(domain.domid):
            live = await LiveGuest.open(xen, domain.domid, model, has_claim=True)
            work = _Work(xen, live, name, file, outcome)
            saving = _Saving(live, keep=keep)
            writing = asyncio.ensure_future(asyncio.to_thread(_write, xen, saving, work.draft, head))
            try:
                try:
                    await asyncio.shield(writing)
                except BaseException:
                    saving.given_up = True
                    await whole(work.undo(writing))
                    raise
                return await whole(work.finish(keep=keep))
            finally:
                live.close()


class _Work:
    # What is done around libxc's part, and said of it.

    def __init__(self, xen: Xen, live: LiveGuest, name: str, file: Path, outcome: Outcome) -> None:
        # Of this process alone: another one that saves to the same file must not cut it short.
        self.draft = file.with_name(f"{file.name}.{os.getpid()}{_DRAFT}")
        self._xen = xen
        self._live = live
        self._name = name
        self._file = file
        self._file_says = "is as it was"
        self._outcome = outcome

    async def undo(self, writing: asyncio.Future[None]) -> None:
        self._say("may be suspended")
        await asyncio.wait({writing})
        await self._back()

    async def finish(self, *, keep: bool) -> int:
        self._say("is suspended")
        try:
            size = await asyncio.to_thread(_put, self.draft, self._file)
            self._file_says = "is whole, but perhaps not on its disk yet"
            await asyncio.to_thread(_sync, self._file.parent)
        except HypervisorError:
            await self._back()
            raise
        saved = f"{self._name} is saved in {self._file}, {size} bytes"
        self._outcome.said = f"{saved}; the guest may be suspended"
        try:
            if keep:
                await asyncio.to_thread(self._live.bring_back, BACK_S)
            else:
                await toolstack.destroy(self._xen, self._live.domid)
        finally:
            self._outcome.said = f"{saved}; the guest {standing(self._xen, self._live)}"
        self._outcome.good = True
        return size

    async def _back(self) -> None:
        with suppress(OSError):
            await asyncio.to_thread(self.draft.unlink, missing_ok=True)
        await asyncio.to_thread(self._live.bring_back, BACK_S)
        self._say(standing(self._xen, self._live))

    def _say(self, doing: str) -> None:
        self._outcome.said = f"{self._name} {doing}, and {self._file} {self._file_says}"


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
            call = partial(save_claimed, xen, saving.live.domid, stream=Stream.PLAIN, live=saving.keep)
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
    except OSError as failed:
        raise HypervisorError(f"{file} cannot be written: {failed}") from failed
    return size


def _sync(directory: Path) -> None:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as failed:
        raise HypervisorError(f"what {directory} holds cannot be brought to its disk: {failed}") from failed
