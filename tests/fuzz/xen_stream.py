"""What a fuzzer feeds to everything that reads migration streams, and what must hold whatever it feeds.

Run by ``test_xen_stream.py``; by hand: ``python tests/fuzz/xen_stream.py DIRECTORY… [libFuzzer's options]``, where new
inputs that reach new code are written to the first directory. The first byte of an input says how the rest is cut up.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["understudy_xen"]):
    from understudy_xen.streams.backchannel import BackChannel
    from understudy_xen.streams.errors import StreamError
    from understudy_xen.streams.formats import Limits
    from understudy_xen.streams.framer import Framer
    from understudy_xen.streams.frames import Frame
    from understudy_xen.streams.inspector import Inspector, Run
    from understudy_xen.streams.reader import records
    from understudy_xen.streams.split import Span, by_checkpoint, by_layer, plain
    from understudy_xen.streams.verifier import Verifier

_LIMITS = Limits(record_bytes=1 << 16, config_bytes=1 << 12)
_STEPS = (1, 3, 8, 9, 64, 1000, 1 << 30)


def _fed(
    framer: Framer, data: memoryview, step: int
) -> tuple[list[Frame], StreamError | None, StreamError | None]:
    frames: list[Frame] = []
    try:
        for at in range(0, len(data), step):
            frames += framer.feed(data[at : at + step])
    except StreamError as error:
        return [*frames, *error.frames], error, error
    try:
        framer.finish()
    except StreamError as error:
        return frames, None, error
    return frames, None, None


def _check_frames(frames: list[Frame], framer: Framer, data: memoryview) -> None:
    assert all(before.end == after.start for before, after in pairwise(frames))
    assert not frames or (frames[0].start == 0 and frames[-1].end <= len(data))
    ends = [frame.end for frame in frames if frame.ends_checkpoint]
    assert framer.checkpoints == len(ends)
    assert framer.checkpoint_end == (ends[-1] if ends else 0)


def _check_error(error: StreamError | None, data: memoryview) -> None:
    if error is not None:
        assert 0 <= error.start <= error.offset <= len(data)
        assert str(error).startswith(f"offset {error.offset}: {error.layer} {error.record}")


def _check_split(frames: list[Frame], framer: Framer, data: memoryview) -> None:
    for spans in ([span for _, span in by_layer(frames)], list(by_checkpoint(frames))):
        assert sum(span.end - span.start for span in spans) == (frames[-1].end if frames else 0)
    if framer.checkpoints and framer.libxl and framer.libxc:
        pieces = plain(
            frames,
            framer.checkpoints,
            libxl_byteorder=framer.libxl.byteorder,
            libxc_byteorder=framer.libxc.byteorder,
        )
        again = Framer(limits=_LIMITS)
        for piece in pieces:
            again.feed(data[piece.start : piece.end] if isinstance(piece, Span) else piece)
        again.finish()
        assert again.ended
        assert not again.checkpoints


def examine(given: bytes) -> None:
    """Feed an input to every reader."""
    data = memoryview(given)[1:]
    step = (
        max(_STEPS[given[0] % len(_STEPS)], len(data) >> 9) if given else 1
    )  # an input takes no longer for its length
    framer = Framer(limits=_LIMITS)
    frames, error, end = _fed(framer, data, step)
    _check_frames(frames, framer, data)
    _check_error(end, data)
    _check_split(frames, framer, data)
    at_once = Framer(limits=_LIMITS)
    frames_too, error_too, end_too = _fed(at_once, data, 1 << 30)
    assert frames == frames_too
    assert str(error) == str(error_too)
    assert str(end) == str(end_too)

    verifier = Verifier(limits=_LIMITS)
    verified, _, verdict = _fed(verifier, data, step)
    _check_frames(verified, verifier, data)
    _check_error(verdict, data)
    assert verified == frames[: len(verified)]
    assert verdict is not None or end is None

    inspector = Inspector(limits=_LIMITS)
    _fed(inspector, data, step)
    rest = inspector.close()
    runs = sum(each.count for each in inspector.take() if isinstance(each, Run))
    assert runs == len(verified)
    assert rest is None or rest.end <= len(data)

    try:
        values = list(records(data, Framer(limits=_LIMITS)))
    except StreamError as wrong:
        read: StreamError | None = wrong
    else:
        read = None
        assert [frame for frame, _ in values] == frames
    assert read is None or verdict is not None, read
    channel = BackChannel(limits=_LIMITS)
    try:
        for at in range(0, len(data), step):
            channel.feed(data[at : at + step])
        channel.finish()
    except StreamError as wrong:
        _check_error(wrong, data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, examine)
    atheris.Fuzz()
