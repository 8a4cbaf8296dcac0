"""Test processes that boot Xen hosts take turns: not more of them at once than the machine has processors.

A host is emulated; ten of them on two processors do nothing but miss their deadlines, and each failure then looks like
a fault of what is tested. A process takes its turn with its first host and keeps it to its end, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import Final

__all__ = ["take_turn"]

WAIT_S: Final = 1800.0
_AGAIN_S: Final = 0.5
_taken: list[int] = []  # the descriptor whose lock is this process's turn


def take_turn() -> None:
    """Wait until fewer than as many processes as there are processors have hosts; this one counts from then on.

    UNDERSTUDY_XEN_TURNS sets another number of them.

    Raises:
        TimeoutError: it took longer than half an hour.
    """
    if _taken:
        return
    turns = int(os.environ.get("UNDERSTUDY_XEN_TURNS") or os.cpu_count() or 1)
    places = Path(tempfile.gettempdir()) / f"understudy-xen-turns-{os.getuid()}"
    places.mkdir(exist_ok=True)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for number in range(turns):
            fd = os.open(places / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            _taken.append(fd)
            return
        time.sleep(_AGAIN_S)
    raise TimeoutError(f"{turns} other processes have had Xen hosts for {WAIT_S:g} s")
