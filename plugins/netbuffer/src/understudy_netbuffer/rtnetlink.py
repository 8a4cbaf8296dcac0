"""The few rtnetlink messages that are exchanged while a guest waits: encoded once, decoded by offset.

A change of a plug qdisc asks for its *echo* (``NLM_F_ECHO``) instead of a bare acknowledgement: the kernel answers with
the qdisc as it is after the change, counters included. So one answer confirms the change, and says how many bytes were
held at the barrier and how many have left so far. A refusal is an ``NLMSG_ERROR`` as ever. Nothing is cut out of a
datagram before it is looked at, as `understudy.netlink` does: these are read while the guest stands still.

========  =====  ===================================================================
offset    size   field, all of the host's byte order
========  =====  ===================================================================
0         16     struct nlmsghdr: length, type, flags, sequence number, port
16        20     struct tcmsg: family, ifindex (at 20), handle, parent, info
36        12     TCA_KIND "plug"
48        12     TCA_OPTIONS: struct tc_plug_qopt: action, limit in bytes
========  =====  ===================================================================

Source: Linux include/uapi/linux/{netlink,rtnetlink,pkt_sched,gen_stats}.h; net/sched/{sch_api,sch_plug}.c.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from understudy.netlink import NLM_F_CREATE, NLM_F_REQUEST

__all__ = [
    "INGRESS",
    "INGRESS_HANDLE",
    "ROOT",
    "Action",
    "Event",
    "KernelRefused",
    "Stats",
    "change_message",
    "event_of",
    "fresh_message",
    "messages",
    "read_message",
    "refusal_of",
]

RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
RTM_NEWQDISC: Final = 36
RTM_DELQDISC: Final = 37
RTM_GETQDISC: Final = 38
RTM_NEWTFILTER: Final = 44
RTM_DELTFILTER: Final = 45
RTM_NEWACTION: Final = 48
RTM_DELACTION: Final = 49

_NLM_F_ECHO: Final = 0x008
_NLM_F_REPLACE: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200

ROOT: Final = 0xFFFFFFFF  #: TC_H_ROOT
INGRESS: Final = 0xFFFFFFF1  #: TC_H_INGRESS, the parent of ingress and clsact qdiscs
INGRESS_HANDLE: Final = 0xFFFF0000  #: the handle that both of them have, the parent of their filters

_IFF_UP: Final = 1
_TCA_STATS: Final = 3
_NLMSGERR_ATTR_MSG: Final = 1

_HEADER = struct.Struct("=IHHII")
_TRAFFIC = struct.Struct("=BxxxiIII")
_LINK = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_PLUG = struct.Struct("=HH8sHHII")
_STATS = struct.Struct("=QIIIIIII")
_KIND = b"plug\0\0\0\0"
_SEQUENCE_AT: Final = 8


class Action(IntEnum):
    """What a plug qdisc is told. Source: enum of TCQ_PLUG_* in include/uapi/linux/pkt_sched.h."""

    BUFFER = 0  #: end the epoch: what comes from now on belongs to the next one
    RELEASE_ONE = 1  #: let out what was held at the last BUFFER
    RELEASE_INDEFINITE = 2  #: let everything pass
    LIMIT = 3  #: hold at most so many bytes


class KernelRefused(OSError):
    """The kernel refused a request: its errno, and its own words where it gives any."""


@dataclass(frozen=True, slots=True)
class Stats:
    """The counters of a qdisc. Packets that are segmented later count once while held, several times when sent."""

    sent_bytes: int
    sent_packets: int
    dropped_packets: int
    held_packets: int
    held_bytes: int

    @property
    def entered_bytes(self) -> int:
        """How many bytes have ever been taken in: those that have left and those that are held."""
        return self.sent_bytes + self.held_bytes

    @property
    def entered_packets(self) -> int:
        """How many packets have ever been taken in, as `entered_bytes`."""
        return self.sent_packets + self.held_packets

    @classmethod
    def of(cls, message: bytes) -> Stats:
        """Decode the counters of an ``RTM_NEWQDISC`` message."""
        for kind, at in _attributes(message, _HEADER.size + _TRAFFIC.size):
            if kind == _TCA_STATS:
                sent_bytes, sent, dropped, _, _, _, held, held_bytes = _STATS.unpack_from(message, at)
                return cls(sent_bytes, sent, dropped, held, held_bytes)
        raise KernelRefused(0, "the kernel tells no counters of the qdisc")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was changed by somebody else."""

    kind: int  #: ``RTM_*``
    index: int  #: of the interface
    parent: int = 0  #: of a qdisc or filter
    up: bool = False  #: of an interface

    def __str__(self) -> str:
        words = {
            RTM_NEWLINK: "was brought down",
            RTM_DELLINK: "was deleted",
            RTM_NEWQDISC: "got another qdisc",
            RTM_DELQDISC: "lost its qdisc",
            RTM_NEWTFILTER: "got another filter",
            RTM_DELTFILTER: "lost its filter",
        }
        return words.get(self.kind, "had an action changed")


