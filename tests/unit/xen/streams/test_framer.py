"""Boundaries of records and checkpoints, however the bytes arrive; and what is no stream, with its offset."""

from __future__ import annotations

import tracemalloc
from struct import pack

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.testbeds.rounds import rounds
from tests.unit.xen.streams.samples import (
    CONFIG,
    ORDERS,
    capture,
    cut_up,
    head,
    hvm_first,
    hvm_state,
    libxc_record,
    pages,
    pv,
    raw,
    remus,
    saved,
)
from understudy_xen.streams.errors import StreamCut, StreamError
from understudy_xen.streams.formats import ByteOrder, Form, GuestType, Layer, LibxcType, LibxlType, Limits
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.frames import Frame
from understudy_xen.streams.libxc import HvmParams
from understudy_xen.streams.libxl import CheckpointState, ColoState, EmulatorContext
from understudy_xen.streams.verifier import Verifier
from understudy_xen.streams.writer import joined, libxc_headers, libxl_header, preamble, record
from understudy_xen.streams.x86pv import PvInfo

STREAMS = {
    **{f"saved-{order}": saved(order) for order in ORDERS},
    **{f"remus-{order}": remus(order) for order in ORDERS},
    **{f"colo-{order}": remus(order, colo=True) for order in ORDERS},
    **{f"pv-{order}": pv(order) for order in ORDERS},
    "pv-v2": pv(version=2),
    "pv-32": pv(width=4),
    "libxl": saved()[len(preamble(CONFIG)) :],
    "xl-save": capture("pvh-save.gz"),
    "own-remus": capture("pvh-remus.gz"),
}


def frames_of(data: bytes, framer: Framer | None = None) -> list[Frame]:
    framer = framer or Framer()
    frames = framer.feed(data)
    framer.finish()
    return frames


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("kind", [Framer, Verifier])
def test_frames_tile_a_stream(name: str, kind: type[Framer]) -> None:
    data = STREAMS[name]
    frames = frames_of(data, kind())
    assert frames[0].start == 0
    assert [frame.end for frame in frames[:-1]] == [frame.start for frame in frames[1:]]
    assert frames[-1].end == len(data)


@pytest.mark.parametrize("name", STREAMS)
@settings(max_examples=rounds(15, 400))
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=5))
@example(lengths=[7])
def test_pieces_of_any_size_give_the_same_frames(name: str, lengths: list[int]) -> None:
    data = STREAMS[name]
    framer = Framer()
    frames = [frame for piece in cut_up(data, lengths) for frame in framer.feed(piece)]
    framer.finish()
    assert frames == frames_of(data)
    assert framer.offset == len(data)


@pytest.mark.parametrize("name", STREAMS)
def test_what_is_skipped_need_not_be_shown(name: str) -> None:
    data = STREAMS[name]
    framer, frames, shown = Framer(), list[Frame](), 0
    while framer.offset < len(data):
        if framer.skippable:
            frames += framer.skip(framer.skippable)
        else:
            frames += framer.feed(data[framer.offset : framer.offset + 1])
            shown += 1
    framer.finish()
    assert frames == frames_of(data)
    assert shown == sum(
        f.end - f.start if f.type == -1 else 8 for f in frames
    )  # headers alone: of records, and of layers


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("kind", [Framer, Verifier])
def test_cut_at_every_offset(name: str, kind: type[Framer]) -> None:
    data = STREAMS[name]
    frames = frames_of(data)
    whole = [frame.end for frame in frames if frame.ends_checkpoint]
    within = [frame for frame in frames if frame.type != LibxcType.PAGE_DATA]
    cuts = {at for frame in within for at in range(frame.start, min(frame.end, frame.start + 80))}
    cuts |= {at for frame in frames for at in (frame.start, frame.start + 9, frame.end - 1, frame.end)}
    for at in sorted(at for at in cuts if at < len(data)):
        framer = kind()
        framer.feed(data[:at])
        assert framer.offset == at
        assert framer.checkpoint_end == max((end for end in whole if end <= at), default=0)
        assert framer.checkpoints == sum(end <= at for end in whole)
        assert not framer.ended
        if at and at == framer.checkpoint_end:
            framer.finish()
            continue
        with pytest.raises(StreamCut) as caught:
            framer.finish()
        assert caught.value.offset == at
        assert caught.value.start <= at


