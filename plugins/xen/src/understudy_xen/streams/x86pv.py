"""The records of a libxc stream that only PV guests have.

``check`` and ``unpack`` are as in `understudy_xen.streams.libxc`. Zero-length contexts are accepted, because Xen 4.6 to
4.8 wrote them (specification, erratum 1).

Source: Xen docs/specs/libxc-migration-stream.pandoc; tools/libs/guest/xg_sr_stream_format.h, xg_sr_restore_x86_pv.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack
from typing import ClassVar, Final, Self

from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.errors import BodyError
from understudy_xen.streams.fields import PAIR, Layout, at_least, exactly, zero
from understudy_xen.streams.formats import PAGE_BYTES, ByteOrder, LibxcType
from understudy_xen.streams.pages import entries_of

__all__ = ["P2mFrames", "PvInfo", "SharedInfo", "VcpuContext"]

_PV_INFO: Final = Layout("BBHI")
_PFN_BYTES: Final = 8
_LEVELS_OF_WIDTH: Final = {4: 3, 8: 4}
_VCPU_BASIC_BYTES: Final = {4: 2800, 8: 5168}  # vcpu_guest_context_x86_32_t, _x86_64_t
_VCPU_EXTENDED_MOST: Final = 128
_VCPU_XSAVE_LEAST: Final = 16
_VCPU_MSR_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class PvInfo:
    """Shape of a PV guest: bytes of its words, and levels of its page tables."""

    kind: ClassVar = LibxcType.X86_PV_INFO
    head_bytes: ClassVar[int | None] = 8

    width: int
    levels: int

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        return (_PV_INFO.of(byteorder).pack(self.width, self.levels, 0, 0),)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:
        """Raise what is wrong with a body of `length` bytes that begins with `head`."""
        exactly(_PV_INFO.size, length)
        width, levels, reserved, more = _PV_INFO.of(byteorder).unpack_from(head)
        if _LEVELS_OF_WIDTH.get(width) != levels:
            raise BodyError(f"width {width} with {levels} levels", allowed="4 with 3, 8 with 4")
        zero(reserved or more, 2)

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(body, len(body), byteorder)
        return cls(body[0], body[1])


@dataclass(frozen=True, slots=True)
class P2mFrames:
    """Where a PV guest's table of its frames lies, for the frames `start_pfn` to `end_pfn`."""

    kind: ClassVar = LibxcType.X86_PV_P2M_FRAMES
    head_bytes: ClassVar[int | None] = 8

    start_pfn: int
    end_pfn: int
    frames: Sequence[int]

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        sign = "<" if byteorder == "little" else ">"
        return (pack(f"{sign}II{len(self.frames)}Q", self.start_pfn, self.end_pfn, *self.frames),)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder, width: int | None = None) -> None:
        """Raise what is wrong with a body of `length` bytes that begins with `head`.

        Args:
            head: Its first bytes.
            length: Of all of it, bytes.
            byteorder: Of the libxc layer.
            width: Of the guest (X86_PV_INFO), from which follows how many frames there must be.
        """
        at_least(PAIR.size, length)
        start, end = PAIR.of(byteorder).unpack_from(head)
        if start > end:
            raise BodyError(
                f"begins with pfn {start:#x} and ends with {end:#x}", allowed="in ascending order"
            )
        if (length - PAIR.size) % _PFN_BYTES:
            raise BodyError(f"the body has {length} bytes", allowed="8 and a multiple of 8")
        if width:
            per_frame = PAGE_BYTES // width
            exactly(PAIR.size + _PFN_BYTES * (end // per_frame - start // per_frame + 1), length)

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(body, len(body), byteorder)
        start, end = PAIR.of(byteorder).unpack_from(body)
        return cls(start, end, tuple(entries_of(body[PAIR.size :], byteorder)))


@dataclass(frozen=True, slots=True)
class VcpuContext:
    """A part of a PV vcpu's state, a blob of Xen's: X86_PV_VCPU_BASIC, _EXTENDED, _XSAVE or _MSRS by its `kind`."""

    head_bytes: ClassVar[int | None] = 8

    kind: LibxcType
    vcpu: int
    context: Buffer

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        return (PAIR.of(byteorder).pack(self.vcpu, 0), self.context)

    @staticmethod
    def check(kind: int, head: Buffer, length: int, byteorder: ByteOrder, width: int | None = None) -> None:
        """Raise what is wrong with a body of `length` bytes that begins with `head`.

        Args:
            kind: The record's type.
            head: Its first bytes.
            length: Of all of it, bytes.
            byteorder: Of the libxc layer.
            width: Of the guest (X86_PV_INFO), from which follows the size of the basic part.
        """
        at_least(PAIR.size, length)
        _, reserved = PAIR.of(byteorder).unpack_from(head)
        zero(reserved, 4)
        size = length - PAIR.size
        if not size:
            return
        if kind == LibxcType.X86_PV_VCPU_BASIC and width and size != _VCPU_BASIC_BYTES[width]:
            raise BodyError(f"the context has {size} bytes", at=8, allowed=str(_VCPU_BASIC_BYTES[width]))
        if kind == LibxcType.X86_PV_VCPU_EXTENDED and size > _VCPU_EXTENDED_MOST:
            raise BodyError(f"the context has {size} bytes", at=8, allowed=f"at most {_VCPU_EXTENDED_MOST}")
        if kind == LibxcType.X86_PV_VCPU_XSAVE and size < _VCPU_XSAVE_LEAST:
            raise BodyError(f"the context has {size} bytes", at=8, allowed=f"at least {_VCPU_XSAVE_LEAST}")
        if kind == LibxcType.X86_PV_VCPU_MSRS and size % _VCPU_MSR_BYTES:
            raise BodyError(f"the context has {size} bytes", at=8, allowed=f"a multiple of {_VCPU_MSR_BYTES}")

    @classmethod
    def unpack(cls, kind: LibxcType, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body; the context is a part of it, not a copy.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(kind, body, len(body), byteorder)
        return cls(kind, PAIR.of(byteorder).unpack_from(body)[0], body[PAIR.size :])


@dataclass(frozen=True, slots=True)
class SharedInfo:
    """A PV guest's shared info page."""

    kind: ClassVar = LibxcType.SHARED_INFO
    head_bytes: ClassVar[int | None] = 0

    page: Buffer

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:  # noqa: ARG002 - as the others
        """Return the body's parts."""
        return (self.page,)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:  # noqa: ARG003 - as the others
        """Raise what is wrong with a body of `length` bytes."""
        exactly(PAGE_BYTES, length)

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body; it is not copied.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(b"", len(body), byteorder)
        return cls(body)
