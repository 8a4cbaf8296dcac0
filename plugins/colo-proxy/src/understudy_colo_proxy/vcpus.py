"""Wait until the guest has taken in what was delivered to it.

A SYN that lies in the guest's receive queue when the checkpoint is taken is answered twice afterwards, by each copy
with a number of its own, and the fresh rewriter has not seen it. So the cut waits until every virtual CPU, since the
last packet was delivered, has either gone to sleep (its guest has nothing left to do) or had the processor for long
enough. QEMU tells the thread of each; the kernel tells what the thread does.

Source: QEMU qapi/machine.json (query-cpus-fast); proc(5), ``/proc/TID/stat`` and ``schedstat``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from understudy.services import Monitor

__all__ = ["Vcpus"]

_ENOUGH_NS: Final = 10_000_000  # processor time after which a busy guest has seen its interrupt
_POLL_S: Final = 0.0005
_ASLEEP: Final = 2  # looks in a row: once may be a moment in which it waits for one of QEMU's locks


@dataclass(slots=True)
class _Thread:
    tid: int
    ran_ns: int
    asleep: int = 0


class Vcpus:
    """The threads of a guest's virtual CPUs.

    Args:
        threads: Their ids, in our namespace of processes.
        proc: Where procfs is mounted.
    """

    def __init__(self, threads: Sequence[int], proc: Path = Path("/proc")) -> None:
        self._threads = tuple(threads)
        self._proc = proc

    @classmethod
    async def of(cls, monitor: Monitor) -> Vcpus:
        """Return those of the guest behind `monitor`."""
        return cls([int(cpu["thread-id"]) for cpu in await monitor.execute("query-cpus-fast")])

    async def caught_up(self, timeout_s: float) -> bool:
        """Wait until every virtual CPU has slept, or run for long enough, since now.

        Returns:
            Whether all have; threads that this host's kernel does not show us count as if they had.
        """
        waiting = [_Thread(tid, self._ran_ns(tid)) for tid in self._threads]
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while waiting := [thread for thread in waiting if not self._done(thread)]:  # noqa: ASYNC110 - no event for it
                    await asyncio.sleep(_POLL_S)
        return not waiting

    def _done(self, thread: _Thread) -> bool:
        state = self._state(thread.tid)
        thread.asleep = thread.asleep + 1 if state in "SI" else 0
        gone = not state
        return gone or thread.asleep >= _ASLEEP or self._ran_ns(thread.tid) - thread.ran_ns >= _ENOUGH_NS

    def _state(self, tid: int) -> str:
        # "tid (name) state ...": the name may hold anything, also brackets.
        try:
            text = (self._proc / str(tid) / "stat").read_text()
        except OSError:
            return ""
        return text.rpartition(")")[2].split()[0]

    def _ran_ns(self, tid: int) -> int:
        try:
            return int((self._proc / str(tid) / "schedstat").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return 0