def test_checkpoints_of_a_stream_as_it_arrives() -> None:
    data, framer, ends = remus(checkpoints=4), Framer(Form.XL), list[int]()
    config_at = first_record_at = 0
    for at in range(len(data)):
        for frame in framer.feed(data[at : at + 1]):
            assert frame.end == at + 1
            if frame.ends_checkpoint:
                ends.append(frame.end)
                assert (framer.checkpoints, framer.checkpoint_end) == (len(ends), frame.end)
        config_at = config_at or (at + 1 if framer.preamble else 0)
        first_record_at = first_record_at or (at + 1 if framer.libxc else 0)
    assert config_at == len(preamble(CONFIG))
    assert first_record_at == len(head("little")) + 40
    assert framer.preamble is not None
    assert b'"web"' in framer.preamble.config
    assert framer.libxc is not None
    assert framer.libxc.guest is GuestType.X86_HVM
    assert len(ends) == 4
    assert ends[-1] == len(data)
    framer.finish()


def test_a_checkpointed_stream_may_come_to_an_end() -> None:
    data = remus() + joined(record(LibxcType.END)) + joined(record(LibxlType.END))
    framer = Framer()
    framer.feed(data)
    assert framer.ended
    assert framer.checkpoints == 3
    framer.finish()


def test_bytes_after_the_end_are_left_to_the_caller() -> None:
    data, framer = saved(), Framer()
    framer.feed(data + b"my copy unpause")
    assert framer.ended
    assert framer.offset == len(data)
    assert framer.feed(b"more") == []
    framer.finish()


def test_colo_is_noticed_by_its_record() -> None:
    for colo in (False, True):
        framer = Framer()
        framer.feed(remus(colo=colo))
        assert framer.colo is colo


def test_a_records_claim_takes_no_memory() -> None:
    stream = head("little") + libxc_headers(GuestType.X86_HVM) + libxc_record(LibxcType.STATIC_DATA_END)
    for kind in (LibxcType.HVM_CONTEXT, LibxcType.PAGE_DATA):
        for framer in (Framer(), Verifier()):
            framer.feed(stream)
            tracemalloc.start()
            framer.feed(pack("<II", kind, 128 << 20))
            framer.feed(pack("<II", 15 << 20, 0) + bytes(1000))
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert most < 64 << 10
    framer = Framer()
    with pytest.raises(StreamError, match="claims a body of 4294967295 bytes") as caught:
        framer.feed(stream + pack("<II", LibxcType.HVM_CONTEXT, 0xFFFFFFFF))
    assert caught.value.offset == len(stream) + 4


def test_limits_are_the_callers() -> None:
    limits = Limits(record_bytes=4096, config_bytes=20)
    with pytest.raises(StreamError, match="optional data"):
        Framer(limits=limits).feed(saved())
    with pytest.raises(StreamError, match="claims a body") as caught:
        Framer(limits=Limits(record_bytes=4096)).feed(saved())
    assert caught.value.record == "PAGE_DATA"


def test_an_error_comes_with_what_was_whole_before_it_and_stays() -> None:
    good = remus(checkpoints=2)
    framer = Framer()
    with pytest.raises(StreamError, match="no known type") as caught:
        framer.feed(good + raw(0x77))
    assert list(caught.value.frames) == frames_of(good)
    assert (framer.checkpoints, framer.checkpoint_end) == (2, len(good))
    assert (caught.value.offset, caught.value.layer, caught.value.record) == (
        len(good),
        "libxc",
        "record 0x77",
    )
    for again in (lambda: framer.feed(b"x"), framer.finish, lambda: framer.skip(0)):
        with pytest.raises(StreamError) as repeated:
            again()
        assert repeated.value is caught.value
        assert repeated.value.frames == ()


def test_a_form_that_is_not_the_wanted_one() -> None:
    for form in Form:
        begun = {Form.XL: saved(), Form.LIBXL: libxl_header(), Form.LIBXC: pv()}
        for other, data in begun.items():
            framer = Framer(form)
            if other is form:
                framer.feed(data)
                continue
            with pytest.raises(StreamError, match="begins with") as caught:
                framer.feed(data)
            assert caught.value.offset == 0


def one_by_one(framer: Framer, data: bytes) -> None:
    for byte in data:
        framer.feed(bytes([byte]))


def _xl(numbers: bytes, rest: bytes = b"") -> bytes:
    return preamble(CONFIG)[:32] + numbers + rest


