"""What a framer finds."""

from __future__ import annotations

from typing import NamedTuple

from understudy_xen.streams.formats import Layer, LibxlType, record_name

__all__ = ["Frame"]


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
