"""What a closer look finds in the bodies of records, with the offset; and that it finds nothing in what is right."""

from __future__ import annotations

import gzip
from pathlib import Path
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.xen.streams.samples import (
    CONFIG,
    ORDERS,
    STATIC,
    capture,
    head,
    hvm_blob,
    hvm_first,
    libxc_record,
    page,
    pages,
    pv,
    raw,
    remus,
    saved,
)
from understudy_xen.streams.errors import StreamError
from understudy_xen.streams.formats import (
    XL_BYTEORDER,
    XL_FLAG_JSON,
    XL_FLAG_STREAM_V2,
    XL_MAGIC,
    GuestType,
    LibxcType,
    LibxlType,
)
from understudy_xen.streams.inspector import Inspector, Run, Tally
from understudy_xen.streams.pages import page_entry
from understudy_xen.streams.verifier import Verifier
from understudy_xen.streams.writer import joined, libxc_headers, libxl_header, preamble, record
from understudy_xen.streams.x86pv import P2mFrames, PvInfo

SHARED = Path(__file__).parents[5] / "shared/data/streams"

HVM = head("little") + hvm_first("little")
HVM_STATIC = head("little") + libxc_headers(GuestType.X86_HVM)
XC_END = libxc_record(LibxcType.END)
CHECKPOINT = HVM + libxc_record(LibxcType.CHECKPOINT)
AFTER = HVM + XC_END
PV = libxc_headers(GuestType.X86_PV) + libxc_record(PvInfo(8, 4)) + libxc_record(LibxcType.STATIC_DATA_END)
PV_PAGES = PV + libxc_record(P2mFrames(0, 511, (7,)))


def page_data(count: int, *entries: int, contents: int = 0, reserved: int = 0) -> bytes:
    return raw(1, pack(f"<II{len(entries)}Q", count, reserved, *entries) + page(1) * contents)


def blob(*entries: bytes) -> bytes:
    return raw(9, b"".join(entries))


HEADER = pack("<HHIIIQII", 1, 0, 24, 0x54381286, 1, 0, 0, 0)
BLOB_END = pack("<HHI", 0, 0, 0)
MANY = (1 << 16) + 5

