"""Which record may follow which, as far as record headers show it.

The specifications' rules, and what libxl's and libxc's own readers refuse. One rule is left out, because libxc's save
code breaks it: HVM_PARAMS comes *after* HVM_CONTEXT in every stream that it writes.

Source: Xen docs/specs/libxc-migration-stream.pandoc ("Layout", "Compatibility with older versions"),
tools/libs/guest/xg_sr_restore.c, xg_sr_restore_x86_pv.c, xg_sr_save_x86_hvm.c; tools/libs/light/libxl_stream_read.c.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from understudy_xen.streams.formats import OPTIONAL, GuestType, LibxcType, LibxlType

__all__ = ["LibxcOrder", "LibxlOrder"]

_LIBXC_TYPES: Final = frozenset(int(kind) for kind in LibxcType)
_LIBXL_TYPES: Final = frozenset(int(kind) for kind in LibxlType)
_LIBXL_SIGNALS: Final = frozenset({LibxlType.END, LibxlType.LIBXC_CONTEXT, LibxlType.CHECKPOINT_END})
_SIGNALS: Final = frozenset(
    {LibxcType.END, LibxcType.VERIFY, LibxcType.CHECKPOINT, LibxcType.STATIC_DATA_END}
)
_STATIC: Final = frozenset(
    {LibxcType.X86_PV_INFO, LibxcType.X86_CPUID_POLICY, LibxcType.X86_MSR_POLICY, LibxcType.STATIC_DATA_END}
)
_NEW_IN_3: Final = _STATIC - {LibxcType.X86_PV_INFO}
_PV_ONLY: Final = frozenset(
    {
        LibxcType.X86_PV_INFO,
        LibxcType.X86_PV_P2M_FRAMES,
        LibxcType.X86_PV_VCPU_BASIC,
        LibxcType.X86_PV_VCPU_EXTENDED,
        LibxcType.X86_PV_VCPU_XSAVE,
        LibxcType.X86_PV_VCPU_MSRS,
        LibxcType.SHARED_INFO,
    }
)
_HVM_ONLY: Final = frozenset({LibxcType.HVM_CONTEXT, LibxcType.HVM_PARAMS})
# What the guest cannot run without, and is therefore sent with each of its states.
_STATE: Final = {GuestType.X86_PV: LibxcType.X86_PV_VCPU_BASIC, GuestType.X86_HVM: LibxcType.HVM_CONTEXT}


_UNKNOWN: Final = "is of no known type, and not marked as optional"
_BODY: Final = "has a body; this record has none"


class _Place(Enum):
    BEFORE = "before LIBXC_CONTEXT"
    CHECKPOINT = "inside a checkpoint"
    BETWEEN = "after a checkpoint"
    NEXT = "after CHECKPOINT_STATE"
    AFTER = "after libxc's END"


class LibxlOrder:
    """The order of a libxl stream's records, and when the stream is libxc's to go on with."""

    def __init__(self) -> None:
        self._place = _Place.BEFORE

    @property
    def libxc_may_go_on(self) -> bool:
        """Whether the next record is libxc's, unless it is a CHECKPOINT_STATE that may come."""
        return self._place in {_Place.BETWEEN, _Place.NEXT}

    @property
    def state_may_come(self) -> bool:
        """Whether a CHECKPOINT_STATE may be the next record."""
        return self._place is _Place.BETWEEN

    def back_from_libxc(self, last: LibxcType) -> None:
        """Note that libxc's part has ended for now.

        Args:
            last: With which record: CHECKPOINT or END.
        """
        self._place = _Place.CHECKPOINT if last is LibxcType.CHECKPOINT else _Place.AFTER

    def admit(self, kind: int, length: int) -> str:
        """Take note of the next record.

        Args:
            kind: Its type.
            length: Of its body, bytes.

        Returns:
            What is wrong with its coming here, or ``""``.
        """
        if kind & OPTIONAL:
            return ""
        if kind not in _LIBXL_TYPES:
            return _UNKNOWN
        if kind in _LIBXL_SIGNALS and length:
            return _BODY
        place = self._place
        allowed = {
            LibxlType.LIBXC_CONTEXT: place is _Place.BEFORE,
            LibxlType.CHECKPOINT_END: place is _Place.CHECKPOINT,
            LibxlType.CHECKPOINT_STATE: place is _Place.BETWEEN,
            LibxlType.END: place is _Place.AFTER,
        }
        if not allowed.get(LibxlType(kind), place is not _Place.BETWEEN):
            return f"may not come {place.value}"
        if kind == LibxlType.CHECKPOINT_END:
            self._place = _Place.BETWEEN
        elif kind == LibxlType.CHECKPOINT_STATE:
            self._place = _Place.NEXT
        return ""


