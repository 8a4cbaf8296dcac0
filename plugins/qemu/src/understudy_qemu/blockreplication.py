"""Disk subkind ``block-replication``: QEMU's own replication driver, over NBD, for any number of disks.

The two halves are in blockprimary.py and blocksecondary.py; what the disks of one guest share is in disksession.py.
The driver's start, checkpoint and stop are executed by QEMU inside its COLO transaction, in both modes, so nothing
here asks for them: this subkind builds the graph, watches it and takes it down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from understudy.device import (
    Decline,
    Finding,
    Kind,
    Mode,
    OpenContext,
    ProbeContext,
    ProtectedDevice,
    ReplicationMode,
    Severity,
    Subkind,
)
from understudy_qemu.blockprimary import PrimaryDisk
from understudy_qemu.blocksecondary import SecondaryDisk
from understudy_qemu.disksession import DISKS
from understudy_qemu.guestfile import BLOCK_REPLICATION as NAME
from understudy_qemu.images import is_volatile

__all__ = ["BLOCK_REPLICATION", "NAME", "BlockReplicationOptions"]

_SHORTEST_MS: Final = 5  # below it the guest makes hardly any progress between two checkpoints
_LONGEST_MS: Final = 3_600_000


@dataclass(frozen=True, slots=True)
class BlockReplicationOptions:
    """``[protection.options.block-replication]``."""

    checkpoint_delay_ms: int = 10_000
    """In mode colo, the longest time between two checkpoints, milliseconds; what the overlays hold grows with it."""

    def __post_init__(self) -> None:
        if not _SHORTEST_MS <= self.checkpoint_delay_ms <= _LONGEST_MS:
            raise ValueError(f"checkpoint_delay_ms must be from {_SHORTEST_MS} to {_LONGEST_MS}")


async def _open(context: OpenContext) -> ProtectedDevice | Decline:
    if not context.services.has(DISKS):
        return Decline("its hypervisor does not offer QEMU's disks")
    if context.side is ReplicationMode.PRIMARY:
        primary = PrimaryDisk(context)
        await primary.mirror()
        return primary
    secondary = SecondaryDisk(context)
    await secondary.prepare()
    return secondary


async def _probe(context: ProbeContext) -> Sequence[Finding] | Decline:
    if context.device.hypervisor != "qemu":
        return Decline(f"{context.device.hypervisor} is not QEMU")
    if context.side is ReplicationMode.SECONDARY and is_volatile(context.directory):
        return (
            Finding(
                Severity.NOTE,
                f"{context.device.name} on the secondary",
                f"the overlays of the copy's disks are in memory ({context.directory}): they count against it, and "
                "a crash of this host shortly after a takeover loses what was not committed yet",
            ),
        )
    return ()


BLOCK_REPLICATION: Final = Subkind(
    name=NAME,
    kind=Kind.DISK,
    modes=frozenset({Mode.COLO, Mode.REMUS}),
    open=_open,
    probe=_probe,
    options=BlockReplicationOptions,
    hypervisors=frozenset({"qemu"}),
)
