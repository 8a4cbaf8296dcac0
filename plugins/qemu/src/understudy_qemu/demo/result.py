"""What a demo has shown: measured values, their JSON and their table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["DemoResult", "Epoch", "Failover", "Mark", "Reply", "Segment", "percentile"]


@dataclass(frozen=True, slots=True)
class Failover:
    """One loss of the primary's host."""

    detection_ms: float | None  #: loss → suspicion
    takeover_ms: float | None  #: suspicion → survivor running, the arbiter's swaps included
    first_reply_ms: float | None  #: loss → first reply that the client got from the survivor
    connection_kept: bool  #: the client's one TCP connection went on
    acknowledged_lost: int  #: words that the client had a reply for and that the survivor's disks lack
    disk_contiguous: bool  #: every disk of the survivor holds an unbroken chain

    @property
    def passed(self) -> bool:
        """Whether the client could not tell, delays aside."""
        return (
            None not in {self.detection_ms, self.takeover_ms, self.first_reply_ms}
            and self.connection_kept
            and self.acknowledged_lost == 0
            and self.disk_contiguous
        )


@dataclass(frozen=True, slots=True)
class Epoch:
    """One committed checkpoint; times are CLOCK_MONOTONIC."""

    t_ns: int  #: of the commit
    host: str  #: the primary's
    number: int
    pause_ns: int
    length_ns: int
    acknowledge_ns: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply that the client got."""

    t_ns: int
    rtt_ns: int
    n: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a moment."""

    t_ns: int
    kind: str  #: ``kill``, ``suspect``, ``running``, ``protected``, ``back`` or ``start``
    host: str
    text: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time during which the guest ran on one host."""

    start_ns: int
    end_ns: int
    host: str
    protected: bool


@dataclass(slots=True)
class DemoResult:
    """Everything that a demo measured."""

    mode: str = "remus"
    hypervisor: str = ""  #: name and version
    disks: int = 1
    nics: int = 1
    failovers: list[Failover] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    client: dict[str, Any] = field(default_factory=dict)  #: the client's own summary
    duration_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether both hosts were lost and the client never noticed."""
        return (
            len(self.failovers) == 2  # noqa: PLR2004 - each of the two hosts once
            and all(failover.passed for failover in self.failovers)
            and not self.problems
            and not self.client.get("bad", 1)
        )

    @property
    def pause_ms(self) -> dict[str, float | None]:
        """How long the guest stood still for a checkpoint, as p50 and p99."""
        pauses = [epoch.pause_ns / 1e6 for epoch in self.epochs]
        return {"p50": percentile(pauses, 50), "p99": percentile(pauses, 99)}

    def to_json(self) -> dict[str, Any]:
        """Return what ``understudy demo --format json`` prints."""
        return {
            "failovers": [asdict(failover) for failover in self.failovers],
            "checkpoints": len(self.epochs),
            "pause_ms": self.pause_ms,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table that ends the demo: a heading, then a row per figure."""
        names = ("first failover", "second failover")[: len(self.failovers)]
        rows: list[tuple[str, ...]] = [("", *names)]
        for label, key in _FIGURES.items():
            rows.append((label, *(_show(asdict(failover)[key]) for failover in self.failovers)))
        return rows


_FIGURES: Mapping[str, str] = {
    "loss → suspicion (ms)": "detection_ms",
    "suspicion → survivor runs (ms)": "takeover_ms",
    "loss → client's next reply (ms)": "first_reply_ms",
    "TCP connection kept": "connection_kept",
    "acknowledged words lost": "acknowledged_lost",
    "disks contiguous": "disk_contiguous",
}


def _show(value: Any) -> str:
    if value is None:
        return "?"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the value below which ``percent`` of ``values`` lie (nearest rank), ``None`` of nothing."""
    if not values:
        return None
    rank = math.ceil(len(values) * percent / 100)
    return round(sorted(values)[max(0, rank - 1)], 3)
