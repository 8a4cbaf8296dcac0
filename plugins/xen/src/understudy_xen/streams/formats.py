"""The numbers of the three layers of a migration stream.

A stream that ``xl`` writes is a preamble (magic, flags, the guest's configuration), then a libxl stream (version 2),
inside which, after the record LIBXC_CONTEXT, a libxc stream (version 2 or 3) is embedded.

Source: Xen docs/specs/libxl-migration-stream.pandoc (revision 2), docs/specs/libxc-migration-stream.pandoc
(revision 3), tools/xl/xl.h (struct save_file_header), tools/libs/guest/xg_sr_stream_format.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from struct import Struct
from typing import Final, Literal

__all__ = [
    "HEADER",
    "LIBXC_HEADERS_BYTES",
    "LIBXC_ID",
    "LIBXC_MARKER",
    "LIBXC_VERSIONS",
    "LIBXL_HEADER_BYTES",
    "LIBXL_IDENT",
    "LIBXL_VERSION",
    "OPTIONAL",
    "PAGE_BYTES",
    "PAGE_SHIFT",
    "RECORD_HEADER_BYTES",
    "XL_BYTEORDER",
    "XL_FLAG_JSON",
    "XL_FLAG_STREAM_V2",
    "XL_MAGIC",
    "XL_PREAMBLE_BYTES",
    "ByteOrder",
    "Form",
    "GuestType",
    "Layer",
    "LibxcType",
    "LibxlType",
    "Limits",
    "padded",
    "record_header",
    "record_name",
]

ByteOrder = Literal["little", "big"]

XL_MAGIC: Final = b"Xen saved domain, xl format\n \0 \r"
XL_PREAMBLE_BYTES: Final = 48  # the magic and four numbers
XL_BYTEORDER: Final = 0x01020304
XL_FLAG_JSON: Final = 1
XL_FLAG_STREAM_V2: Final = 2

LIBXL_IDENT: Final = b"LibxlFmt"
LIBXL_VERSION: Final = 2
LIBXL_HEADER_BYTES: Final = 16

LIBXC_MARKER: Final = b"\xff" * 8
LIBXC_ID: Final = 0x58454E46  # "XENF"
LIBXC_VERSIONS: Final = (2, 3)
LIBXC_HEADERS_BYTES: Final = 40  # image header and domain header

RECORD_HEADER_BYTES: Final = 8  # type and length, in both inner layers

PAGE_SHIFT: Final = 12
PAGE_BYTES: Final = 1 << PAGE_SHIFT

OPTIONAL: Final = 0x80000000
"""Bit of a record's type: a reader that does not know the type may pass over the record."""

HEADER: Final = -1
"""Stands in place of a record's type for the preamble and the headers."""


class Layer(Enum):
    """Who wrote a part of a stream."""

    XL = "xl"
    LIBXL = "libxl"
    LIBXC = "libxc"


class Form(Enum):
    """With which layer a stream begins."""

    XL = "xl"
    LIBXL = "libxl"
    LIBXC = "libxc"


class GuestType(IntEnum):
    """Type field of the domain header; PVH guests are x86 HVM here."""

    X86_PV = 1
    X86_HVM = 2


class LibxlType(IntEnum):
    """Record types of a libxl stream."""

    END = 0
    LIBXC_CONTEXT = 1
    EMULATOR_XENSTORE_DATA = 2
    EMULATOR_CONTEXT = 3
    CHECKPOINT_END = 4
    CHECKPOINT_STATE = 5


class LibxcType(IntEnum):
    """Record types of a libxc stream."""

    END = 0x00
    PAGE_DATA = 0x01
    X86_PV_INFO = 0x02
    X86_PV_P2M_FRAMES = 0x03
    X86_PV_VCPU_BASIC = 0x04
    X86_PV_VCPU_EXTENDED = 0x05
    X86_PV_VCPU_XSAVE = 0x06
    SHARED_INFO = 0x07
    X86_TSC_INFO = 0x08
    HVM_CONTEXT = 0x09
    HVM_PARAMS = 0x0A
    TOOLSTACK = 0x0B
    X86_PV_VCPU_MSRS = 0x0C
    VERIFY = 0x0D
    CHECKPOINT = 0x0E
    CHECKPOINT_DIRTY_PFN_LIST = 0x0F
    STATIC_DATA_END = 0x10
    X86_CPUID_POLICY = 0x11
    X86_MSR_POLICY = 0x12


@dataclass(frozen=True, slots=True)
class Limits:
    """What a stream may claim before it is refused; nothing is set aside for a claim before its bytes have come."""

    record_bytes: int = 128 << 20
    """Length of one record's body. The default is what libxc itself accepts (REC_LENGTH_MAX in xg_sr_stream_format.h);
    libxl knows no limit of its own."""

    config_bytes: int = 1 << 20
    """Length of the optional data of the preamble, which holds the guest's configuration."""


_HEADERS: Final = {"little": Struct("<II"), "big": Struct(">II")}
_NAMES: Final = {
    Layer.XL: {HEADER: "preamble"},
    Layer.LIBXL: {HEADER: "header", **{int(kind): kind.name for kind in LibxlType}},
    Layer.LIBXC: {HEADER: "headers", **{int(kind): kind.name for kind in LibxcType}},
}


def record_header(order: ByteOrder) -> Struct:
    """Return the layout of a record's header, type and length, in this byte order."""
    return _HEADERS[order]


def record_name(layer: Layer, kind: int) -> str:
    """Return the specification's name of a record type, or its number."""
    name = _NAMES[layer].get(kind)
    return name or (f"optional record {kind:#010x}" if kind & OPTIONAL else f"record {kind:#x}")


def padded(length: int) -> int:
    """Return how many bytes a body of `length` bytes takes in a stream."""
    return (length + 7) & ~7