# What is right so far, the record that is wrong, at which byte of it, the reason.
WRONG: dict[str, tuple[bytes, bytes, int, str]] = {
    "padding": (AFTER, b"\3\0\0\0\x0b\0\0\0\2\0\0\0\0\0\0\0abc\0\0\0\0\1", 19, "padding"),
    "padding of an optional record": (
        HVM,
        pack("<II", 0x80000000, 1) + b"a" + b"\0" * 6 + b"x",
        9,
        "padding",
    ),
    "reserved in the image header": (
        head("little"),
        b"\xff" * 8 + pack(">IIHHI", 0x58454E46, 3, 0, 1, 0) + pack("<IHHII", 2, 12, 0, 4, 17),
        0,
        "reserved",
    ),
    "reserved in the domain header": (
        head("little"),
        libxc_headers(GuestType.X86_HVM)[:24] + pack("<IHHII", 2, 12, 1, 4, 17),
        0,
        "reserved",
    ),
    "PAGE_DATA too short": (HVM, raw(1, bytes(4)), 8, "sub-header"),
    "PAGE_DATA empty": (HVM, raw(1), 8, "sub-header"),
    "TSC_INFO empty": (HVM, raw(8), 8, "0 bytes"),
    "CPUID policy empty": (HVM_STATIC, raw(0x11), 8, "0 bytes"),
    "PAGE_DATA without pfns": (HVM, page_data(0), 8, "there are no pfns"),
    "PAGE_DATA reserved": (HVM, page_data(1, 5, contents=1, reserved=1), 12, "reserved"),
    "PAGE_DATA with more pfns than room": (HVM, page_data(9, 5, 6), 8, "9 pfns are not to be found"),
    "PAGE_DATA with a page too few": (HVM, page_data(2, 5, 6, contents=1), 8, "take 8216"),
    "PAGE_DATA with a page too many": (HVM, page_data(1, page_entry(5, 0xF), contents=1), 8, "take 16"),
    "a reserved type": (HVM, page_data(2, 5, page_entry(6, 7), contents=2), 24, r"pfn\[1\].*reserved type"),
    "reserved bits of a pfn": (HVM, page_data(1, 1 << 52, contents=1), 16, r"pfn\[0\].*reserved bits"),
    "a reserved type far behind": (
        HVM,
        page_data(MANY, *[page_entry(5, 0xF)] * (MANY - 1), page_entry(5, 8)),
        8 + 8 + 8 * (MANY - 1),
        rf"pfn\[{MANY - 1}\]",
    ),
    "TSC_INFO length": (HVM, raw(8, bytes(20)), 8, "20 bytes"),
    "TSC_INFO reserved": (HVM, raw(8, bytes(20) + b"\1\0\0\0"), 28, "reserved"),
    "HVM_CONTEXT empty": (HVM, raw(9), 8, "does not end with END"),
    "HVM_CONTEXT of noise": (HVM, blob(bytes(range(1, 40))), 8, "entry|HEADER"),
    "HVM_CONTEXT without HEADER": (HVM, blob(BLOB_END), 8, "HEADER"),
    "HVM_CONTEXT without END": (HVM, blob(HEADER), 8 + 32, "does not end"),
    "HVM_CONTEXT with an entry too long": (
        HVM,
        blob(HEADER, pack("<HHI", 2, 0, 9), BLOB_END),
        40,
        "claims 9 bytes",
    ),
    "HVM_CONTEXT with another magic": (
        HVM,
        blob(pack("<HHIIIQII", 1, 0, 24, 7, 1, 0, 0, 0), BLOB_END),
        16,
        "magic 0x7",
    ),
    "HVM_CONTEXT with a short HEADER": (
        HVM,
        blob(pack("<HHI", 1, 0, 4) + bytes(4), BLOB_END),
        8,
        "HEADER has 4",
    ),
    "HVM_PARAMS count": (HVM, raw(10, pack("<IIQQ", 2, 0, 1, 1)), 8, "24 bytes"),
    "HVM_PARAMS reserved": (HVM, raw(10, pack("<IIQQ", 1, 3, 1, 1)), 12, "reserved"),
    "HVM_PARAMS too short": (HVM, raw(10, bytes(4)), 8, "fixed part"),
    "CPUID policy length": (HVM_STATIC, raw(0x11, bytes(25)), 8, "25 bytes"),
    "MSR policy length": (HVM_STATIC, raw(0x12, bytes(24)), 8, "24 bytes"),
    "emulator too short": (AFTER, raw(3, bytes(7)), 8, "fixed part"),
    "emulator unknown": (AFTER, raw(3, b"\3" + bytes(7)), 8, "emulator 0x3"),
    "emulator unknown in a checkpoint": (CHECKPOINT, raw(3, b"\3" + bytes(7)), 8, "emulator 0x3"),
    "xenstore without a NUL": (AFTER, raw(2, bytes(8) + b"key\0value"), 24, "no NUL"),
    "xenstore odd": (AFTER, raw(2, bytes(8) + b"key\0"), 16, "1 strings"),
    "xenstore too long": (
        AFTER,
        pack("<II", 2, (1 << 20) + 1) + bytes(8) + b"k\0v\0" * (1 << 18),
        8,
        "at most 1048576",
    ),
    "a secondary's state": (remus(), raw(5, b"\2\0\0\0"), 8, "only a secondary"),
    "state unknown": (remus(), raw(5, b"\4\0\0\0"), 8, "state 0x4"),
    "PV width": (libxc_headers(GuestType.X86_PV), raw(2, b"\x08\x03" + bytes(6)), 8, "width 8 with 3"),
    "PV info reserved": (libxc_headers(GuestType.X86_PV), raw(2, b"\x08\x04\1" + bytes(5)), 10, "reserved"),
    "PV info length": (libxc_headers(GuestType.X86_PV), raw(2, b"\x08\x04"), 8, "2 bytes"),
    "P2M order": (PV, raw(3, pack("<IIQ", 9, 8, 0)), 8, "ascending"),
    "P2M length": (PV, raw(3, pack("<IIQ", 0, 512, 0)), 8, "16 bytes"),
    "P2M ragged": (PV, raw(3, bytes(12)), 8, "multiple of 8"),
    "pfn beyond the table": (PV_PAGES, page_data(2, 3, 512, contents=2), 16, "0x200 is beyond"),
    "vcpu reserved": (PV_PAGES, raw(4, pack("<II", 0, 1)), 12, "reserved"),
    "vcpu basic size": (PV_PAGES, raw(4, bytes(8 + 2800)), 16, "2800 bytes"),
    "vcpu extended size": (PV_PAGES, raw(5, bytes(8 + 129)), 16, "129 bytes"),
    "vcpu xsave size": (PV_PAGES, raw(6, bytes(8 + 15)), 16, "15 bytes"),
    "vcpu msrs size": (PV_PAGES, raw(0xC, bytes(8 + 17)), 16, "17 bytes"),
    "vcpu too short": (PV_PAGES, raw(4, bytes(4)), 8, "fixed part"),
    "shared info length": (PV_PAGES, raw(7, bytes(4095)), 8, "4095 bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_a_body(name: str) -> None:
    right, wrong, at, reason = WRONG[name]
    verifier = Verifier()
    frames = verifier.feed(right)
    assert frames[-1].end == len(right)
    assert verifier.remarks == []
    with pytest.raises(StreamError, match=reason) as caught:
        verifier.feed(wrong)
    assert caught.value.start == len(right)
    assert caught.value.offset == len(right) + at


@pytest.mark.parametrize(
    ("config", "reason"),
    [(b"{", "JSON"), (b"[]", "list"), (b"\xff", "JSON"), (b"[" * 100_000, "JSON"), (b"1" * 5000, "JSON|int")],
)
def test_a_configuration_that_is_none(config: bytes, reason: str) -> None:
    with pytest.raises(StreamError, match=reason) as caught:
        Verifier().feed(preamble(config))
    assert (caught.value.offset, caught.value.layer) == (52, "xl")


def test_a_configuration_that_is_announced_and_not_there() -> None:
    numbers = pack("=IIII", XL_BYTEORDER, XL_FLAG_STREAM_V2 | XL_FLAG_JSON, 0, 0)
    with pytest.raises(StreamError, match="JSON") as caught:
        Verifier().feed(XL_MAGIC + numbers + b"nex")
    assert (caught.value.offset, caught.value.layer) == (48, "xl")


@pytest.mark.parametrize("byteorder", ORDERS)
def test_what_the_writer_writes_is_right(byteorder: str) -> None:
    for data in (saved(byteorder), remus(byteorder), remus(byteorder, colo=True), pv(byteorder)):  # type: ignore[arg-type]
        verifier = Verifier()
        verifier.feed(data)
        verifier.finish()
        assert verifier.remarks == []


@pytest.mark.parametrize("name", ["pvh-save.gz", "pvh-remus.gz"])
def test_what_xen_wrote_is_right(name: str) -> None:
    verifier = Verifier()
    verifier.feed(capture(name))
    verifier.finish()
    assert verifier.remarks == []
    assert verifier.libxc is not None
    assert verifier.libxc.xen == (4, 17)
    assert verifier.pages == {"pvh-save.gz": 24, "pvh-remus.gz": 24 + 3 * 9}[name]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the whole captures are not kept in the repository")
@pytest.mark.parametrize("path", sorted(SHARED.glob("*.gz")), ids=lambda path: path.name)
def test_whole_captures(path: Path) -> None:
    verifier = Verifier()
    with gzip.open(path) as stream:
        while piece := stream.read(100_003):
            verifier.feed(piece)
    verifier.finish()
    assert verifier.remarks == []
    assert verifier.pfns > 1_044_000


def test_remarks() -> None:
    xl = preamble(CONFIG)
    data = xl[:40] + b"\1\0\0\0" + xl[44:] + HVM[len(xl) :]
    data += raw(0x80000005, b"x") + raw(10, bytes(8)) + XC_END + joined(record(LibxlType.END))
    verifier = Verifier()
    verifier.feed(data)
    verifier.finish()
    assert [remark.split(": ", 1)[1] for remark in verifier.remarks] == [
        "xl preamble has unknown optional flags 0x1",
        "libxc optional record 0x80000005 is optional, of no known type, and was passed over",
        "libxc HVM_PARAMS is empty, as Xen 4.6 to 4.8 wrote it",
    ]
    many = Verifier()
    many.feed(HVM + raw(0x80000005, b"x") * 50)
    assert len(many.remarks) == 20


def test_what_a_converter_made_is_remarked() -> None:
    verifier = Verifier()
    verifier.feed(libxc_headers(GuestType.X86_HVM, xen=(0, 1)))
    assert [remark.split(": ", 1)[1] for remark in verifier.remarks] == [
        "libxc headers are a converter's: the stream was made from one of Xen 4.5 or older"
    ]


def test_empty_vcpu_parts_of_old_xen_are_only_remarked() -> None:
    verifier = Verifier()
    verifier.feed(PV_PAGES + raw(6, bytes(8)))
    assert len(verifier.remarks) == 1


def test_a_libxl_stream_may_come_without_configuration() -> None:
    verifier = Verifier()
    numbers = pack("<4I", 0x01020304, 2, 0, 0)
    verifier.feed(preamble(CONFIG)[:32] + numbers + libxl_header())
    assert verifier.remarks == ["offset 0: xl preamble holds no configuration"]


def test_tallies_of_checkpoints() -> None:
    data = remus(checkpoints=3) + libxc_record(pages(range(7)))
    inspector = Inspector()
    for at in range(0, len(data), 1000):
        inspector.feed(data[at : at + 1000])
    rest = inspector.close()
    seen = inspector.take()
    assert inspector.take() == []
    tallies = [each for each in seen if isinstance(each, Tally)]
    assert [tally.number for tally in tallies] == [1, 2, 3]
    assert [(tally.pfns, tally.pages) for tally in tallies] == [(6, 5), (2, 2), (3, 3)]
    assert [tally.device_model_bytes for tally in tallies] == [8 + 4 + 1, 8 + 4 + 2, 8 + 4 + 3]
    assert tallies[0].start == 0
    assert [tally.end for tally in tallies[:-1]] == [tally.start for tally in tallies[1:]]
    assert rest is not None
    assert (rest.number, rest.pages, rest.records, rest.end) == (4, 7, 1, len(data))
    runs = [each for each in seen if isinstance(each, Run)]
    assert sum(run.count for run in runs) == sum(tally.records for tally in (*tallies, rest))
    assert [(run.count, run.pages, run.pfns) for run in runs if run.name == "PAGE_DATA"][0] == (3, 5, 6)  # noqa: RUF015
    assert (
        seen.index(tallies[0]) == 4 + len(STATIC) + 1 + 3 + 1 + 3
    )  # headers, static, a run, state, two layers' end


@given(st.data())
def test_a_flipped_bit_is_an_error_or_harmless(data: st.DataObject) -> None:
    stream = bytearray(data.draw(st.sampled_from([saved(), remus(checkpoints=2, colo=True), pv()])))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= 1 << data.draw(st.integers(0, 7))
    verifier = Verifier()
    try:
        verifier.feed(stream)
        verifier.finish()
    except StreamError as error:
        assert error.start <= error.offset <= len(stream)  # noqa: PT017


def test_a_blob_may_have_entries_that_nobody_knows_here() -> None:
    data = hvm_blob("little")
    verifier = Verifier()
    verifier.feed(HVM + raw(9, data[:-8] + pack("<HHI", 99, 3, 2) + b"ab" + data[-8:]))
    assert verifier.remarks == []
