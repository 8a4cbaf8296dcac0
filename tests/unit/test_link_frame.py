"""The bytes on the link."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.errors import PeerError
from understudy.link.frame import MAX_HEADER_BYTES, PREAMBLE, VERSION, Decoder, Frame, encode

headers = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20), max_size=4).map(
    lambda extra: {**extra, "t": "note"}
)


@given(
    frames=st.lists(st.tuples(headers, st.binary(max_size=40)), max_size=5), cuts=st.lists(st.integers(1, 30))
)
def test_whatever_the_pieces_the_frames_are_the_same(
    frames: list[tuple[dict[str, object], bytes]], cuts: list[int]
) -> None:
    stream = PREAMBLE + b"".join(encode(header, payload) for header, payload in frames)
    decoder, found = Decoder(), []
    for cut in [*cuts, len(stream)]:
        found += list(decoder.feed(stream[:cut]))
        stream = stream[cut:]
    assert found == [Frame(header, payload) for header, payload in frames]
    assert decoder.version == VERSION


@given(st.binary(min_size=1, max_size=200))
def test_garbage_is_an_error_and_never_a_frame(garbage: bytes) -> None:
    decoder = Decoder()
    try:
        frames = list(decoder.feed(garbage))
    except PeerError:
        assert list(decoder.feed(PREAMBLE + encode({"t": "beat"}))) == []
    else:
        assert frames == []
        assert PREAMBLE.startswith(garbage[: len(PREAMBLE)])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (struct.pack(">II", MAX_HEADER_BYTES + 1, 0), "announced"),
        (struct.pack(">II", 2, 1 << 30), "announced"),
        (struct.pack(">II", 3, 0) + b"{{{", "no JSON"),
        (struct.pack(">II", 2, 0) + b"[]", "no type"),
        (struct.pack(">II", 100_000, 0) + b"[" * 100_000, "no JSON"),
        (struct.pack(">II", 7, 0) + b'{"t":1}', "no type"),
    ],
)
def test_bad_frames(bad: bytes, words: str) -> None:
    with pytest.raises(PeerError, match=words):
        list(Decoder().feed(PREAMBLE + bad))


def test_frames_before_the_bad_one_are_kept() -> None:
    decoder = Decoder()
    stream = decoder.feed(PREAMBLE + encode({"t": "beat"}) + struct.pack(">II", 2, 0) + b"[]")
    assert next(stream).header == {"t": "beat"}
    with pytest.raises(PeerError):
        next(stream)


def test_too_large_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="larger than the link takes"):
        encode({"t": "note", "p": "x" * MAX_HEADER_BYTES})
