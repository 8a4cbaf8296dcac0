"""What a framer finds: records, and what the headers say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from understudy_xen.streams.formats import (
    XL_FLAG_JSON,
    ByteOrder,
    GuestType,
    Layer,
    LibxlType,
    record_name,
)

__all__ = ["Frame", "LibxcHeaders", "LibxlHeader", "Preamble"]


class Frame(NamedTuple):
    """One record or header of a stream; the frames of a stream follow each other without a gap."""

    layer: Layer
    type: int
    """A `LibxlType` or `LibxcType`, the number of an unknown optional record, or `HEADER`."""
    start: int
    """Offset of its first byte in the stream."""
    end: int
    """Offset one past its last byte, padding included."""
    length: int
    """Of the body without padding, bytes; of a preamble or header, all of it."""

    @property
    def name(self) -> str:
        """The specification's name of it."""
        return record_name(self.layer, self.type)

    @property
    def ends_checkpoint(self) -> bool:
        """Whether a checkpoint is whole with it."""
        return self.layer is Layer.LIBXL and self.type == LibxlType.CHECKPOINT_END


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


@dataclass(frozen=True, slots=True)
class LibxlHeader:
    """Head of a libxl stream; `legacy` says that it was made from a stream of Xen 4.5 or older."""

    byteorder: ByteOrder
    legacy: bool


@dataclass(frozen=True, slots=True)
class LibxcHeaders:
    """Image header and domain header of a libxc stream; `xen` is the version that wrote it, (0, n) a converter's."""

    byteorder: ByteOrder
    version: int
    guest: GuestType
    xen: tuple[int, int]
