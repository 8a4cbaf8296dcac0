"""What DRBD says of a device at this moment: version 8.4 in ``/proc/drbd``, version 9 through ``drbdsetup``.

Source: linux drivers/block/drbd/drbd_proc.c; DRBD 9 drbd-utils user/v9/drbdsetup.c (status, JSON).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from understudy.errors import UnderstudyError

__all__ = ["PROC", "UNCONFIGURED", "State", "read_json", "read_proc", "version_of"]

PROC: Final = Path("/proc/drbd")

_UP_TO_DATE: Final = "UpToDate"
_CONNECTED: Final = "Connected"


@dataclass(frozen=True, slots=True)
class State:
    """The state of one DRBD device with one peer, in DRBD's words."""

    connection: str  #: e.g. ``"Connected"``, ``"WFConnection"``, ``"SyncSource"``; ``"Unconfigured"`` if there is none
    role: str = "Unknown"  #: ``"Primary"`` or ``"Secondary"``
    peer_role: str = "Unknown"
    disk: str = "DUnknown"  #: e.g. ``"UpToDate"``, ``"Diskless"``
    peer_disk: str = "DUnknown"
    protocol: str = ""  #: ``"C"``; empty where DRBD does not tell
    out_of_sync_bytes: int = 0

    @property
    def mirrored(self) -> bool:
        """Whether every write that has ended is on both hosts."""
        return self.connection == _CONNECTED and self.disk == self.peer_disk == _UP_TO_DATE

    def __str__(self) -> str:
        return f"{self.connection} {self.role}/{self.peer_role} {self.disk}/{self.peer_disk}"


UNCONFIGURED: Final = State("Unconfigured")

_LINE: Final = re.compile(
    r"^ *(?P<minor>\d+): cs:(?P<cs>\w+)(?: ro:(?P<ro>\w+)/(?P<pro>\w+) ds:(?P<ds>\w+)/(?P<pds>\w+)"
    r"(?: (?P<proto>[ABCD]) )?)?"  # a blank where there is no connection
)
_OUT_OF_SYNC: Final = re.compile(r"\boos:(\d+)")


def version_of(proc: str) -> tuple[int, ...]:
    """Return the version of the DRBD that is loaded, e.g. ``(8, 4, 11)``.

    Args:
        proc: Text of ``/proc/drbd``.

    Raises:
        UnderstudyError: It is not told there.
    """
    found = re.match(r"version: (\d+(?:\.\d+)*)", proc)
    if found is None:
        raise UnderstudyError(f"{PROC} tells no version: {proc[:80]!r}")
    return tuple(map(int, found[1].split(".")))


def read_proc(text: str, minor: int) -> State:
    """Return the state of a device of DRBD 8.4.

    Args:
        text: Of ``/proc/drbd``.
        minor: The device's minor number.

    Returns:
        The state; ``Unconfigured`` where DRBD does not have the device.
    """
    lines = iter(text.splitlines())
    for line in lines:
        found = _LINE.match(line)
        if found is None or int(found["minor"]) != minor:
            continue
        if found["ro"] is None:
            return State(found["cs"])
        behind = _OUT_OF_SYNC.search(next(lines, ""))
        return State(
            connection=found["cs"],
            role=found["ro"],
            peer_role=found["pro"],
            disk=found["ds"],
            peer_disk=found["pds"],
            protocol=found["proto"] or "",
            out_of_sync_bytes=int(behind[1]) * 1024 if behind else 0,
        )
    return UNCONFIGURED


def read_json(text: str, minor: int) -> State:
    """Return the state of a device of DRBD 9 from what ``drbdsetup status --json`` prints.

    The connection is told in 8.4's words: ``Connected`` where the replication is ``Established``.

    Raises:
        UnderstudyError: The device has several peers, or the text is no such status.
    """
    try:
        return _of_resources(json.loads(text or "[]"), minor)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnderstudyError(f"drbdsetup's status makes no sense ({error!r}): {text[:200]!r}") from error


def _of_resources(resources: list[dict[str, object]], minor: int) -> State:
    for resource in resources:
        devices: list[dict[str, object]] = resource["devices"]  # type: ignore[assignment]
        connections: list[dict[str, object]] = resource.get("connections", [])  # type: ignore[assignment]
        for device in devices:
            if device["minor"] != minor:
                continue
            role, disk = str(resource["role"]), str(device["disk-state"])
            if not connections:
                return State("StandAlone", role=role, disk=disk)
            if len(connections) > 1:
                raise UnderstudyError(
                    f"the DRBD resource {resource['name']} has {len(connections)} peers, not one"
                )
            return _with_peer(connections[0], device["volume"], role, disk)
    return UNCONFIGURED


def _with_peer(connection: dict[str, object], volume: object, role: str, disk: str) -> State:
    state = str(connection["connection-state"])
    peers: list[dict[str, object]] = connection.get("peer_devices", [])  # type: ignore[assignment]
    for peer in peers:
        if peer["volume"] == volume:
            replication = str(peer["replication-state"])
            if state == _CONNECTED and replication != "Established":
                state = replication
            return State(
                connection=state,
                role=role,
                peer_role=str(connection["peer-role"]),
                disk=disk,
                peer_disk=str(peer["peer-disk-state"]),
                out_of_sync_bytes=int(str(peer.get("out-of-sync", 0))) * 1024,
            )
    return State(state, role=role, disk=disk)
