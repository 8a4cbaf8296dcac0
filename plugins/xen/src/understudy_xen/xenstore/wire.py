"""The bytes of the xenstore protocol, without any I/O.

::

    message = type (u32) | req_id (u32) | tx_id (u32) | length (u32) | payload        host byte order

A request is answered by a message with the same type and req_id, or by one of type ERROR. Watch events come unasked,
with req_id 0, so no request of ours has that number. Xenstored closes the connection of whoever sends more than
4096 bytes of payload, so that is looked at before anything is sent.

Source: Xen xen/include/public/io/xs_wire.h, docs/misc/xenstore.txt (4.22.0; messages and limits are the same from 4.14
on); Linux 6.1 drivers/xen/xenbus/xenbus_dev_frontend.c (struct xenbus_file_priv: the buffer for a request).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from understudy_xen.xenstore.errors import XenStoreGarbage, XenStoreLimit

__all__ = [
    "ABS_PATH_MAX",
    "DEVICE_PAYLOAD_MAX",
    "PAYLOAD_MAX",
    "Decoder",
    "Message",
    "Op",
    "encode",
    "path_bytes",
    "special_or_path_bytes",
    "strings",
    "text_of",
]

PAYLOAD_MAX: Final = 4096  #: XENSTORE_PAYLOAD_MAX, bytes
ABS_PATH_MAX: Final = 3072  #: XENSTORE_ABS_PATH_MAX, bytes
DEVICE_PAYLOAD_MAX: Final = 4080  #: what the kernel's device takes: its buffer holds the header, too
REL_PATH_MAX: Final = 2048  #: XENSTORE_REL_PATH_MAX, bytes

_HEADER = struct.Struct("=IIII")
_PATH = re.compile(rb"/?(?:[A-Za-z0-9_@-]+(?:/[A-Za-z0-9_@-]+)*)?", re.ASCII)
_SPECIAL = re.compile(rb"@[A-Za-z]+(?:/[0-9]+)?", re.ASCII)


class Op(IntEnum):
    """Types of messages, enum xsd_sockmsg_type."""

    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    DIRECTORY_PART = 22


@dataclass(frozen=True, slots=True)
class Message:
    """One message, either way."""

    op: int  #: an `Op`, or a type that this client never asks for
    req_id: int
    tx_id: int
    payload: bytes


def encode(op: Op, req_id: int, tx_id: int, payload: bytes, limit: int = PAYLOAD_MAX) -> bytes:
    """Return a request's bytes.

    Args:
        op: Its type.
        req_id: Number that its answer will carry, not 0.
        tx_id: Of the transaction, 0 outside of one.
        payload: Whole, with the zeros that the type asks for.
        limit: How long a payload the way to xenstored takes, bytes.

    Raises:
        XenStoreLimit: The payload is longer.
    """
    if len(payload) > limit:
        raise XenStoreLimit(
            f"a {op.name} of {len(payload)} bytes was not sent to xenstored: it takes {limit} bytes, "
            f"path and value together"
        )
    return _HEADER.pack(op, req_id, tx_id, len(payload)) + payload


class Decoder:
    """Cuts messages out of a stream of bytes, however it comes in pieces.

    Guarantees:
        Never keeps more than one message that has not come whole: what claims to be longer than the protocol allows
        is refused by its header.
    """

    def __init__(self) -> None:
        self._rest = bytearray()

    @property
    def pending_bytes(self) -> int:
        """How much of a message has come that is not whole yet."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that are whole now, in the order they came.

        Raises:
            XenStoreGarbage: A header claims more than 4096 bytes of payload. Nothing that follows can be read.
        """
        self._rest += data
        whole: list[Message] = []
        at = 0
        while len(self._rest) - at >= _HEADER.size:
            op, req_id, tx_id, length = _HEADER.unpack_from(self._rest, at)
            if length > PAYLOAD_MAX:
                raise XenStoreGarbage(
                    f"xenstored sent a message of type {op} that claims {length} bytes; {PAYLOAD_MAX} are allowed"
                )
            end = at + _HEADER.size + length
            if end > len(self._rest):
                break
            whole.append(Message(op, req_id, tx_id, bytes(self._rest[at + _HEADER.size : end])))
            at = end
        del self._rest[:at]
        return whole


def path_bytes(path: str) -> bytes:
    """Return a path as it is sent, without its zero.

    Raises:
        XenStoreLimit: Xenstored takes no such path.
    """
    try:
        raw = path.encode("ascii")
    except UnicodeEncodeError:
        raw = b"\0"  # not ASCII: refused below
    if not raw or not _PATH.fullmatch(raw):
        raise XenStoreLimit(
            f"{path!r} is no xenstore path: names of letters, digits and -_@, joined by single slashes, "
            f"and no slash at the end"
        )
    limit = ABS_PATH_MAX if raw.startswith(b"/") else REL_PATH_MAX
    if len(raw) > limit:
        raise XenStoreLimit(
            f"a xenstore path of {len(raw)} bytes is too long, {limit} are allowed: {path[:60]}..."
        )
    return raw


def special_or_path_bytes(path: str) -> bytes:
    """Return what is watched as it is sent: a path, ``@introduceDomain`` or ``@releaseDomain``.

    Raises:
        XenStoreLimit: It is neither.
    """
    if path.startswith("@"):
        raw = path.encode("ascii", "replace")
        if _SPECIAL.fullmatch(raw):
            return raw
    return path_bytes(path)


def strings(payload: bytes) -> list[bytes]:
    """Return the strings of a payload in which each one ends with a zero."""
    parts = payload.split(b"\0")
    if not parts[-1]:
        parts.pop()
    return parts


def text_of(value: bytes) -> str:
    """Return a value as text; bytes that are no UTF-8 survive a way back through `surrogateescape`."""
    return value.decode("utf-8", "surrogateescape")
