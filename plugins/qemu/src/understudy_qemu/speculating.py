"""A disk of the copy that its subkind changes under it from checkpoint to checkpoint.

QEMU's copy runs from every checkpoint on and cannot be kept from it: vm_start is unconditional there. So what it reads
must be the disk of its checkpoint. Where QEMU replicates the disk itself, its replication driver sees to that; any
other subkind names a block device (`ProtectedDevice.copy_path`), has the copy stopped when it puts another content
there, and counts what the copy wrote meanwhile.

::

    quorum disk0 <- disk0-image (raw) <- disk0-copy (the subkind's device)     until the guest has settled
    quorum disk0 <- disk0-image (raw) <- disk0-file (the guest file's path)    as any guest

Source: QEMU migration/colo.c, colo_incoming_process_checkpoint; block.c, bdrv_reopen_multiple.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from understudy.errors import HypervisorError
from understudy.services import Monitor
from understudy_qemu.events import Stage, Timeline
from understudy_qemu.guestfile import Disk, QemuConfig
from understudy_qemu.machine import file_node, quorum_node
from understudy_qemu.monitor import CommandRefused
from understudy_qemu.running import Qemu

__all__ = ["CopyDrive", "QemuSpeculation", "settle_disk"]

_STOP_S: Final = 8.0  # it waits for the writes that the copy has under way
_LOOK_S: Final = 5.0
_SETTLE_S: Final = 10.0
_CHANGES: Final = (
    "wr_operations",
    "failed_wr_operations",
    "unmap_operations",
    "failed_unmap_operations",
    "zone_append_operations",
    "failed_zone_append_operations",
)


@dataclass(frozen=True, slots=True)
class CopyDrive:
    """A disk of the copy that is what its subkind says.

    Args:
        disk: As this host's guest file has it.
        path: The subkind's block device.

    Raises:
        HypervisorError: The guest file says that the disk is no raw one.
    """

    disk: Disk
    path: Path

    def __post_init__(self) -> None:
        if self.disk.format != "raw":
            raise HypervisorError(
                f'{self.disk.name}: its subkind {self.disk.subkind} serves raw disks; say format = "raw"'
            )

    @property
    def top_node(self) -> str:
        """Name of the quorum."""
        return self.disk.name

    def blockdevs(self) -> Sequence[Mapping[str, Any]]:
        """Return the device's node, which goes past the page cache, the image's, and the quorum."""
        name = self.disk.name
        # What the page cache holds of a device would outlive a change of what the device is.
        device = file_node(self.path, copy_node(name), cache="none")
        return (device, image_node(name, copy_node(name)), quorum_node(name, f"{name}-image"))


def copy_node(disk: str) -> str:
    """Return the name of the node of a disk's subkind's device."""
    return f"{disk}-copy"


def image_node(disk: str, below: str) -> dict[str, Any]:
    """Return the options of the image node of a raw disk above the node `below`."""
    return {"driver": "raw", "node-name": f"{disk}-image", "file": below}


class QemuSpeculation:
    """What disks are told of the copy; `understudy.services.Speculation`.

    Args:
        config: The guest.
        timeline: The copy's events.
    """

    def __init__(self, config: QemuConfig, timeline: Timeline) -> None:
        self._config = config
        self._timeline = timeline
        #: The copy's QEMU, once it is launched.
        self.qemu: Qemu | None = None

    @property
    def loaded(self) -> int:
        """How many whole checkpoints the copy has loaded."""
        return self._timeline.follower.loaded

    async def park(self) -> None:
        """Stop the copy; see `understudy.services.Speculation.park`.

        QEMU takes the next checkpoint into a copy that stands still as into one that runs. What the copy has loaded
        before it stopped is counted when this returns: QEMU told of it before it answered.

        Raises:
            HypervisorError: It does not stop, or does not answer.
        """
        follower = self._timeline.follower
        if follower.stage is Stage.COPYING:
            return  # it waits for its memory and does not run; QEMU would only note that it is not to start
        await self._monitor.execute("stop", timeout_s=_STOP_S)
        await self._timeline.until(lambda: not follower.running or None, timeout_s=_STOP_S, what="STOP")

    async def writes(self, device: str) -> int:
        """Return how often the copy has changed a disk; see `understudy.services.Speculation.writes`.

        Raises:
            HypervisorError: QEMU does not tell.
        """
        for entry in await self._monitor.execute("query-blockstats", timeout_s=_LOOK_S):
            if f"dev-{device}" in str(entry.get("qdev", "")).split("/"):
                stats = entry["stats"]
                return sum(int(stats.get(name, 0)) for name in _CHANGES)
        raise HypervisorError(f"QEMU has no statistics of {device}")

    async def settle(self, device: str) -> None:
        """Let the promoted guest have its disk at its guest file's path.

        Raises:
            HypervisorError: It has it where it was.
        """
        if self.qemu is None:
            raise HypervisorError("the copy has not been launched")
        await settle_disk(self.qemu, self._config.disk(device))

    @property
    def _monitor(self) -> Monitor:
        if self.qemu is None:
            raise HypervisorError("the guest's QEMU has not been started yet")
        return self.qemu.monitor


async def settle_disk(qemu: Qemu, disk: Disk) -> bool:
    """Let a promoted guest have a disk at its guest file's path, if it still has it at its subkind's device.

    Args:
        qemu: The guest's QEMU; the guest may run.
        disk: The disk.

    Returns:
        Whether there was anything to do.

    Raises:
        HypervisorError: QEMU refused; the guest has the disk where it was.
    """
    copy, own = copy_node(disk.name), f"{disk.name}-file"

    async def execute(command: str, arguments: Mapping[str, Any]) -> None:
        await qemu.monitor.execute(command, arguments, timeout_s=_SETTLE_S)

    nodes = {n["node-name"] for n in await qemu.monitor.execute("query-named-block-nodes", {"flat": True})}
    if copy not in nodes:
        return False
    # First of all, so that no janitor takes the new node for something that a session left behind.
    qemu.adopt_node(own)
    if own not in nodes:
        await execute("blockdev-add", file_node(disk.path, own, cache=disk.cache))
    try:
        await execute("blockdev-reopen", {"options": [image_node(disk.name, own)]})
    except CommandRefused:
        await execute("blockdev-del", {"node-name": own})
        raise
    await execute("blockdev-del", {"node-name": copy})
    return True
