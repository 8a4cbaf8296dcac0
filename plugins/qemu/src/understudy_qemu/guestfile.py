"""The QEMU part of a guest file. docs/reference/qemu-guest.md describes the keys.

::

    name = "web"
    hypervisor = "qemu"
    memory = "512MiB"

    [[disk]]
    path = "/var/lib/images/web.qcow2"

    [[nic]]
    bridge = "br0"

Devices are named by kind and position, ``disk0``, ``nic0`` …, the same on both hosts; QEMU's node names, device ids
and backend ids are derived from these names (machine.py).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from understudy.config import NAME_PATTERN, NAME_WORDS
from understudy.device import DeviceInfo, Kind
from understudy.hypervisor import GuestConfig, Protection
from understudy.schema import Table
from understudy_qemu.network import tap_name

__all__ = ["BLOCK_REPLICATION", "HYPERVISOR", "Disk", "Nic", "Overlays", "QemuConfig", "parse_config"]

HYPERVISOR: Final = "qemu"
BLOCK_REPLICATION: Final = (
    "block-replication"  #: the subkind that takes a disk unless its entry names another one
)
QEMU: Final = "qemu-system-x86_64"
QEMU_VARIABLE: Final = "UNDERSTUDY_QEMU"  #: another QEMU where the guest file names none, for tests

_BUSES: Final = ("virtio", "scsi", "ide")
_FORMATS: Final = ("qcow2", "raw")
_CACHES: Final = ("writeback", "none", "directsync", "writethrough")
_MODELS: Final = ("virtio-net-pci", "e1000", "e1000e", "rtl8139")
_MACHINE: Final = r"pc|q35|pc-(i440fx|q35)-[0-9.]+"
_MAC: Final = r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}"
_INTERFACE: Final = r"[^\s/:]{1,15}"
_MULTICAST_BIT: Final = 1
_PCI_DEVICES: Final = 24
_IDE_DISKS: Final = 4


@dataclass(frozen=True, slots=True)
class Disk:
    """One ``[[disk]]``."""

    name: str  #: ``disk0`` …
    path: Path  #: absolute
    format: str  #: ``qcow2`` or ``raw``
    bus: str  #: ``virtio``, ``scsi`` or ``ide``
    cache: str  #: as QEMU's -drive cache=
    serial: str  #: what the guest reads as the disk's serial number
    subkind: str

    @property
    def replicated(self) -> bool:
        """Whether QEMU replicates it into an image on the other host; if not, what is there is its subkind's."""
        return self.subkind in {"auto", BLOCK_REPLICATION}


@dataclass(frozen=True, slots=True)
class Nic:
    """One ``[[nic]]``."""

    name: str  #: ``nic0`` …
    bridge: str
    mac: str  #: lower case
    model: str  #: QEMU's device
    tap: str  #: the host's side of it, on this host
    subkind: str

    @property
    def vnet_hdr(self) -> bool:
        """Whether the packets of this interface carry a virtio-net header on the host."""
        return self.model.startswith("virtio")


@dataclass(frozen=True, slots=True)
class Overlays:
    """``[overlays]``: where a copy's writes go until the next checkpoint."""

    directory: Path | None  #: ``None``: the agent's overlay directory
    room_ratio: float  #: free room that must be there, as a part of all disks' sizes
    volatile: bool  #: the operator knows that the directory is in memory


@dataclass(frozen=True, slots=True)
class QemuConfig(GuestConfig):
    """A QEMU guest as its file describes it."""

    machine: str
    memory_bytes: int  #: as written; accel.guest_memory_bytes says what the guest gets
    cpus: int
    cpu: str  #: QEMU's -cpu, ``""``: what fits the accelerator
    accel: str  #: ``auto``, ``kvm`` or ``tcg``
    firmware: Path | None
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    overlays: Overlays
    qemu: str  #: the program, found on PATH unless it is a path
    qemu_img: str
    serial: Path | None  #: where the guest's serial console is written; ``None``: the guest's state directory
    arguments: tuple[str, ...]  #: appended to QEMU's command line as they are

    def disk(self, name: str) -> Disk:
        """Return the disk called `name`."""
        return next(disk for disk in self.disks if disk.name == name)

    def nic(self, name: str) -> Nic:
        """Return the interface called `name`."""
        return next(nic for nic in self.nics if nic.name == name)


