"""Services that a hypervisor offers to device subkinds, as small Protocols.

A plugin never imports another plugin: a NIC subkind that needs QEMU's monitor asks its context for `MONITOR` and
gets whatever the hypervisor put there. A service that is not offered is a clear error, and a reason to decline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from understudy.errors import StateError

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager

__all__ = [
    "CHANNELS",
    "GUEST_PAUSE",
    "MONITOR",
    "PACE",
    "SPECULATION",
    "Channels",
    "GuestPause",
    "Monitor",
    "MonitorEvent",
    "Pace",
    "ServiceKey",
    "Services",
    "Speculation",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServiceKey(Generic[T]):
    """The typed name under which a service is offered."""

    name: str


class Services:
    """The services offered in one context.

    Args:
        offered: Pairs of key and service.
    """

    __slots__ = ("_offered",)

    def __init__(self, *offered: tuple[ServiceKey[Any], object]) -> None:
        self._offered = dict(offered)

    def get(self, key: ServiceKey[T]) -> T:
        """Return the service offered under `key`.

        Raises:
            StateError: Nobody offers it here.
        """
        try:
            return cast("T", self._offered[key])
        except KeyError:
            known = ", ".join(sorted(k.name for k in self._offered)) or "none"
            message = f"the service {key.name!r} is not offered by this hypervisor (offered: {known})"
            raise StateError(message) from None

    def has(self, key: ServiceKey[Any]) -> bool:
        """Tell whether a service is offered under `key`."""
        return key in self._offered

    def plus(self, *offered: tuple[ServiceKey[Any], object]) -> Services:
        """Return these services and `offered`, which go before services of the same key."""
        both = Services()
        both._offered = self._offered | dict(offered)
        return both


@dataclass(frozen=True, slots=True)
class MonitorEvent:
    """One event of a QMP monitor."""

    name: str  #: e.g. ``"RESUME"``
    data: Mapping[str, Any]
    host_ns: int  #: when it happened by the host's realtime clock, nanoseconds


class Monitor(Protocol):
    """A QMP monitor of the guest's QEMU process; every call has a deadline."""

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """Run one QMP command and return its result.

        Args:
            command: QMP name, e.g. ``"object-add"``.
            arguments: Its arguments; keys with ``-`` as in QMP.
            timeout_s: Deadline in seconds, ``None`` for the monitor's default.

        Raises:
            HypervisorError: QEMU refused; its words are in the text.
            MonitorSilent: No answer before the deadline; the monitor must be taken for dead.
        """

    async def supports(self, command: str, *members: str) -> bool:
        """Tell by ``query-qmp-schema`` whether `command` exists and takes all of `members` (dotted paths)."""

    async def give_fd(self, name: str, fd: int) -> None:
        """Hand the file descriptor `fd` to QEMU under `name` (``getfd``); the caller keeps its own copy."""

    def events(self, *names: str) -> AbstractAsyncContextManager[AsyncIterator[MonitorEvent]]:
        """Subscribe to the events `names` (all if none) from the moment the context is entered."""


class Pace(Protocol):
    """When the next checkpoint begins; offered by the engine on the primary where it is the one who decides."""

    def hurry(self) -> None:
        """Have the next checkpoint begin at once instead of at its time; returns immediately, may be called often.

        For a device that cannot hold the guest's output much longer. Asked for while a checkpoint is under way, it is
        the next one that begins without delay.
        """


class GuestPause(Protocol):
    """Stops the guest between two checkpoints.

    Offered by hypervisors that let the guest run on before its checkpoint is acknowledged. Where the guest waits for
    the acknowledgement anyway (QEMU), a hurried checkpoint stops it as soon.
    """

    async def pause(self) -> None:
        """Stop the guest; it may be stopped already."""

    async def proceed(self) -> None:
        """Let it run again, unless something else keeps it stopped."""


class Speculation(Protocol):
    """The copy of a guest that runs from each checkpoint on, although nobody has promoted it.

    Offered on the secondary by hypervisors that cannot keep their copy from it (QEMU). Such a copy reads and writes its
    disks, and what it reads must be the disk of the checkpoint that its memory holds. A disk that is to be changed
    under it offers a device for that (`understudy.device.ProtectedDevice.copy_path`).
    """

    @property
    def loaded(self) -> int:
        """How many whole checkpoints the copy has loaded; exact after `park`, final once its stream is cut."""

    async def park(self) -> None:
        """Stop the copy until it has loaded the next checkpoint, or is promoted.

        Raises:
            HypervisorError: It does not stop, or does not answer.

        Guarantees:
            Afterwards it writes nothing, and everything that it wrote has ended. It may be stopped already.
        """

    async def writes(self, device: str) -> int:
        """Return how often the copy has changed a disk since it was launched, counting what failed.

        Args:
            device: Name of the disk, e.g. ``"disk0"``.

        Raises:
            HypervisorError: It cannot be told.
        """

    async def settle(self, device: str) -> None:
        """Let the promoted guest have its disk where its guest file says, not at `copy_path` any more.

        The guest may run. Both must be the same disk.

        Args:
            device: Name of the disk.

        Raises:
            HypervisorError: It has it where it was.
        """


class Channels(Protocol):
    """Plain byte streams between the two hosts, made by the agents; TCP_NODELAY is set on both ends."""

    async def connect(self, name: str, *, timeout_s: float) -> socket.socket:
        """Return a connected, blocking-mode socket to the other host's `accept` of the same `name`."""

    async def accept(self, name: str, *, timeout_s: float) -> socket.socket:
        """Return the socket of the other host's `connect` of the same `name`."""


MONITOR: ServiceKey[Monitor] = ServiceKey("monitor")
CHANNELS: ServiceKey[Channels] = ServiceKey("channels")
PACE: ServiceKey[Pace] = ServiceKey("pace")
GUEST_PAUSE: ServiceKey[GuestPause] = ServiceKey("guest-pause")
SPECULATION: ServiceKey[Speculation] = ServiceKey("speculation")
