"""What the hypervisor tells about a domain.

Source: Xen xen/include/public/domctl.h (struct xen_domctl_getdomaininfo), xen/include/public/sched.h (SHUTDOWN_*),
xen/include/public/arch-x86/xen.h (XEN_X86_EMU_*), tools/libs/light/libxl_x86.c (which flags a PVH domain has).
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from understudy_xen.libs.versions import Facts

__all__ = ["FLAGS_AT", "DomainInfo", "DomainType", "ShutdownReason", "parse", "shutdown_of"]

FLAGS_AT: Final = 4
_DYING: Final = 1 << 0
_HVM: Final = 1 << 1
_SHUTDOWN: Final = 1 << 2
_PAUSED: Final = 1 << 3
_BLOCKED: Final = 1 << 4
_RUNNING: Final = 1 << 5
_HAP: Final = 1 << 8
_REASON_SHIFT: Final = 16
_REASON_MASK: Final = 0xFF
_EMU_LAPIC: Final = 1 << 0

_HEAD = struct.Struct("=HHI7QIII16sI")


class DomainType(Enum):
    """Kind of guest, with libxl's names."""

    PV = "pv"
    PVH = "pvh"  #: hardware virtualization, no device model
    HVM = "hvm"  #: with a device model


class ShutdownReason(IntEnum):
    """Why a domain is shut down."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5
    UNKNOWN = 255  #: a code that this version does not know


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """One domain at one moment."""

    domid: int
    uuid: uuid.UUID
    kind: DomainType
    hap: bool  #: hardware assisted paging
    dying: bool  #: being destroyed
    shutdown: ShutdownReason | None  #: ``None`` unless it is shut down; SUSPEND is a suspended guest
    paused: bool  #: by the control software
    blocked: bool  #: waits for an event
    running: bool  #: on a processor at this moment
    pages: int  #: of 4096 bytes it has
    max_pages: int  #: it may have
    max_vcpus: int
    online_vcpus: int
    cpu_ns: int  #: time on processors so far

    @property
    def suspended(self) -> bool:
        """Whether it has suspended, and can be saved or resumed."""
        return self.shutdown is ShutdownReason.SUSPEND and not self.dying


def shutdown_of(flags: int) -> ShutdownReason | None:
    """Return the reason of a shutdown from a domain's flags, ``None`` if it is not shut down."""
    if not flags & _SHUTDOWN:
        return None
    try:
        return ShutdownReason(flags >> _REASON_SHIFT & _REASON_MASK)
    except ValueError:
        return ShutdownReason.UNKNOWN


def parse(raw: bytes, facts: Facts) -> DomainInfo:
    """Return what a struct xen_domctl_getdomaininfo says."""
    domid, _, flags, pages, max_pages, _, _, _, _, cpu_ns, online, last_vcpu, _, handle, _ = (
        _HEAD.unpack_from(raw)
    )
    (emulated,) = struct.unpack_from("=I", raw, facts.emulation_at)
    kind = DomainType.PV
    if flags & _HVM:
        # A PVH domain has nothing emulated but, at most, its local APIC.
        kind = DomainType.HVM if emulated & ~_EMU_LAPIC else DomainType.PVH
    return DomainInfo(
        domid=domid,
        uuid=uuid.UUID(bytes=handle),
        kind=kind,
        hap=bool(flags & _HAP),
        dying=bool(flags & _DYING),
        shutdown=shutdown_of(flags),
        paused=bool(flags & _PAUSED),
        blocked=bool(flags & _BLOCKED),
        running=bool(flags & _RUNNING),
        pages=pages,
        max_pages=max_pages,
        max_vcpus=last_vcpu + 1 & 0xFFFFFFFF,
        online_vcpus=online,
        cpu_ns=cpu_ns,
    )
