"""What a hypervisor plugin implements: find guests, copy them, checkpoint them, promote the copy.

The core never touches a guest but through these classes. A `Hypervisor` exists once per agent; a `PrimaryDomain` or
`SecondaryDomain` exists for the length of one session, one on each host. The engine (understudy.engine) calls them
in the order of the session tables; each method says what holds after a failure.

The rules of ownership are the engine's business: a domain neither asks the arbiter nor decides; it does what it is
told, and never more (it must not, for instance, resume a guest or open an outlet by itself).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from understudy.arbiter import Record
    from understudy.device import DeviceInfo, Finding, Gate, Mode, Progress, ReplicationMode
    from understudy.group import DeviceGroup
    from understudy.report import Checkpoint
    from understudy.services import Channels, Services

__all__ = [
    "DomainEvent",
    "DomainEventKind",
    "FoundGuest",
    "GuestConfig",
    "GuestState",
    "HostContext",
    "Hypervisor",
    "Phases",
    "PrimaryDomain",
    "Protection",
    "SecondaryDomain",
]


class GuestState(Enum):
    """What a host can see of one guest."""

    ABSENT = "absent"  #: no process, no domain
    RUNNING = "running"
    PAUSED = "paused"  #: exists, stopped
    INCOMING = "incoming"  #: a copy that waits for or receives checkpoints
    SHUTOFF = "shutoff"  #: the guest has shut down; the hypervisor preserved it
    SILENT = "silent"  #: exists, but its monitor does not answer


@dataclass(frozen=True, slots=True)
class HostContext:
    """What a hypervisor may use of this host, for every guest."""

    host: str  #: this host's name in the configuration
    address: str  #: numeric address of this host on the link
    state_directory: Path  #: ``/var/lib/understudy``: survives a reboot
    runtime_directory: Path  #: ``/run/understudy``: sockets; does not survive
    overlay_directory: Path  #: where write overlays of copies go
    bwlimit_bytes_per_s: int = 0  #: for initial copies, 0 = none


@dataclass(frozen=True, slots=True)
class Protection:
    """The ``[protection]`` table of a guest file, parsed by the core."""

    mode: Mode
    peer: str = ""  #: host name of the secondary; empty: the only peer configured
    interval: str = "fixed"  #: name of the interval policy (remus)
    interval_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    subkind_options: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    prefer_primary: bool = False
    overwrite_secondary: bool = False  #: the secondary's images may be overwritten whatever they hold
    allow_unsafe: bool = False  #: unsafe findings of the preflight are warnings (`understudy.device.Finding`)


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """A guest as its file describes it, with this host's overrides applied. Plugins subclass it."""

    name: str
    hypervisor: str
    source: Path  #: the file it came from
    protection: Protection
    devices: tuple[DeviceInfo, ...]


@dataclass(frozen=True, slots=True)
class FoundGuest:
    """A guest that runs on this host, whoever started it."""

    name: str
    state: GuestState
    ours: bool  #: started by Understudy
    obstacle: str = ""  #: why it cannot be protected, one sentence; empty if it can
    remedy: str = ""  #: what would change that


class DomainEventKind(Enum):
    """What may happen to a domain without being asked for."""

    STREAM_LOST = "stream-lost"  #: the checkpoint stream broke; nothing more will be acknowledged
    SHUTDOWN = "shutdown"  #: the guest shut itself down; it is preserved, stopped
    RESET = "reset"  #: the guest rebooted; it runs on
    PANIC = "panic"  #: the guest reported a crash; it is preserved
    GONE = "gone"  #: the hypervisor's process is dead or silent
    CHECKPOINT = "checkpoint"  #: secondary only: one more whole checkpoint is loaded


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """One event of a domain."""

    kind: DomainEventKind
    detail: str = ""
    count: int = 0  #: for `CHECKPOINT`: how many checkpoints are loaded since the stream began


class Phases(Protocol):
    """What a domain calls at its gates while it makes a checkpoint; each call asks both hosts' devices."""

    async def postsuspend(self, epoch: int) -> None:
        """Run every device's postsuspend; the guest must be stopped."""

    async def checkpoint(self, epoch: int) -> None:
        """Run every device's checkpoint step; the secondary holds the whole checkpoint."""

    async def preresume(self, epoch: int) -> None:
        """Run every device's preresume; the guest must still be stopped."""

    async def postresume(self, epoch: int) -> None:
        """Run every device's postresume; the guest runs."""