def parse_config(
    table: Mapping[str, Any], *, name: str, source: Path, protection: Protection, host: str
) -> QemuConfig:
    """Read the QEMU part of a guest file.

    Args:
        table: The file without the keys that the core owns.
        name: The guest's name.
        source: The file; relative paths in it start at its directory.
        protection: The parsed ``[protection]`` table.
        host: This host's name; the taps' names depend on it.

    Raises:
        ConfigError: A key is unknown or wrong; the text has the file, the key and what is allowed.
    """
    top = Table(source, "", table)
    disks = tuple(_disk(entry, index, source) for index, entry in enumerate(top.tables("disk")))
    nics = tuple(_nic(entry, index, name, host) for index, entry in enumerate(top.tables("nic")))
    overlays = top.table("overlays")
    qemu = top.str("qemu", os.environ.get(QEMU_VARIABLE) or QEMU)
    config = QemuConfig(
        name=name,
        hypervisor=HYPERVISOR,
        source=source,
        protection=protection,
        devices=(*map(_disk_info, disks), *(_nic_info(nic, index) for index, nic in enumerate(nics))),
        machine=top.str("machine", "pc", pattern=_MACHINE, allowed="pc, q35, or a version of them"),
        memory_bytes=_memory(top),
        cpus=top.int("cpus", 1, minimum=1, maximum=255),
        cpu=top.str("cpu", ""),
        accel=top.str("accel", "auto", choices=("auto", "kvm", "tcg")),
        firmware=_optional_path(top, "firmware", source),
        kernel=_optional_path(top, "kernel", source),
        initrd=_optional_path(top, "initrd", source),
        cmdline=top.str("cmdline", ""),
        disks=disks,
        nics=nics,
        overlays=Overlays(
            directory=_optional_path(overlays, "directory", source),
            room_ratio=overlays.float("room_ratio", 0.1, minimum=0),
            volatile=overlays.bool("volatile", default=False),
        ),
        qemu=qemu,
        qemu_img=top.str("qemu_img", _image_tool(qemu)),
        serial=_optional_path(top, "serial", source),
        arguments=top.strings("arguments", ()),
    )
    top.done()
    _check_boot(top, config)
    _check_distinct(top, config)
    _check_counts(top, config)
    return config


