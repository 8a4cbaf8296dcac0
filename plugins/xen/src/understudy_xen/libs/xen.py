"""The hypervisor of this host: its facts, its domains, and what is done to a domain.

The calls are short and may be made from any thread, also from the event loop's: each is one hypercall or two. What is
long has a module of its own: `understudy_xen.libs.saving`, `understudy_xen.libs.suspending`.

Source: Xen tools/include/xenctrl.h, xen/include/public/{domctl,sysctl,sched}.h, xen/include/public/hvm/params.h.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Final, Self

from understudy_xen.libs.domain import FLAGS_AT, DomainInfo, ShutdownReason, parse, shutdown_of
from understudy_xen.libs.errors import DomainGone
from understudy_xen.libs.loading import Libraries, call, find_libraries, open_handle
from understudy_xen.libs.toollog import ToolLog
from understudy_xen.libs.versions import XenVersion

__all__ = ["PAGE_BYTES", "Capabilities", "HvmParam", "Xen", "open_xen"]

PAGE_BYTES: Final = 4096
_log = logging.getLogger("understudy_xen.libxc")
_BATCH: Final = 64  # domains asked for at once
_CAPABILITIES_AT: Final = 28
_BITS: Final = MappingProxyType({"hvm": 0, "pv": 1, "directio": 2, "hap": 3, "shadow": 4})


class HvmParam(IntEnum):
    """Parameters of PVH and HVM domains that are read here."""

    CALLBACK_IRQ = 0  #: how the guest wants to be told of events; 0 as long as it has no PV drivers
    STORE_PFN = 1
    STORE_EVTCHN = 2
    ACPI_S_STATE = 14  #: not 0 while the guest sleeps
    CONSOLE_PFN = 17
    CONSOLE_EVTCHN = 18


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this hypervisor can do, and what memory it has; a page is 4096 bytes."""

    hvm: bool  #: HVM and PVH guests
    pv: bool  #: PV guests
    hap: bool  #: hardware assisted paging: dirty pages of HVM and PVH guests are found through it
    shadow: bool  #: shadow paging: without it dirty pages of a PV guest cannot be found, and it cannot be protected
    directio: bool
    total_pages: int
    free_pages: int
    outstanding_pages: int  #: promised to domains, and not given yet


