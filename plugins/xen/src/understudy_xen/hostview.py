"""What a host has, as far as the preflight of a Xen guest asks: a snapshot in plain values, and how it is taken.

Nothing is opened that could be in use: the size of a block device comes from sysfs, because a DRBD device in the
secondary's role refuses to be opened.

Source: Linux Documentation/ABI (sysfs-dev, sysfs-class-net), proc(5).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from understudy_xen.libs.errors import XenUnavailable
from understudy_xen.libs.versions import XenVersion
from understudy_xen.libs.xen import PAGE_BYTES, Capabilities, Xen

__all__ = ["Cpu", "HostView", "bridge_problem", "look", "path_problem", "script_problem", "size_bytes"]

_ROOT: Final = Path("/")
_SECTOR_BYTES: Final = 512  # of sysfs, whatever the device's own sectors are


@dataclass(frozen=True, slots=True)
class Cpu:
    """A host's processors, as its control domain sees them."""

    vendor: str
    family: int
    model: int
    flags: frozenset[str]
    tsc_mhz: float  #: frequency of the time-stamp counter, 0 where it is not told

    @classmethod
    def read(cls, root: Path = _ROOT) -> Self:
        """Read it of the first processor; what is not told is empty.

        Args:
            root: Where ``proc`` is.
        """
        try:
            lines = (root / "proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        except OSError:
            lines = []
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        return cls.of(
            {
                "vendor": told.get("vendor_id", ""),
                "family": told.get("cpu family", "0"),
                "model": told.get("model", "0"),
                "flags": told.get("flags", "").split(),
                "tsc_mhz": told.get("cpu MHz", "0"),
            }
        )

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """Return the one that `to_json` told of."""
        return cls(
            vendor=str(facts.get("vendor", "")),
            family=int(facts.get("family", 0)),
            model=int(facts.get("model", 0)),
            flags=frozenset(facts.get("flags", ())),
            tsc_mhz=float(facts.get("tsc_mhz", 0)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON-able object."""
        return {
            "vendor": self.vendor,
            "family": self.family,
            "model": self.model,
            "flags": sorted(self.flags),
            "tsc_mhz": self.tsc_mhz,
        }


@dataclass(frozen=True, slots=True)
class HostView:
    """What one host has."""

    name: str
    obstacles: tuple[tuple[str, str], ...]  #: why Xen cannot be used here, each with what would change it
    version: XenVersion | None
    capabilities: Capabilities | None  #: of the hypervisor, its memory included
    domains: frozenset[str]  #: names of the domains that exist
    cpu: Cpu
    available_bytes: (
        int | None
    )  #: memory that the control domain itself can still give, ``None`` if it is not told

    @property
    def free_bytes(self) -> int | None:
        """Memory of the hypervisor that no domain has or was promised, ``None`` if it is not known."""
        if self.capabilities is None:
            return None
        return (self.capabilities.free_pages - self.capabilities.outstanding_pages) * PAGE_BYTES


def look(
    name: str,
    xen: Xen | None,
    domains: Sequence[str],
    obstacles: Sequence[XenUnavailable | tuple[str, str]],
    *,
    root: Path = _ROOT,
) -> HostView:
    """Take a snapshot of this host.

    Args:
        name: Of the host.
        xen: The hypervisor, ``None`` if it cannot be used; `obstacles` says why, then.
        domains: Names of the domains that exist.
        obstacles: What stands against using Xen: the error of each part, or a problem with its remedy.
        root: Where ``proc`` is.

    Raises:
        HypervisorError: The hypervisor does not tell what it has.
    """
    return HostView(
        name=name,
        obstacles=tuple(
            (each.problem, each.remedy) if isinstance(each, XenUnavailable) else each for each in obstacles
        ),
        version=xen.version if xen is not None else None,
        capabilities=xen.capabilities() if xen is not None else None,
        domains=frozenset(domains),
        cpu=Cpu.read(root),
        available_bytes=_available_bytes(root),
    )


def script_problem(path: Path) -> str:
    """Return why libxl could not run a hotplug script, one clause; ``""`` if it can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{path} cannot be run: {error.strerror}"
    if not stat.S_ISREG(mode):
        return f"{path} is no file"
    return "" if os.access(path, os.X_OK) else f"{path} is not executable"


def bridge_problem(name: str, root: Path = _ROOT) -> str:
    """Return why an interface could not be put on a bridge, one clause; ``""`` if it can.

    Args:
        name: The bridge's.
        root: Where ``sys`` is.
    """
    interface = root / "sys/class/net" / name
    if not interface.exists():
        return f"there is no interface {name}"
    return "" if (interface / "bridge").is_dir() else f"{name} is no bridge"


def path_problem(path: Path) -> str:
    """Return why a path could not be a disk, one clause; ``""`` if it can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{path} cannot be used: {error.strerror}"
    fits = stat.S_ISBLK(mode) or stat.S_ISREG(mode)
    return "" if fits else f"{path} is neither a block device nor a file"


def size_bytes(path: Path, root: Path = _ROOT) -> int | None:
    """Return the size of a block device or file without opening it, ``None`` if there is none.

    Args:
        path: What is to be measured.
        root: Where ``sys`` is.
    """
    try:
        status = path.stat()
        if not stat.S_ISBLK(status.st_mode):
            return status.st_size if stat.S_ISREG(status.st_mode) else None
        major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        return int((root / f"sys/dev/block/{major}:{minor}/size").read_text()) * _SECTOR_BYTES
    except (OSError, ValueError):
        return None


def _available_bytes(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    told = next((line.split() for line in lines if line.startswith("MemAvailable:")), [])
    return int(told[1]) << 10 if len(told) > 1 and told[1].isdecimal() else None
