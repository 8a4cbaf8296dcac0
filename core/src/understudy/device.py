"""Devices under protection, and what a plugin implements to protect one.

A *subkind* is one way to protect a kind of device (libxl's word). Plugins offer frozen `Subkind` descriptors; for
every device of a guest the core asks the fitting subkinds in turn and keeps the `ProtectedDevice` that the first
one returns. From then on its phases are bound methods; a phase that a class leaves alone costs nothing.

Source: the steps are libxl's checkpoint device layer (tools/libs/light/libxl_checkpoint_device.c) joined with
QEMU's replication driver (include/block/replication.h); docs/explanation/architecture.md has the table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from understudy.services import Services

__all__ = [
    "Decline",
    "DeviceInfo",
    "Finding",
    "Gate",
    "Kind",
    "Mode",
    "OpenContext",
    "Peer",
    "ProbeContext",
    "Progress",
    "ProtectedDevice",
    "ReplicationMode",
    "Severity",
    "Subkind",
    "SweepContext",
    "Verdict",
    "no_progress",
]

Json = Mapping[str, Any]


class Kind(Enum):
    """What a device is."""

    DISK = "disk"  #: a block device of the guest
    NIC = "nic"  #: a network interface of the guest


class Mode(Enum):
    """How a guest is protected."""

    REMUS = "remus"  #: periodic checkpoints, output held until acknowledged
    COLO = "colo"  #: both copies run, output is compared, checkpoint on divergence


class ReplicationMode(Enum):
    """Which of the two a host is in a session. Source: QAPI's ReplicationMode."""

    PRIMARY = "primary"  #: runs the guest
    SECONDARY = "secondary"  #: holds the copy


class Verdict(Enum):
    """What becomes of output that is still held when a device is torn down."""

    KEEP = "keep"  #: the record says ``alone`` and we are the owner: what is held may leave
    DISCARD = "discard"  #: the other side goes on, or may: what is held must never leave


class Gate(Enum):
    """A point of the cycle at which the guest really waits for the devices."""

    POSTSUSPEND = "postsuspend"  #: the guest stays stopped until every postsuspend has finished
    CHECKPOINT = "checkpoint"  #: the guest stays stopped until the secondary's checkpoint step has finished
    PRERESUME = "preresume"  #: the guest stays stopped until every preresume has finished


class Severity(Enum):
    """How much a finding of the preflight weighs."""

    ERROR = "error"  #: the guest cannot be protected
    WARNING = "warning"  #: it can, with a weakness that is named
    NOTE = "note"  #: worth knowing


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer of the preflight: what was found and what to do about it."""

    severity: Severity
    subject: str  #: what it is about, e.g. ``"disk0 on beta"``
    problem: str  #: one sentence
    remedy: str = ""  #: what the operator can do; empty for notes
    #: An ERROR that an operator may take upon himself with ``--allow-unsafe``: then it is a WARNING.
    unsafe: bool = False

    def __str__(self) -> str:
        tail = f" To do: {self.remedy}" if self.remedy else ""
        return f"{self.severity.value}: {self.subject}: {self.problem}{tail}"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device of a guest as its hypervisor describes it, the same name on both hosts."""

    kind: Kind
    name: str  #: unique in the guest and equal on both hosts, e.g. ``"disk0"``
    index: int  #: position among the devices of its kind, from 0
    hypervisor: str  #: name of the hypervisor that has it, e.g. ``"qemu"``
    subkind: str = "auto"  #: the subkind the operator asked for, or ``"auto"``
    properties: Json = field(default_factory=lambda: MappingProxyType({}))  #: the hypervisor's facts


class Peer(Protocol):
    """The way from one half of a device to its other half on the other host."""

    async def request(self, method: str, params: Json, *, timeout_s: float) -> Json:
        """Ask the other half's `ProtectedDevice.serve` and return its answer.

        Args:
            method: A word the two halves agree on.
            params: JSON-able arguments.
            timeout_s: How long to wait for the answer, seconds.

        Raises:
            LinkLost: The connection is gone or the answer did not come in time.
            PeerError: The other half raised; its text is in the error.
        """


class Progress(Protocol):
    """Where long steps tell how far they are."""

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Tell that `done_bytes` of `total_bytes` of `what` are copied; cheap, may be called often."""


def no_progress(what: str, done_bytes: int, total_bytes: int) -> None:
    """Ignore progress; the default where nobody watches."""


@dataclass(frozen=True, slots=True)
class ProbeContext:
    """What a subkind's `probe` may look at. Probing changes nothing on any host."""

    guest: str
    device: DeviceInfo
    side: ReplicationMode
    mode: Mode
    options: Any  #: an instance of the subkind's `options` class, or ``None``
    services: Services
    directory: Path  #: where this guest's overlays and other files would be put on this host
    peer_facts: Json = field(default_factory=lambda: MappingProxyType({}))  #: the other host's facts


@dataclass(frozen=True, slots=True)
class OpenContext:
    """What a subkind's `open` gets: the device, its side, its other half and the offered services."""

    guest: str
    device: DeviceInfo
    side: ReplicationMode
    mode: Mode
    session: str  #: id of the session, equal on both hosts
    options: Any  #: an instance of the subkind's `options` class, or ``None``
    services: Services
    peer: Peer
    directory: Path  #: this guest's directory on this host; exists
    local_address: str  #: numeric address of this host on the link
    peer_address: str  #: numeric address of the other host on the link
    progress: Progress = no_progress
    bwlimit_bytes_per_s: int = 0  #: upper bound for initial copies, 0 = none


