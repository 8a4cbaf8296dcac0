"""The few messages of nf_tables that are sent while a guest is protected, made once and sent by one raw socket.

A session's table is made by the program ``nft``. What is done at every commit must not start a process: it takes two
batches of less than 300 bytes, which never change.

The kernel carries a batch out, whole or not at all, before ``sendmsg`` returns; its answers are there to be read then.

Source: Linux include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h; net/netfilter/nfnetlink.c
(nfnetlink_rcv_batch), nf_tables_api.c (nft_set_flush, nf_tables_newsetelem).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from understudy.netlink import (
    NLM_F_CREATE,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    acknowledged,
    attribute,
    attributes,
    message,
    messages,
    nested,
    raise_refusal,
    text,
)

__all__ = [
    "Count",
    "Nfnetlink",
    "batch",
    "counter_request",
    "element_added",
    "set_flushed",
    "table_deleted",
]

# netlink.h, nfnetlink.h
_NETLINK_NETFILTER: Final = 12
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10
_BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
_NFTABLES: Final = 10
_NFPROTO_UNSPEC: Final = 0
_NFPROTO_NETDEV: Final = 5
# nf_tables.h
_DELTABLE: Final = _NFTABLES << 8 | 2
_NEWSETELEM: Final = _NFTABLES << 8 | 12
_DELSETELEM: Final = _NFTABLES << 8 | 14
_NEWOBJ: Final = _NFTABLES << 8 | 18
_GETOBJ: Final = _NFTABLES << 8 | 19
_TABLE_NAME: Final = 1
_LIST_TABLE: Final = 1
_LIST_SET: Final = 2
_LIST_ELEMENTS: Final = 3
_LIST_ELEM: Final = 1
_ELEM_KEY: Final = 1
_ELEM_TIMEOUT: Final = 4
_DATA_VALUE: Final = 1
_OBJ_TABLE: Final = 1
_OBJ_NAME: Final = 2
_OBJ_TYPE: Final = 3
_OBJ_DATA: Final = 4
_OBJECT_COUNTER: Final = 1
_COUNTER_BYTES: Final = 1
_COUNTER_PACKETS: Final = 2

_IFNAME_BYTES: Final = 16
_ANSWER_BYTES: Final = 8192
_GENERIC = struct.Struct("!BBH")


@dataclass(frozen=True, slots=True)
class Count:
    """What a counter of nf_tables has counted."""

    packets: int
    bytes: int


def element_added(table: str, name: str, interface: str, timeout_ms: int) -> bytes:
    """Return the message that puts an interface into a set of interface names.

    Args:
        table: Of the family netdev.
        name: Of the set; it must have the flag ``timeout``.
        interface: The element.
        timeout_ms: After how many milliseconds the kernel takes it for gone, 0 = never. The kernel does not begin the
            time anew for an element that is there.
    """
    key = nested(_ELEM_KEY, attribute(_DATA_VALUE, interface.encode().ljust(_IFNAME_BYTES, b"\0")))
    timeout = attribute(_ELEM_TIMEOUT, struct.pack("!Q", timeout_ms)) if timeout_ms else b""
    elements = nested(_LIST_ELEMENTS, nested(_LIST_ELEM, key + timeout))
    return _message(_NEWSETELEM, NLM_F_CREATE, _where(table, name) + elements)


def set_flushed(table: str, name: str) -> bytes:
    """Return the message that empties a set; right also for one that is empty."""
    return _message(_DELSETELEM, 0, _where(table, name))


def table_deleted(table: str) -> bytes:
    """Return the message that deletes a table and all that is in it."""
    return _message(_DELTABLE, 0, attribute(_TABLE_NAME, text(table)))


def batch(*changes: bytes) -> bytes:
    """Return `changes` as one transaction, for `Nfnetlink.change`; the kernel answers for the last one."""
    bracket = struct.pack("!BBH", _NFPROTO_UNSPEC, 0, _NFTABLES)
    begin, end = (message(each, NLM_F_REQUEST, bracket) for each in (_BATCH_BEGIN, _BATCH_END))
    return b"".join((begin, *changes[:-1], acknowledged(changes[-1]), end))


def counter_request(table: str, name: str) -> bytes:
    """Return the message that asks for a named counter, for `Nfnetlink.counter`."""
    kind = attribute(_OBJ_TYPE, struct.pack("!I", _OBJECT_COUNTER))
    body = attribute(_OBJ_TABLE, text(table)) + attribute(_OBJ_NAME, text(name)) + kind
    return _message(_GETOBJ, 0, body)


class Nfnetlink:
    """One socket to nf_tables; calls block for as long as another transaction holds the kernel's lock.

    Raises:
        OSError: No netlink socket can be had.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            _NETLINK_NETFILTER,
        )
        try:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def change(self, transaction: bytes) -> None:
        """Carry out what `batch` made.

        Raises:
            OSError: The kernel refuses; nothing was changed. ``ENOENT``: table or set is not there.
        """
        for kind, body in self._ask(transaction):
            if kind == NLMSG_ERROR:
                raise_refusal(body)
                return
        raise OSError(errno.EPROTO, "nf_tables did not answer")

    def counter(self, request: bytes) -> Count:
        """Return a counter that `counter_request` asks for.

        Raises:
            OSError: The kernel refuses. ``ENOENT``: it is not there.
        """
        for kind, body in self._ask(request):
            if kind == NLMSG_ERROR:
                raise_refusal(body)
            if kind == _NEWOBJ:
                told = dict(attributes(body[_GENERIC.size :]))
                data = dict(attributes(told.get(_OBJ_DATA, b"")))
                packets, octets = (
                    int.from_bytes(data[which], "big") for which in (_COUNTER_PACKETS, _COUNTER_BYTES)
                )
                return Count(packets, octets)
        raise OSError(errno.EPROTO, "nf_tables did not answer")

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def _ask(self, request: bytes) -> Iterator[tuple[int, bytes]]:
        # An answer that nobody has read, after a failure, is none to this question.
        for _ in self._answers():
            pass
        self._socket.send(request)
        return self._answers()

    def _answers(self) -> Iterator[tuple[int, bytes]]:
        while True:
            try:
                datagram = self._socket.recv(_ANSWER_BYTES)
            except BlockingIOError:
                return
            yield from messages(datagram)


def _where(table: str, name: str) -> bytes:
    return attribute(_LIST_TABLE, text(table)) + attribute(_LIST_SET, text(name))


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return message(kind, flags | NLM_F_REQUEST, _GENERIC.pack(_NFPROTO_NETDEV, 0, 0) + body)