class LibxcOrder:
    """The order of one stream's records.

    Args:
        version: Of the image header.
        guest: Of the domain header.
    """

    def __init__(self, version: int, guest: GuestType) -> None:
        self._version = version
        self._guest = guest
        self._static = True
        self._pages_welcome = False  # a PAGE_DATA record needs no further look
        self._checkpoints = 0
        self._ever: set[int] = set()
        self._since: set[int] = set()  # the last checkpoint

    def admit(self, kind: int, length: int) -> str:
        """Take note of the next record.

        Args:
            kind: Its type.
            length: Of its body, bytes.

        Returns:
            What is wrong with its coming here, or ``""``.
        """
        if kind == LibxcType.PAGE_DATA and self._pages_welcome:
            return ""
        if kind & OPTIONAL:
            return ""
        problem = self._misplaced(kind, length)
        if problem:
            return problem
        if kind in _STATIC:
            self._static = kind != LibxcType.STATIC_DATA_END
        else:
            self._static = False
        self._ever.add(kind)
        self._since.add(kind)
        if kind == LibxcType.PAGE_DATA:
            self._pages_welcome = True
        elif kind == LibxcType.CHECKPOINT:
            self._checkpoints += 1
            self._since.clear()
            self._pages_welcome = False
        return ""

    def _misplaced(self, kind: int, length: int) -> str:
        if kind not in _LIBXC_TYPES:
            return _UNKNOWN
        if kind in _SIGNALS and length:
            return _BODY
        if kind == LibxcType.CHECKPOINT_DIRTY_PFN_LIST:
            return "goes from the secondary to the primary, on the back channel alone"
        if kind == LibxcType.TOOLSTACK:
            return "is deprecated, and no release of libxc accepts it"
        if kind in (_PV_ONLY if self._guest is GuestType.X86_HVM else _HVM_ONLY):
            return f"is not for a guest of type {self._guest.name}"
        return self._static_too_late(kind) if kind in _STATIC else self._dynamic_too_early(kind)

    def _static_too_late(self, kind: int) -> str:
        if self._version < 3 and kind in _NEW_IN_3:  # noqa: PLR2004 - the version that brought them
            return f"came with version 3, this stream has version {self._version}"
        if not self._static:
            return "comes after the end of the static data"
        if kind == LibxcType.X86_PV_INFO and kind in self._ever:
            return "comes a second time"
        return ""

    def _dynamic_too_early(self, kind: int) -> str:
        if self._static and self._version >= 3:  # noqa: PLR2004 - in version 2 it begins by itself
            return "comes before STATIC_DATA_END"
        if self._guest is GuestType.X86_PV:
            if LibxcType.X86_PV_INFO not in self._ever:
                return "comes before X86_PV_INFO"
            if kind == LibxcType.PAGE_DATA and LibxcType.X86_PV_P2M_FRAMES not in self._ever:
                return "comes before X86_PV_P2M_FRAMES"
        if kind == LibxcType.CHECKPOINT or (kind == LibxcType.END and (self._since or not self._checkpoints)):
            needed = _STATE[self._guest]
            if needed not in self._since:
                return f"comes without {needed.name} before it: the guest could not run from this state"
        return ""
