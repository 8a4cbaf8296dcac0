"""What the agents say on the stream's connection: the same again after any cutting, and nothing that was not said."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.errors import PeerError
from understudy_xen.wire import HELLO_BYTES, Ack, Answers, Coding, Hello, Refusal

U64 = st.integers(0, 2**64 - 1)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [*pieces, data[at:]]


@pytest.mark.parametrize("coding", list(Coding))
def test_greeting_round_trip(coding: Coding) -> None:
    said = Hello(coding).encode()
    assert len(said) == HELLO_BYTES
    assert Hello.decode(said) == Hello(coding)


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"GET / HTTP/1.1\r\n", "not with the greeting"),
        (struct.pack(">8sHH4x", b"usxenrem", 2, 0), "has version 2, this host speaks 1"),
        (struct.pack(">8sHH4x", b"usxenrem", 1, 7), r"way 7, known are 0 \(plain\), 1 \(zstd\)"),
    ],
)
def test_other_greetings_are_refused(data: bytes, wrong: str) -> None:
    with pytest.raises(PeerError, match=wrong):
        Hello.decode(data)


@given(
    st.lists(st.tuples(U64, U64), max_size=5),
    st.none() | st.text(max_size=600),
    st.lists(st.integers(0, 40)),
)
def test_answers_round_trip_with_any_cutting(
    acks: list[tuple[int, int]], refusal: str | None, sizes: list[int]
) -> None:
    said: list[Ack | Refusal] = [Ack(count, *rest) for count, rest in enumerate(acks, 1)]
    if refusal is not None:
        said.append(Refusal(refusal))
    data = b"".join(each.encode() for each in said)
    answers = Answers()
    heard = [answer for piece in cut(data, sizes) for answer in answers.feed(piece)]
    if refusal is not None:
        assert isinstance(heard[-1], Refusal)
        # What is longer than a refusal may be is cut, in the middle of a character at the worst.
        assert refusal.startswith(heard[-1].reason.rstrip("\N{REPLACEMENT CHARACTER}")[: len(refusal)])
        assert len(refusal.encode()) > 2000 or heard[-1].reason == refusal
        said, heard = said[:-1], heard[:-1]
    assert heard == said


def test_a_long_reason_is_cut() -> None:
    (heard,) = Answers().feed(Refusal("ä" * 5000).encode())
    assert heard == Refusal("ä" * 1000)


def test_i1_acknowledgements_come_without_a_gap() -> None:
    answers = Answers()
    assert list(answers.feed(Ack(1, 5, 0).encode())) == [Ack(1, 5, 0)]
    with pytest.raises(PeerError, match="acknowledges checkpoint 3, after checkpoint 1"):
        list(answers.feed(Ack(3, 5, 0).encode()))
    for first in (0, 2, 2**64 - 1):
        with pytest.raises(PeerError, match=f"acknowledges checkpoint {first}, after checkpoint 0"):
            list(Answers().feed(Ack(first, 0, 0).encode()))
    answers = Answers()
    with pytest.raises(PeerError, match="checkpoint 1, after checkpoint 1"):
        list(answers.feed(Ack(1, 0, 0).encode() * 2))


def test_nothing_follows_a_refusal() -> None:
    answers = Answers()
    heard = answers.feed(Refusal("full").encode() + Ack(1, 0, 0).encode())
    assert next(heard) == Refusal("full")
    with pytest.raises(PeerError, match="after it has refused"):
        next(heard)


@pytest.mark.parametrize(
    ("kind", "length"), [(0, 0), (1, 23), (1, 25), (2, 2001), (3, 24), (0xFFFF, 0xFFFF), (2, 0xFFFF)]
)
def test_other_answers_are_refused_before_they_have_come(kind: int, length: int) -> None:
    with pytest.raises(PeerError, match=f"kind {kind}, {length} bytes"):
        list(Answers().feed(struct.pack(">HH", kind, length)))


@given(st.binary(max_size=200), st.lists(st.integers(0, 40)))
def test_i4_any_bytes_are_answers_or_refused(data: bytes, sizes: list[int]) -> None:
    answers = Answers()
    try:
        for piece in cut(data, sizes):
            list(answers.feed(piece))
            assert len(answers._waiting) < 4 + 2000
    except PeerError:
        pass
