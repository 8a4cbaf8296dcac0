"""Can this Xen guest be protected? Facts for the other host, and findings, from what is known of host and domain.

Nothing here asks the hypervisor or xenstore: what they say comes in as a `HostView` and a `DomainConfig`. What takes a
look at this host's files (scripts, bridges, disks) is `look_at_devices`.

Members of the facts: ``host``, ``xen`` (version, or ``None``), ``cpu`` (`Cpu.to_json`), ``guest`` (``None`` where it
does not run; else ``kind``, ``max_memory_bytes``, ``max_vcpus``, ``video_memory_bytes``, ``hap``, ``tsc_mode``),
``disks`` (by name: ``path``, ``format``, ``size_bytes`` or ``None``), ``nics`` (by name: ``bridge``, ``script``).

Source: facts of Xen 4.17 that a check rests on are named where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from understudy.device import Finding, Severity
from understudy_xen.domainconfig import EVENTS, INCOMING, PRESERVE, ConfigMismatch, DomainConfig
from understudy_xen.guestfile import XenConfig
from understudy_xen.hostview import Cpu, HostView, bridge_problem, path_problem, script_problem, size_bytes
from understudy_xen.libs.domain import DomainType
from understudy_xen.libs.versions import XenVersion
from understudy_xen.libs.xen import PAGE_BYTES
from understudy_xen.unprotected import UNBUFFERED

__all__ = ["Devices", "facts", "look_at_devices", "memory_bytes", "of_guest", "of_host", "of_place"]

Facts = Mapping[str, Any]

#: The events at which a domain must stay for its owner to decide; the other ones do not happen to most guests.
_MUST_STAY: Final = ("on_poweroff", "on_reboot", "on_crash")
_SCRIPTS: Final = Path("/etc/xen/scripts")
_SCRIPT: Final = "vif-bridge"  # what libxl takes where nothing is said; libxl_nic.c
_BRIDGE: Final = "xenbr0"  # likewise
_BRIDGING: Final = ("vif-bridge", "vif-understudy")  # scripts that put the interface on a bridge of Linux
_MIB: Final = 1 << 20
_MAXMEM_SLACK_BYTES: Final = 1 << 20  # LIBXL_MAXMEM_CONSTANT
_TSC_TOLERANCE: Final = 0.001
_FEW_FLAGS: Final = 6


@dataclass(frozen=True, slots=True)
class Devices:
    """What this host has for the devices of a copy, by name."""

    scripts: Mapping[str, str]  #: problem of each interface's hotplug script, ``""`` if there is none
    bridges: Mapping[str, str]  #: problem of each interface's bridge
    paths: Mapping[str, str]  #: problem of each disk's path
    sizes: Mapping[str, int | None]  #: of each disk, bytes


def facts(view: HostView, config: XenConfig, domain: DomainConfig | None) -> Facts:
    """Return what the other host's preflight must know, JSON-able.

    Args:
        view: This host.
        config: The guest as its file describes it here.
        domain: The configuration of its domain, ``None`` where it does not run.
    """
    told: dict[str, Any] = {
        "host": view.name,
        "xen": str(view.version) if view.version is not None else None,
        "cpu": view.cpu.to_json(),
        "guest": None,
        "disks": {},
        "nics": {},
    }
    if domain is None:
        return told
    told["guest"] = {
        "kind": domain.kind.value,
        "max_memory_bytes": domain.max_memory_bytes,
        "max_vcpus": domain.max_vcpus,
        "video_memory_bytes": domain.video_memory_bytes,
        "hap": domain.hap and view.capabilities is not None and view.capabilities.hap,
        "tsc_mode": domain.tsc_mode,
    }
    for index, disk in enumerate(domain.disks[: len(config.disks)]):
        path = config.disks[index].path or (Path(disk.path) if disk.path else None)
        told["disks"][config.disks[index].name] = {
            "path": str(path or ""),
            "format": disk.format,
            "size_bytes": size_bytes(path) if path is not None else None,
        }
    for index, nic in enumerate(domain.nics[: len(config.nics)]):
        told["nics"][config.nics[index].name] = {"bridge": nic.bridge, "script": nic.script}
    return told


def look_at_devices(config: XenConfig, peer: Facts, *, root: Path = Path("/")) -> Devices:
    """Look at what this host has for the devices of a copy; nothing is opened.

    Args:
        config: The guest as its file describes it here.
        peer: The primary's facts, for what the file leaves to the domain's configuration.
        root: Where ``sys`` is.
    """
    scripts, bridges, paths, sizes = {}, {}, {}, {}
    for nic in config.nics:
        theirs = peer.get("nics", {}).get(nic.name, {})
        script = nic.script or _SCRIPTS / (theirs.get("script") or _SCRIPT)
        scripts[nic.name] = script_problem(script)
        if script.name in _BRIDGING:
            bridges[nic.name] = bridge_problem(nic.bridge or theirs.get("bridge") or _BRIDGE, root)
    for disk in config.disks:
        path = disk.path or Path(peer.get("disks", {}).get(disk.name, {}).get("path") or "")
        if path != Path():
            paths[disk.name], sizes[disk.name] = path_problem(path), size_bytes(path, root)
    return Devices(scripts, bridges, paths, sizes)


def memory_bytes(guest: Facts) -> int:
    """Return how much memory of the hypervisor a copy takes, bytes.

    Args:
        guest: ``guest`` of the primary's facts.

    Source: tools/libs/light/libxl_create.c (``libxl__get_required_paging_memory``), libxl_internal.h.
    """
    memory, vcpus = int(guest["max_memory_bytes"]), int(guest["max_vcpus"])
    pages_per_mib = int(guest["kind"] != DomainType.PV.value) + int(not guest["hap"])
    paging = PAGE_BYTES * (256 * vcpus + pages_per_mib * memory // _MIB)
    return memory + int(guest["video_memory_bytes"]) + paging + _MAXMEM_SLACK_BYTES


# --- Findings --------------------------------------------------------------------------------------------------------


def of_host(view: HostView) -> Iterator[Finding]:
    """Say what stands against using Xen on this host at all."""
    for problem, remedy in view.obstacles:
        yield _error(f"Xen on {view.name}", problem, remedy)


def of_guest(view: HostView, config: XenConfig, domain: DomainConfig) -> Iterator[Finding]:
    """Say what stands against protecting a domain that runs on this host."""
    subject = f"guest {config.name} on {view.name}"
    try:
        domain.require(config)
    except ConfigMismatch as mismatch:
        yield _error(
            subject, f"{mismatch.where} of its domain {mismatch.problem}", mismatch.remedy or "correct it"
        )
    yield from _of_kind(subject, view, domain)
    yield from _of_events(subject, domain)
    yield from _of_contents(subject, domain)
    yield from _of_ways_out(view, config, domain)


def of_place(view: HostView, config: XenConfig, peer: Facts, devices: Devices) -> Iterator[Finding]:
    """Say what stands against holding a copy on this host.

    Args:
        view: This host.
        config: The guest as its file describes it here.
        peer: The primary's facts.
        devices: What this host has for the guest's devices.
    """
    subject = f"guest {config.name} on {view.name}"
    for name in (config.name, f"{config.name}{INCOMING}"):
        if name in view.domains:
            problem = f"a domain of the name {name} exists here, the copy needs the name"
            yield _error(subject, problem, f"end it, or rename it: xl destroy {name}")
    yield from _of_devices(view, config, peer, devices)
    yield from _of_memory(view, config, peer.get("guest"))
    yield from _of_version(view, peer)
    yield from _of_cpu(view, peer)


def _of_kind(subject: str, view: HostView, domain: DomainConfig) -> Iterator[Finding]:
    has = view.capabilities
    if has is None:
        return
    if domain.kind is DomainType.PV and not has.shadow:
        problem = (
            "a PV guest needs log-dirty by shadow paging, which this Xen was built without; "
            "PVH and HVM guests work"
        )
        remedy = 'let it run as type = "pvh", or build Xen with CONFIG_SHADOW_PAGING'
        yield _error(subject, problem, remedy)
    elif domain.kind is not DomainType.PV and not (has.hap or has.shadow):
        problem = "its dirty pages cannot be found: this Xen has neither hardware assisted nor shadow paging"
        yield _error(subject, problem, "enable it in the firmware, and let Xen use it (hap=1)")


def _of_events(subject: str, domain: DomainConfig) -> Iterator[Finding]:
    wrong = [event for event in EVENTS if domain.on_events[event] != PRESERVE]
    for severity, events in (
        (Severity.ERROR, [event for event in wrong if event in _MUST_STAY]),
        (Severity.WARNING, [event for event in wrong if event not in _MUST_STAY]),
    ):
        if events:
            told = ", ".join(f'{event} = "{domain.on_events[event]}"' for event in events)
            problem = f"its domain would be ended or renewed behind our back ({told})"
            lines = "; ".join(f'{event} = "{PRESERVE}"' for event in events)
            remedy = f"write into its xl configuration: {lines}; then start it anew"
            yield Finding(severity, subject, problem, remedy)


def _of_contents(subject: str, domain: DomainConfig) -> Iterator[Finding]:
    # The hypervisor refuses log-dirty with devices assigned (paging_log_dirty_enable), libxl refuses to save vNUMA
    # (libxl_dom_save.c), and no record of a stream carries the state of a nested hypervisor (arch-x86/hvm/save.h).
    if domain.passed_through:
        problem = f"it uses devices of its host by itself ({', '.join(domain.passed_through)})"
        yield _error(subject, problem, "detach them")
    if domain.vnuma:
        problem = "it has a virtual NUMA topology, which a migration stream does not carry"
        yield _error(subject, problem, "remove vnuma from its xl configuration")
    if domain.nested:
        problem = "it may run a hypervisor itself, whose state a migration stream does not carry"
        yield _error(subject, problem, "set nestedhvm = 0 in its xl configuration")
    if domain.stubdomain:
        problem = "its device model runs in a domain of its own, where its state cannot be asked for"
        yield _error(subject, problem, "set device_model_stubdomain_override = 0 in its xl configuration")


def _of_ways_out(view: HostView, config: XenConfig, domain: DomainConfig) -> Iterator[Finding]:
    for wanted, nic in zip(config.nics, domain.nics, strict=False):
        subject = f"{wanted.name} on {view.name}"
        if nic.emulated and wanted.subkind != UNBUFFERED.name:
            problem = (
                f"the guest has an emulated card beside its interface, and what leaves through vifD.{nic.devid}-emu "
                "does not pass the gate"
            )
            yield _error(
                subject, problem, "write type=vif into its vif= in the xl configuration", unsafe=True
            )
        if nic.driver_domain:
            problem = f"the domain {nic.driver_domain} serves it, and the gate can only stand in dom0"
            yield _error(subject, problem, "remove backend= from its vif= in the xl configuration")
    for wanted_disk, disk in zip(config.disks, domain.disks, strict=False):
        if disk.driver_domain:
            problem = f"the domain {disk.driver_domain} serves it, where nobody stops its writes"
            remedy = "remove backend= from its disk= in the xl configuration"
            yield _error(f"{wanted_disk.name} on {view.name}", problem, remedy)


def _of_devices(view: HostView, config: XenConfig, peer: Facts, devices: Devices) -> Iterator[Finding]:
    here = view.name
    for nic in config.nics:
        # Trap: libxl destroys the domain that it has just restored when a script fails.
        if problem := devices.scripts.get(nic.name):
            remedy = f"install it, or name another one in [host.{here}]: without it a takeover fails"
            yield _error(f"{nic.name} on {here}", f"its hotplug script {problem}", remedy)
        if problem := devices.bridges.get(nic.name):
            remedy = f"make it (ip link add BRIDGE type bridge), or name another one in [host.{here}]"
            yield _error(f"{nic.name} on {here}", problem, remedy)
    for disk in config.disks:
        subject = f"{disk.name} on {here}"
        theirs = peer.get("disks", {}).get(disk.name, {})
        wanted, has = theirs.get("size_bytes"), devices.sizes.get(disk.name)
        if problem := devices.paths.get(disk.name):
            yield _error(subject, problem, f"make it, or name another path in [host.{here}]")
        elif theirs.get("format") in {"raw", ""} and wanted is not None and has is not None and has < wanted:
            problem = f"it has {has} bytes, the primary's has {wanted}"
            yield _error(subject, problem, "make it at least as large as the primary's")


def _of_memory(view: HostView, config: XenConfig, guest: Facts | None) -> Iterator[Finding]:
    need = memory_bytes(guest) if guest is not None else 0
    if view.free_bytes is not None and view.free_bytes < need:
        problem = f"the hypervisor has {_mib(view.free_bytes)} of free memory, a copy of the guest needs {_mib(need)}"
        remedy = "end or shrink a domain, or give dom0 less memory (dom0_mem=)"
        yield _error(f"memory on {view.name}", problem, remedy)
    if view.available_bytes is not None and view.available_bytes < config.hold_limit_bytes:
        problem = (
            f"checkpoints of up to {_mib(config.hold_limit_bytes)} may be held here, and dom0 has "
            f"{_mib(view.available_bytes)} available"
        )
        remedy = f"give dom0 more memory, or lower hold_limit in [host.{view.name}]"
        yield Finding(Severity.WARNING, f"memory on {view.name}", problem, remedy)


def _of_version(view: HostView, peer: Facts) -> Iterator[Finding]:
    theirs = _version(peer.get("xen"))
    if theirs is None or view.version is None or theirs == view.version:
        return
    subject = f"Xen on {view.name}"
    if view.version < theirs:
        problem = (
            f"it is {view.version}, older than the primary's {theirs}: it cannot restore what that one saves"
        )
        yield _error(subject, problem, "install the same version on both hosts")
    else:
        problem = (
            f"it is {view.version}, newer than the primary's {theirs}: after a takeover there is no way back"
        )
        remedy = "install the same version on both hosts"
        yield Finding(Severity.WARNING, subject, problem, remedy)


def _of_cpu(view: HostView, peer: Facts) -> Iterator[Finding]:
    if "cpu" not in peer:
        return
    ours, theirs = view.cpu, Cpu.of(peer["cpu"])
    subject, primary = f"CPU on {view.name}", peer.get("host", "the primary")
    if ours.vendor != theirs.vendor:
        problem = f"it is of {ours.vendor or 'an unknown vendor'}, that of {primary} of {theirs.vendor}"
        yield _error(subject, problem, "protect the guest on a host with a processor of the same vendor")
        return
    if missing := sorted(theirs.flags - ours.flags):
        told = ", ".join(missing[:_FEW_FLAGS]) + (" …" if len(missing) > _FEW_FLAGS else "")
        problem = f"it lacks features that {primary} has, and a guest that uses them cannot run here ({told})"
        remedy = "mask them for the guest with cpuid= in its xl configuration"
        yield Finding(Severity.WARNING, subject, problem, remedy)
    native = (peer.get("guest") or {}).get("tsc_mode") == "native"
    if native and abs(ours.tsc_mhz - theirs.tsc_mhz) > _TSC_TOLERANCE * theirs.tsc_mhz:
        problem = (
            f"its time-stamp counter runs at {ours.tsc_mhz:g} MHz, that of {primary} at {theirs.tsc_mhz:g} MHz, "
            'and with tsc_mode = "native" the guest reads it as it is'
        )
        remedy = 'set tsc_mode = "default" in its xl configuration'
        yield Finding(Severity.WARNING, subject, problem, remedy)


# --- Words -----------------------------------------------------------------------------------------------------------


def _version(text: object) -> XenVersion | None:
    major, _, minor = str(text or "").partition(".")
    return XenVersion(int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"


def _error(subject: str, problem: str, remedy: str, *, unsafe: bool = False) -> Finding:
    return Finding(Severity.ERROR, subject, problem, remedy, unsafe)