def derived_mac(guest: str, nic: str) -> str:
    """Return the MAC address of an interface for which the guest file gives none.

    It depends on the names of guest and interface alone, so both hosts find the same; the prefix is QEMU's.
    """
    digest = hashlib.sha256(f"{guest}/{nic}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


# --- Devices ---------------------------------------------------------------------------------------------------------


def _disk(entry: Table, index: int, source: Path) -> Disk:
    name = _device_name(entry, "disk", index)
    path = _path(entry.str("path"), source)
    guess = "raw" if path.suffix in {".raw", ".img"} else "qcow2"
    return Disk(
        name=name,
        path=path,
        format=entry.str("format", guess, choices=_FORMATS),
        bus=entry.str("bus", "virtio", choices=_BUSES),
        cache=entry.str("cache", "writeback", choices=_CACHES),
        serial=entry.str(
            "serial", "", pattern=r"[A-Za-z0-9_.-]{0,20}", allowed="up to 20 letters and digits"
        ),
        subkind=entry.str("subkind", "auto"),
    )


def _nic(entry: Table, index: int, guest: str, host: str) -> Nic:
    name = _device_name(entry, "nic", index)
    mac = entry.str("mac", derived_mac(guest, name), pattern=_MAC, allowed="six bytes like 52:54:00:12:34:56")
    if int(mac[:2], 16) & _MULTICAST_BIT:
        raise entry.error("mac", f"{mac} is a group address", "an even first byte")
    return Nic(
        name=name,
        bridge=entry.str("bridge", pattern=_INTERFACE, allowed="the name of a network interface"),
        mac=mac.lower(),
        model=entry.str("model", "virtio-net-pci", choices=_MODELS),
        tap=tap_name(host, guest, name),
        subkind=entry.str("subkind", "auto"),
    )


def _device_name(entry: Table, kind: str, index: int) -> str:
    # What is written is a label for overrides of one host; the device's name is its position's, on both hosts.
    name = f"{kind}{index}"
    label = entry.str("name", name, pattern=NAME_PATTERN, allowed=NAME_WORDS)
    if label != name and re.fullmatch(r"(disk|nic)\d+", label):
        raise entry.error(
            "name", f"{label!r} is the name of another position", f"{name}, or a name of your own"
        )
    return name


def _disk_info(disk: Disk) -> DeviceInfo:
    properties = {
        "path": str(disk.path),
        "format": disk.format,
        "bus": disk.bus,
        "cache": disk.cache,
        "node": disk.name,  # of the quorum above the image
        "image_node": f"{disk.name}-image",
    }
    return DeviceInfo(
        kind=Kind.DISK,
        name=disk.name,
        index=int(disk.name.removeprefix("disk")),
        hypervisor=HYPERVISOR,
        subkind=disk.subkind,
        properties=MappingProxyType(properties),
    )


def _nic_info(nic: Nic, index: int) -> DeviceInfo:
    properties = {
        "netdev": nic.name,
        "mac": nic.mac,
        "model": nic.model,
        "bridge": nic.bridge,
        "tap": nic.tap,
        "vnet_hdr": nic.vnet_hdr,
    }
    return DeviceInfo(
        kind=Kind.NIC,
        name=nic.name,
        index=index,
        hypervisor=HYPERVISOR,
        subkind=nic.subkind,
        properties=MappingProxyType(properties),
    )


# --- Values ----------------------------------------------------------------------------------------------------------


def _memory(top: Table) -> int:
    size = top.bytes("memory", minimum=1 << 20)
    if size % 4096:
        raise top.error("memory", f"{size} bytes are no whole pages", "a multiple of 4 KiB")
    return size


def _path(text: str, source: Path) -> Path:
    return Path(os.path.abspath(source.parent / text))  # noqa: PTH100 - resolve() would follow symbolic links


def _optional_path(table: Table, key: str, source: Path) -> Path | None:
    text = table.str(key, "")
    return _path(text, source) if text else None


def _image_tool(qemu: str) -> str:
    # The qemu-img that belongs to a QEMU named by path, if it lies beside it.
    beside = Path(qemu).parent / "qemu-img"
    return str(beside) if "/" in qemu and beside.exists() else "qemu-img"


def _check_boot(top: Table, config: QemuConfig) -> None:
    for key in ("initrd", "cmdline"):
        if getattr(config, key) and config.kernel is None:
            raise top.error(key, "needs a kernel", "together with kernel")


def _check_distinct(top: Table, config: QemuConfig) -> None:
    paths = [disk.path for disk in config.disks]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise top.error(
                f"disk[{index}].path", f"{path} is another disk of this guest already", "one disk each"
            )
    macs = [nic.mac for nic in config.nics]
    for index, mac in enumerate(macs):
        if mac in macs[:index]:
            raise top.error(
                f"nic[{index}].mac", f"{mac} belongs to another interface already", "distinct addresses"
            )


def _check_counts(top: Table, config: QemuConfig) -> None:
    # machine.py gives disks the lowest and interfaces the highest slots of one PCI bus.
    if len(config.disks) + len(config.nics) > _PCI_DEVICES:
        raise top.error("disk", "too many devices", f"at most {_PCI_DEVICES} disks and interfaces together")
    ide = sum(disk.bus == "ide" for disk in config.disks)
    if ide > _IDE_DISKS:
        raise top.error("disk", f"{ide} disks on ide", f"at most {_IDE_DISKS}")
