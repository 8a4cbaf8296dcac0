"""Tell observers what happened, without ever making a guest wait for them.

Each observer has a thread and a bounded queue of its own: one that is slow, hangs or blocks delays neither the event
loop nor another observer. When its queue is full, what is newest is dropped and counted; when it raises, that is logged
with its name and the next report is handed to it all the same.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from understudy.phases import in_words
from understudy.report import EpochReport, Observer

__all__ = ["ObserverFeed"]

log = logging.getLogger(__name__)

_END: Final = None
_Call = Callable[[Observer], None]


class ObserverFeed(Observer):
    """Hands reports and events to observers, each in its own thread.

    Args:
        observers: Pairs of name, for logs and counts, and observer.
        limit: How many reports and events may wait for one observer.
    """

    __slots__ = ("_lanes",)

    def __init__(self, observers: Iterable[tuple[str, Observer]], *, limit: int = 1000) -> None:
        self._lanes = [_Lane(name, observer, limit) for name, observer in observers]

    def epoch(self, report: EpochReport) -> None:
        """Queue a report for every observer; never blocks, never raises."""
        for lane in self._lanes:
            lane.put(lambda observer: observer.epoch(report))

    def event(self, guest: str, name: str, facts: Mapping[str, object]) -> None:
        """Queue an event for every observer; never blocks, never raises."""
        for lane in self._lanes:
            lane.put(lambda observer: observer.event(guest, name, facts))

    @property
    def dropped(self) -> Mapping[str, int]:
        """How much each observer missed because its queue was full."""
        return {lane.name: lane.dropped for lane in self._lanes}

    @property
    def failed(self) -> Mapping[str, int]:
        """How often each observer raised."""
        return {lane.name: lane.failed for lane in self._lanes}

    def close(self, *, timeout_s: float = 2.0) -> tuple[str, ...]:
        """Let the observers finish what is queued, and end their threads.

        Blocks; call it in a thread when a loop is running.

        Args:
            timeout_s: Seconds for all of them together.

        Returns:
            The names of those that did not finish; their threads end with the process.
        """
        until = time.monotonic() + timeout_s
        for lane in self._lanes:
            lane.close()
        return tuple(lane.name for lane in self._lanes if not lane.join(max(0.0, until - time.monotonic())))


class _Lane:
    # One observer with its queue and its thread, which starts with the first report.

    def __init__(self, name: str, observer: Observer, limit: int) -> None:
        self.name = name
        self.dropped = 0
        self.failed = 0
        self._observer = observer
        self._limit = limit
        # Unbounded in itself, so that the end always fits; the bound is checked by the one who puts.
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, call: _Call) -> None:
        if self._closed:
            return
        if self._queue.qsize() >= self._limit:
            self.dropped += 1
            # The first, then every thousandth: one sentence, not a flood.
            if self.dropped % 1000 == 1:
                log.warning("observer %s is too slow: %d reports dropped", self.name, self.dropped)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"observer-{self.name}", daemon=True)
            self._thread.start()
        self._queue.put(call)

    def close(self) -> None:
        self._closed = True
        self._queue.put(_END)

    def join(self, timeout_s: float) -> bool:
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (call := self._queue.get()) is not _END:
            try:
                call(self._observer)
            except Exception as error:
                self.failed += 1
                log.error("observer %s failed: %s", self.name, in_words(error), exc_info=self.failed == 1)  # noqa: TRY400
