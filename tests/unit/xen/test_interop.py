"""Work with stock tools, without Xen: what is refused, and how a receiver is left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.xen.streams.samples import remus, saved
from understudy.errors import HypervisorError
from understudy_xen.interop.command import xen
from understudy_xen.outlet import ProgramOutlet
from understudy_xen.streams.errors import StreamError
from understudy_xen.streams.formats import OPTIONAL, Form, Layer, LibxcType, LibxlType
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.libxl import EmulatorContext, EmulatorXenstoreData
from understudy_xen.streams.writer import (
    abandonment,
    ending,
    joined,
    record,
)

# Reads its input to the end, talks more than a pipe holds, and ends with a status.
RECEIVER = "import sys; data = sys.stdin.buffer.read(); print('x' * 200000); sys.exit({})"


def receiver(source: str) -> ProgramOutlet:
    return ProgramOutlet([sys.executable, "-c", source])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["remus", "web", "beta"], "the receiver acknowledges nothing and no output is held"),
        (["remus", "web", "--blackhole"], "add --allow-unsafe"),
        (["remus", "web", "--allow-unsafe"], "give one of HOST, --command and --blackhole"),
        (["remus", "web", "beta", "-b", "--allow-unsafe"], "give one of HOST, --command and --blackhole"),
        (["promote", "web"], "has no record that proves it may go on: --force and --reason TEXT are needed"),
        (["promote", "web", "--force"], "--reason TEXT are needed"),
        (["promote", "web", "--reason", "dead"], "--force and --reason TEXT are needed"),
        (["receive", "--hold-limit", "much"], "--hold-limit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(words: Sequence[str], said: str) -> None:
    result = CliRunner().invoke(xen, words)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_without_xen_nothing_is_saved(tmp_path: Path) -> None:
    if Path("/proc/xen/capabilities").exists():
        pytest.skip("this is a Xen host")
    file = tmp_path / "web.save"
    file.write_text("the one before")
    result = CliRunner().invoke(xen, ["save", "web", str(file)])
    assert result.exit_code == 1
    assert "; nothing was done" in result.output
    assert [(each, each.read_text()) for each in tmp_path.iterdir()] == [(file, "the one before")]


@pytest.mark.parametrize("status", [0, 3])
def test_a_receiver_is_given_time_for_its_end(status: int) -> None:
    outlet = receiver(RECEIVER.format(status))
    try:
        outlet.write(b"stream")
        assert outlet.finish(20) == status
    finally:
        outlet.close()
    with pytest.raises(HypervisorError, match="closed"):
        outlet.finish(20)


def test_a_receiver_that_a_signal_ends_says_so() -> None:
    outlet = receiver("import os, sys; sys.stdin.read(); os.kill(os.getpid(), 9)")
    try:
        assert outlet.finish(20) == -9
    finally:
        outlet.close()


def test_a_receiver_that_goes_on_is_not_waited_for() -> None:
    outlet = receiver("import time; time.sleep(60)")
    try:
        assert outlet.finish(0.05) is None
    finally:
        outlet.cut("enough")
        outlet.close()


def test_an_abandoned_stream_is_wrong_after_its_last_checkpoint() -> None:
    framer = Framer(Form.XL)
    framer.feed(remus())
    framer.finish()
    whole = framer.offset
    with pytest.raises(StreamError) as caught:
        framer.feed(abandonment())
    assert caught.value.offset == whole
    # A type that may not be passed over; and it is a whole checkpoint, else xl would take over before it looks.
    kind = int.from_bytes(abandonment()[:4], "little")
    assert not kind & OPTIONAL
    assert kind not in list(LibxcType)
    assert abandonment()[8:] == joined([*record(LibxcType.CHECKPOINT), *record(LibxlType.CHECKPOINT_END)])


def test_a_stream_without_checkpoints_ends_as_with_xl() -> None:
    stream = saved()
    framer = Framer(Form.XL)
    end = next(
        frame for frame in framer.feed(stream) if (frame.layer, frame.type) == (Layer.LIBXC, LibxcType.END)
    )
    keys = EmulatorXenstoreData(((b"physmap/0/size", b"800000"), (b"physmap/0/name", b"vga.vram")))
    assert stream[end.end :] == joined(ending(EmulatorContext(b"QEVM\0state"), keys))
    assert joined(ending()) == joined(record(LibxlType.END))
