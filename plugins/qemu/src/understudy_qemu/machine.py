"""The command line of a guest's QEMU: the same machine on both hosts, protectable from birth.

Every disk stands below a ``quorum`` with one child, so that a replication child can be added while the guest runs;
every interface is a tap without vhost, so that filters see its packets; two QMP sockets; and the guest's own
shutdown or crash only pauses it (docs/explanation/session.md, ownership rule 7). Devices have fixed PCI slots: disks
from the lowest, interfaces from the highest, so that both sides agree and one more device moves no other.

A disk that fails never stops the guest: the guest is told of the error, as by a real disk (``werror`` and ``rerror``).
QEMU's own choice is to stop it when the host's file system is full, and a QEMU that is stopped so aborts at the next
checkpoint, on either side: ``invalid runstate transition: 'io-error' -> 'colo'``. Source: QEMU system/runstate.c
(runstate_transitions_def), block/block-backend.c (blk_get_error_action).

Names in QEMU, all derived from the device's name ``disk0`` or ``nic0``:

==================  ================================================================
``disk0``           node of the quorum; ``top-id`` of the replication driver, ``parent`` of ``x-blockdev-change``
``disk0-image``     node of the image (qcow2 or raw)
``disk0-file``      node of the file below it
``dev-disk0``       the guest's device
``nic0``            the netdev (tap)
``dev-nic0``        the guest's device
==================  ================================================================

A copy gets the same line but for its drives, which its block replication makes (`DriveProvider`), and
``-incoming defer``. ``-S`` stands on both: a guest is let run when its images and interfaces are ready; a copy under
COLO ignores it, but one that was sent a plain migration by mistake stays stopped.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from understudy_qemu.accel import DEFAULT_CPU, Accel, guest_memory_bytes
from understudy_qemu.guestfile import Disk, Nic, QemuConfig

__all__ = [
    "DriveProvider",
    "GuestPaths",
    "ImageDrive",
    "command_line",
    "environment",
    "file_node",
    "image_nodes",
]

_FIRST_SLOT = 0x4
_LAST_SLOT = 0x1B
_SCSI_SLOT = 0x3
_IDE_UNITS = 2


@dataclass(frozen=True, slots=True)
class GuestPaths:
    """Where the files of one guest's QEMU lie on this host."""

    runtime: Path  #: ``/run/understudy/qemu/GUEST``
    state: Path  #: ``/var/lib/understudy/qemu/GUEST``

    @property
    def qmp(self) -> Path:
        """The monitor's socket."""
        return self.runtime / "qmp"

    @property
    def oob(self) -> Path:
        """The second monitor's socket, for out-of-band commands."""
        return self.runtime / "oob"

    @property
    def pidfile(self) -> Path:
        """QEMU's pidfile; its name on the command line is what makes a process this guest's."""
        return self.runtime / "pid"

    @property
    def launched(self) -> Path:
        """What the process was launched with, JSON (running.py)."""
        return self.runtime / "launched.json"

    @property
    def stderr(self) -> Path:
        """QEMU's own words."""
        return self.state / "qemu.log"

    @property
    def serial(self) -> Path:
        """The guest's serial console, unless the guest file names another file."""
        return self.state / "serial.log"


class DriveProvider(Protocol):
    """What a disk of the command line is made of: nodes, the last of which carry the guest's device."""

    @property
    def top_node(self) -> str:
        """Name of the node below the guest's device."""

    def blockdevs(self) -> Sequence[Mapping[str, Any]]:
        """Return QAPI BlockdevOptions in an order in which they can be made, `top_node` included."""


@dataclass(frozen=True, slots=True)
class ImageDrive:
    """A disk of a guest that runs: its image below a quorum of one."""

    disk: Disk

    @property
    def top_node(self) -> str:
        """Name of the quorum."""
        return self.disk.name

    def blockdevs(self) -> Sequence[Mapping[str, Any]]:
        """Return the image's nodes and the quorum."""
        return (*image_nodes(self.disk), quorum_node(self.disk.name, f"{self.disk.name}-image"))


def quorum_node(name: str, child: str) -> dict[str, Any]:
    """Return the options of a quorum `name` above the one node `child`."""
    return {
        "driver": "quorum",
        "node-name": name,
        "read-pattern": "fifo",
        "vote-threshold": 1,
        "children": [child],
    }


def image_nodes(disk: Disk) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a disk's file node and of its image node above it."""
    return (
        file_node(disk.path, f"{disk.name}-file", cache=disk.cache),
        {"driver": disk.format, "node-name": f"{disk.name}-image", "file": f"{disk.name}-file"},
    )


def file_node(path: Path, name: str, *, cache: str = "writeback") -> dict[str, Any]:
    """Return the options of a node that is the file or block device at `path`.

    Args:
        path: The file; it need not exist yet.
        name: The node's name.
        cache: ``none`` and ``directsync`` go past the host's page cache.
    """
    driver = "host_device" if path.exists() and stat.S_ISBLK(path.stat().st_mode) else "file"
    direct = cache in {"none", "directsync"}
    return {"driver": driver, "node-name": name, "filename": str(path), "cache": {"direct": direct}}


