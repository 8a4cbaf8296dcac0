"""Pieces: the same stream again after any cutting, compressed where it pays, refused where they lie."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from understudy.errors import PeerError
from understudy_xen.coding import LARGEST_PIECE_BYTES, PIECE_HEADER, PROBE_EVERY, Decoder, Encoder
from understudy_xen.wire import HELLO_BYTES

SOFT = random.Random(4).randbytes(32768).hex().encode()  # compresses to somewhat more than a half
HARD = random.Random(5).randbytes(len(SOFT))


class Clock:
    """Time passes when compression asks how late it is: `compress_ns` from one question to the next."""

    def __init__(self, compress_ns: int) -> None:
        self.now_ns = 0
        self.compress_ns = compress_ns

    def __call__(self) -> int:
        self.now_ns += self.compress_ns
        return self.now_ns


def send(encoder: Encoder, chunk: bytes, link_ns_per_byte: float) -> bytes:
    header, body = encoder.encode(chunk)
    size = len(header) + len(body)
    encoder.sent(size, int(size * link_ns_per_byte))
    return header + bytes(body)


def compressed(encoder: Encoder, chunk: bytes, link_ns_per_byte: float, times: int) -> int:
    return sum(len(send(encoder, chunk, link_ns_per_byte)) < len(chunk) for _ in range(times))


@given(
    st.lists(st.binary(min_size=1, max_size=3000) | st.sampled_from([SOFT, HARD, bytes(4096)]), max_size=12),
    st.lists(st.integers(1, 100_000), max_size=20),
    st.booleans(),
)
def test_round_trip_with_any_cutting(chunks: list[bytes], sizes: list[int], slow: bool) -> None:
    encoder, decoder = Encoder(), Decoder()
    link = b"".join(send(encoder, chunk, 1e9 if slow else 0) for chunk in chunks)
    out: list[bytes] = []
    at = 0
    for size in [*sizes, len(link)]:
        out += decoder.feed(link[at : at + size])
        at += size
    assert out == chunks
    assert encoder.figures.plain_bytes == sum(map(len, chunks))
    assert encoder.figures.link_bytes == len(link)
    assert not decoder._waiting


def test_compresses_on_a_slow_link() -> None:
    encoder = Encoder(Clock(len(SOFT)))  # 1 ns a byte
    assert compressed(encoder, SOFT, 100.0, 50) == 50
    assert encoder.figures.compresses
    assert encoder.figures.link_bytes < encoder.figures.plain_bytes * 0.7


def test_does_not_on_a_quick_link_but_probes() -> None:
    encoder = Encoder(Clock(len(SOFT)))
    # The first piece is a probe, too: nothing is known yet.
    assert compressed(encoder, SOFT, 0.1, 3 * PROBE_EVERY) == 3
    assert not encoder.figures.compresses


def test_incompressible_pages_turn_it_off() -> None:
    encoder = Encoder(Clock(len(SOFT)))
    compressed(encoder, SOFT, 10.0, 10)
    assert encoder.pays
    compressed(encoder, HARD, 10.0, 20)
    assert not encoder.figures.compresses
    before = encoder.figures.link_bytes
    compressed(encoder, HARD, 10.0, 10)
    assert encoder.figures.link_bytes - before == 10 * (len(HARD) + PIECE_HEADER.size)


def test_probing_finds_that_it_pays_again() -> None:
    encoder = Encoder(Clock(len(SOFT)))
    compressed(encoder, HARD, 10.0, 2 * PROBE_EVERY)
    assert not encoder.pays
    assert compressed(encoder, SOFT, 10.0, 3 * PROBE_EVERY) > PROBE_EVERY
    assert encoder.pays


def test_probing_finds_that_the_link_is_slow_now() -> None:
    encoder = Encoder(Clock(len(SOFT)))
    compressed(encoder, SOFT, 0.1, 2 * PROBE_EVERY)
    assert not encoder.pays
    compressed(encoder, SOFT, 50.0, 4)
    assert encoder.pays


def test_headers_of_records_are_neither_compressed_nor_measured() -> None:
    encoder = Encoder(Clock(10))
    for _ in range(3 * PROBE_EVERY):
        assert send(encoder, bytes(24), 1e6) == PIECE_HEADER.pack(24, 24) + bytes(24)
    assert not encoder.pays


@pytest.mark.parametrize(
    "header",
    [(0, 0), (0, 1), (5, 6), (5, 0), (LARGEST_PIECE_BYTES + 1, 5), (2**32 - 1, 2**32 - 1)],
)
def test_sizes_that_no_piece_has_are_refused_at_once(header: tuple[int, int]) -> None:
    with pytest.raises(PeerError, match="claims"):
        list(Decoder().feed(PIECE_HEADER.pack(*header)))


def piece(body: bytes, length: int) -> bytes:
    return PIECE_HEADER.pack(length, len(body)) + body


def test_damaged_pieces_are_refused() -> None:
    packed = zstandard.ZstdCompressor(level=1).compress(bytes(65536))
    damaged = {
        "short": packed[:-1],
        "long": packed + b"x",
        "no frame": b"x" * len(packed),
        "two frames": packed + packed,
        "frame of nothing": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
        "only its head": packed[:6],
    }
    for what, body in damaged.items():
        decoder = Decoder()
        with pytest.raises(PeerError, match="compressed piece"):
            list(decoder.feed(piece(body, 65536))) or pytest.fail(what)
    assert list(Decoder().feed(piece(packed, 65536))) == [bytes(65536)]


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_frame_of_another_size_is_refused(wrong: int) -> None:
    packed = zstandard.ZstdCompressor(level=1).compress(SOFT)
    with pytest.raises(PeerError, match="does not hold"):
        list(Decoder().feed(piece(packed, len(SOFT) + wrong)))
    unsaid = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(SOFT)
    with pytest.raises(PeerError, match="does not hold"):
        list(Decoder().feed(piece(unsaid, len(SOFT))))


def test_i4_a_bomb_is_not_unpacked() -> None:
    # 64 MiB in a few KB, said to be one piece: only what the header may claim is ever set aside.
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 26))
    assert len(bomb) < LARGEST_PIECE_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(PeerError, match="does not hold"):
            list(Decoder().feed(piece(bomb, LARGEST_PIECE_BYTES)))
        assert tracemalloc.get_traced_memory()[1] < 4 * LARGEST_PIECE_BYTES
    finally:
        tracemalloc.stop()


def test_i4_many_small_bombs_come_out_one_by_one() -> None:
    small = zstandard.ZstdCompressor(level=1).compress(bytes(LARGEST_PIECE_BYTES))
    many = piece(small, LARGEST_PIECE_BYTES) * 1000  # 60 KB that stand for 1 GB
    tracemalloc.start()
    try:
        total = sum(len(chunk) for chunk in Decoder().feed(many))
        assert tracemalloc.get_traced_memory()[1] < 4 * LARGEST_PIECE_BYTES
    finally:
        tracemalloc.stop()
    assert total == 1000 * LARGEST_PIECE_BYTES


def test_whole_pieces_before_a_damaged_one_come_out() -> None:
    out = Decoder().feed(piece(b"abc", 3) + piece(b"x", 9))
    assert next(out) == b"abc"
    with pytest.raises(PeerError):
        next(out)


@given(st.binary(max_size=300))
def test_i4_any_bytes_are_pieces_or_refused(data: bytes) -> None:
    decoder = Decoder()
    try:
        for at in range(0, len(data), HELLO_BYTES):
            list(decoder.feed(data[at : at + HELLO_BYTES]))
            assert len(decoder._waiting) <= LARGEST_PIECE_BYTES + PIECE_HEADER.size
    except PeerError:
        pass
