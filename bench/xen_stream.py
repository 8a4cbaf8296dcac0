"""Migration streams of Xen: the command beside Debian's verify-stream-v2 on one file, and how fast records are found.

The file is what ``xl save`` would write of an HVM guest with 4 GiB: all its pfns, 1024 to a record as libxc sends them,
and 200 MiB of address space without contents; what the pages hold is a hole in the file, so that it takes little room.
All figures are processor time, user and system, which other work on the machine leaves alone; both programs use one
processor and wait for nothing. The commands' figures hold everything from the start of the process to its end, the
others what the reading alone takes: the second program is loaded as a module for that. Framing is done as a receiver
does it: in pieces of 1 MiB, as a socket delivers them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.figures import Figure
from tests.testbeds.verifystream import Unavailable, command, reading_s
from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.formats import PAGE_BYTES, GuestType, LibxcType, LibxlType
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.hvmcontext import HvmContext
from understudy_xen.streams.libxc import CpuidLeaf, CpuidPolicy, HvmParams, MsrEntry, MsrPolicy, TscInfo
from understudy_xen.streams.libxl import EmulatorContext
from understudy_xen.streams.pages import PageData, page_entry
from understudy_xen.streams.source import Source
from understudy_xen.streams.verifier import Verifier
from understudy_xen.streams.writer import libxc_headers, libxl_header, preamble, record

__all__ = ["measure"]

_ROUNDS = 7
_BATCH = 1024
_PAGES = 4 << 18  # 4 GiB
_PFNS = _PAGES + (200 << 8)
_FRAMED = 1 << 16  # 256 MiB
_XTAB = 0xF
_PIECE_BYTES = 1 << 20
_SPEEDUP = 5.0
_FRAMING_GB_PER_S = 1.0
_CONTEXT = bytes.fromhex("0100000018000000861238540100000000000000000000000000000000000000") + bytes(8)


def measure() -> list[Figure]:
    """Compare both verifiers on one file, and measure the framing of pages."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "stream"
        _write(path)
        own = [str(Path(sys.executable).with_name("understudy")), "stream", "verify", str(path)]
        try:
            other, environment = command("xl", str(path))
        except Unavailable as error:
            raise RuntimeError(str(error)) from error
        samples: dict[str, list[float]] = {
            name: [] for name in ("ours", "theirs", "our reading", "their reading")
        }
        for turn in range(_ROUNDS + 1):
            row = {
                "ours": _command_s(own, None),
                "theirs": _command_s(other, environment),
                "our reading": _reading_s(path),
                "their reading": reading_s(path, "xl"),
            }
            for name, spent_s in row.items():
                if turn:  # the first one compiled byte code, and brought the file into memory
                    samples[name].append(spent_s)
    figures = [
        _ms("stream_verify_command_cpu_ms", samples["ours"]),
        _ms("stream_verify_stream_v2_command_cpu_ms", samples["theirs"]),
        _times("stream_verify_speedup_ratio", samples["theirs"], samples["ours"], floor=_SPEEDUP),
        _ms("stream_verify_reading_cpu_ms", samples["our reading"]),
        _ms("stream_verify_stream_v2_reading_cpu_ms", samples["their reading"]),
        _times("stream_verify_reading_speedup_ratio", samples["their reading"], samples["our reading"]),
    ]
    for name, batch in (("", _BATCH), ("_single_pages", 1)):
        pages = b"".join(_stream(_FRAMED, _FRAMED, batch))
        spent = [_framing_s(pages) for _ in range(_ROUNDS)]
        rates = [_FRAMED * PAGE_BYTES / each / 1e9 for each in spent]
        figures.append(Figure(f"stream_framing{name}_gb_per_s", rates, floor=_FRAMING_GB_PER_S))
    return figures


def _ms(name: str, samples_s: Sequence[float]) -> Figure:
    return Figure(name, [each * 1e3 for each in samples_s])


def _times(name: str, theirs: Sequence[float], ours: Sequence[float], floor: float | None = None) -> Figure:
    return Figure(name, [one / other for one, other in zip(theirs, ours, strict=True)], floor=floor)


def _write(path: Path) -> None:
    with path.open("wb") as file:
        for part in _stream(_PFNS, _PAGES, _BATCH):
            if len(part) == _BATCH * PAGE_BYTES:
                file.seek(len(part), os.SEEK_CUR)
            else:
                file.write(part)


def _stream(pfns: int, pages: int, batch: int) -> Iterator[Buffer]:
    yield preamble({"c_info": {"type": "hvm", "name": "bench"}})
    yield libxl_header()
    yield from record(LibxlType.LIBXC_CONTEXT)
    yield libxc_headers(GuestType.X86_HVM)
    yield from record(CpuidPolicy((CpuidLeaf(0, 0xFFFFFFFF, 13, 0, 0, 0),) * 50))
    yield from record(MsrPolicy((MsrEntry(0xCE, 0, 1 << 31),)))
    yield from record(LibxcType.STATIC_DATA_END)
    contents = bytes(range(256)) * (PAGE_BYTES // 256) * batch
    for first in range(0, pfns, batch):
        numbers = range(first, min(first + batch, pfns))
        full = max(0, min(pages - first, len(numbers)))
        entries = tuple(page_entry(pfn, 0 if pfn < pages else _XTAB) for pfn in numbers)
        yield from record(PageData(entries, memoryview(contents)[: full * PAGE_BYTES]))
    yield from record(TscInfo(2, 2_000_000, 0, 0))
    yield from record(HvmContext(_CONTEXT))
    yield from record(HvmParams(((1, 0xFEFFC), (17, 5))))
    yield from record(LibxcType.END)
    yield from record(EmulatorContext(bytes(6000)))
    yield from record(LibxlType.END)


def _command_s(argv: list[str], environment: dict[str, str] | None) -> float:
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    return usage.ru_utime + usage.ru_stime


def _reading_s(path: Path) -> float:
    started = time.process_time()
    for _ in Source(str(path)).frames(Verifier()):
        pass
    return time.process_time() - started


def _framing_s(data: bytes) -> float:
    view, framer = memoryview(data), Framer()
    started = time.process_time()
    for at in range(0, len(view), _PIECE_BYTES):
        framer.feed(view[at : at + _PIECE_BYTES])
    framer.finish()
    return time.process_time() - started
