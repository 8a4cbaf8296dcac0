"""A domain's configuration as libxl writes it: read what matters here, and make the copy's for this host of it.

The JSON is what stands before every migration stream, and what ``xl list -l`` prints. What is not named here goes
through untouched; a field that has its default is not written by libxl at all.

Source: tools/libs/light/libxl_types.idl (``libxl_domain_config``) and gentypes.py of Xen 4.14 to 4.22: a field is left
out while it equals its initial value; tools/xl/xl_migrate.c (the suffix).
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from understudy.errors import HypervisorError
from understudy_xen.guestfile import XenConfig
from understudy_xen.libs.domain import DomainType

__all__ = ["EVENTS", "INCOMING", "PRESERVE", "ConfigMismatch", "DomainConfig", "DomainDisk", "DomainNic"]

Json = dict[str, Any]

INCOMING: Final = "--incoming"  #: what is appended to the name of a copy; the same as with xl
PRESERVE: Final = "preserve"
#: What ends a domain. Where the configuration does not say what follows, it is destroyed (init_val in the IDL).
EVENTS: Final = ("on_poweroff", "on_reboot", "on_watchdog", "on_crash", "on_soft_reset")
_DEFAULT_ACTION: Final = "destroy"
_DEFBOOL_TRUE: Final = ("True", True)
_DEFBOOL_FALSE: Final = ("False", False)
#: Lists of a configuration whose entries are devices of the host that the guest uses by itself.
_PASSED_THROUGH: Final = ("pcidevs", "dtdevs", "usbdevs")
_PASSED_THROUGH_BUILD: Final = ("ioports", "irqs", "iomem")


class ConfigMismatch(HypervisorError):
    """A domain's configuration is not what its guest file describes, or is none at all.

    Args:
        where: The field, e.g. ``"disks[1].vdev"``.
        problem: What is wrong with it, one clause.
        remedy: What would mend it.
    """

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        super().__init__(f"the domain's configuration: {where} {problem}" + (f"; {remedy}" if remedy else ""))
        self.where = where
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class DomainNic:
    """One virtual interface of a domain."""

    devid: int
    mac: str
    bridge: str  #: ``""``: libxl's default
    script: str  #: ``""``: libxl's default
    emulated: bool  #: the device model has a second way out beside the vif, ``vifD.N-emu``
    driver_domain: str  #: domain that serves it, by name or number; ``""``: dom0


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """One disk of a domain."""

    vdev: str
    path: str  #: ``""``: an empty drive
    format: str  #: ``raw``, ``qcow2`` …, ``""`` where libxl has to find out
    backend: str  #: ``phy``, ``qdisk``, ``tap``, ``""`` where libxl chooses
    read_only: bool
    cdrom: bool
    driver_domain: str  #: domain that serves it, by name or number; ``""``: dom0


@dataclass(frozen=True, slots=True)
class DomainConfig:
    """The configuration of one domain; `tree` is never changed."""

    tree: Json
    name: str
    kind: DomainType
    uuid: uuid.UUID | None
    max_memory_bytes: int
    target_memory_bytes: int
    video_memory_bytes: int
    max_vcpus: int
    nics: tuple[DomainNic, ...]
    disks: tuple[DomainDisk, ...]
    on_events: Mapping[str, str]  #: what libxl does at each of `EVENTS`
    passed_through: tuple[str, ...]  #: kinds of host devices that it uses by itself
    nested: bool  #: it may run a hypervisor itself
    hap: bool  #: it may have hardware assisted paging, where the host has it
    vnuma: bool  #: it was given a NUMA topology
    stubdomain: bool  #: its device model runs in a domain of its own
    tsc_mode: str  #: ``default``, ``native`` …

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read a configuration.

        Args:
            text: JSON, perhaps with the NUL that ends it in a stream's preamble.

        Raises:
            ConfigMismatch: It is no JSON, or not what libxl writes.
        """
        try:
            tree = json.loads(text.rstrip(b"\0") if isinstance(text, bytes) else text.rstrip("\0"))
        except ValueError as error:
            raise ConfigMismatch("as a whole", f"is no JSON: {error}") from error
        return cls.of(_table(tree, "as a whole"))

    @classmethod
    def of(cls, tree: Json) -> Self:
        """Read a configuration that was parsed, or is a part of what ``xl list -l`` prints.

        Raises:
            ConfigMismatch: It is not what libxl writes.
        """
        create, build = _table(tree.get("c_info"), "c_info"), _table(tree.get("b_info"), "b_info")
        kind = _kind(create.get("type"))
        max_memkb = _number(build, "max_memkb", "b_info")
        return cls(
            tree=tree,
            name=_text(create, "name", "c_info"),
            kind=kind,
            uuid=_uuid(create.get("uuid")),
            max_memory_bytes=max_memkb << 10,
            target_memory_bytes=_number(build, "target_memkb", "b_info", max_memkb) << 10,
            video_memory_bytes=max(0, _number(build, "video_memkb", "b_info", 0)) << 10,
            max_vcpus=_number(build, "max_vcpus", "b_info", 1),
            nics=tuple(_nic(entry, index, kind) for index, entry in enumerate(_tables(tree, "nics"))),
            disks=tuple(_disk(entry, index) for index, entry in enumerate(_tables(tree, "disks"))),
            on_events={event: str(tree.get(event, _DEFAULT_ACTION)) for event in EVENTS},
            passed_through=(
                *(key for key in _PASSED_THROUGH if tree.get(key)),
                *(key for key in _PASSED_THROUGH_BUILD if build.get(key)),
            ),
            nested=any(
                part.get("nested_hvm") in _DEFBOOL_TRUE for part in (build, build.get("type.hvm") or {})
            ),
            hap=create.get("hap") not in _DEFBOOL_FALSE,
            vnuma=bool(build.get("vnuma_nodes")),
            stubdomain=build.get("device_model_stubdomain") in _DEFBOOL_TRUE,
            tsc_mode=str(build.get("tsc_mode", "default")),
        )

    def require(self, config: XenConfig) -> None:
        """Check that the domain has the devices that its guest file describes, no more and no fewer.

        Raises:
            ConfigMismatch: It has others.
        """
        for key, has, described in (
            ("nics", len(self.nics), len(config.nics)),
            ("disks", len(self.disks), len(config.disks)),
        ):
            if has != described:
                kind = key.removesuffix("s")
                raise ConfigMismatch(
                    key,
                    f"are {has}, {config.source} describes {described}",
                    f"write one [[{kind}]] for each {kind} of the domain, in its order",
                )
        for index, (disk, wanted) in enumerate(zip(self.disks, config.disks, strict=True)):
            if disk.vdev != wanted.vdev:
                raise ConfigMismatch(
                    f"disks[{index}].vdev",
                    f"is {disk.vdev}, {config.source} calls {wanted.name} {wanted.vdev}",
                    "write the [[disk]] tables in the order of the domain's disks",
                )
            if wanted.read_only and not disk.read_only:
                raise ConfigMismatch(
                    f"disks[{index}]", "may be written to, the guest file says read_only", "let them agree"
                )

    def for_copy(self, config: XenConfig) -> Self:
        """Return the configuration of a copy on this host.

        Args:
            config: The guest as its file describes it on this host.

        Returns:
            Named with `INCOMING`, its interfaces and disks as they are here, and with nothing that libxl would do by
            itself when the copy ends: it is the same guest afterwards, and its end is for its owner to decide.

        Raises:
            ConfigMismatch: The domain is not what the guest file describes.
        """
        self.require(config)
        tree = copy.deepcopy(self.tree)
        tree["c_info"]["name"] = f"{config.name}{INCOMING}"
        tree["c_info"].pop("domid", None)
        for entry, nic in zip(_tables(tree, "nics"), config.nics, strict=True):
            entry.pop("ifname", None)  # of the domain that runs on the primary
            if nic.bridge:
                entry["bridge"] = nic.bridge
            if nic.script is not None:
                entry["script"] = str(nic.script)
        for entry, disk in zip(_tables(tree, "disks"), config.disks, strict=True):
            if disk.path is not None:
                entry["pdev_path"] = str(disk.path)
        tree |= dict.fromkeys(EVENTS, PRESERVE)
        return type(self).of(tree)

    def to_json(self) -> str:
        """Return it as libxl reads it, without a NUL at its end."""
        return json.dumps(self.tree)


