"""The Xen part of a guest file. docs/reference/xen-guest.md describes the keys.

::

    name = "web"
    hypervisor = "xen"
    config = "/etc/xen/web.cfg"

    [[disk]]
    vdev = "xvda"
    path = "/dev/drbd0"

    [[nic]]
    bridge = "xenbr0"

The machine itself is what its xl configuration says; here stands what Understudy has to know beyond that. Devices are
named by kind and position, ``disk0``, ``nic0`` …, in the order of the domain's disks and interfaces, the same on both
hosts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from understudy.config import NAME_PATTERN, NAME_WORDS
from understudy.device import DeviceInfo, Kind
from understudy.hypervisor import GuestConfig, Protection
from understudy.schema import Table

__all__ = [
    "HYPERVISOR",
    "Compression",
    "Disk",
    "Nic",
    "SuspendVia",
    "XenConfig",
    "parse_config",
    "vif_name",
]

HYPERVISOR: Final = "xen"

_SCRIPTS: Final = Path("/etc/xen/scripts")
_HOLD_BYTES: Final = 1 << 30
_LEAST_HOLD_BYTES: Final = 1 << 20
_INTERFACE: Final = r"[^\s/:]{0,15}"  # none: as in the domain's configuration
_VDEV: Final = r"[a-z][a-z0-9]{2,15}"
_VDEV_WORDS: Final = 'what the xl configuration calls it, such as "xvda"'


class Compression(Enum):
    """Whether the checkpoint stream is compressed on the link."""

    AUTO = "auto"  #: zstd for as long as that pays
    OFF = "off"


class SuspendVia(Enum):
    """How the guest is asked to suspend."""

    AUTO = "auto"  #: by its event channel if it offers one
    EVENT_CHANNEL = "event-channel"
    XENSTORE = "xenstore"  #: by ``control/shutdown``


@dataclass(frozen=True, slots=True)
class Disk:
    """One ``[[disk]]``."""

    name: str  #: ``disk0`` …
    vdev: str  #: the guest's name of it, as in the domain's configuration
    path: Path | None  #: on this host, absolute; ``None``: as in the domain's configuration
    read_only: bool
    subkind: str


@dataclass(frozen=True, slots=True)
class Nic:
    """One ``[[nic]]``."""

    name: str  #: ``nic0`` …
    devid: int  #: number of the virtual interface in its domain
    bridge: str  #: on this host; ``""``: as in the domain's configuration
    script: Path | None  #: hotplug script of a copy on this host; ``None``: as in the domain's configuration
    subkind: str


@dataclass(frozen=True, slots=True)
class XenConfig(GuestConfig):
    """A Xen guest as its file describes it."""

    config: Path  #: the xl configuration that the guest is started from
    compression: Compression
    hold_limit_bytes: int  #: of checkpoints that this host, as secondary, may hold in memory
    suspend: SuspendVia
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]

    def disk(self, name: str) -> Disk:
        """Return the disk called `name`."""
        return next(disk for disk in self.disks if disk.name == name)

    def nic(self, name: str) -> Nic:
        """Return the interface called `name`."""
        return next(nic for nic in self.nics if nic.name == name)


def parse_config(
    table: Mapping[str, Any], *, name: str, source: Path, protection: Protection, host: str
) -> XenConfig:
    """Read the Xen part of a guest file.

    Args:
        table: The file without the keys that the core owns.
        name: The guest's name, which is its domain's.
        source: The file; relative paths in it start at its directory.
        protection: The parsed ``[protection]`` table.
        host: This host's name, for errors.

    Raises:
        ConfigError: A key is unknown or wrong; the text has the file, the key and what is allowed.
    """
    top = Table(source, "", table)
    disks = tuple(_disk(entry, index, source) for index, entry in enumerate(top.tables("disk")))
    nics = tuple(_nic(entry, index) for index, entry in enumerate(top.tables("nic")))
    config = XenConfig(
        name=name,
        hypervisor=HYPERVISOR,
        source=source,
        protection=protection,
        devices=(*map(_disk_info, disks, range(len(disks))), *map(_nic_info, nics)),
        config=_path(top.str("config"), source),
        compression=top.choice("compression", Compression, Compression.AUTO),
        hold_limit_bytes=top.bytes("hold_limit", _HOLD_BYTES, minimum=_LEAST_HOLD_BYTES),
        suspend=top.choice("suspend", SuspendVia, SuspendVia.AUTO),
        disks=disks,
        nics=nics,
    )
    top.done()
    _distinct(top, "vdev", [disk.vdev for disk in disks], f"on {host}: another disk of this guest")
    _distinct(top, "path", [disk.path for disk in disks], f"on {host}: another disk of this guest")
    return config


def vif_name(domid: int | None, devid: int) -> str:
    """Return the host's name of a virtual interface, ``vif*.N`` where the domain does not run.

    Source: drivers/net/xen-netback/interface.c of Linux (``xenvif_alloc``); tools/libs/light/libxl_osdeps.h of Xen.
    """
    return f"vif{'*' if domid is None else domid}.{devid}"


def _disk(entry: Table, index: int, source: Path) -> Disk:
    path = entry.str("path", "")
    return Disk(
        name=_device_name(entry, "disk", index),
        vdev=entry.str("vdev", pattern=_VDEV, allowed=_VDEV_WORDS),
        path=_path(path, source) if path else None,
        read_only=entry.bool("read_only", default=False),
        subkind=entry.str("subkind", "auto"),
    )


def _nic(entry: Table, index: int) -> Nic:
    script = entry.str("script", "")
    return Nic(
        name=_device_name(entry, "nic", index),
        devid=index,
        bridge=entry.str("bridge", "", pattern=_INTERFACE, allowed="the name of a network interface"),
        script=_SCRIPTS / script if script else None,  # where libxl looks for one without a directory, too
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


def _disk_info(disk: Disk, index: int) -> DeviceInfo:
    properties: dict[str, Any] = {"vdev": disk.vdev, "read_only": disk.read_only}
    if disk.path is not None:
        properties["path"] = str(disk.path)
    return DeviceInfo(Kind.DISK, disk.name, index, HYPERVISOR, disk.subkind, MappingProxyType(properties))


def _nic_info(nic: Nic) -> DeviceInfo:
    properties = {"vif": vif_name(None, nic.devid), "devid": nic.devid, "bridge": nic.bridge}
    return DeviceInfo(Kind.NIC, nic.name, nic.devid, HYPERVISOR, nic.subkind, MappingProxyType(properties))


def _path(text: str, source: Path) -> Path:
    return Path(os.path.abspath(source.parent / text))  # noqa: PTH100 - resolve() would follow symbolic links


def _distinct(top: Table, key: str, values: Sequence[object], whose: str) -> None:
    for index, value in enumerate(values):
        if value is not None and value in values[:index]:
            raise top.error(f"disk[{index}].{key}", f"{value} is {whose} already", "one disk each")
