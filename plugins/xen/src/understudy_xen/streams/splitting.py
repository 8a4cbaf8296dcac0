"""A stream's parts as files in a directory: all of them, or after a failure none."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from understudy.errors import UnderstudyError
from understudy_xen.streams.errors import StreamError
from understudy_xen.streams.formats import Layer
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.frames import Frame
from understudy_xen.streams.source import STDIN, Source
from understudy_xen.streams.split import Span, by_checkpoint, by_layer, plain
from understudy_xen.streams.verifier import Verifier

__all__ = ["Output", "SplitError", "checkpoints_apart", "kept", "layers_apart", "made_plain"]


class SplitError(UnderstudyError):
    """The parts cannot be written; those that had been are gone again."""


@dataclass
class Output:
    """Files that are made in a directory, which is made if it is not there.

    Args:
        directory: Where.
    """

    directory: Path
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes written by file name."""
    _files: dict[str, BinaryIO] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def into(cls, directory: Path) -> Iterator[Output]:
        """Make files; keep them if the block ends well, take them away if it does not.

        Raises:
            SplitError: A file is there already, or cannot be written.
        """
        output = cls(directory)
        existed = directory.is_dir()
        with ExitStack() as undo:
            undo.callback(output._take_away, directory=not existed)
            try:
                directory.mkdir(parents=True, exist_ok=True)
                yield output
                output._close()
            except OSError as error:
                raise SplitError(
                    f"{error.filename or directory}: {error.strerror}; no part was kept"
                ) from error
            undo.pop_all()

    def write(self, name: str, data: bytes) -> None:
        """Add to a file, which is made by the first call with its name."""
        file = self._files.get(name)
        if file is None:
            if name in self.sizes:
                raise ValueError(f"{name} has been closed")
            file = self._files[name] = (self.directory / name).open("xb")
            self.sizes[name] = 0
        file.write(data)
        self.sizes[name] += len(data)

    def close(self, name: str) -> None:
        """Close a file to which nothing more will be added."""
        file = self._files.pop(name, None)
        if file is not None:
            file.close()

    def _close(self) -> None:
        for name in tuple(self._files):
            self.close(name)

    def _take_away(self, *, directory: bool) -> None:
        for file in self._files.values():
            file.close()
        for name in self.sizes:
            (self.directory / name).unlink(missing_ok=True)
        if directory:
            _remove_if_empty(self.directory)


def _remove_if_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


@contextmanager
def kept(source: Source, directory: Path) -> Iterator[Source]:
    """Have a source that can be read more than once: what comes by a pipe is kept in a file for the time being.

    Args:
        source: The stream.
        directory: Where there is room.

    Raises:
        SplitError: There is no room, or it cannot be read.
    """
    if source.name != STDIN:
        yield source
        return
    with ExitStack() as undo:
        existed = directory.is_dir()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not existed:
                undo.callback(_remove_if_empty, directory)
            path = directory / f".stream-{os.getpid()}"
            undo.callback(path.unlink, missing_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        except OSError as error:
            raise SplitError(f"{error.filename or directory}: {error.strerror}") from error
        yield Source(str(path))


def _frames(source: Source) -> Iterator[Frame]:
    try:
        for frames in source.frames(Framer()):
            yield from frames
    except StreamError as error:
        yield from error.frames
        raise


def layers_apart(source: Source, verifier: Verifier, output: Output) -> None:
    """Write each layer's bytes into a file of its own, and the guest's configuration.

    Args:
        source: A stream that has been verified, and can be read again.
        verifier: That has read it.
        output: Where to.
    """
    if verifier.preamble is not None:
        output.write(
            "config.json" if verifier.preamble.is_json else "config", verifier.preamble.config.rstrip(b"\0")
        )
    names = {Layer.XL: "xl-preamble.bin", Layer.LIBXL: "libxl.bin", Layer.LIBXC: "libxc.bin"}
    layers: list[Layer] = []

    def spans() -> Iterator[Span]:
        for layer, span in by_layer(_frames(source)):
            layers[:] = [layer]
            yield span

    for _, piece in source.parts(spans()):
        output.write(names[layers[0]], piece)


def checkpoints_apart(source: Source, output: Output) -> None:
    """Write each checkpoint into a file of its own; one after the other they are the stream again.

    Args:
        source: A stream that has been verified, and can be read again.
        output: Where to.
    """
    last = ""
    for index, piece in source.parts(by_checkpoint(_frames(source))):
        name = f"checkpoint-{index + 1:06}.bin"
        if last not in {"", name}:
            output.close(last)
        output.write(name, piece)
        last = name


def made_plain(source: Source, verifier: Verifier, checkpoint: int, output: Output) -> None:
    """Write a plain stream that holds the guest as it was at a checkpoint.

    Args:
        source: A stream that has been verified as far as that checkpoint, and can be read again.
        verifier: That has read it.
        checkpoint: Its number.
        output: Where to.
    """
    assert verifier.libxl is not None  # noqa: S101 - there are no checkpoints without it
    assert verifier.libxc is not None  # noqa: S101 - as above
    pieces = plain(
        _frames(source),
        checkpoint,
        libxl_byteorder=verifier.libxl.byteorder,
        libxc_byteorder=verifier.libxc.byteorder,
    )
    name = f"plain.{verifier.form.value if verifier.form else 'bin'}"

    def spans() -> Iterator[Span]:
        for piece in pieces:
            if isinstance(piece, Span):
                yield piece
            else:
                output.write(name, piece)

    for _, part in source.parts(spans()):
        output.write(name, part)
