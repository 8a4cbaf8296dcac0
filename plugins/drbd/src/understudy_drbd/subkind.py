"""The subkind ``drbd``: a disk on stock DRBD with a thin volume below, in mode remus."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from understudy.device import (
    Decline,
    DeviceInfo,
    Finding,
    Gate,
    Kind,
    Mode,
    OpenContext,
    ProbeContext,
    ProtectedDevice,
    ReplicationMode,
    Severity,
    Subkind,
    SweepContext,
    Verdict,
)
from understudy.errors import UnderstudyError
from understudy.services import SPECULATION
from understudy_drbd.control import DISK_KEYS, Control, disk_path, threads
from understudy_drbd.copydevice import remove_left
from understudy_drbd.dm import Mapper, MapperRefused
from understudy_drbd.findings import of_configuration, of_disk, of_pool, of_state, of_version, of_volume
from understudy_drbd.primary import PrimaryDisk, rejoin
from understudy_drbd.secondary import SecondaryDisk
from understudy_drbd.speculating import SpeculatingDisk
from understudy_drbd.thin import InUse, NotThin, PoolState, ThinVolume

__all__ = ["DRBD", "NAME"]

_log = logging.getLogger(__name__)

NAME: Final = "drbd"

_LOOK_S: Final = 5.0
_QEMU: Final = "qemu"


async def _claimed(device: DeviceInfo) -> Control | Decline:
    path = disk_path(device)
    if path is None:
        return Decline(
            f"{device.hypervisor} does not tell what it is on the host (any of {', '.join(DISK_KEYS)})"
        )
    if device.hypervisor == _QEMU and device.subkind != NAME:
        # QEMU's own block replication takes any disk, and needs no DRBD.
        return Decline(f'under QEMU only a disk with subkind = "{NAME}" is protected by DRBD')
    control = await Control.find(path)
    if control is None:
        would = "on one, with a thin volume below it on both hosts, this subkind would protect it"
        return Decline(f"{path} is no DRBD device; {would}")
    return control


async def _open(context: OpenContext) -> ProtectedDevice | Decline:
    control = await _claimed(context.device)
    if isinstance(control, Decline):
        return control
    subject = f"{context.device.name} on the {context.side.value}"
    finding = next(of_disk(subject, context.device.properties), None)
    if finding is not None:
        raise UnderstudyError(f"{finding.subject}: {finding.problem} {finding.remedy}")
    if context.side is ReplicationMode.SECONDARY:
        kind = SpeculatingDisk if context.services.has(SPECULATION) else SecondaryDisk
        return await kind.open(context, control)
    return await PrimaryDisk.open(context, control)


async def _probe(context: ProbeContext) -> Sequence[Finding] | Decline:
    control = await _claimed(context.device)
    if isinstance(control, Decline):
        return control
    subject = f"{context.device.name} on the {context.side.value}"
    resource, side, device = control.resource, context.side, context.device
    findings = [*of_version(subject, control.version), *of_configuration(subject, resource)]
    findings += of_disk(subject, device.properties)
    findings += of_state(subject, resource, await control.state(), side)
    try:
        volume, pool = await threads.run(_look_below, resource.disk, timeout_s=_LOOK_S)
    except MapperRefused as error:
        severity = Severity.ERROR if side is ReplicationMode.SECONDARY else Severity.WARNING
        remedy = "load the device mapper: modprobe dm-thin-pool"
        return [*findings, Finding(severity, subject, str(error), remedy)]
    findings += of_volume(subject, resource, volume, side)
    if pool is not None:
        findings += of_pool(subject, pool)
    return findings


def _look_below(path: Path) -> tuple[ThinVolume | NotThin, PoolState | None]:
    with Mapper() as mapper:
        try:
            volume = ThinVolume.find(mapper, path)
        except NotThin as reason:
            return reason, None
        return volume, volume.pool_state()


async def _sweep(context: SweepContext) -> Sequence[str]:
    done: list[str] = []
    for device in context.devices:
        path = disk_path(device) if device.kind is Kind.DISK else None
        control = await Control.find(path) if path is not None else None
        if control is None:
            continue
        name = control.resource.name
        try:
            if await threads.run(remove_left, control.resource.minor, timeout_s=_LOOK_S):
                done.append(f"removed the device that a copy had in place of DRBD resource {name}")
        except InUse as error:
            # A guest that took over runs from it; it is DRBD itself.
            _log.warning("DRBD resource %s: %s", name, error)
        left = await threads.run(_clear_below, control.resource.disk, timeout_s=_LOOK_S)
        if left:
            done.append(f"removed the checkpoints of {control.resource.disk} below DRBD resource {name}")
        if context.verdict is Verdict.DISCARD:
            if await rejoin(control):
                done.append(
                    f"DRBD resource {name} is no longer primary and is copied from the other host as a whole"
                )
        elif left:
            # It took over, and its agent died before it looked for its peer again.
            await control.connect()
    return done


def _clear_below(path: Path) -> bool:
    try:
        with Mapper() as mapper:
            return ThinVolume.find(mapper, path).clear()
    except NotThin:
        return False
    except MapperRefused as error:
        if error.ioctl == "open":  # no device mapper, so no thin volume
            return False
        raise


DRBD: Final = Subkind(
    name=NAME,
    kind=Kind.DISK,
    modes=frozenset({Mode.REMUS}),
    open=_open,
    probe=_probe,
    priority=30,
    needs=frozenset({Gate.POSTSUSPEND}),
    sweep=_sweep,
)
