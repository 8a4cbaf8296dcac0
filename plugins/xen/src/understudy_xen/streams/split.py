"""Where to cut a stream, as arithmetic on frames: apart by layer, apart by checkpoint, or made plain at a checkpoint.

A *plain* stream is what ``xl save`` writes, and what ``xl restore`` and a receiver that knows nothing of checkpoints
accept. A checkpointed one becomes plain at checkpoint n: libxc's records up to it stay in their order, as a restore
under Remus would apply them one after the other; the CHECKPOINT records between them and the device model's older
states go; END records close both layers.

Source: tools/libs/guest/xg_sr_restore.c (handle_checkpoint applies a checkpoint's records in order),
xg_sr_common.h (update_blob: a later context replaces the earlier one).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from understudy_xen.streams.formats import ByteOrder, Layer, LibxcType, LibxlType, record_header
from understudy_xen.streams.frames import Frame

__all__ = ["Span", "by_checkpoint", "by_layer", "plain"]

_LEFT_OUT: Final = frozenset({LibxlType.CHECKPOINT_END, LibxlType.CHECKPOINT_STATE})


class Span(NamedTuple):
    """Bytes of a stream, from `start` up to `end`."""

    start: int
    end: int


def _joined(pieces: Iterable[Span | bytes]) -> Iterator[Span | bytes]:
    last: Span | bytes | None = None
    for piece in pieces:
        if isinstance(last, Span) and isinstance(piece, Span) and last.end == piece.start:
            last = Span(last.start, piece.end)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def by_layer(frames: Iterable[Frame]) -> Iterator[tuple[Layer, Span]]:
    """Say whose every byte of a stream is; a layer's spans in order are its own stream.

    Args:
        frames: Of a stream, in order.
    """
    layer, start, end = Layer.XL, 0, 0
    for frame in frames:
        if frame.layer is not layer and end > start:
            yield layer, Span(start, end)
            start = frame.start
        layer, end = frame.layer, frame.end
    if end > start:
        yield layer, Span(start, end)


def by_checkpoint(frames: Iterable[Frame]) -> Iterator[Span]:
    """Say where each checkpoint lies, headers included in the first; last, what comes after the last one, if anything.

    Args:
        frames: Of a stream, in order.
    """
    start = end = 0
    for frame in frames:
        end = frame.end
        if frame.ends_checkpoint:
            yield Span(start, end)
            start = end
    if end > start:
        yield Span(start, end)


def plain(
    frames: Iterable[Frame],
    checkpoint: int,
    *,
    libxl_byteorder: ByteOrder = "little",
    libxc_byteorder: ByteOrder = "little",
) -> Iterator[Span | bytes]:
    """Say of what a plain stream consists that holds the guest as it was at a checkpoint.

    Args:
        frames: Of the checkpointed stream from its beginning, in order; none are taken after that checkpoint.
        checkpoint: Its number, counted from 1.
        libxl_byteorder: Of its libxl layer.
        libxc_byteorder: Of its libxc layer.

    Yields:
        Spans of the checkpointed stream, and bytes that stand in for what is left out.

    Raises:
        ValueError: The stream ends before that checkpoint does; what has been yielded is of no use.
    """
    yield from _joined(_plain(frames, checkpoint, libxl_byteorder, libxc_byteorder))


def _plain(
    frames: Iterable[Frame], checkpoint: int, libxl_byteorder: ByteOrder, libxc_byteorder: ByteOrder
) -> Iterator[Span | bytes]:
    number = 0
    of_model: list[Span] = []
    for frame in frames:
        span = Span(frame.start, frame.end)
        if frame.layer is Layer.LIBXL and number:
            if frame.ends_checkpoint:
                if number == checkpoint:
                    yield record_header(libxc_byteorder).pack(LibxcType.END, 0)
                    yield from of_model
                    yield record_header(libxl_byteorder).pack(LibxlType.END, 0)
                    return
                of_model = []
            elif frame.type not in _LEFT_OUT:
                of_model.append(span)
        elif frame.layer is Layer.LIBXC and frame.type == LibxcType.CHECKPOINT:
            number += 1
        else:
            yield span
    raise ValueError(f"the stream ends before checkpoint {checkpoint} does")
