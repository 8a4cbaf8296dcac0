"""Streams from files, pipes and gzip, fed to a framer; what nobody will look at is not even read from a file."""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from understudy.errors import UnderstudyError
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.frames import Frame

if TYPE_CHECKING:
    from gzip import GzipFile

    _File = io.BufferedReader | GzipFile

__all__ = ["STDIN", "Progress", "Source", "SourceError"]

STDIN: Final = "-"
_GZIP: Final = b"\x1f\x8b"
_LEAST_BYTES: Final = 16 << 10  # the pfns of a PAGE_DATA record and not many of its pages
_MOST_BYTES: Final = 1 << 20

Progress = Callable[[int, int], None]
"""Is told how many bytes of the input have been passed and how many there are; 0 if that is not known."""


class SourceError(UnderstudyError):
    """A file cannot be read, or its compression is damaged."""


class Source:
    """Where a stream comes from; gzip is recognised by its first bytes.

    Args:
        name: A path, or ``-`` for standard input.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.trailing_bytes = 0
        """How many bytes were seen after the stream's END; of a pipe, those that came with it."""

    def frames(self, framer: Framer, progress: Progress | None = None) -> Iterator[list[Frame]]:
        """Feed the framer to the stream's end.

        Args:
            framer: A fresh one. If it is a `Verifier`, what it needs is read; the rest of a file is sought over.
            progress: Is told how far it is.

        Raises:
            StreamError: The stream is wrong or cut.
            SourceError: It cannot be read.
        """
        with self._opened() as file:
            if isinstance(file, io.BufferedReader) and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                yield from self._sought(file, framer, progress)
            else:
                yield from self._fed(file, framer, progress)
        framer.finish()

    def parts(self, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        """Read parts of the stream, in one pass; of a pipe there is no second one.

        Args:
            spans: First offset and the one past the last of each, in ascending order.

        Yields:
            Index of the span, and some of its bytes.

        Raises:
            SourceError: It cannot be read, or has become shorter.
        """
        with self._opened() as file:
            for index, (start, end) in enumerate(spans):
                file.seek(start)
                at = start
                while at < end:
                    piece = file.read(min(_MOST_BYTES, end - at))
                    if not piece:
                        raise SourceError(f"{self.name}: has become shorter: there is nothing at offset {at}")
                    yield index, piece
                    at += len(piece)

    @contextmanager
    def _opened(self) -> Iterator[_File]:
        try:
            with (
                open(0 if self.name == STDIN else self.name, "rb", closefd=self.name != STDIN) as file,
                _expanded(file) if file.peek(2).startswith(_GZIP) else nullcontext(file) as plain,
            ):
                yield plain
        except (EOFError, zlib.error) as error:
            raise SourceError(f"{self.name}: its compression is damaged: {error}") from error
        except OSError as error:
            raise SourceError(f"{self.name}: {error.strerror or error}") from error

    def _fed(self, file: _File, framer: Framer, progress: Progress | None) -> Iterator[list[Frame]]:
        passed = 0
        while not framer.ended and (piece := file.read1(_MOST_BYTES)):
            frames = framer.feed(piece)
            passed += len(piece)
            self.trailing_bytes = passed - framer.offset
            yield frames
            if progress:
                progress(passed, 0)

    def _sought(self, file: _File, framer: Framer, progress: Progress | None) -> Iterator[list[Frame]]:
        descriptor = file.fileno()
        total = os.fstat(descriptor).st_size
        at, piece_bytes = 0, _LEAST_BYTES
        while not framer.ended and at < total:
            if framer.skippable > _LEAST_BYTES:
                step = min(framer.skippable, total - at)
                yield framer.skip(step)
                at, piece_bytes = at + step, _LEAST_BYTES
            else:
                piece = os.pread(descriptor, piece_bytes, at)
                if not piece:
                    break
                yield framer.feed(piece)
                at, piece_bytes = at + len(piece), min(2 * piece_bytes, _MOST_BYTES)
            if progress:
                progress(min(at, total), total)
        self.trailing_bytes = max(0, total - framer.offset) if framer.ended else 0


def _expanded(file: io.BufferedReader) -> GzipFile:
    from gzip import GzipFile  # noqa: PLC0415 - takes its time, and most streams are not compressed

    return GzipFile(fileobj=file)
