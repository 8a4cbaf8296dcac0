"""Bytes in pieces of any size for a parser that is written as if they came all at once.

The parser is a generator that yields how many bytes it wants next: a positive number is answered with that many bytes,
a negative one passes over as many without looking at them. Only what is asked for is ever copied.
"""

from __future__ import annotations

from collections.abc import Generator

__all__ = ["Buffer", "Cursor", "Steps"]

Buffer = bytes | bytearray | memoryview
"""What a stream may be handed over in."""

Steps = Generator[int, bytes, None]
"""A parser, or a part of one."""


class Cursor:
    """Where a parser stands in its stream.

    Args:
        steps: The parser; never yields 0.
    """

    def __init__(self, steps: Steps) -> None:
        self.offset = 0
        """How many bytes the parser has been given or has passed over."""
        self.done = False
        """The parser has come to its end; nothing more is taken."""
        self._steps = steps
        self._held = bytearray()
        self._want = 0
        self._started = False

    @property
    def received(self) -> int:
        """How many bytes have come."""
        return self.offset + len(self._held)

    @property
    def missing(self) -> int:
        """How many bytes more the parser waits for before it can go on."""
        return 0 if self.done else abs(self._want) - len(self._held)

    @property
    def skippable(self) -> int:
        """How many of the next bytes nobody will look at: they may be passed to `skip` instead of being read."""
        return max(0, -self._want)

    def skip(self, count: int) -> None:
        """Pass over bytes that are there but need not be shown.

        Args:
            count: How many, at most `skippable`.
        """
        if not 0 <= count <= self.skippable:
            raise ValueError(f"{count} bytes are not to be skipped here, at most {self.skippable} are")
        self.offset += count
        self._want += count
        if count and not self._want:
            self._go(b"")

    def feed(self, data: memoryview) -> int:
        """Give the parser the next bytes, and let it go as far as they carry.

        Args:
            data: Bytes of the stream, as unsigned bytes.

        Returns:
            How many were taken: all of them, unless the parser came to its end before.

        Raises:
            Exception: What the parser raises; the cursor is of no use afterwards.
        """
        if not self._started:
            self._started = True
            self._go(None)
        at, size = 0, len(data)
        while not self.done and at < size:
            want = self._want
            if want < 0:
                step = min(-want, size - at)
                at += step
                self.offset += step
                self._want = want = want + step
                if not want:
                    self._go(b"")
                continue
            missing = want - len(self._held)
            if missing > size - at:
                self._held += data[at:]
                return size
            piece = bytes(data[at : at + missing])
            at += missing
            if self._held:
                piece = bytes(self._held + piece)
                self._held = bytearray()
            self.offset += want
            self._go(piece)
        return at

    def _go(self, piece: bytes | None) -> None:
        try:
            self._want = next(self._steps) if piece is None else self._steps.send(piece)
        except StopIteration:
            self.done = True
            self._want = 0
