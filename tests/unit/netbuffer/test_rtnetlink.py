"""What is sent is what pyroute2 would send; what comes back is read to its end, and nothing beyond."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from understudy_netbuffer import rtnetlink
from understudy_netbuffer.rtnetlink import (
    INGRESS,
    ROOT,
    Action,
    Event,
    KernelRefused,
    Stats,
    change_message,
    event_of,
    fresh_message,
    messages,
    number,
    read_message,
    refusal_of,
)

ECHO, REQUEST, REPLACE, CREATE = 0x8, 0x1, 0x100, 0x400


def by_pyroute2(index: int, handle: int, action: int, limit: int, flags: int) -> bytes:
    message: Any = tcmsg()
    message["index"], message["handle"], message["parent"] = index, handle, ROOT
    message["attrs"] = [("TCA_KIND", "plug"), ("TCA_OPTIONS", {"action": action, "limit": limit})]
    message["header"]["type"] = rtnetlink.RTM_NEWQDISC
    message["header"]["flags"] = flags
    message["header"]["sequence_number"] = 7
    message.encode()
    return bytes(message.data)


@pytest.mark.parametrize("action", list(Action))
def test_a_change_is_what_pyroute2_would_send(action: Action) -> None:
    made = change_message(42, 0x10000, action)
    number(made, 7)
    assert bytes(made) == by_pyroute2(42, 0x10000, action, 0, REQUEST | ECHO)


def test_a_fresh_plug_has_its_limit_and_takes_the_place_of_any_other() -> None:
    made = fresh_message(42, 0x20000, 10_000_000)
    number(made, 7)
    wanted = by_pyroute2(42, 0x20000, Action.LIMIT, 10_000_000, REQUEST | ECHO | REPLACE | CREATE)
    assert bytes(made) == wanted


def test_the_question_for_counters_names_one_qdisc() -> None:
    made = read_message(42, 0x10000)
    assert struct.unpack_from("=IHH", made) == (36, rtnetlink.RTM_GETQDISC, REQUEST | ECHO)
    assert struct.unpack_from("=iII", made, 20) == (42, 0x10000, ROOT)


def answer(stats: tuple[int, ...], before: bytes = b"") -> bytes:
    attribute = struct.pack("=HHQIIIIIII", 4 + 36, 3, *stats)
    body = struct.pack("=BxxxiIII", 0, 42, 0x10000, ROOT, 2) + before + attribute
    return struct.pack("=IHHII", 16 + len(body), rtnetlink.RTM_NEWQDISC, 0, 7, 99) + body


def test_counters_are_found_behind_any_other_attribute() -> None:
    kind = struct.pack("=HH8s", 9, 1, b"plug") + struct.pack("=HH4s", 5, 12, b"")
    stats = Stats.of(answer((1000, 10, 3, 0, 0, 0, 2, 120), before=kind))
    assert stats == Stats(1000, 10, 3, 2, 120)
    assert (stats.entered_bytes, stats.entered_packets) == (1120, 12)


def test_an_answer_without_counters_is_an_error() -> None:
    message = answer((0,) * 8)[:36]
    with pytest.raises(KernelRefused, match="no counters"):
        Stats.of(message)


def test_a_refusal_carries_the_errno_and_the_kernels_words() -> None:
    text = b"Invalid handle\0\0"
    body = struct.pack("=i", -errno.EINVAL) + bytes(16) + struct.pack("=HH", 4 + len(text), 1) + text
    message = struct.pack("=IHHII", 16 + len(body), 2, 0x200, 7, 99) + body
    refused = refusal_of(message)
    assert refused
    assert refused.errno == errno.EINVAL
    assert "(Invalid handle)" in str(refused.strerror)


def test_an_acknowledgement_is_no_refusal() -> None:
    assert refusal_of(struct.pack("=IHHIIi", 36, 2, 0, 7, 99, 0) + bytes(16)) is None


@pytest.mark.parametrize(("flags", "up"), [(1, True), (0, False)])
def test_a_link_is_up_or_down(flags: int, up: bool) -> None:
    message = bytes(16) + struct.pack("=BxHiII", 0, 1, 42, flags, 0)
    assert event_of(rtnetlink.RTM_NEWLINK, message) == Event(rtnetlink.RTM_NEWLINK, 42, up=up)


def test_an_event_of_traffic_control_names_interface_and_parent() -> None:
    message = bytes(16) + struct.pack("=BxxxiIII", 0, 42, 0, INGRESS, 0)
    event = event_of(rtnetlink.RTM_DELQDISC, message)
    assert event == Event(rtnetlink.RTM_DELQDISC, 42, parent=INGRESS)
    assert str(event) == "lost its qdisc"


def test_what_concerns_no_gate_is_no_event() -> None:
    assert event_of(24, bytes(64)) is None


@given(st.lists(st.binary(max_size=40), max_size=6), st.binary(max_size=20))
def test_every_message_of_a_datagram_is_found_and_rubbish_ends_it(bodies: list[bytes], rest: bytes) -> None:
    datagram = b""
    for index, body in enumerate(bodies):
        head = struct.pack("=IHHII", 16 + len(body), 36, 0, index, 99)
        datagram += (head + body).ljust((16 + len(body) + 3) & ~3, b"\0")
    found = list(messages(datagram + (bytes(16) + rest if rest else b"")))
    assert [(sequence, message[16:]) for _, sequence, _, message in found] == list(enumerate(bodies))