def _nic(entry: Json, index: int, kind: DomainType) -> DomainNic:
    # In an HVM guest an interface is emulated, too, unless its configuration says otherwise. Source: libxl_nic.c.
    default = "vif_ioemu" if kind is DomainType.HVM else "vif"
    kind_of_nic = str(entry.get("nictype", default))
    return DomainNic(
        devid=_number(entry, "devid", f"nics[{index}]", index),
        mac=str(entry.get("mac", "")).lower(),
        bridge=str(entry.get("bridge", "")),
        script=str(entry.get("script", "")),
        emulated=kind_of_nic == "vif_ioemu",
        driver_domain=_driver_domain(entry),
    )


def _disk(entry: Json, index: int) -> DomainDisk:
    return DomainDisk(
        vdev=_text(entry, "vdev", f"disks[{index}]"),
        path=str(entry.get("pdev_path") or ""),
        format=_known(entry.get("format")),
        backend=_known(entry.get("backend")),
        read_only=not entry.get("readwrite", 0),
        cdrom=bool(entry.get("is_cdrom", 0)),
        driver_domain=_driver_domain(entry),
    )


def _driver_domain(entry: Json) -> str:
    return str(entry.get("backend_domname") or entry.get("backend_domid") or "")


def _known(value: object) -> str:
    return "" if value in {None, "unknown"} else str(value)


def _kind(value: object) -> DomainType:
    try:
        return DomainType(value)
    except ValueError:
        allowed = ", ".join(kind.value for kind in DomainType)
        raise ConfigMismatch("c_info.type", f"is {value!r}", f"known are {allowed}") from None


def _uuid(value: object) -> uuid.UUID | None:
    if value is None:
        return None
    try:
        return uuid.UUID(str(value))
    except ValueError:
        raise ConfigMismatch("c_info.uuid", f"is {value!r}, which is none") from None


def _table(value: object, where: str) -> Json:
    if not isinstance(value, dict):
        raise ConfigMismatch(where, "is no table" if value is not None else "is missing")
    return value


def _tables(tree: Json, key: str) -> list[Json]:
    entries = tree.get(key) or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigMismatch(key, "is no list of tables")
    return entries


def _text(table: Json, key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigMismatch(f"{where}.{key}", "is missing" if value is None else f"is {value!r}")
    return value


def _number(table: Json, key: str, where: str, default: int | None = None) -> int:
    value = table.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigMismatch(f"{where}.{key}", "is missing" if value is None else f"is {value!r}")
    return value
