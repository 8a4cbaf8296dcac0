"""The answers of a COLO secondary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.xen.streams.samples import ORDERS, cut_up, raw
from understudy_xen.streams.backchannel import BackChannel
from understudy_xen.streams.errors import StreamCut, StreamError
from understudy_xen.streams.formats import ByteOrder, Limits
from understudy_xen.streams.libxc import DirtyPfnList
from understudy_xen.streams.libxl import CheckpointState, ColoState
from understudy_xen.streams.writer import joined, record

READY, RESUMED, SUSPENDED = (
    CheckpointState(state) for state in (ColoState.SVM_READY, ColoState.SVM_RESUMED, ColoState.SVM_SUSPENDED)
)
TALK = (
    READY,
    RESUMED,
    SUSPENDED,
    DirtyPfnList((4, 1 << 40)),
    READY,
    RESUMED,
    SUSPENDED,
    DirtyPfnList(()),
    READY,
)


def written(byteorder: ByteOrder = "little") -> bytes:
    return b"".join(joined(record(each, byteorder)) for each in TALK)


@pytest.mark.parametrize("byteorder", ORDERS)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_answers_in_pieces_of_any_size(byteorder: ByteOrder, lengths: list[int]) -> None:
    channel = BackChannel(byteorder)
    found = [each for piece in cut_up(written(byteorder), lengths) for each in channel.feed(piece)]
    channel.finish()
    assert tuple(found) == TALK


def test_cut_at_every_offset() -> None:
    data, whole, at = written(), {0}, 0
    for each in TALK:
        at += len(joined(record(each)))
        whole.add(at)
    for cut in range(len(data) + 1):
        channel = BackChannel()
        channel.feed(data[:cut])
        if cut in whole:
            channel.finish()
            continue
        with pytest.raises(StreamCut) as caught:
            channel.finish()
        assert caught.value.offset == cut


FIRST = joined(record(READY))
BEFORE_LIST = FIRST + joined(record(RESUMED)) + joined(record(SUSPENDED))


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        (b"", raw(4), "another record"),
        (b"", joined(record(RESUMED)), "says SVM_RESUMED"),
        (FIRST, FIRST, "says SVM_READY"),
        (b"", raw(5, b"\1"), "1 bytes"),
        (b"", raw(5, b"\7\0\0\0"), "state 0x7"),
        (b"", joined(record(READY))[:12] + b"\0\0\0\1", "padding"),
        (BEFORE_LIST, FIRST, "another record"),
        (BEFORE_LIST, raw(0xF, bytes(12)), "12 bytes"),
        # As libxc of today writes it: the address of its buffer where the first pfn is to be, one pfn too many behind.
        (BEFORE_LIST, raw(0xF, b"\x10\x20\x30\x40\x55\x7f\0\0") + bytes(8), "another record"),
    ],
)
def test_what_is_wrong(right: bytes, wrong: bytes, reason: str) -> None:
    channel = BackChannel()
    channel.feed(right)
    with pytest.raises(StreamError, match=reason) as caught:
        channel.feed(wrong)
    assert len(right) <= caught.value.offset <= len(right) + len(wrong)
    with pytest.raises(StreamError) as again:
        channel.feed(b"")
    assert again.value is caught.value


def test_a_list_has_a_limit() -> None:
    channel = BackChannel(limits=Limits(record_bytes=800))
    channel.feed(BEFORE_LIST + joined(record(DirtyPfnList(tuple(range(100))))))
    with pytest.raises(StreamError, match="claims a body of 808 bytes"):
        channel.feed(BEFORE_LIST + joined(record(DirtyPfnList(tuple(range(101))))))
