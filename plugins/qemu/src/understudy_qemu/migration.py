"""The checkpoint stream's transport: our socket, handed to QEMU, and the switches of QEMU's migration.

QEMU's own ``tcp:`` sockets leave Nagle's algorithm on, which costs one or two delayed acknowledgements in every
checkpoint. A socket that the agents have connected, with TCP_NODELAY on both ends, is given to each QEMU as a file
descriptor; what we keep is a duplicate, and to shut it down cuts the stream at once, whatever QEMU is doing.

Source: QEMU migration/fd.c, migration/options.c, qapi/migration.json.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from understudy.errors import HypervisorError
from understudy.services import Monitor

__all__ = ["CHANNEL", "URI", "Cable", "Switches"]

_log = logging.getLogger(__name__)

CHANNEL = "migration"  #: name of the stream between the two hosts
FD_NAME = "understudy-migration"
URI = f"fd:{FD_NAME}"

# What a copy for COLO needs. `multifd` writes pages past COLO's cache of the guest's memory, which corrupts the copy
# (seen on QEMU 7.2), and cannot run over a descriptor. With `pause-before-switchover` some versions never enter COLO.
_CAPABILITIES: Mapping[str, bool] = {
    "x-colo": True,
    "events": True,
    "multifd": False,
    "pause-before-switchover": False,
    "postcopy-ram": False,
}
_PARAMETERS = ("x-checkpoint-delay", "max-bandwidth")
_UNLIMITED = 1 << 40  # bytes per second; more than any link


class Cable:
    """Our end of the migration socket.

    Args:
        sock: A connected stream socket; owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._given: Monitor | None = None
        if sock.family in {socket.AF_INET, socket.AF_INET6}:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def give(self, monitor: Monitor) -> None:
        """Hand the socket to QEMU, to be used as `URI`.

        Raises:
            HypervisorError: QEMU did not take it.
        """
        await monitor.give_fd(FD_NAME, self._sock.fileno())
        self._given = monitor

    def used(self) -> None:
        """Note that QEMU's migration has taken the descriptor."""
        self._given = None

    def cut(self) -> None:
        """Shut the stream down in both directions, for QEMU too; needs no monitor. Idempotent."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Cut the stream and let go of our duplicate; takes back a descriptor that QEMU never used."""
        self.cut()
        self._sock.close()
        monitor, self._given = self._given, None
        if monitor is not None:
            with suppress(HypervisorError):
                await monitor.execute("closefd", {"fdname": FD_NAME})


@dataclass(slots=True)
class Switches:
    """The capabilities and parameters of one QEMU's migration, and what they were before.

    Args:
        monitor: That QEMU's.
    """

    monitor: Monitor
    _capabilities: dict[str, bool]
    _parameters: dict[str, Any]

    @classmethod
    async def set(
        cls, monitor: Monitor, *, checkpoint_delay_ms: int | None = None, bandwidth_bytes_per_s: int = 0
    ) -> Switches:
        """Prepare a QEMU to send or receive checkpoints.

        Args:
            monitor: Its monitor.
            checkpoint_delay_ms: Period of QEMU's own checkpoints, for the sender.
            bandwidth_bytes_per_s: Bound for the initial copy, 0 = none; for the sender.

        Raises:
            HypervisorError: This QEMU has no COLO, or refuses.
        """
        answer = await monitor.execute("query-migrate-capabilities")
        have: dict[str, bool] = {entry["capability"]: entry["state"] for entry in answer}
        if "x-colo" not in have:
            raise HypervisorError("this QEMU was built without COLO; it cannot replicate a guest")
        before = {
            name: have[name] for name, on in _CAPABILITIES.items() if name in have and have[name] is not on
        }
        switches = cls(monitor, before, {})
        await switches._switch({name: _CAPABILITIES[name] for name in before})
        if checkpoint_delay_ms is not None:
            now = await monitor.execute("query-migrate-parameters")
            switches._parameters = {name: now[name] for name in _PARAMETERS if name in now}
            bandwidth = bandwidth_bytes_per_s or _UNLIMITED
            await monitor.execute(
                "migrate-set-parameters",
                {"x-checkpoint-delay": checkpoint_delay_ms, "max-bandwidth": bandwidth},
            )
        return switches

    async def restore(self) -> None:
        """Put everything back as it was; only after the stream has ended.

        Raises:
            HypervisorError: QEMU refuses.
        """
        capabilities, self._capabilities = self._capabilities, {}
        parameters, self._parameters = self._parameters, {}
        await self._switch(capabilities)
        if parameters:
            await self.monitor.execute("migrate-set-parameters", parameters)

    async def _switch(self, wanted: Mapping[str, bool]) -> None:
        if wanted:
            entries = [{"capability": name, "state": state} for name, state in wanted.items()]
            await self.monitor.execute("migrate-set-capabilities", {"capabilities": entries})
