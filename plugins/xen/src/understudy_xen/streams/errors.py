"""What is wrong with a stream, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from understudy.errors import UnderstudyError

if TYPE_CHECKING:
    from understudy_xen.streams.frames import Frame

__all__ = ["BodyError", "StreamCut", "StreamError"]


class StreamError(UnderstudyError):
    """A stream does not follow its specification, or a limit.

    Args:
        problem: What is wrong.
        offset: Of the byte at which it showed, counted from the beginning of the stream.
        layer: ``"xl"``, ``"libxl"`` or ``"libxc"``.
        record: Name of the record or header that is wrong, e.g. ``"PAGE_DATA"``.
        start: Offset of that record's or header's first byte.
        allowed: What would be right, if that can be said.

    Attributes:
        frames: What was whole before the error and has not been returned to the caller yet.
    """

    def __init__(
        self, problem: str, *, offset: int, layer: str, record: str, start: int, allowed: str = ""
    ) -> None:
        where = f"offset {offset}: {layer} {record}" + (f" (begins at {start})" if start != offset else "")
        super().__init__(f"{where}: {problem}" + (f" (allowed: {allowed})" if allowed else ""))
        self.problem = problem
        self.offset = offset
        self.layer = layer
        self.record = record
        self.start = start
        self.allowed = allowed
        self.frames: tuple[Frame, ...] = ()


class StreamCut(StreamError):
    """The stream ends where it may not: what came is right as far as it goes."""


class BodyError(UnderstudyError):
    """The body of a record, looked at by itself, is wrong.

    Args:
        problem: What is wrong.
        at: Offset in the body at which it showed.
        allowed: What would be right, if that can be said.
    """

    def __init__(self, problem: str, *, at: int = 0, allowed: str = "") -> None:
        super().__init__(
            problem
            + (f" at byte {at} of the body" if at else "")
            + (f" (allowed: {allowed})" if allowed else "")
        )
        self.problem = problem
        self.at = at
        self.allowed = allowed
