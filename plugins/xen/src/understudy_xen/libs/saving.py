"""Save a domain through libxenguest, with callbacks in Python.

`save` blocks for as long as the domain is protected. It is called in a thread of its own; the callbacks are called in
that thread, and the interpreter is free for others whenever libxenguest works.

The order of the calls, by the kind of stream::

    PLAIN   [precopy*] suspend                                                       then the stream ends
    REMUS   [precopy*] suspend  postcopy  checkpoint         suspend  postcopy  ...  until checkpoint returns False
    COLO    [precopy*] suspend  checkpoint  postcopy  wait_checkpoint     suspend  ...  likewise

What libxenguest writes between `suspend` and the next callback is all the memory that has changed.

Source: Xen tools/include/xenguest.h (struct save_callbacks, xc_domain_save), tools/libs/guest/xg_sr_save.c (save,
send_domain_memory_checkpointed), 4.17.0; the header's text is the same from 4.14 to 4.22.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Protocol

from understudy_xen.claim import claimed
from understudy_xen.libs.errors import XenCallFailed
from understudy_xen.libs.loading import open_handle
from understudy_xen.libs.toollog import Progress, ToolLog
from understudy_xen.libs.xen import Xen

__all__ = ["Precopy", "PrecopyStats", "SaveCallbacks", "Stream", "save", "save_claimed"]

_log = logging.getLogger("understudy_xen.libxc")
_LIVE: Final = 1  # XCFLAGS_LIVE


class Stream(IntEnum):
    """Kind of stream, xc_stream_type_t."""

    PLAIN = 0
    REMUS = 1
    COLO = 2


class Precopy(IntEnum):
    """What to do after a round of the live copy, XGS_POLICY_*."""

    ABORT = -1  #: give up; the domain runs on
    CONTINUE = 0
    STOP = 1  #: suspend now, and copy what is left


@dataclass(frozen=True, slots=True)
class PrecopyStats:
    """How far the live copy is; told before and after each round."""

    iteration: int  #: rounds begun, from 0
    written_pages: int  #: in all rounds
    dirty_pages: int | None  #: that wait, ``None`` if that is not known at this point


class SaveCallbacks(Protocol):
    """What `save` calls. What a method raises ends the saving, and is raised by `save`."""

    def suspend(self) -> None:
        """Have the domain suspended when this returns."""

    def precopy(self, stats: PrecopyStats) -> Precopy:
        """Decide how the live copy goes on."""

    def postcopy(self) -> None:
        """Let the domain run on: its memory has been read."""

    def checkpoint(self) -> bool:
        """Do what a checkpoint needs after its memory was written, and tell whether there is to be another one."""

    def wait_checkpoint(self) -> bool:
        """Wait until the next checkpoint is due, and tell whether there is to be one; COLO only."""

    def switch_qemu_logdirty(self, domid: int, *, enable: bool) -> None:
        """Have the device model log the pages that it dirties, or not any more; PVH domains have none."""


class _Stats(ctypes.Structure):
    _fields_ = (
        ("iteration", ctypes.c_uint),
        ("total_written", ctypes.c_ulong),
        ("dirty_count", ctypes.c_long),
    )


_Plain = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_Policy = ctypes.CFUNCTYPE(ctypes.c_int, _Stats, ctypes.c_void_p)  # the struct itself, not a pointer
_LogDirty = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_uint, ctypes.c_void_p)


class _Callbacks(ctypes.Structure):
    _fields_ = (
        ("suspend", _Plain),
        ("precopy_policy", _Policy),
        ("postcopy", _Plain),
        ("checkpoint", _Plain),
        ("wait_checkpoint", _Plain),
        ("switch_qemu_logdirty", _LogDirty),
        ("data", ctypes.c_void_p),
    )


class _Bridge:
    # Between libxenguest's conventions and Python's: an exception is kept, and the library told to end.

    def __init__(self, callbacks: SaveCallbacks, on_first_suspend: Callable[[], None]) -> None:
        self.first: BaseException | None = None
        self.ended = False
        self._callbacks = callbacks
        self._on_first_suspend: Callable[[], None] | None = on_first_suspend
        self.struct = _Callbacks(
            suspend=_Plain(lambda _: self._run(self._suspend, 0)),
            precopy_policy=_Policy(self._precopy),
            postcopy=_Plain(lambda _: self._run(self._postcopy, 0)),
            checkpoint=_Plain(lambda _: self._run(self._checkpoint, 0)),
            wait_checkpoint=_Plain(lambda _: self._run(self._wait_checkpoint, 0)),
            switch_qemu_logdirty=_LogDirty(self._log_dirty),
        )

    def _run(self, call: Callable[[], int], failed: int) -> int:
        try:
            return call()
        except BaseException as error:  # noqa: BLE001 - ctypes would print it and go on; `save` raises it
            if self.first is None:
                self.first = error
            return failed

    def _suspend(self) -> int:
        if self._on_first_suspend is not None:
            self._on_first_suspend()
            self._on_first_suspend = None
        self._callbacks.suspend()
        return 1

    def _postcopy(self) -> int:
        self._callbacks.postcopy()
        return 1

    def _checkpoint(self) -> int:
        return self._more(self._callbacks.checkpoint())

    def _wait_checkpoint(self) -> int:
        return self._more(self._callbacks.wait_checkpoint())

    def _more(self, more: bool) -> int:  # noqa: FBT001 - the callbacks' answer
        self.ended = not more
        return int(more)

    def _precopy(self, stats: Any, _data: int | None) -> int:
        def decide() -> int:
            dirty = stats.dirty_count if stats.dirty_count >= 0 else None
            return int(self._callbacks.precopy(PrecopyStats(stats.iteration, stats.total_written, dirty)))

        return self._run(decide, Precopy.ABORT)

    def _log_dirty(self, domid: int, enable: int, _data: int | None) -> int:
        def switch() -> int:
            self._callbacks.switch_qemu_logdirty(domid, enable=bool(enable))
            return 0

        return self._run(switch, -1)


def _say(level: int, context: str, text: str) -> None:
    # Its errors are told by whoever catches ours. And it says "Save failed" of every end that a callback wished.
    _log.log(logging.DEBUG if level >= logging.ERROR else level, "%s: %s", context, text)


def save(
    xen: Xen,
    domid: int,
    fd: int,
    callbacks: SaveCallbacks,
    *,
    stream: Stream = Stream.REMUS,
    live: bool = True,
    recv_fd: int = -1,
    progress: Progress | None = None,
) -> None:
    """Write a domain's memory and state to a file descriptor, checkpoint after checkpoint; blocks.

    To end it from outside, have a callback return False or raise, or break `fd`: a write to a pipe or socket whose
    other end is closed fails.

    Args:
        xen: A handle; this call opens one of its own beside it.
        domid: Of the domain.
        fd: Gets the libxc stream; must be in blocking mode.
        callbacks: Called in this thread.
        stream: Its kind.
        live: Copy while the domain runs, before it is first suspended.
        recv_fd: Where the secondary's list of dirty pages is read; COLO only.
        progress: Told what is being done, and how far it is, until the domain is first suspended.

    Raises:
        ClaimTaken: Somebody else on this host works on the domain.
        BaseException: What a callback raised first; a note says what libxenguest made of it.
        XenCallFailed: libxenguest failed by itself, e.g. because `fd` broke.

    Guarantees:
        The dirty logging that was switched on is switched off. A domain that is suspended at that moment stays
        suspended: the caller resumes it. Returns only when a callback ended it (PLAIN: when all is written).
    """
    with claimed(domid):
        save_claimed(xen, domid, fd, callbacks, stream=stream, live=live, recv_fd=recv_fd, progress=progress)


def save_claimed(
    xen: Xen,
    domid: int,
    fd: int,
    callbacks: SaveCallbacks,
    *,
    stream: Stream = Stream.REMUS,
    live: bool = True,
    recv_fd: int = -1,
    progress: Progress | None = None,
) -> None:
    """Save a domain as `save` does, for a caller who has the claim on it and keeps it."""
    log = ToolLog(_say, progress)
    handle = open_handle(xen.libraries, log.address)
    bridge = _Bridge(callbacks, log.stop_progress)
    function = xen.libraries.guest["xc_domain_save"]
    try:
        ctypes.set_errno(0)
        result = function(
            handle, fd, domid, _LIVE if live else 0, ctypes.byref(bridge.struct), stream, recv_fd
        )
        code = ctypes.get_errno()
    finally:
        xen.libraries.ctrl["xc_interface_close"](handle)
    detail = "; ".join(log.errors)
    if bridge.first is not None:
        bridge.first.add_note(
            f"xc_domain_save of domain {domid} returned {result}" + (f": {detail}" if detail else "")
        )
        raise bridge.first
    # Of COLO it is -1 also when a callback ended it as it should.
    if result and not (stream is Stream.COLO and bridge.ended):
        raise XenCallFailed("xc_domain_save", code, domid, detail)
