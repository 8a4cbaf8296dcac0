"""The figures of every protected guest's last epochs, for `list` and `history`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from understudy.report import EpochReport, Observer

__all__ = ["Figures", "percentile"]

KEEP = 1000


class Figures(Observer):
    """Keeps the reports of the last epochs of each guest."""

    __slots__ = ("_reports",)

    def __init__(self) -> None:
        self._reports: dict[str, deque[EpochReport]] = {}

    def epoch(self, report: EpochReport) -> None:
        """Take the report of a committed epoch."""
        self._reports.setdefault(report.guest, deque(maxlen=KEEP)).append(report)

    def event(self, guest: str, name: str, facts: Mapping[str, object]) -> None:
        """Take nothing: events are the history's."""

    def forget(self, guest: str) -> None:
        """Drop the figures of a guest whose session is over."""
        self._reports.pop(guest, None)

    def row(self, guest: str, now_ns: int) -> dict[str, Any]:
        """Return the figures of the last epochs; empty when there are none.

        Args:
            guest: The guest.
            now_ns: The realtime clock, nanoseconds.
        """
        reports = self._reports.get(guest)
        if not reports:
            return {}
        last = reports[-1]
        pauses = [report.pause_ns for report in reports]
        span_ns = last.wall_ns - reports[0].wall_ns
        return {
            "epoch": last.epoch,
            "pause_p50_ms": round(percentile(pauses, 50) / 1e6, 2),
            "pause_p99_ms": round(percentile(pauses, 99) / 1e6, 2),
            "acknowledge_p50_ms": round(percentile([each.acknowledge_ns for each in reports], 50) / 1e6, 2),
            "checkpoints_per_s": round((len(reports) - 1) / (span_ns / 1e9), 2) if span_ns > 0 else None,
            "lag_ms": round((now_ns - last.wall_ns + last.acknowledge_ns) / 1e6, 1),
            "held_packets": last.held_packets,
            "transferred_bytes": last.transferred_bytes,
            "counters": dict(last.counters),
            "notice": last.notice,
        }


def percentile(values: Sequence[int], percent: float) -> int:
    """Return the value below which `percent` of `values` lie (nearest rank); `values` is not empty."""
    ordered = sorted(values)
    rank = math.ceil(len(ordered) * percent / 100)
    return ordered[max(0, rank - 1)]
