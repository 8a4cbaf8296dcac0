"""Streams taken apart, and made plain at a checkpoint."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.unit.xen.streams.samples import ORDERS, capture, libxc_record, pages, pv, remus, saved
from understudy_xen.streams.formats import ByteOrder, Layer, LibxcType
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.libxl import EmulatorContext
from understudy_xen.streams.pages import PageData
from understudy_xen.streams.reader import records
from understudy_xen.streams.split import Span, by_checkpoint, by_layer, plain
from understudy_xen.streams.verifier import Verifier

REMUS: dict[str, tuple[bytes, ByteOrder]] = {
    **{f"remus-{order}": (remus(order, checkpoints=4), order) for order in ORDERS},
    **{f"colo-{order}": (remus(order, checkpoints=4, colo=True), order) for order in ORDERS},
    "capture": (capture("pvh-remus.gz"), "little"),
}


def made_plain(data: bytes, checkpoint: int, byteorder: ByteOrder = "little") -> bytes:
    pieces = plain(Framer().feed(data), checkpoint, libxl_byteorder=byteorder, libxc_byteorder=byteorder)
    return b"".join(data[piece.start : piece.end] if isinstance(piece, Span) else piece for piece in pieces)


def pages_of(data: bytes) -> dict[int, bytes]:
    """Return what the guest's memory is after all records have been applied in order."""
    return {
        page.pfn: bytes(page.contents or b"")
        for _, value in records(data)
        if isinstance(value, PageData)
        for page in value.pages()
    }


@pytest.mark.parametrize("name", REMUS)
@pytest.mark.parametrize("checkpoint", [1, 2, 4])
def test_plain_at_a_checkpoint(name: str, checkpoint: int) -> None:
    data, byteorder = REMUS[name]
    end = [frame.end for frame in Framer().feed(data) if frame.ends_checkpoint][checkpoint - 1]
    stream = made_plain(data, checkpoint, byteorder)
    verifier = Verifier()
    verifier.feed(stream)
    verifier.finish()
    assert verifier.ended
    assert (verifier.checkpoints, verifier.colo) == (0, False)
    assert pages_of(stream) == pages_of(data[:end])
    states = [bytes(value.context) for _, value in records(stream) if isinstance(value, EmulatorContext)]
    assert states == ([] if name == "capture" else [b"QEVM" + bytes([checkpoint] * checkpoint)])
    # The same whatever came after that checkpoint.
    assert made_plain(data[:end], checkpoint, byteorder) == stream


def test_plain_at_a_checkpoint_that_is_not_there() -> None:
    for data in (remus(checkpoints=2), remus(checkpoints=2)[:-1], saved()):
        with pytest.raises(ValueError, match="before checkpoint 3"):
            made_plain(data, 3)


def test_plain_asks_for_no_frame_after_its_checkpoint() -> None:
    frames = iter(Framer().feed(remus(checkpoints=3)))
    list(plain(frames, 1))
    left = list(frames)
    assert left
    assert sum(frame.ends_checkpoint for frame in left) == 2


@pytest.mark.parametrize("data", [saved(), remus(), remus(colo=True), pv(), saved("big")])
def test_layers_are_all_of_a_stream(data: bytes) -> None:
    spans = list(by_layer(Framer().feed(data)))
    assert b"".join(data[span.start : span.end] for _, span in spans) == data
    assert all(first[0] is not second[0] for first, second in pairwise(spans))
    libxc = b"".join(data[span.start : span.end] for layer, span in spans if layer is Layer.LIBXC)
    framer = Verifier()
    framer.feed(libxc)
    assert framer.libxc is not None
    assert framer.ended == (b"LibxlFmt" not in data or data.endswith(bytes(8)))


def test_checkpoints_are_all_of_a_stream() -> None:
    data = remus(checkpoints=3)
    rest = libxc_record(pages([1])) + libxc_record(LibxcType.VERIFY)
    spans = list(by_checkpoint(Framer().feed(data + rest)))
    assert len(spans) == 4
    assert b"".join((data + rest)[span.start : span.end] for span in spans) == data + rest
    assert spans[-1] == (len(data), len(data) + len(rest))
    assert len(list(by_checkpoint(Framer().feed(data)))) == 3


def test_records_of_a_part_are_read_with_the_framer_that_saw_the_rest() -> None:
    data, framer = remus(checkpoints=3), Framer()
    first = [frame.end for frame in Framer().feed(data) if frame.ends_checkpoint][0]  # noqa: RUF015
    whole = list(records(data))
    again = [*records(data[:first], framer), *records(data[first:], framer)]
    assert [frame for frame, _ in again] == [frame for frame, _ in whole]
