"""The post of the kernel bed: a message is a file in the shared run directory, its number goes over a serial line.

Neither alone would do: a file tells nobody that it is there, and a serial line of user-mode Linux loses what does not
fit into its buffer of 4096 bytes. Each message is a file of its own because the guest caches pages of a file that the
host goes on writing.

Source:
    arch/um/drivers/line.c (LINE_BUFSIZE), fs/hostfs/hostfs_kern.c (hostfs_file_release writes back).
"""

from __future__ import annotations

import os
import tty
from pathlib import Path
from typing import Any

from tests.testbeds.post import Post

__all__ = ["FilePost", "inside", "outside"]


class FilePost(Post):
    """One end of the line.

    Args:
        line: file descriptor of the serial line; the caller's to close.
        run: the run directory.
        outgoing: prefix of the files that this end writes.
        incoming: prefix of the files that the other end writes.
    """

    def __init__(self, line: int, run: Path, outgoing: str, incoming: str) -> None:
        super().__init__(line)
        self._run, self._outgoing, self._incoming = run, outgoing, incoming
        self._sent = 0

    def _pack(self, message: Any) -> bytes:
        self._sent += 1
        # Closing the file is what writes it back from the guest's page cache to the host.
        (self._run / f"{self._outgoing}{self._sent}").write_bytes(super()._pack(message))
        return b"%d" % self._sent

    def _unpack(self, line: bytes) -> Any:
        path = self._run / f"{self._incoming}{int(line)}"
        message = super()._unpack(path.read_bytes())
        path.unlink()
        return message


def outside(line: int, run: Path) -> FilePost:
    """Return the host's end."""
    return FilePost(line, run, "to-bed-", "from-bed-")


def inside() -> FilePost:
    """Return the guest's end."""
    line = os.open("/dev/ttyS0", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    tty.setraw(line)
    return FilePost(line, Path(os.environ["BED_RUN"]), "from-bed-", "to-bed-")
