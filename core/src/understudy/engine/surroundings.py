"""What an engine is given: the guest, its hypervisor, the arbiter, the way to the other host, and its limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from understudy.phases import Deadlines

if TYPE_CHECKING:
    from understudy.arbiter import Arbiter
    from understudy.device import Subkind
    from understudy.hypervisor import GuestConfig, Hypervisor
    from understudy.interval import IntervalPolicy
    from understudy.link.port import PeerPort
    from understudy.report import EpochReport
    from understudy.services import Channels
    from understudy.session.machine import Tables

__all__ = ["Limits", "Surroundings", "Telling", "Way"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the engine waits, seconds. What passes its limit has failed, and the tables say what follows."""

    retry_s: float = 0.5  #: before the arbiter is asked again after silence, or read again
    prepare_s: float = 60.0  #: for the other host to launch the copy
    peer_s: float = (
        5.0  #: for one request to the other host within an epoch; the guest may be stopped meanwhile
    )
    stall_s: float = (
        120.0  #: for the first copy, without any progress; a hypervisor that hangs is left after it
    )
    checkpoint_s: float = 30.0  #: for one checkpoint that was asked for; the guest may be stopped meanwhile
    told_s: float = 0.5  #: for the other host's word about its failure, once the stream has ended without one
    cut_s: float = 10.0  #: to cut the checkpoint stream
    end_s: float = 30.0  #: to stop, kill, release or tear down, each
    promote_s: float = 60.0  #: to make memory and disks of the copy agree
    start_s: float = 60.0  #: to start the guest


@dataclass(frozen=True, slots=True)
class Way:
    """The way to the other host for one session."""

    port: PeerPort  #: for the engine's own words
    channels: Channels
    peer_address: str  #: numeric address of the other host on the link


class Telling(Protocol):
    """Who is told what happens; must not block."""

    def epoch(self, report: EpochReport) -> None:
        """Take the report of a committed epoch."""

    def event(self, guest: str, name: str, facts: Mapping[str, Any]) -> None:
        """Take an event of the session."""

    def progress(self, guest: str, what: str, done_bytes: int, total_bytes: int) -> None:
        """Take the progress of an initial copy."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything outside a session that its engine uses."""

    config: GuestConfig
    hypervisor: Hypervisor
    arbiter: Arbiter
    subkinds: Callable[[], Sequence[Subkind]]  #: all that the plugins offer
    interval: Callable[[GuestConfig], IntervalPolicy]  #: makes the policy of a session
    connect: Callable[[str, str], Awaitable[Way]]  #: (other host, session id) → the way to it
    telling: Telling
    tables: Tables
    limits: Limits = field(default_factory=Limits)
    deadlines: Deadlines = field(default_factory=Deadlines)