class PrimaryDomain(ABC):
    """The running guest during one session, on the primary's host.

    The order: `replicate` once → `checkpoint` for each epoch → `sever` → one of `resume_alone` (go on without the
    secondary), `freeze` then `discard` (the other side goes on), `discard`. `close` at the end in any case.
    """

    @property
    @abstractmethod
    def gates(self) -> frozenset[Gate]:
        """The phases of a checkpoint at which the guest really waits for the devices."""

    @property
    @abstractmethod
    def services(self) -> Services:
        """The services offered to device subkinds."""

    @property
    def paced(self) -> bool:
        """Whether the engine decides when a checkpoint is taken (remus) or the hypervisor does (colo)."""
        return True

    @abstractmethod
    async def replicate(self, group: DeviceGroup, channels: Channels, progress: Progress) -> None:
        """Copy the memory and begin the checkpoint stream; runs ``group.start_all(PRIMARY)`` while stopped.

        The devices are open on both hosts and their initial copies are done; the copy of the guest waits on the
        other host. The guest is stopped for as short as the hypervisor allows.

        Raises:
            NotReplicating: The copy ended as a plain migration.
            HypervisorError: Any other failure.

        Guarantees:
            Afterwards the guest runs, its output held by the devices, and the next `checkpoint` may be asked for.
            After a failure or cancellation the guest is running here again, confirmed, with its own disks; what the
            devices did is left for ``group.stop_all`` and teardown.
        """

    @abstractmethod
    async def checkpoint(self, epoch: int, phases: Phases) -> Checkpoint:
        """Make, or in a mode that is not `paced` wait for, the next checkpoint and its acknowledgement.

        Args:
            epoch: Number of the epoch that this checkpoint ends.
            phases: Called at this hypervisor's gates while the guest is stopped.

        Raises:
            HypervisorError: The stream is broken or the deadline passed; nothing was acknowledged.

        Guarantees:
            A return means that the secondary holds the whole checkpoint and can run from it without this host.
        """

    async def hurry(self) -> None:  # noqa: B027 - where the engine paces, there is nothing to hurry
        """Ask for a checkpoint as soon as possible in a mode that is not `paced`."""

    @abstractmethod
    async def sever(self, reason: str) -> None:
        """Cut the checkpoint stream at once, out of band; works when the peer or the main monitor hangs.

        Guarantees:
            Afterwards nothing more is acknowledged, and the guest's disk writes do not wait for the peer. The
            guest's output stays held.
        """

    @abstractmethod
    async def resume_alone(self, group: DeviceGroup) -> None:
        """Go on without the secondary: leave replication (``group.stop_all(failover=True)`` included) and run.

        Called only after this host won the record's swap to ``alone``, perhaps after `freeze`: a standby that could
        not promote gives the guest back. Output is still held; the engine opens the gate afterwards by
        ``group.teardown(KEEP)``.

        Raises:
            ExceptionGroup: Devices could not be stopped; the guest runs all the same.
            HypervisorError: The guest does not run; it is asked again.
        """

    @abstractmethod
    async def freeze(self) -> None:
        """Stop the guest and keep it stopped, its output held: it is fenced."""

    async def retire(self) -> None:
        """Leave replication with a guest that has shut itself down; what its gates hold is to leave next.

        Called only after this host won the record's swap to ``alone``. The default discards it. A hypervisor that can
        keep a dead guest's interfaces keeps them, so that they are a way for what the gates hold; the guest is killed
        when its record says ``stopped``.
        """
        await self.discard()

    @abstractmethod
    async def discard(self) -> None:
        """Bring the interfaces down and off their bridges, then kill the guest and see it dead; in this order."""

    @abstractmethod
    def watch(self) -> AsyncIterator[DomainEvent]:
        """Yield what happens unasked, until `close`."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of this session's handles; the guest stays as it is. Idempotent."""


class SecondaryDomain(ABC):
    """The copy of the guest during one session, on the secondary's host.

    The order: `launch` → `receive` → (checkpoints arrive; `watch` tells) → `sever` → `promote` and `open_outlet`, or
    `discard`. Its interfaces have no way out until `open_outlet`.
    """

    @property
    @abstractmethod
    def services(self) -> Services:
        """The services offered to device subkinds; those of the copy itself work only after `launch`."""

    @abstractmethod
    async def launch(self, group: DeviceGroup) -> None:
        """Make the copy's domain, same machine as the primary's, from what the opened devices prepared.

        Guarantees:
            Afterwards it waits for its memory, and none of its interfaces has a way out. After a failure nothing
            of it is left.
        """

    @abstractmethod
    async def receive(self, channels: Channels, group: DeviceGroup) -> None:
        """Accept the stream and return when the initial copy is loaded; runs ``group.start_all(SECONDARY)``."""

    @abstractmethod
    async def sever(self, reason: str) -> int:
        """Make further acknowledgements impossible: cut the stream before any monitor command, wait for its end.

        Returns:
            How many whole checkpoints this copy has loaded since the stream began: with the stream cut this number
            is final, and it says which checkpoint the copy holds. 0: none, the copy must not be promoted.
        """

    @abstractmethod
    async def promote(self, group: DeviceGroup, won: Record) -> None:
        """Turn the copy into the guest, with memory and disks of one checkpoint; no outlet yet.

        Runs ``group.stop_all(failover=True)``.

        Args:
            group: The opened devices of this side.
            won: The record of state ``promoting`` that this host's swap won: the proof that it may.

        Guarantees:
            Afterwards the guest is ready, its memory and disks at one checkpoint.
        """

    @abstractmethod
    async def open_outlet(self, won: Record) -> None:
        """Connect the guest's interfaces, announce its addresses, let it run.

        Args:
            won: The record of state ``alone`` with this host as owner.
        """

    @abstractmethod
    async def discard(self) -> None:
        """Kill the copy and see it dead. Idempotent; also right when `launch` failed half-way."""

    @abstractmethod
    def watch(self) -> AsyncIterator[DomainEvent]:
        """Yield what happens unasked, until `close`."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of this session's handles; the domain stays as it is. Idempotent."""


