"""Netlink messages: what is made is read back, and no bytes make the reader hang or see too much."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.netlink import (
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    acknowledged,
    ask,
    attribute,
    attributes,
    message,
    messages,
    nested,
    raise_refusal,
    text,
)

KINDS = st.integers(1, 0x3FFF)
PARTS = st.lists(st.tuples(KINDS, st.binary(max_size=40)), max_size=6)


@given(PARTS)
def test_attributes_come_back(parts: list[tuple[int, bytes]]) -> None:
    made = b"".join(attribute(kind, payload) for kind, payload in parts)
    assert len(made) % 4 == 0
    assert list(attributes(made)) == parts
    ((outer, inner),) = attributes(nested(7, made))
    assert (outer, list(attributes(inner))) == (7, parts)


@given(PARTS)
def test_messages_come_back(parts: list[tuple[int, bytes]]) -> None:
    padded = [(kind, body.ljust((len(body) + 3) & ~3, b"\0")) for kind, body in parts]
    made = b"".join(message(kind, 0, body) for kind, body in padded)
    assert list(messages(made)) == padded


@given(st.binary(max_size=200))
def test_any_bytes_end(data: bytes) -> None:
    assert sum(4 + len(payload) for _, payload in attributes(data)) <= len(data)
    assert sum(16 + len(body) for _, body in messages(data)) <= len(data)


def test_what_is_cut_short_is_not_read() -> None:
    assert not list(attributes(attribute(1, b"12345678")[:-1]))
    assert not list(messages(message(20, 0, b"12345678")[:-1]))


def test_the_kernel_reads_them_and_its_refusal_is_raised() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(5)
        for name, code in (("lo", None), ("nowhere-at-all", errno.ENODEV)):
            link = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
            request = acknowledged(message(18, NLM_F_REQUEST, link + attribute(3, text(name))))  # RTM_GETLINK
            assert struct.unpack_from("=H", request, 6) == (NLM_F_REQUEST | NLM_F_ACK,)
            sock.send(request)
            answers = [each for _ in range(1 if code else 2) for each in messages(sock.recv(65536))]
            refusal = next(body for kind, body in answers if kind == NLMSG_ERROR)
            if code is None:
                raise_refusal(refusal)
                told = next(body for kind, body in answers if kind != NLMSG_ERROR)
                assert dict(attributes(told[16:]))[3] == text(name)
            else:
                with pytest.raises(OSError, match="No such device") as raised:
                    raise_refusal(refusal)
                assert raised.value.errno == code


def test_a_question_on_a_socket_of_its_own() -> None:
    link = message(18, NLM_F_REQUEST, struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attribute(3, text("lo")))
    assert dict(attributes(ask(socket.NETLINK_ROUTE, link)[16:]))[3] == text("lo")
    with pytest.raises(OSError, match="No such device"):
        ask(socket.NETLINK_ROUTE, link.replace(b"lo", b"l?"))
