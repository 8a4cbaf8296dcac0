"""What the layouts of records have in common."""

from __future__ import annotations

from struct import Struct
from typing import Final

from understudy_xen.streams.errors import BodyError
from understudy_xen.streams.formats import ByteOrder

__all__ = ["PAIR", "Layout", "at_least", "exactly", "zero"]


class Layout:
    """One struct in both byte orders.

    Args:
        fields: Format of `struct`, without byte order.
    """

    def __init__(self, fields: str) -> None:
        self.little, self.big = Struct(f"<{fields}"), Struct(f">{fields}")
        self.size = self.little.size

    def of(self, byteorder: ByteOrder) -> Struct:
        """Return it in this byte order."""
        return self.little if byteorder == "little" else self.big


PAIR: Final = Layout("II")
"""Two numbers, which is how most bodies begin."""


def exactly(size: int, length: int) -> None:
    """Raise unless a body of `length` bytes has `size`."""
    if length != size:
        raise BodyError(f"the body has {length} bytes", allowed=str(size))


def at_least(size: int, length: int) -> None:
    """Raise if a body of `length` bytes is too short for its fixed part of `size`."""
    if length < size:
        raise BodyError(f"the body has {length} bytes, its fixed part alone takes {size}")


def zero(value: int, at: int) -> None:
    """Raise unless the reserved field at byte `at` is zero."""
    if value:
        raise BodyError(f"reserved field is {value:#x}", at=at, allowed="zero")
