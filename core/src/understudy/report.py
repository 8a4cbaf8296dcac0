"""What is measured: one frozen report per epoch, handed to observers after commit, off the pause path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from understudy.device import Mode

__all__ = ["Checkpoint", "EpochReport", "Observer"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint that the secondary has acknowledged, as the hypervisor saw it.

    The three times are nanoseconds of one clock of the primary's host, monotonic or realtime.
    """

    epoch: int
    stopped_ns: int  #: when the guest was stopped
    resumed_ns: int  #: when it ran again
    acknowledged_ns: int  #: when the acknowledgement was seen
    gated: bool  #: output was held (mode colo: compared) from before its stop; else nothing may leave
    transferred_bytes: int = 0  #: memory and device state sent, 0 if the hypervisor does not tell
    dirty_pages: int = 0  #: 4 KiB pages sent, 0 if the hypervisor does not tell
    parts_ns: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  #: pause by part


@dataclass(frozen=True, slots=True)
class EpochReport:
    """Everything known of one finished epoch."""

    guest: str
    session: str
    mode: Mode
    epoch: int
    wall_ns: int  #: realtime clock at commit, for people
    length_ns: int  #: from the previous resume to this stop: how long the guest ran
    pause_ns: int  #: from stop to resume
    acknowledge_ns: int  #: from stop to acknowledgement: what was held waited at least this long
    commit_ns: int  #: how long the commit phase took
    transferred_bytes: int
    dirty_pages: int
    held_packets: int  #: output packets held at commit, 0 where the subkind does not tell
    held_bytes: int
    phases_ns: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    counters: Mapping[str, int | float] = field(
        default_factory=lambda: MappingProxyType({})
    )  #: ``nic0.mismatches`` …
    notice: str = ""  #: which of its bounds the interval policy cannot keep, in words


class Observer:
    """Somebody who is told of every epoch and event; failures are logged with its name and never matter."""

    __slots__ = ()

    def epoch(self, report: EpochReport) -> None:
        """Take the report of a committed epoch; called off the pause path."""

    def event(self, guest: str, name: str, facts: Mapping[str, object]) -> None:
        """Take an event of a session: a change of state, a suspicion, a takeover; `facts` is JSON-able."""
