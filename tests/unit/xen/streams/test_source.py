"""Streams in files: pages are sought over, and a file that ends early is noticed all the same."""

from __future__ import annotations

import gzip
import os
import threading
from pathlib import Path

import pytest

from tests.unit.xen.streams.samples import head, hvm_first, hvm_state, libxc_record, pages, remus, saved
from understudy_xen.streams.errors import StreamCut
from understudy_xen.streams.formats import LibxcType, LibxlType
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.frames import Frame
from understudy_xen.streams.pages import PageData
from understudy_xen.streams.source import Source, SourceError
from understudy_xen.streams.verifier import Verifier
from understudy_xen.streams.writer import joined, record

BATCH = 1024
MIB = 1 << 20


def write_large(path: Path, batches: int) -> int:
    """Write a stream whose pages are holes in the file; return its length."""
    with path.open("wb") as file:
        file.write(head("little") + hvm_first("little"))
        for first in range(batches):
            numbers = tuple(range(first * BATCH, (first + 1) * BATCH))
            start, entries = record(PageData(numbers, bytes(BATCH * 4096)))[:2]
            file.write(start)
            file.write(entries)
            file.seek(BATCH * 4096, os.SEEK_CUR)
        file.write(hvm_state("little") + libxc_record(LibxcType.END) + joined(record(LibxlType.END)))
        return file.tell()


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_pages_are_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    total = write_large(path, 64)
    assert total > 256 * MIB
    for framer in (Framer(), Verifier()):
        before = read_bytes()
        frames = [frame for some in Source(str(path)).frames(framer) for frame in some]
        assert read_bytes() - before < 3 * MIB
        assert framer.ended
        assert frames[-1].end == total
    assert isinstance(framer, Verifier)
    assert framer.pages == 64 * BATCH + 5


@pytest.mark.parametrize("missing", [1, 100, 2 * MIB, 9 * MIB])
def test_a_large_file_that_ends_early(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "stream"
    total = write_large(path, 4)
    os.truncate(path, total - missing)
    verifier = Verifier()
    with pytest.raises(StreamCut) as caught:
        for _ in Source(str(path)).frames(verifier):
            pass
    assert caught.value.offset == total - missing


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("data", [saved(), remus(checkpoints=5), saved("big")])
def test_frames_are_those_of_the_bytes(tmp_path: Path, data: bytes, *, compressed: bool) -> None:
    path = tmp_path / "stream"
    path.write_bytes(gzip.compress(data) if compressed else data)
    told: list[tuple[int, int]] = []
    source = Source(str(path))
    frames: list[Frame] = []
    for some in source.frames(Framer(), lambda passed, total: told.append((passed, total))):
        frames += some
    assert frames == Framer().feed(data)
    assert told[-1] == (len(data), 0 if compressed else len(data))
    assert source.trailing_bytes == 0


def test_a_fifo_is_read_as_it_comes(tmp_path: Path) -> None:
    path, data = tmp_path / "fifo", saved()
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(data + b"bye",), daemon=True)
    writer.start()
    source = Source(str(path))
    frames = [frame for some in source.frames(Verifier()) for frame in some]
    writer.join(10)
    assert frames[-1].end == len(data)
    assert source.trailing_bytes == 3


def test_parts(tmp_path: Path) -> None:
    data = remus() + libxc_record(pages([1]))
    path = tmp_path / "stream"
    spans = [(0, 5), (5, 5), (7, 3000), (len(data) - 9, len(data))]
    for compressed in (False, True):
        path.write_bytes(gzip.compress(data) if compressed else data)
        parts: dict[int, bytes] = {}
        for index, piece in Source(str(path)).parts(spans):
            parts[index] = parts.get(index, b"") + piece
        assert parts == {index: data[start:end] for index, (start, end) in enumerate(spans) if end > start}
    with pytest.raises(SourceError, match="shorter"):
        list(Source(str(path)).parts([(0, len(data) + 1)]))