class Xen:
    """A handle of the running hypervisor.

    Make one with `open_xen`; it is a context manager. It is not to be used in a child after fork(2).

    Args:
        libraries: Of the running version.
        log: Of the handle.
        handle: Of libxenctrl.
    """

    def __init__(self, libraries: Libraries, log: ToolLog, handle: int) -> None:
        self.libraries = libraries
        self._log = log
        self._handle: int | None = handle

    @property
    def version(self) -> XenVersion:
        """Major and minor version of the hypervisor and of its libraries."""
        return self.libraries.version

    @property
    def handle(self) -> int:
        """The handle of libxenctrl.

        Raises:
            ValueError: It was closed.
        """
        if self._handle is None:
            raise ValueError("this handle of Xen was closed")
        return self._handle

    def close(self) -> None:
        """Close the handle; it may be closed already."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self.libraries.ctrl["xc_interface_close"](handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def capabilities(self) -> Capabilities:
        """Return what the hypervisor can do, and how much memory it has now."""
        facts = self.libraries.facts
        raw = ctypes.create_string_buffer(facts.physinfo_bytes)
        call(self.libraries.ctrl["xc_physinfo"], self.handle, raw)
        (bits,) = struct.unpack_from("=I", raw, _CAPABILITIES_AT)
        total, free, _scrub, outstanding = struct.unpack_from("=4Q", raw, facts.pages_at)
        has = {name: bool(bits & 1 << bit) for name, bit in _BITS.items()}
        return Capabilities(**has, total_pages=total, free_pages=free, outstanding_pages=outstanding)

    def domain(self, domid: int) -> DomainInfo | None:
        """Return what is known of a domain, ``None`` if there is none with this number."""
        raw = self._info(domid)
        return None if raw is None else parse(raw.raw, self.libraries.facts)

    def domains(self) -> Iterator[DomainInfo]:
        """Yield every domain, dom0 and dying ones too, in the order of their numbers."""
        size = self.libraries.facts.info_bytes
        raw = ctypes.create_string_buffer(size * _BATCH)
        first = 0
        while True:
            found = call(self.libraries.ctrl["xc_domain_getinfolist"], self.handle, first, _BATCH, raw)
            for index in range(found):
                info = parse(raw.raw[index * size : (index + 1) * size], self.libraries.facts)
                first = info.domid + 1
                yield info
            if found < _BATCH:
                return

    def find(self, wanted: uuid.UUID) -> list[DomainInfo]:
        """Return the domains with a UUID that are not being destroyed; two while a copy is beside its original."""
        return [info for info in self.domains() if info.uuid == wanted and not info.dying]

    def shutdown_reason(self, domid: int) -> ShutdownReason | None:
        """Return why a domain is shut down, ``None`` while it is not; cheap enough for each millisecond.

        Raises:
            DomainGone: There is no such domain.
        """
        raw = self._info(domid)
        if raw is None:
            raise DomainGone("xc_domain_getinfolist", 3, domid)
        return shutdown_of(struct.unpack_from("=I", raw, FLAGS_AT)[0])

    def pause(self, domid: int) -> None:
        """Take a domain off the processors; pauses are counted, each needs its `unpause`."""
        call(self.libraries.ctrl["xc_domain_pause"], self.handle, domid, domid=domid)

    def unpause(self, domid: int) -> None:
        """Undo one `pause`."""
        call(self.libraries.ctrl["xc_domain_unpause"], self.handle, domid, domid=domid)

    def shutdown(self, domid: int, reason: ShutdownReason) -> None:
        """Shut a domain down from outside, as if it had done so itself; SUSPEND suspends it without its help."""
        call(self.libraries.ctrl["xc_domain_shutdown"], self.handle, domid, int(reason), domid=domid)

    def destroy(self, domid: int) -> None:
        """End a domain at once; its devices, its device model and its part of xenstore stay.

        `understudy_xen.restorer` does it with all that belongs to it, as ``xl destroy``. This one stops it for certain.
        """
        call(self.libraries.ctrl["xc_domain_destroy"], self.handle, domid, domid=domid)

    def resume(self, domid: int, *, fast: bool = True) -> None:
        """Let a suspended domain run on.

        Args:
            domid: Of the domain.
            fast: Its suspend call returns 1, *cancelled*, and it goes on with its devices as they are. Otherwise the
                guest believes it was restored, and makes everything anew.
        """
        facts = self.libraries.facts
        library = self.libraries.guest if facts.resume_in == "libxenguest" else self.libraries.ctrl
        call(library["xc_domain_resume"], self.handle, domid, int(fast), domid=domid)

    def hvm_param(self, domid: int, param: HvmParam) -> int:
        """Return a parameter of a PVH or HVM domain."""
        value = ctypes.c_uint64()
        call(
            self.libraries.ctrl["xc_hvm_param_get"],
            self.handle,
            domid,
            int(param),
            ctypes.byref(value),
            domid=domid,
        )
        return value.value

    def _info(self, domid: int) -> ctypes.Array[ctypes.c_char] | None:
        # The hypervisor answers with the first domain from this number on.
        raw = ctypes.create_string_buffer(self.libraries.facts.info_bytes)
        found = call(self.libraries.ctrl["xc_domain_getinfolist"], self.handle, domid, 1, raw)
        return raw if found == 1 and struct.unpack_from("=H", raw)[0] == domid else None


def open_xen() -> Xen:
    """Open the hypervisor that runs under this kernel.

    Raises:
        XenUnavailable: It cannot be used: no Xen, no dom0, an unknown version, a library missing, no privilege. The
            error says which, and what would change it.
    """
    libraries = find_libraries()
    log = ToolLog(lambda level, context, text: _log.log(level, "%s: %s", context, text))
    return Xen(libraries, log, open_handle(libraries, log.address))
