"""Find the domains of this host, and what they consist of, in xenstore and at the hypervisor.

libxl keeps a domain's devices under ``/libxl/<domid>/device/<kind>/<devid>``, each with the paths of its two halves;
what is there is what the toolstack made, not what a guest claims. Everything is read in one transaction per domain, so
that a device that comes or goes meanwhile is seen whole or not at all.

Source: Xen docs/misc/xenstore-paths.pandoc; tools/libs/light/libxl_nic.c (libxl__set_xenstore_nic,
libxl__device_nic_devname), libxl_disk.c (device_disk_add), libxl_create.c (libxl__domain_make), libxl_dm.c
(device-model-pid, device-model-domid); xen/include/public/io/xenbus.h (enum xenbus_state), 4.17.0.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from understudy_xen.libs.domain import DomainInfo, DomainType
from understudy_xen.libs.xen import Xen
from understudy_xen.xenstore import Transaction, XenStore

__all__ = ["Disk", "Domain", "Nic", "XenbusState", "domain_of", "domains", "find"]

_BACKEND = re.compile(r"/local/domain/(?P<domid>[0-9]+)/backend/(?P<kind>[a-z0-9_]+)/[0-9]+/[0-9]+")
_FORMATS: Final = {"aio": "raw"}  # what a qdisk's parameters call it, as xl does


class XenbusState(IntEnum):
    """Where one half of a device is."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


@dataclass(frozen=True, slots=True)
class Nic:
    """A network interface of a domain."""

    devid: int
    interface: str  #: of the backend's host, e.g. ``"vif3.0"``
    mac: str
    bridge: str  #: ``""`` if it is on none
    script: str  #: hotplug script, an absolute path
    backend_domid: int
    emulated: bool  #: the device model has a card for it, too, at the interface with ``-emu`` at its end
    state: XenbusState  #: of the backend
    backend_path: str  #: in xenstore

    @property
    def name(self) -> str:
        """Its name among the domain's devices, e.g. ``"nic0"``."""
        return f"nic{self.devid}"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a domain."""

    devid: int
    vdev: str  #: as the guest sees it, e.g. ``"xvda"``
    backend: str  #: ``"phy"``, ``"qdisk"`` or what else libxl calls it
    format: str  #: ``"raw"``, ``"qcow2"``, ...
    target: str  #: path of the image or block device; ``""`` for an empty drive
    script: str  #: hotplug script, ``""`` if there is none
    writable: bool
    cdrom: bool
    backend_domid: int
    state: XenbusState  #: of the backend
    backend_path: str  #: in xenstore


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain with its devices."""

    domid: int
    name: str
    uuid: uuid.UUID
    kind: DomainType
    info: DomainInfo  #: what the hypervisor says
    nics: tuple[Nic, ...]  #: in the order of their numbers
    disks: tuple[Disk, ...]  #: likewise
    console_tty: str  #: ``""`` if nobody serves it yet
    device_model_pid: int | None  #: of the QEMU in dom0: an HVM domain's, or one that only serves disks
    stubdom: int | None  #: domain in which its device model runs instead


async def domains(store: XenStore, xen: Xen) -> list[Domain]:
    """Return every domain but dom0 that is not being destroyed, in the order of their numbers."""
    found = await asyncio.gather(*(domain_of(store, info) for info in xen.domains() if info.domid))
    return [domain for domain in found if domain is not None]


async def find(store: XenStore, xen: Xen, name: str) -> Domain | None:
    """Return the domain of a name, ``None`` if there is none."""
    infos = [info for info in xen.domains() if info.domid and not info.dying]
    names = await asyncio.gather(*(store.get(f"/local/domain/{info.domid}/name") for info in infos))
    for info, its in zip(infos, names, strict=True):
        if its == name:
            return await domain_of(store, info)
    return None


