"""The bytes on the link between two agents. No I/O here: bytes in, frames out, and back.

Each direction of a connection is a preamble, once, and then frames. All numbers are big-endian.

==============  ======  =========================================================================================
preamble        bytes
==============  ======  =========================================================================================
magic           10      ``UNDERSTUDY``
version         2       protocol version of the sender, `VERSION`
==============  ======  =========================================================================================

==============  ======  =========================================================================================
frame           bytes
==============  ======  =========================================================================================
header length   4       length of the header, 2 to `MAX_HEADER_BYTES`
payload length  4       length of the payload, 0 to `MAX_PAYLOAD_BYTES`
header          …       one JSON object, UTF-8
payload         …       raw bytes; empty unless a later protocol version says what they are
==============  ======  =========================================================================================

The header's ``t`` says what the frame is:

===========  ======================================================  ================================================
``t``        other keys                                              meaning
===========  ======================================================  ================================================
``hello``    host, peer, agent, protocol, incarnation                the first frame of the dialling side
``welcome``  host, agent, protocol, incarnation                      the answer: the link is up
``refuse``   kind, reason                                            the answer: it is not; the connection is closed
``beat``                                                             I am alive
``request``  id, to, m, p                                            do ``m`` with ``p`` in conversation ``to``
``answer``   id, p                                                   it is done
``error``    id, kind, reason                                        it failed
``cancel``   id                                                      the answer is no longer wanted
``note``     to, m, p                                                know this
``bye``      reason                                                  the sender closes the connection on purpose
===========  ======================================================  ================================================

The preamble and ``hello``, ``welcome`` and ``refuse`` stay as they are in every later version, so that two agents of
different versions can tell each other so.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from understudy.errors import PeerError

__all__ = ["MAX_HEADER_BYTES", "MAX_PAYLOAD_BYTES", "PREAMBLE", "VERSION", "Decoder", "Frame", "encode"]

MAGIC = b"UNDERSTUDY"
VERSION = 1
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 20
_PREAMBLE = struct.Struct(">10sH")
_LENGTHS = struct.Struct(">II")
_encoder = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def preamble(version: int = VERSION) -> bytes:
    """Return the bytes that begin a direction."""
    return _PREAMBLE.pack(MAGIC, version)


PREAMBLE = preamble()


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    header: Mapping[str, Any]
    payload: bytes = b""


def encode(header: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """Return the bytes of one frame.

    Raises:
        ValueError: Too large, or not JSON.
        TypeError: Not JSON.
    """
    text = _encoder.encode(header).encode()
    if len(text) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a frame of {len(text)} + {len(payload)} bytes is larger than the link takes")
    return _LENGTHS.pack(len(text), len(payload)) + text + payload


class Decoder:
    """Cuts a stream of bytes into frames. After an error it takes nothing more.

    `version` is the other side's protocol version as soon as its preamble has come.
    """

    __slots__ = ("_broken", "_buffer", "version")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken = False
        self.version: int | None = None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take `data` and yield the frames that are complete now.

        Raises:
            PeerError: The bytes are not those of an agent.
        """
        if self._broken:
            return
        self._buffer += data
        try:
            if self.version is None and not self._preamble():
                return
            while (frame := self._frame()) is not None:
                yield frame
        except PeerError:
            self._broken = True
            self._buffer.clear()
            raise

    def _preamble(self) -> bool:
        head = bytes(self._buffer[: len(MAGIC)])
        if head != MAGIC[: len(head)]:
            raise PeerError(f"the bytes on the link are not an agent's: they begin with {head!r}")
        if len(self._buffer) < _PREAMBLE.size:
            return False
        _, self.version = _PREAMBLE.unpack_from(self._buffer)
        del self._buffer[: _PREAMBLE.size]
        return True

    def _frame(self) -> Frame | None:
        if len(self._buffer) < _LENGTHS.size:
            return None
        header_bytes, payload_bytes = _LENGTHS.unpack_from(self._buffer)
        if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
            raise PeerError(f"a frame of {header_bytes} + {payload_bytes} bytes was announced on the link")
        end = _LENGTHS.size + header_bytes
        if len(self._buffer) < end + payload_bytes:
            return None
        try:
            header = json.loads(self._buffer[_LENGTHS.size : end])
        except (ValueError, RecursionError) as error:
            raise PeerError(f"a frame on the link has no JSON header: {error}") from error
        if not isinstance(header, dict) or not isinstance(header.get("t"), str):
            raise PeerError("a frame on the link has no type")
        payload = bytes(self._buffer[end : end + payload_bytes])
        del self._buffer[: end + payload_bytes]
        return Frame(header, payload)