def command_line(
    config: QemuConfig,
    paths: GuestPaths,
    *,
    accel: Accel,
    drives: Mapping[str, DriveProvider],
    taps: Mapping[str, str],
    incoming: bool,
) -> list[str]:
    """Return QEMU's whole command line.

    Args:
        config: The guest.
        paths: Where its files lie.
        accel: What runs its CPU; must be the same on both hosts.
        drives: What each disk is made of, by the disk's name.
        taps: The tap of each interface, by the interface's name.
        incoming: Whether it is a copy that waits for its memory.
    """
    line = [
        config.qemu,
        "-name",
        f"guest={_escaped(config.name)},debug-threads=on",
        "-pidfile",
        str(paths.pidfile),
    ]
    line += ["-no-user-config", "-nodefaults", "-display", "none", "-S"]
    line += ["-machine", f"{config.machine},dump-guest-core=off", "-accel", accel.value]
    line += ["-cpu", config.cpu or DEFAULT_CPU[accel.value]]
    line += ["-m", f"{guest_memory_bytes(config.memory_bytes, accel) // 1024}K", "-smp", str(config.cpus)]
    line += ["-action", "reboot=reset,shutdown=pause,panic=pause", "-rtc", "base=utc"]
    line += _boot(config)
    for name, path in (("qmp", paths.qmp), ("oob", paths.oob)):
        line += ["-chardev", f"socket,id={name},path={_escaped(str(path))},server=on,wait=off"]
        line += ["-mon", f"chardev={name},mode=control"]
    line += ["-chardev", f"file,id=serial,path={_escaped(str(config.serial or paths.serial))}"]
    line += ["-serial", "chardev:serial"]
    line += _disks(config, drives)
    for index, nic in enumerate(config.nics):
        line += _nic(nic, index, taps[nic.name], _pci_bus(config))
    if incoming:
        line += ["-incoming", "defer"]
    return [*line, *config.arguments]


def environment(preload: Path | None) -> dict[str, str]:
    """Return the environment of a QEMU process.

    Args:
        preload: The library that QEMU needs under TCG, ``None`` under KVM.
    """
    # The service manager's words are for the agent alone.
    made = {key: value for key, value in os.environ.items() if key not in {"NOTIFY_SOCKET", "WATCHDOG_USEC"}}
    if preload is not None:
        made["LD_PRELOAD"] = " ".join(filter(None, (str(preload), made.get("LD_PRELOAD", ""))))
    return made


# --- Parts of the line -----------------------------------------------------------------------------------------------


def _boot(config: QemuConfig) -> list[str]:
    line = ["-bios", str(config.firmware)] if config.firmware else []
    if config.kernel:
        line += ["-kernel", str(config.kernel)]
    if config.initrd:
        line += ["-initrd", str(config.initrd)]
    if config.cmdline:
        line += ["-append", config.cmdline]
    return line


def _disks(config: QemuConfig, drives: Mapping[str, DriveProvider]) -> list[str]:
    line: list[str] = []
    if any(disk.bus == "scsi" for disk in config.disks):
        controller = {
            "driver": "virtio-scsi-pci",
            "id": "scsi",
            "bus": _pci_bus(config),
            "addr": hex(_SCSI_SLOT),
        }
        line += ["-device", json.dumps(controller)]
    ide = 0
    for index, disk in enumerate(config.disks):
        drive = drives[disk.name]
        for node in drive.blockdevs():
            line += ["-blockdev", json.dumps(node)]
        device: dict[str, Any] = {"id": f"dev-{disk.name}", "drive": drive.top_node}
        device |= {"werror": "report", "rerror": "report"}
        if config.kernel is None:
            # Otherwise QEMU's loader of kernels has the first place, and shares it with nobody.
            device["bootindex"] = index
        device["write-cache"] = "off" if disk.cache in {"writethrough", "directsync"} else "on"
        if disk.serial:
            device["serial"] = disk.serial
        if disk.bus == "virtio":
            device |= {"driver": "virtio-blk-pci", "bus": _pci_bus(config), "addr": hex(_FIRST_SLOT + index)}
        elif disk.bus == "scsi":
            device |= {"driver": "scsi-hd", "bus": "scsi.0", "scsi-id": index}
        else:
            device |= {"driver": "ide-hd", **_ide_place(config, ide)}
            ide += 1
        line += ["-device", json.dumps(device)]
    return line


def _ide_place(config: QemuConfig, number: int) -> dict[str, Any]:
    if "q35" in config.machine:  # AHCI: one disk on each port
        return {"bus": f"ide.{number}"}
    return {"bus": f"ide.{number // _IDE_UNITS}", "unit": number % _IDE_UNITS}


def _nic(nic: Nic, index: int, tap: str, bus: str) -> list[str]:
    vnet_hdr = "on" if nic.vnet_hdr else "off"
    netdev = f"tap,id={nic.name},ifname={tap},script=no,downscript=no,vhost=off,vnet_hdr={vnet_hdr}"
    # Without a boot ROM: the guest boots from its disks, and both sides need the same ROM's size otherwise.
    device = {"driver": nic.model, "id": f"dev-{nic.name}", "netdev": nic.name, "mac": nic.mac, "romfile": ""}
    device |= {"bus": bus, "addr": hex(_LAST_SLOT - index)}
    return ["-netdev", netdev, "-device", json.dumps(device)]


def _pci_bus(config: QemuConfig) -> str:
    return "pcie.0" if "q35" in config.machine else "pci.0"


def _escaped(value: str) -> str:
    # QEMU's option lists end a value at a comma unless it is doubled.
    return value.replace(",", ",,")