async def domain_of(store: XenStore, info: DomainInfo) -> Domain | None:
    """Return a domain with its devices, ``None`` if it is gone or being destroyed.

    Args:
        store: Xenstore.
        info: What the hypervisor says of it.

    Raises:
        XenStoreError: Xenstored cannot be asked.
    """
    if info.dying:
        return None

    async def look(t: Transaction) -> Domain | None:
        base = f"/local/domain/{info.domid}"
        name, kind, tty, pid, stubdom = await asyncio.gather(
            t.get(f"{base}/name"),
            t.get(f"/libxl/{info.domid}/type"),
            t.get(f"{base}/console/tty"),
            t.get(f"{base}/image/device-model-pid"),
            t.get(f"{base}/image/device-model-domid"),
        )
        if name is None:
            return None
        known = {each.value: each for each in DomainType}
        return Domain(
            domid=info.domid,
            name=name,
            uuid=info.uuid,
            kind=known.get(kind or "", info.kind),
            info=info,
            nics=tuple(await _nics(t, info.domid)),
            disks=tuple(await _disks(t, info.domid)),
            console_tty=tty or "",
            device_model_pid=int(pid) if pid and pid.isdecimal() else None,
            stubdom=int(stubdom) if stubdom and stubdom.isdecimal() and int(stubdom) else None,
        )

    return await store.atomically(look)


async def _devices(t: Transaction, domid: int, *kinds: str) -> list[tuple[int, str, Mapping[str, str]]]:
    # Number, path and values of the backend of each device of these kinds.
    async def values(path: str) -> dict[str, str]:
        names = await t.children(path)
        read = await asyncio.gather(*(t.get(f"{path}/{name}") for name in names))
        return {name: value for name, value in zip(names, read, strict=True) if value is not None}

    async def of_kind(kind: str) -> list[tuple[int, str]]:
        base = f"/libxl/{domid}/device/{kind}"
        devids = [name for name in await t.children(base) if name.isdecimal()]
        backends = await asyncio.gather(*(t.get(f"{base}/{devid}/backend") for devid in devids))
        return [(int(devid), path) for devid, path in zip(devids, backends, strict=True) if path]

    found = [device for kind in kinds for device in await of_kind(kind)]
    held = await asyncio.gather(*(values(path) for _, path in found))
    return sorted((devid, path, its) for (devid, path), its in zip(found, held, strict=True))


async def _nics(t: Transaction, domid: int) -> list[Nic]:
    return [
        Nic(
            devid=devid,
            interface=its.get("vifname") or f"vif{domid}.{devid}",
            mac=its.get("mac", ""),
            bridge=its.get("bridge", ""),
            script=its.get("script", ""),
            backend_domid=_backend_domid(path),
            emulated=its.get("type") == "vif_ioemu",
            state=_state(its),
            backend_path=path,
        )
        for devid, path, its in await _devices(t, domid, "vif")
    ]


async def _disks(t: Transaction, domid: int) -> list[Disk]:
    disks: list[Disk] = []
    for devid, path, its in await _devices(t, domid, "vbd", "qdisk"):
        backend = its.get("type", "")
        form, target = "raw", its.get("params", "")
        if backend == "qdisk":
            form, _, target = target.partition(":")
        disks.append(
            Disk(
                devid=devid,
                vdev=its.get("dev", ""),
                backend=backend,
                format=_FORMATS.get(form, form),
                target=target,
                script=its.get("script", ""),
                writable="w" in its.get("mode", ""),
                cdrom=its.get("device-type") == "cdrom",
                backend_domid=_backend_domid(path),
                state=_state(its),
                backend_path=path,
            )
        )
    return disks


def _backend_domid(path: str) -> int:
    match = _BACKEND.fullmatch(path)
    return int(match["domid"]) if match else 0


def _state(values: Mapping[str, str]) -> XenbusState:
    try:
        return XenbusState(int(values.get("state", "0")))
    except ValueError:
        return XenbusState.UNKNOWN
