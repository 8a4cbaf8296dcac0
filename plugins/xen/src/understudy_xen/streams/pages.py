"""PAGE_DATA: which pages, of which types, and what is in them.

A stream is pages, nearly all of it, so this is where speed counts. The types of all pfns of a record stand in every
eighth byte; they are picked out and counted by the operations of ``bytes``, a whole record at a time, and the contents
of pages are never touched.

Source: Xen docs/specs/libxc-migration-stream.pandoc (PAGE_DATA); tools/libs/guest/xg_sr_common.h (is_known_page_type,
page_type_has_stream_data), xg_sr_restore.c (handle_page_data).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import pack
from typing import ClassVar, Final, NamedTuple, Self

from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.errors import BodyError
from understudy_xen.streams.fields import PAIR
from understudy_xen.streams.formats import PAGE_BYTES, ByteOrder, LibxcType

__all__ = [
    "PFN_MASK",
    "TYPE_SHIFT",
    "Page",
    "PageCount",
    "PageData",
    "count_pages",
    "largest_pfn",
    "page_entry",
]

PFN_MASK: Final = (1 << 52) - 1
TYPE_SHIFT: Final = 60
ENTRY_BYTES: Final = 8

_WITHOUT_DATA: Final = (0xD, 0xE, 0xF)  # BROKEN, XALLOC, XTAB
_RESERVED_TYPES: Final = (5, 6, 7, 8)
_KNOWN: Final = bytes(kind << 4 for kind in range(16) if kind not in _RESERVED_TYPES)
_NO_DATA: Final = bytes(kind << 4 for kind in _WITHOUT_DATA)
_CLEAR_ABOVE_PFN: Final = bytes(range(16))
_TOP: Final = {"little": 7, "big": 0}
_NEXT: Final = {"little": 6, "big": 1}


class PageCount(NamedTuple):
    """How many pages a record speaks of, and of how many it brings the contents."""

    pfns: int
    pages: int


class Page(NamedTuple):
    """One page of a record."""

    pfn: int
    type: int
    """PFINFO type, 0 to 15."""
    contents: memoryview | None
    """None if the type has none: broken, to be allocated only, or not there."""


def page_entry(pfn: int, kind: int = 0) -> int:
    """Return what stands for a page in a record's array."""
    return kind << TYPE_SHIFT | pfn


def count_pages(entries: bytes, byteorder: ByteOrder, *, first: int = 0) -> int:
    """Count the pages whose contents a record must bring.

    Args:
        entries: A part of its array of pfns, as it stands in the stream.
        byteorder: Of the libxc layer.
        first: Index of the part's first entry, for messages.

    Raises:
        BodyError: An entry has a reserved type or reserved bits.
    """
    tops = entries[_TOP[byteorder] :: ENTRY_BYTES]
    strange = tops.translate(None, _KNOWN) or entries[_NEXT[byteorder] :: ENTRY_BYTES].translate(
        None, _CLEAR_ABOVE_PFN
    )
    if strange:
        _fail(entries, byteorder, first)
    return len(tops.translate(None, _NO_DATA))


def _fail(entries: bytes, byteorder: ByteOrder, first: int) -> None:
    for index, entry in enumerate(entries_of(entries, byteorder)):
        at = PAIR.size + ENTRY_BYTES * (first + index)
        if entry >> TYPE_SHIFT in _RESERVED_TYPES:
            raise BodyError(
                f"pfn[{first + index}] is {entry:#018x}, of a reserved type",
                at=at,
                allowed="0x0-0x4, 0x9-0xf",
            )
        if entry & ~PFN_MASK & ((1 << TYPE_SHIFT) - 1):
            raise BodyError(
                f"pfn[{first + index}] is {entry:#018x}, with reserved bits", at=at, allowed="zero"
            )


def entries_of(raw: Buffer, byteorder: ByteOrder) -> Sequence[int]:
    """Read an array of 64-bit numbers."""
    numbers = array("Q", bytes(raw))
    if (byteorder == "little") != (pack("=H", 1) == b"\1\0"):
        numbers.byteswap()
    return numbers


def largest_pfn(entries: bytes, byteorder: ByteOrder) -> int:
    """Return the largest pfn of a part of the array."""
    return max(entry & PFN_MASK for entry in entries_of(entries, byteorder))


@dataclass(frozen=True, slots=True)
class PageData:
    """Contents of pages, or that pages are without."""

    kind: ClassVar = LibxcType.PAGE_DATA

    entries: Sequence[int]
    """Type and pfn of each page, as `page_entry` makes them."""
    contents: Buffer
    """Of those pages that have any, one after the other."""

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts; the contents are not copied."""
        sign = "<" if byteorder == "little" else ">"
        head = pack(f"{sign}II{len(self.entries)}Q", len(self.entries), 0, *self.entries)
        return (head, self.contents)

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body; the contents are a part of it, not a copy.

        Raises:
            BodyError: It is wrong.
        """
        count = page_count(body[: PAIR.size], len(body), byteorder)
        start = PAIR.size
        end = start + ENTRY_BYTES * count
        raw = bytes(body[start:end])
        check_contents(count, count_pages(raw, byteorder), len(body))
        return cls(tuple(entries_of(raw, byteorder)), body[end:])

    def pages(self) -> Iterator[Page]:
        """Go through the pages; contents are views of this record's."""
        view, at = memoryview(self.contents), 0
        for entry in self.entries:
            kind = entry >> TYPE_SHIFT
            if kind in _WITHOUT_DATA:
                yield Page(entry & PFN_MASK, kind, None)
            else:
                yield Page(entry & PFN_MASK, kind, view[at : at + PAGE_BYTES])
                at += PAGE_BYTES


def _head(head: Buffer, byteorder: ByteOrder) -> tuple[int, int]:
    count, reserved = PAIR.of(byteorder).unpack_from(head)
    return int(count), int(reserved)


def page_count(head: Buffer, length: int, byteorder: ByteOrder) -> int:
    """Read how many pfns a body of `length` bytes has.

    Raises:
        BodyError: It says something that cannot be.
    """
    if length < PAIR.size:
        raise BodyError(f"the body has {length} bytes, its sub-header alone takes 8")
    count, reserved = _head(head, byteorder)
    if reserved:
        raise BodyError(f"reserved field is {reserved:#x}", at=4, allowed="zero")
    if not count:
        raise BodyError("there are no pfns", allowed="at least one")
    if count > (length - PAIR.size) // ENTRY_BYTES:
        raise BodyError(f"{count} pfns are not to be found in a body of {length} bytes")
    return count


def check_contents(count: int, pages: int, length: int) -> None:
    """Raise if a body of `length` bytes is not what `count` pfns, `pages` of them with contents, take."""
    expected = PAIR.size + ENTRY_BYTES * count + PAGE_BYTES * pages
    if length != expected:
        raise BodyError(
            f"the body has {length} bytes, {count} pfns with {pages} pages take {expected}",
            allowed=str(expected),
        )
