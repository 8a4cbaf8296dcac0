"""Streams and records to test with, made by the writer."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from struct import pack

from hypothesis import strategies as st

from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.formats import ByteOrder, GuestType, LibxcType, LibxlType
from understudy_xen.streams.hvmcontext import HvmContext
from understudy_xen.streams.libxc import (
    CpuidLeaf,
    CpuidPolicy,
    DirtyPfnList,
    HvmParams,
    MsrEntry,
    MsrPolicy,
    TscInfo,
)
from understudy_xen.streams.libxl import (
    CheckpointState,
    ColoState,
    Emulator,
    EmulatorContext,
    EmulatorXenstoreData,
)
from understudy_xen.streams.pages import PageData, page_entry
from understudy_xen.streams.writer import (
    Body,
    checkpoint,
    joined,
    libxc_headers,
    libxl_header,
    preamble,
    raw_record,
    record,
)
from understudy_xen.streams.x86pv import P2mFrames, PvInfo, SharedInfo, VcpuContext

DATA = Path(__file__).parent / "data"
ORDERS: tuple[ByteOrder, ...] = ("little", "big")
CONFIG = {"c_info": {"type": "hvm", "name": "web"}}
VCPU_KINDS = (
    LibxcType.X86_PV_VCPU_BASIC,
    LibxcType.X86_PV_VCPU_EXTENDED,
    LibxcType.X86_PV_VCPU_XSAVE,
    LibxcType.X86_PV_VCPU_MSRS,
)


def capture(name: str) -> bytes:
    """Return what a real xl save, or a real Remus sender on Xen 4.17, wrote; most pages have been taken out."""
    return gzip.decompress((DATA / name).read_bytes())


def page(fill: int) -> bytes:
    return bytes([fill % 256]) * 4096


def pages(pfns: Iterable[int], kind: int = 0) -> PageData:
    pfns = tuple(pfns)
    contents = b"" if kind >= 0xD else b"".join(page(pfn) for pfn in pfns)
    return PageData(tuple(page_entry(pfn, kind) for pfn in pfns), contents)


def hvm_blob(byteorder: ByteOrder, *, salt: int = 0) -> bytes:
    sign = "<" if byteorder == "little" else ">"
    header = pack(f"{sign}HHIIIQII", 1, 0, 24, 0x54381286, 1, 0, 0, 0)
    cpu = pack(f"{sign}HHI", 2, 0, 5) + bytes([salt] * 5)
    return header + cpu + pack(f"{sign}HHI", 0, 0, 0)


def _many(byteorder: ByteOrder, *what: Body | LibxlType | LibxcType) -> bytes:
    return b"".join(joined(record(each, byteorder)) for each in what)


STATIC = (
    CpuidPolicy((CpuidLeaf(0, 0xFFFFFFFF, 1, 2, 3, 4),)),
    MsrPolicy((MsrEntry(0xCE, 0, 1 << 31),)),
    LibxcType.STATIC_DATA_END,
)


def hvm_state(byteorder: ByteOrder, *, salt: int = 0) -> bytes:
    return _many(
        byteorder,
        TscInfo(2, 2_000_000, salt, 0),
        HvmContext(hvm_blob(byteorder, salt=salt)),
        HvmParams(((1, 0xFEFFC), (17, 5))),
    )


def hvm_first(byteorder: ByteOrder) -> bytes:
    return (
        libxc_headers(GuestType.X86_HVM, byteorder)
        + _many(byteorder, *STATIC, pages(range(3)), pages([9], 0xF), pages([4, 5]))
        + hvm_state(byteorder)
    )


def head(byteorder: ByteOrder) -> bytes:
    return preamble(CONFIG, byteorder) + libxl_header(byteorder) + _many(byteorder, LibxlType.LIBXC_CONTEXT)


def saved(byteorder: ByteOrder = "little") -> bytes:
    """Return an HVM guest's stream as ``xl save`` writes it."""
    return (
        head(byteorder)
        + hvm_first(byteorder)
        + _many(
            byteorder,
            LibxcType.END,
            EmulatorXenstoreData(((b"physmap/0/size", b"800000"), (b"physmap/0/name", b"vga.vram"))),
            EmulatorContext(b"QEVM\0state"),
            LibxlType.END,
        )
    )


def remus(byteorder: ByteOrder = "little", *, checkpoints: int = 3, colo: bool = False) -> bytes:
    """Return an HVM guest's checkpointed stream, without an end, as Remus leaves it."""
    stream = head(byteorder) + hvm_first(byteorder)
    for number in range(1, checkpoints + 1):
        if number > 1:
            if colo:
                stream += _many(byteorder, CheckpointState(ColoState.NEW))
            stream += _many(byteorder, pages(range(number))) + hvm_state(byteorder, salt=number)
        stream += _many(byteorder, LibxcType.CHECKPOINT)
        stream += joined(
            checkpoint(
                EmulatorContext(b"QEVM" + bytes([number] * number)),
                EmulatorXenstoreData(((b"key", b"%d" % number),)),
                byteorder,
            )
        )
    return stream


