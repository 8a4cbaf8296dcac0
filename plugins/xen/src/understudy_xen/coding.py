"""The checkpoint stream compressed on the link, where that pays.

libxl's Remus has a switch for it that has done nothing since the stream's second version. Here the stream is cut into
pieces as it comes, and each piece travels compressed (zstd) or as it is, whatever is quicker by what was measured: on a
link that takes the pieces as fast as they come compression costs time, on a slow one it saves most of it. Nothing is
held back: a piece is what there was to read.

Compression pays while::

    1 / compress_rate + share / link_rate  <  1 / link_rate

with `share` the size that is left. While it is off, one piece in `PROBE_EVERY` is compressed all the same, to see
whether that has changed.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from understudy.errors import PeerError

if TYPE_CHECKING:
    import zstandard

__all__ = ["LARGEST_PIECE_BYTES", "PIECE_HEADER", "CodingFigures", "Decoder", "Encoder"]

PIECE_HEADER: Final = struct.Struct(">II")  # bytes that it is, bytes that follow; equal: as it is
LARGEST_PIECE_BYTES: Final = 1 << 20
PROBE_EVERY: Final = 32
_LEVEL: Final = 1
_SMALLEST_BYTES: Final = 512  # below it a piece is a record's header or an answer's trigger: never worth it
_WEIGHT: Final = 0.2  # of the newest measurement


@dataclass(frozen=True, slots=True)
class CodingFigures:
    """What compression does now."""

    plain_bytes: int  #: of the stream so far
    link_bytes: int  #: what travelled for it
    compresses: bool  #: whether it pays now
    share: float  #: size that is left by compression, as measured last


class Encoder:
    """Turns chunks of a stream into pieces.

    Args:
        clock_ns: For measurements.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock_ns = clock_ns
        self._compressor: zstandard.ZstdCompressor | None = None
        self._since_probe = PROBE_EVERY
        self._compress_ns_per_byte = 0.0
        self._link_ns_per_byte = 0.0
        self._share = 0.0
        self._plain_bytes = 0
        self._link_bytes = 0

    def encode(self, chunk: bytes | memoryview) -> tuple[bytes, bytes | memoryview]:
        """Return the header and the body of the piece that carries `chunk`.

        Args:
            chunk: Of the stream, at least 1 byte, at most `LARGEST_PIECE_BYTES`.
        """
        length = len(chunk)
        body: bytes | memoryview = chunk
        if length >= _SMALLEST_BYTES and self._tries():
            began_ns = self._clock_ns()
            packed = self._pack(chunk)
            took_ns = self._clock_ns() - began_ns
            self._compress_ns_per_byte = _mixed(self._compress_ns_per_byte, took_ns / length)
            self._share = _mixed(self._share, min(1.0, len(packed) / length))
            if len(packed) < length:
                body = packed
        self._plain_bytes += length
        self._link_bytes += PIECE_HEADER.size + len(body)
        return PIECE_HEADER.pack(length, len(body)), body

    def sent(self, link_bytes: int, took_ns: int) -> None:
        """Note how long the link takes for the bytes of a piece, not how long it took to write them to a buffer."""
        if link_bytes >= _SMALLEST_BYTES:
            self._link_ns_per_byte = _mixed(self._link_ns_per_byte, took_ns / link_bytes)

    @property
    def pays(self) -> bool:
        """Whether compression saves time by what was measured."""
        return self._compress_ns_per_byte < (1 - self._share) * self._link_ns_per_byte

    @property
    def figures(self) -> CodingFigures:
        """What compression does now."""
        return CodingFigures(self._plain_bytes, self._link_bytes, self.pays, self._share)

    def _tries(self) -> bool:
        self._since_probe += 1
        if self.pays:
            return True
        if self._since_probe < PROBE_EVERY:
            return False
        self._since_probe = 0
        return True

    def _pack(self, chunk: bytes | memoryview) -> bytes:
        if self._compressor is None:
            import zstandard  # noqa: PLC0415 - only where a stream is coded

            self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        return self._compressor.compress(chunk)


class Decoder:
    """Turns pieces into the stream again, from bytes as they come.

    Guarantees:
        What is held is what was fed last and at most one piece: chunks are made one by one, as they are taken, because
        a piece of some dozen bytes may stand for `LARGEST_PIECE_BYTES`.
    """

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._decompressor: zstandard.ZstdDecompressor | None = None

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Yield the chunks that `data` completes; must be exhausted.

        Raises:
            PeerError: These are no pieces, or one is damaged. The chunks before it have been yielded.
        """
        self._waiting += data
        at = 0
        while len(self._waiting) - at >= PIECE_HEADER.size:
            length, follow = PIECE_HEADER.unpack_from(self._waiting, at)
            if not 0 < follow <= length <= LARGEST_PIECE_BYTES:
                raise PeerError(
                    f"a piece of the stream claims {length} bytes in {follow} (allowed: 1 to {LARGEST_PIECE_BYTES}, "
                    "in no more than that)"
                )
            end = at + PIECE_HEADER.size + follow
            if len(self._waiting) < end:
                break
            with memoryview(self._waiting) as waiting:
                body = bytes(waiting[end - follow : end])
            at = end
            yield body if follow == length else self._unpack(body, length)
        del self._waiting[:at]

    def _unpack(self, body: bytes, length: int) -> bytes:
        import zstandard  # noqa: PLC0415 - as above

        if self._decompressor is None:
            self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_PIECE_BYTES)
        try:
            # The size in the frame is the sender's word; what may be allocated is ours.
            if zstandard.frame_content_size(body) != length:
                raise PeerError(f"a compressed piece does not hold the {length} bytes that its header claims")
            return self._decompressor.decompress(body, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as damaged:
            raise PeerError(f"a compressed piece of the stream is damaged: {damaged}") from damaged


def _mixed(known: float, newest: float) -> float:
    return newest if known == 0 else known + _WEIGHT * (newest - known)
