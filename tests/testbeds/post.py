"""Messages between the outside and a machine of a bed, waited for without polling. Both sides load this module.

A message is a line of JSON on a serial line or port. The outside's end closes when the machine dies, so it is told at
once. It needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["LineClosed", "Post"]

CHUNK_BYTES: Final = 1 << 16


class LineClosed(EOFError):
    """The other side is gone."""


class Post:
    """One end of the line.

    Args:
        line: its file descriptor; the caller's to close.
    """

    def __init__(self, line: int) -> None:
        self.line = line
        self._partial: list[bytes] = []
        self._lines: list[bytes] = []

    def send(self, message: Any) -> None:
        """Send a message, anything that JSON can carry.

        Raises:
            LineClosed: nobody is there to read it.
        """
        left = memoryview(self._pack(message) + b"\n")
        try:
            while left:
                left = left[os.write(self.line, left) :]
        except OSError as problem:
            raise LineClosed(str(problem)) from problem

    def receive(self, timeout_s: float | None = None) -> Any:
        """Return the next message.

        Raises:
            TimeoutError: none has come within `timeout_s` seconds.
            LineClosed: the other side is gone.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._lines:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.line], [], [], left)[0]:
                raise TimeoutError(f"no message within {timeout_s:g} s")
            self._read()
        return self._unpack(self._lines.pop(0))

    def ready(self) -> Iterator[Any]:
        """Yield the messages that have come, after a selector said that the line is readable.

        Raises:
            LineClosed: the other side is gone.
        """
        self._read()
        while self._lines:
            yield self._unpack(self._lines.pop(0))

    def _pack(self, message: Any) -> bytes:
        return json.dumps(message).encode()

    def _unpack(self, line: bytes) -> Any:
        return json.loads(line)

    def _read(self) -> None:
        try:
            data = os.read(self.line, CHUNK_BYTES)
        except OSError as problem:
            raise LineClosed(str(problem)) from problem
        if not data:
            raise LineClosed("the line is closed")
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._lines.append(b"".join([*self._partial, line]))
            self._partial = []
        self._partial.append(rest)
