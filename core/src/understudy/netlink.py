"""Make and read netlink messages, for the few that a plugin exchanges with the kernel while a guest waits.

What is not urgent is better left to a library or a tool. What is done in a guest's pause or at a takeover can start no
process and import nothing large; a request is some fifty bytes then, and there are few of them.

::

    datagram  = message*                    each padded to 4 bytes
    message   = header (16 bytes) | body    length, type, flags, sequence number, port
    body      = a fixed header of the protocol's, then attribute*
    attribute = length, type | payload      each padded to 4 bytes; a nested one has attributes for a payload

Source: netlink(7); Linux include/uapi/linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

__all__ = [
    "NLMSG_ERROR",
    "NLM_F_ACK",
    "NLM_F_CREATE",
    "NLM_F_REQUEST",
    "acknowledged",
    "ask",
    "attribute",
    "attributes",
    "message",
    "messages",
    "nested",
    "raise_refusal",
    "text",
]

NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_CREATE: Final = 0x400
NLMSG_ERROR: Final = 2

_NLA_F_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_FLAGS = struct.Struct("=H")
_FLAGS_AT: Final = 6
_ANSWER_BYTES: Final = 1 << 16
_ANSWER_S: Final = 5.0


def message(kind: int, flags: int, body: bytes) -> bytes:
    """Return a message with sequence number 0, to a port that the kernel knows by the socket.

    Args:
        kind: Its type.
        flags: ``NLM_F_*``.
        body: What follows the header; not padded.
    """
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body


def acknowledged(request: bytes) -> bytes:
    """Return a message that the kernel answers even if it has nothing to say but that it was carried out."""
    (flags,) = _FLAGS.unpack_from(request, _FLAGS_AT)
    return request[:_FLAGS_AT] + _FLAGS.pack(flags | NLM_F_ACK) + request[_FLAGS_AT + _FLAGS.size :]


def messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and body of each message of a datagram; one that is cut short ends it."""
    while len(datagram) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(datagram)
        if not _HEADER.size <= length <= len(datagram):
            return
        yield kind, datagram[_HEADER.size : length]
        datagram = datagram[_padded(length) :]


def ask(protocol: int, request: bytes) -> bytes:
    """Send a message on a socket of its own, and return the body of the answer; blocks.

    Whoever failed between question and answer leaves no answer to the next one.

    Args:
        protocol: ``NETLINK_*``, e.g. ``socket.NETLINK_ROUTE``.
        request: A message that is answered, by its nature or because it is `acknowledged`.

    Raises:
        OSError: The kernel refuses, or no socket can be had.
        TimeoutError: It gives no answer. Most protocols carry a request out within `send`, however long that takes.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as sock:
        sock.settimeout(_ANSWER_S)
        sock.send(request)
        for kind, answer in messages(sock.recv(_ANSWER_BYTES)):
            if kind == NLMSG_ERROR:
                raise_refusal(answer)
            return answer
    raise OSError(errno.EPROTO, "the kernel gave no answer")


def raise_refusal(body: bytes) -> None:
    """Raise what the body of an ``NLMSG_ERROR`` says, unless it is a plain acknowledgement.

    Raises:
        OSError: With the kernel's errno.
    """
    (code,) = struct.unpack_from("=i", body)
    if code:
        raise OSError(-code, os.strerror(-code))


def attribute(kind: int, payload: bytes) -> bytes:
    """Return an attribute, padded."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload.ljust(_padded(length) - _ATTRIBUTE.size, b"\0")


def nested(kind: int, payload: bytes) -> bytes:
    """Return an attribute that is marked as one whose payload is attributes."""
    return attribute(kind | _NLA_F_NESTED, payload)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type, without its flags, and payload of each attribute; one that is cut short ends it."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            return
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[_padded(length) :]


def text(words: str) -> bytes:
    """Return a string as an attribute's payload, its zero at the end."""
    return words.encode() + b"\0"


def _padded(length: int) -> int:
    return (length + 3) & ~3
