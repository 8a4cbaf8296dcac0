"""The janitor: what a dead agent left of a guest on this host.

Decided by the record alone. A guest that runs here although the record gives it to another host, and a copy that
nobody will ever promote, are discarded: interfaces down and off their bridges, QEMU killed and seen dead, then the
rest. A guest whose record says that it is ``alone`` here gets rid of what a session had put around it, its gates
included, and runs (restoring.py). A guest whose record is undecided keeps whatever gates stand above it.

Overlays are data until QEMU has written them into the image. They are removed only when this host's copy is worth
nothing: it was discarded, or the record names this host neither owner nor standby.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from understudy import interfaces
from understudy.arbiter import Record, RecordState
from understudy.errors import HypervisorError
from understudy_qemu import network
from understudy_qemu.egressblock import EgressBlock
from understudy_qemu.identity import claim, known, overlays
from understudy_qemu.inventory import Inventory
from understudy_qemu.machine import GuestPaths
from understudy_qemu.process import QemuProcess
from understudy_qemu.restoring import restore
from understudy_qemu.running import Launched, Qemu
from understudy_qemu.speculating import settle_disk

if TYPE_CHECKING:
    from understudy_qemu.guestfile import QemuConfig
    from understudy_qemu.hypervisor import QemuHypervisor

__all__ = ["kill_strays", "sweep", "uncommitted"]


async def sweep(hypervisor: QemuHypervisor, config: QemuConfig, record: Record | None) -> Sequence[str]:
    """Clean what a dead agent left of a guest on this host.

    Args:
        hypervisor: This host's.
        config: The guest.
        record: The guest's record, ``None`` if there is none.

    Returns:
        What was done or must be known, one sentence each.
    """
    host = hypervisor.here.host
    paths = hypervisor.paths(config)
    process = QemuProcess.adopt(paths.pidfile, stderr=paths.stderr)
    done: list[str] = []
    if process is not None:
        mine = record is not None and record.state is RecordState.ALONE and record.owner == host
        if mine:
            process.resume()  # a fence may have stopped it by a signal
        process.close()
        launched = Launched.read(paths.launched)
        copy = launched is not None and launched.copy
        if record is not None and mine and (not copy or await _was_promoted(hypervisor, config)):
            return await _restore(hypervisor, config, record)
        reason = _why_discard(record, host, copy=copy)
        if not reason:
            return done
        await hypervisor.discard(config)
        done.append(f"{'a copy' if copy else 'the guest'} ran on {host} {reason}: discarded")
    done += await _remove_remains(config, paths)
    return done + _remove_overlays(hypervisor.overlay_directory(config), record, host)


async def kill_strays(paths: GuestPaths) -> None:
    """Kill whatever process was started with this guest's pidfile here, see it dead, and remove its sockets."""
    process = QemuProcess.adopt(paths.pidfile, stderr=paths.stderr)
    if process is not None:
        try:
            await process.kill()
        finally:
            process.close()
    _unlink(paths)


def _why_discard(record: Record | None, host: str, *, copy: bool) -> str:
    # "" means that it stays: it is the record's, or there is nothing to decide by.
    if copy:
        # Nobody can promote it any more: what it has loaded died with the agent that counted. One whose promotion had
        # begun is left to the engine and to an operator.
        promoting = record is not None and record.state is RecordState.PROMOTING and record.standby == host
        return "" if promoting else "of a session that is over"
    if record is None:
        return ""
    if record.owner == host:
        return "after it was stopped" if record.state is RecordState.STOPPED else ""
    return f"although the record says: {record}"


async def _restore(hypervisor: QemuHypervisor, config: QemuConfig, record: Record) -> Sequence[str]:
    # The record says alone, here: the guest loses what a session put around it, runs, and has its way out.
    qemu = await hypervisor.running(config)
    if qemu is None or await qemu.status() == "shutdown":
        return []
    done = []
    if qemu.launched.copy:
        # The agent died between the swap that it won and the end of the takeover.
        images = hypervisor.images(config)
        claim(images, config, record.generation, known(images, config)[0])
        qemu.become_guest()
        done.append(f"{qemu.name} was promoted but not let out: its takeover was finished")
    # Before QEMU lets go of what it holds, and before the guest is announced.
    done += await _remove_blocks(config)
    for disk in config.disks:
        if await settle_disk(qemu, disk):
            done.append(
                f"{disk.name} of {qemu.name} was still on the device that its copy had: put on {disk.path}"
            )
    done += await restore(qemu)
    for nic in config.nics:
        if await network.remove_filters(nic.tap):
            done.append(f"the tap {nic.tap} of {nic.name} still had filters: removed")
    await hypervisor.open_outlet(config)
    if config.nics:
        await qemu.announce()
    directory = hypervisor.overlay_directory(config)
    if overlays(directory) and not await uncommitted(qemu):
        done += _unlink_overlays(directory)
    return done


async def _remove_blocks(config: QemuConfig) -> list[str]:
    return [
        f"the tap {nic.tap} of {nic.name} was still blocked: the block was removed"
        for nic in config.nics
        if await EgressBlock(nic.tap).remove()
    ]


async def uncommitted(qemu: Qemu) -> bool:
    """Tell whether a QEMU still has overlays in use: what they hold is not in the images yet."""
    nodes = (await Inventory.take(qemu.monitor)).nodes
    return any(node.endswith(("-active", "-hidden")) for node in nodes)


async def _was_promoted(hypervisor: QemuHypervisor, config: QemuConfig) -> bool:
    # A copy that was told to take over has left COLO by its own decision; one that only lost its primary has not.
    qemu = await hypervisor.running(config)
    if qemu is None:
        return False
    colo = await qemu.monitor.execute("query-colo-status")
    status = await qemu.status()
    return (colo["mode"], colo["last-mode"]) == ("none", "secondary") and status in {"running", "paused"}


async def _remove_remains(config: QemuConfig, paths: GuestPaths) -> list[str]:
    done = []
    for nic in config.nics:
        await interfaces.close_way_out(nic.tap)
        if await network.remove_tap(nic.tap):
            done.append(f"the tap {nic.tap} of {nic.name} was left: removed")
    done += await _remove_blocks(config)
    left = _unlink(paths)
    if left:
        done.append(f"files of a dead QEMU were left: removed {', '.join(left)}")
    return done


def _unlink(paths: GuestPaths) -> list[str]:
    if not paths.runtime.is_dir():
        return []
    left = sorted(path.name for path in paths.runtime.iterdir())
    for name in left:
        (paths.runtime / name).unlink(missing_ok=True)
    paths.runtime.rmdir()
    return left


def _remove_overlays(directory: Path, record: Record | None, host: str) -> list[str]:
    left = overlays(directory)
    if not left:
        return []
    if record is not None and host in {record.owner, record.standby} and _may_hold_data(record, host):
        return [f"{directory} holds overlays that may not be written into the images yet: left as they are"]
    return _unlink_overlays(directory)


def _unlink_overlays(directory: Path) -> list[str]:
    for path in overlays(directory):
        path.unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError as error:
        raise HypervisorError(f"{directory} holds more than overlays: {error.strerror}") from error
    return [f"overlays that nothing needs any more were left in {directory}: removed"]


def _may_hold_data(record: Record, host: str) -> bool:
    # This host's copy became the guest, or was about to: its memory is gone, but its disks are these.
    return record.owner == host or record.state is RecordState.PROMOTING
