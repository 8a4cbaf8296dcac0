"""What stands in front of the records: the preamble of ``xl``, the header of libxl, the two headers of libxc.

Source: Xen tools/xl/xl.h (struct save_file_header), tools/xl/xl_vmcontrol.c (create_domain), xl_saverestore.c
(save_domain_core_writeconfig); docs/specs/libxl-migration-stream.pandoc, libxc-migration-stream.pandoc ("Headers").
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple, Self

from understudy_xen.streams.errors import BodyError
from understudy_xen.streams.fields import Layout
from understudy_xen.streams.formats import (
    LIBXC_ID,
    LIBXC_MARKER,
    LIBXC_VERSIONS,
    LIBXL_IDENT,
    LIBXL_VERSION,
    PAGE_SHIFT,
    XL_BYTEORDER,
    XL_FLAG_JSON,
    XL_FLAG_STREAM_V2,
    XL_MAGIC,
    XL_PREAMBLE_BYTES,
    ByteOrder,
    GuestType,
)

__all__ = ["LibxcHeaders", "LibxlHeader", "Preamble", "PreambleNumbers"]

_NUMBERS: Final = Layout("IIII")
_LIBXL: Final = Struct(">8sII")
_IMAGE: Final = Struct(">8sIIHHI")
_DOMAIN: Final = Layout("IHHII")
_XL_FLAGS: Final = XL_FLAG_JSON | XL_FLAG_STREAM_V2
_BIG_ENDIAN: Final = 1
_LIBXL_LEGACY: Final = 2
_GUESTS: Final = frozenset(int(guest) for guest in GuestType)
_SIZE_BYTES: Final = 4


class PreambleNumbers(NamedTuple):
    """The fixed part of a preamble, which says how long the rest is."""

    byteorder: ByteOrder
    mandatory_flags: int
    optional_flags: int
    data_bytes: int

    @classmethod
    def unpack(cls, head: bytes) -> PreambleNumbers:
        """Read the first 48 bytes.

        Raises:
            BodyError: They are no preamble, or one of another version.
        """
        if not head.startswith(XL_MAGIC):
            raise BodyError("has the wrong magic", allowed=repr(XL_MAGIC))
        mark = head[len(XL_MAGIC) : len(XL_MAGIC) + 4]
        orders: tuple[ByteOrder, ...] = ("little", "big")
        byteorder = next((each for each in orders if int.from_bytes(mark, each) == XL_BYTEORDER), None)
        if byteorder is None:
            raise BodyError(f"has the byte order mark {mark.hex()}", at=32, allowed="01020304 or 04030201")
        _, mandatory, optional, data_bytes = _NUMBERS.of(byteorder).unpack_from(head, len(XL_MAGIC))
        if mandatory & ~_XL_FLAGS:
            raise BodyError(f"has mandatory flags {mandatory:#x}", at=36, allowed=f"of {_XL_FLAGS:#x}")
        if not mandatory & XL_FLAG_STREAM_V2:
            raise BodyError("announces a stream of the format before Xen 4.6", at=36, allowed="flag 0x2")
        return cls(byteorder, mandatory, optional, data_bytes)


@dataclass(frozen=True, slots=True)
class Preamble:
    """What ``xl`` puts in front: flags, and the guest's configuration as `config` bytes (JSON ends with a NUL)."""

    byteorder: ByteOrder
    mandatory_flags: int
    optional_flags: int
    config: bytes

    @property
    def is_json(self) -> bool:
        """Whether the configuration is libxl's JSON, and not a text of old."""
        return bool(self.mandatory_flags & XL_FLAG_JSON)

    @classmethod
    def of(cls, numbers: PreambleNumbers, data: bytes) -> Self:
        """Put a preamble together from its fixed part and the optional data, of which more than is known may come.

        Raises:
            BodyError: The configuration is longer than the data.
        """
        size = int.from_bytes(data[:_SIZE_BYTES], numbers.byteorder)
        if data and size > len(data) - _SIZE_BYTES:
            problem = f"claims {size} bytes of configuration"
            raise BodyError(problem, at=XL_PREAMBLE_BYTES, allowed=str(max(0, len(data) - _SIZE_BYTES)))
        config = data[_SIZE_BYTES : _SIZE_BYTES + size]
        return cls(numbers.byteorder, numbers.mandatory_flags, numbers.optional_flags, config)

    def pack(self) -> bytes:
        """Return all of its bytes."""
        data = len(self.config).to_bytes(_SIZE_BYTES, self.byteorder) + self.config
        numbers = (XL_BYTEORDER, self.mandatory_flags, self.optional_flags, len(data))
        return XL_MAGIC + _NUMBERS.of(self.byteorder).pack(*numbers) + data


