"""Domains without a hypervisor: what libxenctrl and libxenguest say of a few, and what they do to them.

`Xen` itself is the real one; below it are functions of the libraries' names that know domains in memory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from understudy_xen.libs import ShutdownReason, Stream, Xen, XenVersion
from understudy_xen.libs.loading import Libraries, Library
from understudy_xen.libs.toollog import ToolLog
from understudy_xen.libs.versions import FACTS

VERSION = XenVersion(4, 17)
_HVM, _SHUTDOWN, _PAUSED, _HAP = 1 << 1, 1 << 2, 1 << 3, 1 << 8


@dataclass
class Played:
    """A PVH domain."""

    uuid: uuid.UUID = field(default_factory=uuid.uuid4)
    shutdown: ShutdownReason | None = None
    pauses: int = 0
    resumed: int = 0  #: how often it was let run on

    def suspend(self) -> None:
        self.shutdown = ShutdownReason.SUSPEND


class Domains(dict[int, Played]):
    """Domains by number, and a handle of the hypervisor that has them.

    Args:
        graves: What has a file of its number here was destroyed, by a process.
    """

    def __init__(self, graves: Path) -> None:
        super().__init__()
        self._graves = graves
        self.may_save = threading.Event()  #: a save of a domain waits for this before it asks for its suspend
        self.memory = b"memory"  #: what libxc writes of a domain, each time

    def xen(self) -> Xen:
        functions: list[Callable[..., int]] = [
            self.xc_domain_getinfolist,
            self.xc_domain_resume,
            self.xc_domain_pause,
            self.xc_domain_unpause,
            self.xc_domain_save,
            self.xc_interface_open,
            self.xc_interface_close,
        ]
        library = cast("Library", {each.__name__: each for each in functions})
        libraries = Libraries(VERSION, FACTS[VERSION], library, library, library)
        return Xen(libraries, ToolLog(lambda *_: None), 1)

    def xc_domain_getinfolist(self, _handle: int, first: int, most: int, raw: Any) -> int:
        size = FACTS[VERSION].info_bytes
        for domid in [domid for domid in self if (self._graves / str(domid)).exists()]:
            del self[domid]
        found = sorted(domid for domid in self if domid >= first)[:most]
        for place, domid in enumerate(found):
            ctypes.memmove(ctypes.byref(raw, place * size), _info(domid, self[domid]), size)
        return len(found)

    def xc_domain_resume(self, _handle: int, domid: int, fast: int) -> int:
        assert fast
        if domid not in self:
            return _gone()
        self[domid].shutdown = None
        self[domid].resumed += 1
        return 0

    def xc_domain_pause(self, _handle: int, domid: int) -> int:
        self[domid].pauses += 1
        return 0

    def xc_domain_unpause(self, _handle: int, domid: int) -> int:
        self[domid].pauses -= 1
        return 0

    def xc_interface_open(self, *_: object) -> int:
        return 2

    def xc_interface_close(self, _handle: int) -> int:
        return 0

    def xc_domain_save(self, _handle: int, fd: int, domid: int, *rest: Any) -> int:
        _flags, callbacks, stream, _recv_fd = rest
        self.may_save.wait(10)
        while True:
            if not callbacks._obj.suspend(None):
                ctypes.set_errno(errno.EIO)
                return -1
            assert self[domid].shutdown is ShutdownReason.SUSPEND
            try:
                os.write(fd, self.memory)
            except OSError as broken:
                ctypes.set_errno(broken.errno or 0)
                return -1
            if stream == Stream.PLAIN:
                return 0
            if not callbacks._obj.postcopy(None):
                return -1
            if not callbacks._obj.checkpoint(None):
                return 0


def _gone() -> int:
    ctypes.set_errno(errno.ESRCH)
    return -1


def _info(domid: int, domain: Played) -> bytes:
    # struct xen_domctl_getdomaininfo
    facts = FACTS[VERSION]
    flags = _HVM | _HAP | (_PAUSED if domain.pauses else 0)
    if domain.shutdown is not None:
        flags |= _SHUTDOWN | domain.shutdown << 16
    head = struct.pack("=HHI7QIII16sI", domid, 0, flags, 1, 1, *[0] * 5, 1, 0, 0, domain.uuid.bytes, 0)
    return head.ljust(facts.info_bytes, b"\0")
