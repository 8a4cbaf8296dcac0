"""What a host knows of a guest before anything is done: facts for the other host, and findings for the operator.

Members of the facts: ``host``, ``qemu`` (what the binary can do, with its version; ``None`` if it does not run),
``accel``, ``memory_bytes``, ``machine``, ``cpus``, ``cpu``, ``cpu_model`` (of the host, where the guest sees it),
``disks`` (by name: ``format``, ``bus``, ``size_bytes`` or ``None``), ``nics`` (by name: ``mac``, ``model``),
``guest_id`` and ``generation`` of the images.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy import interfaces
from understudy.device import Finding, Mode, ReplicationMode, Severity
from understudy.errors import HypervisorError
from understudy.hypervisor import FoundGuest, GuestState
from understudy_qemu.accel import NO_COMPILER, Accel, guest_memory_bytes
from understudy_qemu.guestfile import Disk, QemuConfig
from understudy_qemu.identity import known
from understudy_qemu.images import ImageIdentity, free_bytes, is_volatile
from understudy_qemu.process import find_processes, written_pid
from understudy_qemu.running import Launched

if TYPE_CHECKING:
    from understudy_qemu.hypervisor import QemuHypervisor

__all__ = ["facts", "found", "probe"]

_OVERLAY_LEAST_BYTES = 64 << 20  # an overlay needs some room for itself however small the disk is


async def facts(hypervisor: QemuHypervisor, config: QemuConfig) -> Mapping[str, Any]:
    """Return what the other host must know of a guest on this host, JSON-able."""
    qemu = await hypervisor.running(config)
    accel = Accel(qemu.launched.accel) if qemu is not None else (await hypervisor.accel(config))[0]
    try:
        features: Mapping[str, Any] | None = (await hypervisor.features(config)).to_json()
    except HypervisorError:
        features = None
    try:
        guest_id, generation = known(hypervisor.images(config), config)
    except HypervisorError:
        guest_id, generation = "", 0
    seen = not config.cpu or config.cpu.split(",")[0] in {"host", "max"}
    return {
        "host": hypervisor.here.host,
        "qemu": features,
        "accel": accel.value,
        "memory_bytes": guest_memory_bytes(config.memory_bytes, accel),
        "machine": config.machine,
        "cpus": config.cpus,
        "cpu": config.cpu,
        "cpu_model": _cpu_model() if accel is Accel.KVM and seen else "",
        "disks": {disk.name: await _disk_facts(hypervisor, config, disk) for disk in config.disks},
        "nics": {nic.name: {"mac": nic.mac, "model": nic.model} for nic in config.nics},
        "guest_id": guest_id,
        "generation": generation,
    }


async def probe(
    hypervisor: QemuHypervisor,
    config: QemuConfig,
    *,
    side: ReplicationMode,
    mode: Mode,
    peer_facts: Mapping[str, Any],
) -> Sequence[Finding]:
    """Return everything that stands against protecting a guest, or is worth knowing, on this host."""
    findings: list[Finding] = []
    findings += [finding async for finding in _program(hypervisor, config, mode)]
    findings += [finding async for finding in _accelerator(hypervisor, config)]
    findings += [finding async for finding in _network(hypervisor, config)]
    if side is ReplicationMode.PRIMARY:
        findings += [finding async for finding in _own_images(hypervisor, config)]
    else:
        findings += [finding async for finding in _replicas(hypervisor, config, peer_facts)]
        findings += _overlays(hypervisor, config, peer_facts)
    if peer_facts:
        findings += _differences(await facts(hypervisor, config), peer_facts)
    return findings


def found(runtime: Path) -> Sequence[FoundGuest]:
    """List every QEMU process on this host.

    Args:
        runtime: Where the runtime directories of our guests lie.
    """
    guests = []
    for pid, arguments in find_processes():
        pidfile = _value(arguments, "-pidfile")
        if pidfile and Path(pidfile).parent.parent == runtime:
            if written_pid(Path(pidfile)) != pid:
                continue  # another container's, by the same path
            launched = Launched.read(Path(pidfile).parent / "launched.json")
            copy = launched is not None and launched.copy
            state = GuestState.INCOMING if copy else GuestState.RUNNING
            guests.append(FoundGuest(Path(pidfile).parent.name, state, ours=True))
        elif Path(arguments[0]).name.startswith("qemu-system-") and _value(arguments, "-machine") != "none":
            guests.append(
                FoundGuest(
                    _guest_name(arguments),
                    GuestState.RUNNING,
                    ours=False,
                    obstacle="it was not started by Understudy: its disks are not below a quorum, its interfaces may "
                    "use vhost, and its monitor belongs to somebody else",
                    remedy="write a guest file for it, shut it down, and start it with 'understudy start'",
                )
            )
    return guests


# --- One thing each --------------------------------------------------------------------------------------------------


async def _program(hypervisor: QemuHypervisor, config: QemuConfig, mode: Mode) -> AsyncIterator[Finding]:
    here = hypervisor.here.host
    try:
        features = await hypervisor.features(config)
    except HypervisorError as error:
        yield _error(
            f"QEMU on {here}", str(error), "install qemu-system-x86, or name the program in the guest file"
        )
        return
    if shutil.which(config.qemu_img) is None:
        yield _error(f"qemu-img on {here}", f"{config.qemu_img} is not installed", "install qemu-utils")
    if not features.colo or not features.yank:
        yield _error(
            f"QEMU on {here}",
            f"{config.qemu} ({features.version}) has no COLO with block replication, which mode {mode.value} needs",
            "use a QEMU built with replication, such as Debian's",
        )


async def _accelerator(hypervisor: QemuHypervisor, config: QemuConfig) -> AsyncIterator[Finding]:
    here = hypervisor.here.host
    accel, problem = await hypervisor.accel(config)
    if accel is Accel.KVM:
        if problem:
            yield _error(f"accel on {here}", problem, 'use accel = "auto" or "tcg", or make /dev/kvm work')
        return
    reason = problem or "the guest file says so"
    yield _note(f"accel on {here}", f"the guest's CPU is emulated (TCG), which is slow: {reason}")
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        yield _error(f"accel on {here}", NO_COMPILER, "install gcc and libc6-dev")


async def _network(hypervisor: QemuHypervisor, config: QemuConfig) -> AsyncIterator[Finding]:
    here = hypervisor.here.host
    if config.nics and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        yield _error(
            f"network on {here}", "/dev/net/tun cannot be opened", "run as root; load the module tun"
        )
    for nic in config.nics:
        if not await interfaces.interface_exists(nic.bridge):
            yield _error(
                f"{nic.name} on {here}",
                f"there is no bridge {nic.bridge}",
                f"make it (ip link add {nic.bridge} type bridge), or name another one in [host.{here}]",
            )
        elif not await interfaces.is_bridge(nic.bridge):
            yield _error(f"{nic.name} on {here}", f"{nic.bridge} is no bridge", "name a bridge")


async def _own_images(hypervisor: QemuHypervisor, config: QemuConfig) -> AsyncIterator[Finding]:
    images = hypervisor.images(config)
    for disk in config.disks:
        subject = f"{disk.name} on {hypervisor.here.host}"
        try:
            info = await images.info(disk.path)
        except HypervisorError as error:
            yield _error(subject, str(error), "make the image, or correct its path")
            continue
        if disk.format == "qcow2" and info.format != "qcow2":
            yield _error(subject, f"{disk.path} is {info.format}, not qcow2", "correct the disk's format")
        elif info.corrupt:
            yield _error(
                subject,
                f"{disk.path} is marked as damaged",
                f"shut the guest down, qemu-img check {disk.path}",
            )


async def _replicas(
    hypervisor: QemuHypervisor, config: QemuConfig, peer_facts: Mapping[str, Any]
) -> AsyncIterator[Finding]:
    images = hypervisor.images(config)
    for disk in filter(lambda disk: disk.replicated, config.disks):
        subject = f"{disk.name} on {hypervisor.here.host}"
        wanted = peer_facts.get("disks", {}).get(disk.name, {})
        if disk.path.exists():
            try:
                size = await images.size_bytes(disk.path, disk.format)
            except HypervisorError as error:
                yield _error(subject, str(error), "remove the file, or correct path and format")
                continue
            if wanted.get("size_bytes") is not None and size != wanted["size_bytes"]:
                yield _error(
                    subject,
                    f"{disk.path} has {size} bytes, the primary's disk has {wanted['size_bytes']}",
                    "remove it, a fitting one is made then, or make it anew with the primary's size",
                )
            identity = ImageIdentity(
                str(peer_facts.get("guest_id", "")),
                config.name,
                disk.name,
                int(peer_facts.get("generation", 0)),
                ReplicationMode.SECONDARY,
            )
            reason = images.why_not_overwrite(disk.path, identity)
            if reason and peer_facts and not config.protection.overwrite_secondary:
                yield _error(subject, reason, "remove it, or set overwrite_secondary = true in [protection]")
            elif reason and peer_facts:
                yield _warning(subject, f"it will be overwritten as the guest file allows: {reason}", "")
        elif not disk.path.parent.is_dir():
            yield _error(subject, f"the directory {disk.path.parent} does not exist", "make it")
        elif disk.format == "raw" and free_bytes(disk.path.parent) < (wanted.get("size_bytes") or 0):
            yield _error(
                subject, f"no room for {wanted['size_bytes']} bytes in {disk.path.parent}", "make room"
            )


def _overlays(
    hypervisor: QemuHypervisor, config: QemuConfig, peer_facts: Mapping[str, Any]
) -> Sequence[Finding]:
    replicated = [disk.name for disk in config.disks if disk.replicated]
    if not replicated:
        return ()
    findings = []
    directory = hypervisor.overlay_directory(config)
    subject = f"overlays on {hypervisor.here.host}"
    disks = peer_facts.get("disks", {})
    sizes = [disks.get(name, {}).get("size_bytes") or 0 for name in replicated]
    need = overlay_room_bytes(config, sum(sizes))
    free = free_bytes(directory)
    if free < need:
        findings.append(
            _error(
                subject,
                f"{directory} has {free >> 20} MiB of room, the copy's writes need {need >> 20} MiB",
                "make room, or name another directory in [overlays]",
            )
        )
    if is_volatile(directory):
        words = f"{directory} is in memory: a takeover whose host dies before the commit into the image loses writes"
        if config.overlays.volatile:
            findings.append(_note(subject, words))
        else:
            remedy = "name a directory on a disk in [overlays], or say volatile = true there"
            findings.append(_warning(subject, words, remedy))
    return findings


def overlay_room_bytes(config: QemuConfig, disks_bytes: int) -> int:
    """Return how much room must be free for a copy's overlays, bytes.

    Args:
        config: The guest.
        disks_bytes: Size of all its disks as the guest sees them.
    """
    return max(int(config.overlays.room_ratio * disks_bytes), _OVERLAY_LEAST_BYTES if disks_bytes else 0)


def _differences(own: Mapping[str, Any], peer: Mapping[str, Any]) -> Sequence[Finding]:
    # Both sides see the same pair; only one of each pair of findings is wanted, but which side asks is not known
    # here, and the same sentence twice is dropped by whoever collects them.
    pair = " and ".join(sorted((str(own["host"]), str(peer["host"]))))
    findings = []
    versions = [(side["qemu"] or {}).get("version") for side in (own, peer)]
    if None not in versions and versions[0] != versions[1]:
        both = " and ".join(sorted(f"{side['qemu']['version']} on {side['host']}" for side in (own, peer)))
        findings.append(
            _error(
                f"QEMU on {pair}",
                f"the two hosts have different versions: {both}",
                "install the same version",
            )
        )
    for key, words in (
        ("accel", "one runs it with KVM, the other emulates it"),
        ("memory_bytes", "the sizes of memory differ"),
        ("machine", "the machines differ"),
        ("cpus", "the numbers of CPUs differ"),
        ("cpu", "the CPU models differ"),
    ):
        if own[key] != peer[key]:
            both = " and ".join(sorted(f"{side[key]!r} on {side['host']}" for side in (own, peer)))
            findings.append(
                _error(f"{key} on {pair}", f"{words}: {both}", "let both hosts' guest files agree")
            )
    if own["cpu_model"] != peer["cpu_model"]:
        both = " and ".join(sorted(f"{side['cpu_model']} on {side['host']}" for side in (own, peer)))
        findings.append(
            _warning(
                f"cpu on {pair}", f"the guest sees its host's CPU: {both}", "name a CPU model that both have"
            )
        )
    findings += _device_differences(own, peer, pair)
    return findings


def _device_differences(own: Mapping[str, Any], peer: Mapping[str, Any], pair: str) -> Sequence[Finding]:
    findings = []
    for kind, members in (("disks", ("bus",)), ("nics", ("mac", "model"))):
        shapes = [
            {name: tuple(device[member] for member in members) for name, device in side[kind].items()}
            for side in (own, peer)
        ]
        if shapes[0] != shapes[1]:
            findings.append(
                _error(
                    f"{kind} on {pair}",
                    "the two hosts' guest files describe different devices",
                    "let them agree",
                )
            )
    return findings


async def _disk_facts(hypervisor: QemuHypervisor, config: QemuConfig, disk: Disk) -> Mapping[str, Any]:
    try:
        size: int | None = await hypervisor.images(config).size_bytes(disk.path, disk.format)
    except HypervisorError:
        size = None
    return {"format": disk.format, "bus": disk.bus, "size_bytes": size}


# --- Words -----------------------------------------------------------------------------------------------------------


def _error(subject: str, problem: str, remedy: str) -> Finding:
    return Finding(Severity.ERROR, subject, problem, remedy)


def _warning(subject: str, problem: str, remedy: str) -> Finding:
    return Finding(Severity.WARNING, subject, problem, remedy)


def _note(subject: str, problem: str) -> Finding:
    return Finding(Severity.NOTE, subject, problem)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


def _value(arguments: Sequence[str], option: str) -> str:
    try:
        return arguments[arguments.index(option) + 1]
    except (ValueError, IndexError):
        return ""


def _guest_name(arguments: Sequence[str]) -> str:
    for part in _value(arguments, "-name").split(","):
        if part and "=" not in part:
            return part
        if part.startswith("guest="):
            return part.removeprefix("guest=")
    return "(unnamed)"
