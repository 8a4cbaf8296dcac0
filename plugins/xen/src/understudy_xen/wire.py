"""What the two agents add to a checkpoint stream: a greeting before it, and answers in the other direction.

libxl's Remus has no answers: its primary releases output as soon as the stream is written to a local descriptor. Here
the secondary answers each checkpoint that it holds whole, on the same connection, and only that answer counts.

::

    primary → secondary   Hello, then the stream (preamble, libxl and libxc records), plain or in coded pieces
    secondary → primary   Ack for each whole checkpoint; at most one Refusal, which ends the stream

Source: tools/libs/light/libxl_remus.c of Xen 4.17, whose `remus_checkpoint_stream_written` commits without an answer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from understudy.errors import PeerError

__all__ = ["HELLO_BYTES", "Ack", "Answers", "Coding", "Hello", "Refusal"]

_HELLO: Final = struct.Struct(">8sHH4x")
_MAGIC: Final = b"usxenrem"
_VERSION: Final = 1
HELLO_BYTES: Final = _HELLO.size

_HEADER: Final = struct.Struct(">HH")
_ACK: Final = struct.Struct(">QQQ")
_ACK_KIND: Final = 1
_REFUSAL_KIND: Final = 2
_LONGEST_REASON: Final = 2000


class Coding(IntEnum):
    """How the stream is written on the link."""

    PLAIN = 0  #: as it is
    ZSTD = 1  #: in pieces, each of them compressed or not (`understudy_xen.coding`)


@dataclass(frozen=True, slots=True)
class Hello:
    """What the primary says first."""

    coding: Coding

    def encode(self) -> bytes:
        """Return it as bytes."""
        return _HELLO.pack(_MAGIC, _VERSION, self.coding)

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """Return the greeting that `data`, of `HELLO_BYTES`, is.

        Raises:
            PeerError: It is none, or of another version.
        """
        magic, version, coding = _HELLO.unpack(data)
        if magic != _MAGIC:
            raise PeerError(
                f"the stream begins with {data!r}, not with the greeting of an agent's Xen plugin"
            )
        if version != _VERSION:
            raise PeerError(f"the other host's stream has version {version}, this host speaks {_VERSION}")
        try:
            return cls(Coding(coding))
        except ValueError:
            known = ", ".join(f"{each.value} ({each.name.lower()})" for each in Coding)
            raise PeerError(f"the other host codes its stream in way {coding}, known are {known}") from None


@dataclass(frozen=True, slots=True)
class Ack:
    """The secondary holds a whole checkpoint and can run from it without the primary."""

    count: int  #: which one since the stream began; 1 is the first copy
    stream_bytes: int  #: of the stream since the checkpoint before it, not coded
    pages: int  #: how many pages with content that was

    def encode(self) -> bytes:
        """Return it as bytes."""
        return _HEADER.pack(_ACK_KIND, _ACK.size) + _ACK.pack(self.count, self.stream_bytes, self.pages)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The secondary takes no further checkpoint."""

    reason: str

    def encode(self) -> bytes:
        """Return it as bytes."""
        text = self.reason.encode(errors="replace")[:_LONGEST_REASON]
        return _HEADER.pack(_REFUSAL_KIND, len(text)) + text


class Answers:
    """Takes the secondary's answers apart, from bytes as they come.

    Guarantees:
        Acknowledgements come out without a gap, counted from 1, and nothing after a refusal; whatever else arrives is
        an error. At most one answer that is not whole is held.
    """

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._count = 0
        self._refused = False

    def feed(self, data: bytes) -> Iterator[Ack | Refusal]:
        """Yield the answers that `data` completes; must be exhausted.

        Raises:
            PeerError: These are no answers, or not the next ones. Those before them have been yielded.
        """
        self._waiting += data
        while len(self._waiting) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._waiting)
            if (kind, length) != (_ACK_KIND, _ACK.size) and (
                kind != _REFUSAL_KIND or length > _LONGEST_REASON
            ):
                raise PeerError(f"the secondary answers a checkpoint with kind {kind}, {length} bytes")
            if len(self._waiting) < _HEADER.size + length:
                return
            body = bytes(self._waiting[_HEADER.size : _HEADER.size + length])
            del self._waiting[: _HEADER.size + length]
            if self._refused:
                raise PeerError("the secondary answers on after it has refused")
            yield self._acknowledgement(body) if kind == _ACK_KIND else self._refusal(body)

    def _acknowledgement(self, body: bytes) -> Ack:
        answer = Ack(*_ACK.unpack(body))
        if answer.count != self._count + 1:
            raise PeerError(
                f"the secondary acknowledges checkpoint {answer.count}, after checkpoint {self._count}"
            )
        self._count = answer.count
        return answer

    def _refusal(self, body: bytes) -> Refusal:
        self._refused = True
        return Refusal(body.decode(errors="replace"))