CHECKPOINT_END = joined(record(LibxlType.CHECKPOINT_END))
LIBXC_CONTEXT = joined(record(LibxlType.LIBXC_CONTEXT))
HVM = head("little") + hvm_first("little")
HVM_HEAD = head("little") + libxc_headers(GuestType.X86_HVM)
STATIC_END = libxc_record(LibxcType.STATIC_DATA_END)
XC_END = libxc_record(LibxcType.END)
XC_CHECKPOINT = libxc_record(LibxcType.CHECKPOINT)
XL_END = joined(record(LibxlType.END))
NEW = joined(record(CheckpointState(ColoState.NEW)))
PV_INFO = libxc_record(PvInfo(8, 4))
PV_HEAD = libxc_headers(GuestType.X86_PV)

WRONG: dict[str, tuple[bytes, bytes, str]] = {
    # what is right so far, what is wrong then, the reason
    "no stream": (b"", b"GIF89a and so on", "begins with"),
    "another magic": (b"", preamble(CONFIG)[:31] + bytes(17), "wrong magic"),
    "no byte order": (b"", _xl(pack("<IIII", 7, 3, 0, 0)), "byte order mark"),
    "unknown mandatory flags": (b"", _xl(pack("<IIII", 0x01020304, 7, 0, 0)), "mandatory flags 0x7"),
    "a stream of Xen 4.5": (b"", _xl(pack("<IIII", 0x01020304, 1, 0, 0)), "before Xen 4.6"),
    "configuration too long": (b"", _xl(pack("<5I", 0x01020304, 3, 0, 8, 5), bytes(4)), "claims 5 bytes"),
    "optional data too long": (
        b"",
        _xl(pack("<IIII", 0x01020304, 3, 0, 1 << 30)),
        "1073741824 bytes of optional",
    ),
    "libxl version": (b"", b"LibxlFmt" + pack(">II", 1, 0), "version 1"),
    "libxl options": (b"", b"LibxlFmt" + pack(">II", 2, 4), "options 0x4"),
    "no libxl after xl": (preamble(CONFIG), bytes(16), "begins with"),
    "libxc id": (head("little"), b"\xff" * 8 + bytes(32), "begin with"),
    "libxc version": (
        head("little"),
        b"\xff" * 8 + pack(">IIHHI", 0x58454E46, 4, 0, 0, 0) + bytes(16),
        "version 4",
    ),
    "libxc options": (
        head("little"),
        b"\xff" * 8 + pack(">IIHHI", 0x58454E46, 3, 2, 0, 0) + bytes(16),
        "options 0x2",
    ),
    "guest type": (head("little"), libxc_headers(GuestType.X86_HVM)[:24] + bytes(16), "guest of type 0x0"),
    "page shift": (
        head("little"),
        libxc_headers(GuestType.X86_HVM)[:24] + pack("<IHHII", 2, 16, 0, 4, 17),
        "page shift 16",
    ),
    "unknown libxl record": (saved()[: -len(XL_END)], raw(6), "no known type"),
    "END before libxc": (preamble(CONFIG) + libxl_header(), XL_END, "before LIBXC_CONTEXT"),
    "LIBXC_CONTEXT twice": (saved()[: -len(XL_END)], LIBXC_CONTEXT, "after libxc's END"),
    "LIBXC_CONTEXT with a body": (preamble(CONFIG) + libxl_header(), raw(1, b"x"), "has a body"),
    "CHECKPOINT_END without checkpoint": (saved()[: -len(XL_END)], CHECKPOINT_END, "after libxc's END"),
    "END in a checkpoint": (HVM + XC_CHECKPOINT, XL_END, "inside a checkpoint"),
    "LIBXC_CONTEXT in a checkpoint": (HVM + XC_CHECKPOINT, LIBXC_CONTEXT, "inside a checkpoint"),
    "CHECKPOINT_STATE in a checkpoint": (HVM + XC_CHECKPOINT, NEW, "inside a checkpoint"),
    "CHECKPOINT_STATE twice": (
        remus() + NEW,
        NEW,
        "guest of type",
    ),  # the second one is libxc's to understand
    "a context after a checkpoint": (
        remus(),
        joined(record(EmulatorContext(b"x"))),
        "HVM|guest of type",
    ),
    "unknown libxc record": (HVM, raw(0x13), "no known type"),
    "memory before STATIC_DATA_END": (HVM_HEAD, libxc_record(pages([1])), "before STATIC_DATA_END"),
    "END before STATIC_DATA_END": (HVM_HEAD, XC_END, "before STATIC_DATA_END"),
    "STATIC_DATA_END twice": (HVM, STATIC_END, "after the end of the static data"),
    "CPUID policy too late": (HVM, raw(0x11, bytes(24)), "after the end of the static data"),
    "STATIC_DATA_END in version 2": (
        libxc_headers(GuestType.X86_HVM, version=2),
        STATIC_END,
        "came with version 3",
    ),
    "PV record in an HVM guest": (HVM, raw(7, bytes(4096)), "guest of type X86_HVM"),
    "HVM record in a PV guest": (PV_HEAD, libxc_record(HvmParams(())), "guest of type X86_PV"),
    "TOOLSTACK": (HVM, raw(0xB, bytes(8)), "deprecated"),
    "DIRTY_PFN_LIST": (HVM, raw(0xF, bytes(8)), "back channel"),
    "END without HVM_CONTEXT": (HVM_HEAD + STATIC_END, XC_END, "without HVM_CONTEXT"),
    "CHECKPOINT without HVM_CONTEXT": (remus(), XC_CHECKPOINT, "without HVM_CONTEXT"),
    "END with half a checkpoint before it": (
        remus() + libxc_record(pages([1])),
        XC_END,
        "without HVM_CONTEXT",
    ),
    "CHECKPOINT with a body": (HVM, raw(0xE, bytes(8)), "has a body"),
    "PV memory before X86_PV_INFO": (PV_HEAD + STATIC_END, libxc_record(pages([1])), "before X86_PV_INFO"),
    "PV memory before its table": (
        PV_HEAD + raw(2, b"\x08\x04" + bytes(6)) + STATIC_END,
        libxc_record(pages([1])),
        "P2M",
    ),
    "X86_PV_INFO twice": (
        PV_HEAD + PV_INFO,
        PV_INFO,
        "second time",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_at_once_and_with_its_offset(name: str) -> None:
    right, wrong, reason = WRONG[name]
    framer = Framer()
    frames = framer.feed(right)
    assert not right or frames[-1].end == len(right)
    with pytest.raises(StreamError, match=reason) as caught:
        one_by_one(framer, wrong)
    assert len(right) <= caught.value.offset < len(right) + len(wrong)
    assert caught.value.start == len(right)


def test_optional_records_are_passed_over_in_both_layers() -> None:
    optional = raw(0x80000001, b"from the future")
    data = HVM + optional + XC_END + optional + XL_END
    framer = Framer()
    frames = framer.feed(data)
    framer.finish()
    assert [frame.layer for frame in frames if frame.type == 0x80000001] == [Layer.LIBXC, Layer.LIBXL]


def test_pages_may_come_again_for_verification() -> None:
    framer = Framer()
    again = libxc_record(LibxcType.VERIFY) + libxc_record(pages([1]))
    framer.feed(head("little") + hvm_first("little") + again + hvm_state("little") + XC_END + XL_END)
    framer.finish()


@given(st.binary(max_size=400), st.integers(0, 400))
def test_any_bytes_are_an_error_or_incomplete(noise: bytes, at: int) -> None:
    for kind in (Framer, Verifier):
        for start in (
            b"",
            head("little"),
            HVM_HEAD + STATIC_END,
            remus(checkpoints=1),
            remus(checkpoints=1)[:at],
        ):
            framer = kind()
            try:
                framer.feed(start + noise)
                framer.finish()
            except StreamError as error:
                assert 0 <= error.start <= error.offset <= len(start) + len(noise)  # noqa: PT017
            else:
                assert framer.ended or framer.offset == framer.checkpoint_end


@pytest.mark.parametrize("byteorder", ORDERS)
def test_the_layers_may_differ_in_byte_order(byteorder: ByteOrder) -> None:
    other: ByteOrder = "big" if byteorder == "little" else "little"
    data = head(byteorder) + hvm_first(other) + joined(record(LibxcType.CHECKPOINT, other))
    data += joined(record(LibxlType.CHECKPOINT_END, byteorder)) + hvm_state(other)
    data += joined(record(LibxcType.END, other)) + joined(record(LibxlType.END, byteorder))
    framer = Verifier()
    framer.feed(data)
    framer.finish()
    assert framer.checkpoints == 1