def pv(byteorder: ByteOrder = "little", *, version: int = 3, width: int = 8) -> bytes:
    """Return a PV guest's stream of libxc alone."""
    static = (PvInfo(width, {4: 3, 8: 4}[width]), *(STATIC if version > 2 else ()))
    vcpu = {8: 5168, 4: 2800}[width]
    return libxc_headers(GuestType.X86_PV, byteorder, version=version) + _many(
        byteorder,
        *static,
        P2mFrames(0, 600, (7, 8) if width == 8 else (7,)),
        pages([0, 1, 600]),
        pages([2], 0x9),
        pages([3], 0xD),
        TscInfo(0, 1, 2, 3),
        SharedInfo(page(1)),
        VcpuContext(LibxcType.X86_PV_VCPU_BASIC, 0, bytes(vcpu)),
        VcpuContext(LibxcType.X86_PV_VCPU_EXTENDED, 0, bytes(100)),
        VcpuContext(LibxcType.X86_PV_VCPU_XSAVE, 0, bytes(16)),
        VcpuContext(LibxcType.X86_PV_VCPU_MSRS, 0, bytes(32)),
        LibxcType.END,
    )


def libxc_record(what: Body | LibxcType, byteorder: ByteOrder = "little") -> bytes:
    return _many(byteorder, what)


def raw(kind: int, body: bytes = b"", byteorder: ByteOrder = "little") -> bytes:
    return joined(raw_record(kind, body, byteorder=byteorder))


u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
_blob = st.binary(max_size=200)
_key = st.text("abcXYZ019-_@/", min_size=1, max_size=12).filter(lambda key: not key.startswith("/"))
_value = st.binary(max_size=20).filter(lambda value: b"\0" not in value)
_pairs = st.lists(st.tuples(_key.map(str.encode), _value), max_size=4).map(tuple)
_emulators = st.sampled_from(Emulator)

libxl_bodies = st.one_of(
    st.builds(EmulatorContext, _blob, _emulators, u32),
    st.builds(EmulatorXenstoreData, _pairs, _emulators, u32),
    st.builds(CheckpointState, st.sampled_from(ColoState)),
)


def _page_data(kinds: list[int], pfns: list[int]) -> PageData:
    entries = tuple(page_entry(pfn, kind) for pfn, kind in zip(pfns, kinds, strict=False))
    return PageData(entries, b"".join(page(entry) for entry in entries if entry >> 60 < 0xD))


page_data = st.builds(
    _page_data,
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15]), min_size=1, max_size=5),
    st.lists(st.integers(0, (1 << 52) - 1), min_size=1, max_size=5),
)
_leaves = st.lists(st.builds(CpuidLeaf, u32, u32, u32, u32, u32, u32), min_size=1, max_size=4).map(tuple)
_msrs = st.lists(st.builds(MsrEntry, u32, u32, u64), min_size=1, max_size=4).map(tuple)
_sizes = {
    LibxcType.X86_PV_VCPU_BASIC: st.integers(0, 100),
    LibxcType.X86_PV_VCPU_EXTENDED: st.integers(0, 128),
    LibxcType.X86_PV_VCPU_XSAVE: st.integers(16, 200),
    LibxcType.X86_PV_VCPU_MSRS: st.integers(0, 10).map(lambda count: 16 * count),
}
vcpu_contexts = st.sampled_from(VCPU_KINDS).flatmap(
    lambda kind: st.builds(VcpuContext, st.just(kind), u32, _sizes[kind].map(bytes))
)
hvm_bodies = st.one_of(
    page_data,
    st.builds(TscInfo, u32, u32, u64, u32),
    st.builds(HvmParams, st.lists(st.tuples(u64, u64), max_size=4).map(tuple)),
)
libxc_bodies = st.one_of(
    hvm_bodies,
    st.sampled_from([PvInfo(4, 3), PvInfo(8, 4)]),
    st.builds(
        lambda start, more, frames: P2mFrames(start, start + more, frames), u16, u16, st.lists(u64).map(tuple)
    ),
    vcpu_contexts,
    st.builds(SharedInfo, st.binary(min_size=4096, max_size=4096)),
    st.builds(CpuidPolicy, _leaves),
    st.builds(MsrPolicy, _msrs),
    st.builds(DirtyPfnList, st.lists(u64, max_size=6).map(tuple)),
)


def cut_up(data: bytes, lengths: list[int]) -> list[Buffer]:
    """Return the bytes in pieces of these lengths, over and over."""
    pieces: list[Buffer] = []
    at = turn = 0
    while at < len(data):
        step = max(1, lengths[turn % len(lengths)])
        pieces.append(memoryview(data)[at : at + step])
        at, turn = at + step, turn + 1
    return pieces