class Hypervisor(ABC):
    """One hypervisor on one host.

    Args:
        here: What it may use of this host.
    """

    name: ClassVar[str]

    def __init__(self, here: HostContext) -> None:
        self.here = here

    @property
    @abstractmethod
    def modes(self) -> Mapping[Mode, frozenset[Gate]]:
        """The modes it can protect in, with the gates it has in each."""

    @abstractmethod
    def parse(
        self, table: Mapping[str, Any], *, name: str, source: Path, protection: Protection
    ) -> GuestConfig:
        """Turn the hypervisor's part of a guest file into a configuration.

        Args:
            table: The file without the keys that the core owns, overrides of this host applied.
            name: The guest's name.
            source: The file.
            protection: The parsed ``[protection]`` table.

        Raises:
            ConfigError: A key is unknown or wrong: file, key, allowed values.
        """

    async def devices(self, config: GuestConfig) -> Sequence[DeviceInfo]:
        """Return the guest's devices as they are on this host now; no side effects.

        A hypervisor that learns something of them only while the domain runs (the name of an interface that is made
        with it) adds it here; the guest need not run on this host.

        Returns:
            Those of `config`, in its order and each with its name, kind and subkind; only their properties may differ.
        """
        return config.devices

    @abstractmethod
    async def facts(self, config: GuestConfig) -> Mapping[str, Any]:
        """Return what the other host's preflight must know, JSON-able: versions, sizes, features. No side effects."""

    @abstractmethod
    async def probe(
        self, config: GuestConfig, *, side: ReplicationMode, mode: Mode, peer_facts: Mapping[str, Any]
    ) -> Sequence[Finding]:
        """Answer the preflight for this host and side, all findings at once. No side effects."""

    @abstractmethod
    def probe_services(self, config: GuestConfig) -> Services:
        """Return the services that subkinds may use while they probe; calls through them must not change anything."""

    @abstractmethod
    async def found(self) -> Sequence[FoundGuest]:
        """List the guests of this hypervisor that run on this host, whoever started them."""

    @abstractmethod
    async def state(self, config: GuestConfig) -> GuestState:
        """Tell what this host can see of the guest."""

    @abstractmethod
    async def start(self, config: GuestConfig, record: Record) -> None:
        """Start the guest here, unprotected, output open.

        Args:
            config: The guest.
            record: The record of state ``alone`` with this host as owner; its generation is written to the images.
        """

    @abstractmethod
    async def stop(self, config: GuestConfig, *, force: bool, timeout_s: float) -> None:
        """Shut the guest down (`force`: kill it) and see it gone.

        Args:
            config: The guest.
            force: Kill it, also when it does not answer.
            timeout_s: How long it may take to shut itself down, seconds.

        Raises:
            MonitorSilent: It does not answer, so that it cannot be asked; told at once, not after `timeout_s`.
            HypervisorError: It has not shut down in time, or could not be killed; the text says how it stands.

        Guarantees:
            After a failure or cancellation the guest runs on, unless it shuts down later by itself.
        """

    @abstractmethod
    async def primary(self, config: GuestConfig) -> PrimaryDomain:
        """Open the running guest for a session.

        Raises:
            GuestNotFound: It does not run here.
            HypervisorError: It cannot be protected, in words.
        """

    @abstractmethod
    async def secondary(self, config: GuestConfig, peer_facts: Mapping[str, Any]) -> SecondaryDomain:
        """Make ready to hold a copy; nothing is created before `SecondaryDomain.launch`."""

    @abstractmethod
    async def sweep(self, config: GuestConfig, record: Record | None) -> Sequence[str]:
        """Clean what a dead agent left of this guest on this host (the janitor).

        Args:
            config: The guest.
            record: The guest's record, ``None`` if there is none. A gate is never removed above a guest that runs
                without ``alone``; a guest that runs here against the record is discarded, in the order of
                `PrimaryDomain.discard`.

        Returns:
            What was done, one sentence each; empty if nothing was left.
        """
