"""Every record that the writer writes is read as the same value, in both byte orders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.xen.streams.samples import ORDERS, hvm_blob, libxc_bodies, libxl_bodies
from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.errors import BodyError
from understudy_xen.streams.formats import ByteOrder, Layer, LibxcType, LibxlType, record_header
from understudy_xen.streams.hvmcontext import HvmContext
from understudy_xen.streams.libxl import CheckpointState, ColoState, EmulatorXenstoreData
from understudy_xen.streams.pages import PageData, count_pages
from understudy_xen.streams.reader import Optional, read_record
from understudy_xen.streams.writer import Body, joined, raw_record, record

orders = st.sampled_from(ORDERS)


def plainly(value: object) -> object:
    """Return a value with its views turned into bytes, so that it can be compared."""
    names = getattr(type(value), "__slots__", ())
    return {
        name: bytes(part) if isinstance(part := getattr(value, name), bytes | memoryview) else part
        for name in names
    }


def body_of(stream: bytes, byteorder: ByteOrder) -> tuple[int, memoryview]:
    kind, length = record_header(byteorder).unpack_from(stream)
    assert len(stream) == 8 + length + -length % 8
    assert not any(stream[8 + length :])
    return kind, memoryview(stream)[8 : 8 + length]


def read_back(layer: Layer, what: Body, byteorder: ByteOrder) -> object:
    return read_record(layer, *body_of(joined(record(what, byteorder)), byteorder), byteorder)


@given(libxl_bodies, orders)
def test_libxl_records(what: Body, byteorder: ByteOrder) -> None:
    again = read_back(Layer.LIBXL, what, byteorder)
    assert type(again) is type(what)
    assert plainly(again) == plainly(what)


@given(libxc_bodies, orders)
def test_libxc_records(what: Body, byteorder: ByteOrder) -> None:
    again = read_back(Layer.LIBXC, what, byteorder)
    assert type(again) is type(what)
    assert plainly(again) == plainly(what)


@pytest.mark.parametrize("byteorder", ORDERS)
def test_every_type_of_the_specifications_is_covered(byteorder: ByteOrder) -> None:
    for kind in LibxlType:
        if kind in {LibxlType.END, LibxlType.LIBXC_CONTEXT, LibxlType.CHECKPOINT_END}:
            stream = joined(record(kind, byteorder))
            assert read_record(Layer.LIBXL, *body_of(stream, byteorder), byteorder) is kind
    signals = {LibxcType.END, LibxcType.VERIFY, LibxcType.CHECKPOINT, LibxcType.STATIC_DATA_END}
    for signal in signals:
        stream = joined(record(signal, byteorder))
        assert read_record(Layer.LIBXC, *body_of(stream, byteorder), byteorder) is signal


@pytest.mark.parametrize("byteorder", ORDERS)
def test_hvm_context(byteorder: ByteOrder) -> None:
    blob = hvm_blob(byteorder, salt=7)
    again = read_back(Layer.LIBXC, HvmContext(blob), byteorder)
    assert isinstance(again, HvmContext)
    assert bytes(again.blob) == blob
    entries = [(entry.type, bytes(entry.data)) for entry in again.entries(byteorder)]
    assert [kind for kind, _ in entries] == [1, 2]
    assert entries[1][1] == bytes([7] * 5)


@given(st.binary(max_size=30), st.integers(0x80000000, 0xFFFFFFFF))
def test_optional_records_keep_their_body(body: bytes, kind: int) -> None:
    stream = joined(raw_record(kind, body))
    assert read_record(Layer.LIBXC, *body_of(stream, "little"), "little") == Optional(kind, body)


def test_contents_of_pages_are_views_of_the_callers_bytes() -> None:
    pages = bytearray(b"\1" * 4096 + b"\2" * 4096)
    written: list[Buffer] = record(PageData((5, 6), pages))
    assert any(part is pages for part in written)
    stream = bytearray(joined(written))
    again = read_record(Layer.LIBXC, LibxcType.PAGE_DATA, memoryview(stream)[8:], "little")
    assert isinstance(again, PageData)
    stream[-1] = 77
    last = list(again.pages())[-1]
    assert last.contents is not None
    assert (last.pfn, last.contents[-1]) == (6, 77)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=40), orders)
def test_counting_pages_agrees_with_looking_at_each(entries: list[int], byteorder: ByteOrder) -> None:
    raw = b"".join(entry.to_bytes(8, byteorder) for entry in entries)
    wrong = [n for n, entry in enumerate(entries) if entry >> 60 in {5, 6, 7, 8} or entry >> 52 & 0xFF]
    if wrong:
        with pytest.raises(BodyError) as caught:
            count_pages(raw, byteorder, first=3)
        assert caught.value.at == 8 + 8 * (3 + wrong[0])
    else:
        assert count_pages(raw, byteorder) == sum(entry >> 60 < 0xD for entry in entries)


@pytest.mark.parametrize(
    ("strings", "problem"),
    [
        (b"key\0value", "no NUL"),
        (b"key\0value\0odd\0", "3 strings"),
        (b"\0value\0", "no relative xenstore key"),
        (b"/absolute\0value\0", "no relative xenstore key"),
        (b"sp ace\0value\0", "no relative xenstore key"),
        (b"k\xc3\xa9y\0value\0", "no relative xenstore key"),
    ],
)
def test_xenstore_keys_that_are_none(strings: bytes, problem: str) -> None:
    with pytest.raises(BodyError, match=problem):
        EmulatorXenstoreData.unpack(memoryview(bytes(8) + strings), "little")


def test_values_of_xenstore_may_be_empty_and_any_bytes() -> None:
    body = memoryview(bytes(8) + b"key\0\0other\0\xff\n\0")
    assert EmulatorXenstoreData.unpack(body, "little").pairs == ((b"key", b""), (b"other", b"\xff\n"))


def test_a_state_of_the_specifications_length_is_read_too() -> None:
    assert CheckpointState.unpack(memoryview(b"\2" + bytes(7)), "little").state is ColoState.SVM_READY
    with pytest.raises(BodyError, match="reserved"):
        CheckpointState.unpack(memoryview(b"\2" + bytes(6) + b"\1"), "little")