def change_message(index: int, handle: int, action: Action) -> bytearray:
    """Encode a change of the plug qdisc at the root of an interface."""
    return _plug(index, handle, action, 0, 0)


def fresh_message(index: int, handle: int, limit_bytes: int) -> bytearray:
    """Encode a plug qdisc in the place of whatever is at an interface's root: closed, empty, with fresh counters.

    Args:
        index: Of the interface.
        handle: One that the present root does not have; else the kernel takes it for a change.
        limit_bytes: How much it may hold; without it the kernel's default is far too small.
    """
    return _plug(index, handle, Action.LIMIT, limit_bytes, NLM_F_CREATE | _NLM_F_REPLACE)


def read_message(index: int, handle: int) -> bytearray:
    """Encode the question for a qdisc's counters."""
    size = _HEADER.size + _TRAFFIC.size
    message = bytearray(size)
    _HEADER.pack_into(message, 0, size, RTM_GETQDISC, NLM_F_REQUEST | _NLM_F_ECHO, 0, 0)
    _TRAFFIC.pack_into(message, _HEADER.size, 0, index, handle, ROOT, 0)
    return message


def _plug(index: int, handle: int, action: Action, limit_bytes: int, flags: int) -> bytearray:
    start = _HEADER.size + _TRAFFIC.size
    message = bytearray(start + _PLUG.size)
    _HEADER.pack_into(message, 0, len(message), RTM_NEWQDISC, NLM_F_REQUEST | _NLM_F_ECHO | flags, 0, 0)
    _TRAFFIC.pack_into(message, _HEADER.size, 0, index, handle, ROOT, 0)
    # TCA_KIND is 1 and its text ends with one zero; TCA_OPTIONS is 2.
    _PLUG.pack_into(message, start, 9, 1, _KIND, 12, 2, action, limit_bytes)
    return message


def number(message: bytearray, sequence: int) -> None:
    """Write the sequence number by which the answer is known."""
    struct.pack_into("=I", message, _SEQUENCE_AT, sequence)


def messages(datagram: bytes) -> Iterable[tuple[int, int, int, bytes]]:
    """Return type, sequence number, port and bytes of every message of a datagram."""
    at, end = 0, len(datagram)
    found = []
    while at + _HEADER.size <= end:
        length, kind, _, sequence, port = _HEADER.unpack_from(datagram, at)
        if length == end and not at:
            return ((kind, sequence, port, datagram),)  # one message, as nearly always
        if length < _HEADER.size:
            break
        found.append((kind, sequence, port, datagram[at : at + length]))
        at += (length + 3) & ~3
    return found


def refusal_of(message: bytes) -> KernelRefused | None:
    """Return what an ``NLMSG_ERROR`` says, ``None`` for a plain acknowledgement."""
    code = -int(struct.unpack_from("=i", message, _HEADER.size)[0])
    if not code:
        return None
    text = os.strerror(code)
    flags = _HEADER.unpack_from(message, 0)[2]
    if flags & _NLM_F_ACK_TLVS:
        # NETLINK_CAP_ACK: of the refused request only its header is repeated.
        for kind, at in _attributes(message, _HEADER.size + 4 + _HEADER.size):
            if kind == _NLMSGERR_ATTR_MSG:
                said = message[at:].split(b"\0", 1)[0].decode(errors="replace")
                text = f"{text} ({said})"
    return KernelRefused(code, text)


def event_of(kind: int, message: bytes) -> Event | None:
    """Decode a notification, ``None`` if it is about nothing that a gate is made of."""
    if kind in {RTM_NEWLINK, RTM_DELLINK}:
        _, _, index, flags, _ = _LINK.unpack_from(message, _HEADER.size)
        return Event(kind, index, up=bool(flags & _IFF_UP))
    if kind in {RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER, RTM_DELTFILTER}:
        _, index, _, parent, _ = _TRAFFIC.unpack_from(message, _HEADER.size)
        return Event(kind, index, parent=parent)
    if kind in {RTM_NEWACTION, RTM_DELACTION}:
        return Event(kind, 0)
    return None


def _attributes(message: bytes, at: int) -> Iterator[tuple[int, int]]:
    # Type and offset of the payload of each attribute.
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, at + _ATTRIBUTE.size
        at += (length + 3) & ~3
