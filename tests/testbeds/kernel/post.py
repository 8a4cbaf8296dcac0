"""Messages between the host and a kernel of the bed, of any size, waited for without polling.

A message is a file in the shared run directory, made known by its number on a serial line. Neither alone would do: a
file tells nobody that it is there, and a serial line of user-mode Linux loses what does not fit into its buffer of
4096 bytes. Each message is a file of its own because the guest caches pages of a file that the host goes on writing.
Its end of the line closes when the kernel dies, so the host is told at once. Both sides load this module: it needs
nothing but the standard library.

Source:
    arch/um/drivers/line.c (LINE_BUFSIZE), fs/hostfs/hostfs_kern.c (hostfs_file_release writes back).
"""

from __future__ import annotations

import json
import os
import select
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["LineClosed", "Post", "inside"]


class LineClosed(EOFError):
    """The other side is gone."""


class Post:
    """One end of the line.

    Args:
        line: file descriptor of the serial line; the caller's to close.
        run: the run directory.
        outgoing: prefix of the files that this end writes.
        incoming: prefix of the files that the other end writes.
    """

    def __init__(self, line: int, run: Path, outgoing: str, incoming: str) -> None:
        self.line = line
        self._run, self._outgoing, self._incoming = run, outgoing, incoming
        self._sent = 0
        self._partial = b""
        self._numbers: list[int] = []

    def send(self, message: Any) -> None:
        """Send a message, anything that JSON can carry.

        Raises:
            LineClosed: nobody is there to read it.
        """
        self._sent += 1
        # Closing the file is what writes it back from the guest's page cache to the host.
        (self._run / f"{self._outgoing}{self._sent}").write_text(json.dumps(message))
        left = b"%d\n" % self._sent
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
        while not self._numbers:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.line], [], [], left)[0]:
                raise TimeoutError(f"no message within {timeout_s:g} s")
            self._read()
        return self._load(self._numbers.pop(0))

    def ready(self) -> Iterator[Any]:
        """Yield the messages that have come, after a selector said that the line is readable.

        Raises:
            LineClosed: the other side is gone.
        """
        self._read()
        while self._numbers:
            yield self._load(self._numbers.pop(0))

    def _read(self) -> None:
        try:
            data = os.read(self.line, 4096)
        except OSError as problem:
            raise LineClosed(str(problem)) from problem
        if not data:
            raise LineClosed("the line is closed")
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._numbers += [int(line) for line in lines]

    def _load(self, number: int) -> Any:
        path = self._run / f"{self._incoming}{number}"
        message = json.loads(path.read_text())
        path.unlink()
        return message


def outside(line: int, run: Path) -> Post:
    """Return the host's end."""
    return Post(line, run, "to-bed-", "from-bed-")


def inside() -> Post:
    """Return the guest's end."""
    line = os.open("/dev/ttyS0", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    tty.setraw(line)
    return Post(line, Path(os.environ["BED_RUN"]), "from-bed-", "to-bed-")
