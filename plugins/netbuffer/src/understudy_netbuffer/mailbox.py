"""Read all datagrams that wait in a socket by one system call, into memory that is never given back.

Python's sockets read one datagram a call, and need one call more to learn that there are no others. A guest with
sixteen interfaces gets sixteen answers at once.

Source: recvmmsg(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from typing import Final

__all__ = ["Mailbox"]

# Looked up once: as members of their enumeration they take longer than the rest of a call.
_TRUNCATED: Final = int(socket.MSG_TRUNC)
_NOW: Final = int(socket.MSG_DONTWAIT)
_DATAGRAMS: Final = 32
_DATAGRAM_BYTES: Final = 1 << 13  # the kernel's notifications are made for a page, or two


class _Vector(ctypes.Structure):
    # struct iovec
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    # struct msghdr
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_Vector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    # struct mmsghdr
    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


class Mailbox:
    """Where the datagrams of one socket are put.

    Args:
        source: The socket; stays the caller's.
    """

    def __init__(self, source: socket.socket) -> None:
        self._fd = source.fileno()
        self._room = bytearray(_DATAGRAMS * _DATAGRAM_BYTES)
        self._view = memoryview(self._room)
        self._pin = (ctypes.c_char * len(self._room)).from_buffer(self._room)
        start = ctypes.addressof(self._pin)
        self._vectors = (_Vector * _DATAGRAMS)(
            *(_Vector(start + number * _DATAGRAM_BYTES, _DATAGRAM_BYTES) for number in range(_DATAGRAMS))
        )
        self._messages = (_Message * _DATAGRAMS)()
        for number, message in enumerate(self._messages):
            message.header.vectors = ctypes.pointer(self._vectors[number])
            message.header.vector_count = 1
        self._call = ctypes.CDLL(None, use_errno=True).recvmmsg

    def collect(self) -> int:
        """Read what waits.

        Returns:
            How many datagrams were read; more may wait if `full`.

        Raises:
            OSError: As recvmmsg; ENOBUFS when some were lost because the socket's queue was full.
        """
        count = int(self._call(self._fd, self._messages, _DATAGRAMS, _NOW, None))
        if count < 0:
            problem = ctypes.get_errno()
            if problem in {errno.EAGAIN, errno.EINTR}:
                return 0
            raise OSError(problem, os.strerror(problem))
        return count

    def datagrams(self, count: int) -> list[bytes | None]:
        """Return the datagrams that `collect` has read, ``None`` for one that was longer than there was room."""
        found: list[bytes | None] = []
        for number in range(count):
            message, start = self._messages[number], number * _DATAGRAM_BYTES
            cut = message.header.flags & _TRUNCATED
            found.append(None if cut else bytes(self._view[start : start + message.length]))
        return found

    def full(self, count: int) -> bool:
        """Tell whether more may wait after `collect` has returned `count`."""
        return count == _DATAGRAMS