@dataclass(frozen=True, slots=True)
class SweepContext:
    """What a subkind's `sweep` gets: the guest that a dead agent left, and what may become of its output."""

    guest: str
    devices: Sequence[DeviceInfo]  #: all devices of the guest, of any kind
    verdict: Verdict  #: whether output that is still held may leave


class ProtectedDevice:
    """One device under protection, on one side. A phase left alone costs nothing.

    The order of calls: `open` of the subkind → `start` → for every epoch (`postsuspend` → `checkpoint` →
    `preresume` → `postresume` → `error` → `commit`) → `stop` → `teardown`. Devices of a guest take each step
    concurrently and may assume nothing of each other. Every step has a deadline; at the deadline, and when the
    session ends, it is cancelled, and must end then (it may finish an action that must not stay half-done).

    On the secondary, `open` runs before the copy of the guest exists, so that the device can prepare what it will
    be made of; the copy is running, or waiting for its first checkpoint, when `start` is called.
    """

    __slots__ = ()

    @property
    def copy_path(self) -> Path | None:
        """Block device that is to be the copy's disk on the secondary, ``None`` where that is not for it to say.

        Asked when the copy is launched; a hypervisor that offers `understudy.services.SPECULATION` heeds it.
        """
        return None

    async def start(self, side: ReplicationMode) -> None:
        """Begin to replicate; the guest is stopped on the primary. Source: replication_start_all."""

    async def postsuspend(self, epoch: int) -> None:
        """End epoch `epoch`: the guest is stopped and has sent its last output of it."""

    async def checkpoint(self, epoch: int) -> None:
        """Take in checkpoint `epoch`, which this side now holds whole. Source: replication_do_checkpoint_all."""

    async def preresume(self, epoch: int) -> None:
        """Finish what must be done before the primary's guest runs again (primary only)."""

    async def postresume(self, epoch: int) -> None:
        """Do what may be done as soon as the guest runs again."""

    async def error(self) -> None:
        """Raise if anything was lost or failed since the last call. Always asked before a commit.

        Raises:
            Exception: What went wrong; it voids the acknowledgement of this epoch.
        """

    async def commit(self, epoch: int) -> None:
        """Let epoch `epoch` out: the secondary has acknowledged that it holds all of it."""

    def sever(self) -> None:
        """Cut this device's connections to the other host at once, without waiting: the other side is given up.

        Called first of all when a session ends, before the stream is cut, by either side; more than once is harmless.
        What the other host says afterwards must not count, and nothing here may wait for it any more. Held output
        stays held. A device whose other half acknowledges nothing has nothing to do.
        """

    async def stop(self, *, failover: bool) -> None:
        """End replication. Source: replication_stop_all.

        Args:
            failover: True when this side goes on without the other; the guest may be running then. False for a
                planned end, with the guest stopped.
        """

    async def teardown(self, verdict: Verdict) -> None:
        """Remove everything that `open` and later steps made on this host.

        Called once for every device that was opened, whatever failed since, and harmless when repeated. It must not
        need the other half: that host may be dead.

        Args:
            verdict: Whether output that is still held may leave.

        Guarantees:
            Afterwards, also on failure, nothing of the device holds or passes output against the verdict.
        """

    async def serve(self, method: str, params: Json) -> Json:
        """Answer a request of the other half (`Peer.request`)."""
        message = f"{type(self).__name__} answers no requests, got {method!r}"
        raise NotImplementedError(message)

    def counters(self) -> Mapping[str, int | float]:
        """Return numbers for the epoch's report, names with units, e.g. ``{"held_packets": 12}``."""
        return {}


@dataclass(frozen=True, slots=True)
class Decline:
    """The answer of an `open` or `probe` that the device is not this subkind's business."""

    reason: str  #: completes the sentence "it was not claimed because …"


async def _claims(context: ProbeContext) -> Sequence[Finding] | Decline:  # noqa: ARG001 - the signature is the contract
    return ()


@dataclass(frozen=True, slots=True)
class Subkind:
    """One way to protect one kind of device.

    `open` returns the device object (mine), a `Decline` or ``None`` (not mine: the next subkind is asked), or
    raises (mine and broken: the search stops). An `open` that raises or is cancelled has removed what it made: nobody
    else knows of it. `probe` answers the same question for the preflight without any
    side effect: findings (mine, and what is wrong or worth knowing), or a `Decline`.

    `sweep` is the janitor: it removes what devices of this subkind left on this host when their agent died, and returns
    a sentence for each thing done. It is called only once a verdict stands: KEEP when the record says ``alone`` and
    this host is the owner, DISCARD when the guest does not live here. Above a guest that runs undecided nothing is
    swept. It must find its traces by itself, must be harmless when there are none, and is repeated when it raises.
    """

    name: str  #: shown in logs and errors, e.g. ``"drbd"``
    kind: Kind
    modes: frozenset[Mode]
    open: Callable[[OpenContext], Awaitable[ProtectedDevice | Decline | None]]
    probe: Callable[[ProbeContext], Awaitable[Sequence[Finding] | Decline]] = _claims
    priority: int = 50  #: lower is asked first; ties by name
    options: type | None = None  #: frozen dataclass with units in its field names and defaults for all fields
    needs: frozenset[Gate] = frozenset()  #: gates it needs the hypervisor to have in every mode it serves
    hypervisors: frozenset[str] = frozenset()  #: names of hypervisors it works on; empty = any
    sweep: Callable[[SweepContext], Awaitable[Sequence[str]]] | None = (
        None  #: ``None``: it leaves no traces of its own
    )