@dataclass(frozen=True, slots=True)
class LibxlHeader:
    """Head of a libxl stream; `legacy` says that it was made from a stream of Xen 4.5 or older."""

    byteorder: ByteOrder
    legacy: bool

    @classmethod
    def unpack(cls, head: bytes) -> Self:
        """Read its 16 bytes.

        Raises:
            BodyError: They are no such header, or one of another version.
        """
        ident, version, options = _LIBXL.unpack(head)
        if ident != LIBXL_IDENT:
            raise BodyError(f"begins with {ident!r}", allowed=repr(LIBXL_IDENT))
        if version != LIBXL_VERSION:
            raise BodyError(f"has version {version}", at=8, allowed=str(LIBXL_VERSION))
        if options & ~(_BIG_ENDIAN | _LIBXL_LEGACY):
            raise BodyError(f"has options {options:#x}", at=12, allowed="of 0x3")
        return cls("big" if options & _BIG_ENDIAN else "little", bool(options & _LIBXL_LEGACY))

    def pack(self) -> bytes:
        """Return its bytes."""
        options = _BIG_ENDIAN * (self.byteorder == "big") | _LIBXL_LEGACY * self.legacy
        return _LIBXL.pack(LIBXL_IDENT, LIBXL_VERSION, options)


@dataclass(frozen=True, slots=True)
class LibxcHeaders:
    """Image header and domain header of a libxc stream; `xen` is the version that wrote it, (0, n) a converter's."""

    byteorder: ByteOrder
    version: int
    guest: GuestType
    xen: tuple[int, int]
    reserved: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def unpack(cls, head: bytes) -> Self:
        """Read their 40 bytes.

        Raises:
            BodyError: They are no such headers, or for something that no Xen on x86 runs.
        """
        marker, ident, version, options, *reserved = _IMAGE.unpack_from(head)
        if marker != LIBXC_MARKER or ident != LIBXC_ID:
            raise BodyError(f"begin with {head[:12].hex()}", allowed=f"{LIBXC_MARKER.hex()}{LIBXC_ID:x}")
        if version not in LIBXC_VERSIONS:
            raise BodyError(f"have version {version}", at=12, allowed="2, 3")
        if options & ~_BIG_ENDIAN:
            raise BodyError(f"have options {options:#x}", at=16, allowed="of 0x1")
        byteorder: ByteOrder = "big" if options & _BIG_ENDIAN else "little"
        kind, shift, reserved_too, major, minor = _DOMAIN.of(byteorder).unpack_from(head, _IMAGE.size)
        if kind not in _GUESTS:
            raise BodyError(f"are for a guest of type {kind:#x}", at=24, allowed="1 (x86 PV), 2 (x86 HVM)")
        if shift != PAGE_SHIFT:
            raise BodyError(f"have page shift {shift}", at=28, allowed=str(PAGE_SHIFT))
        return cls(byteorder, version, GuestType(kind), (major, minor), (*reserved, reserved_too))

    def pack(self) -> bytes:
        """Return their bytes."""
        first, second, third = self.reserved
        image = _IMAGE.pack(LIBXC_MARKER, LIBXC_ID, self.version, self.byteorder == "big", first, second)
        return image + _DOMAIN.of(self.byteorder).pack(self.guest, PAGE_SHIFT, third, *self.xen)
