"""QEMU as a hypervisor: start and stop guests, tell what is there, prepare both sides of a session, clean up.

What a session does with a guest is in primary.py and secondary.py; the answers of the preflight are in preflight.py,
the janitor in janitor.py. This module keeps the one connection to each guest's monitors that all of them share.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from understudy import interfaces
from understudy.device import Finding, Gate, Mode, ReplicationMode
from understudy.errors import GuestNotFound, HypervisorError, MonitorSilent, StateError
from understudy.hypervisor import (
    FoundGuest,
    GuestConfig,
    GuestState,
    HostContext,
    Hypervisor,
    PrimaryDomain,
    Protection,
    SecondaryDomain,
)
from understudy.options import parse_options
from understudy.services import MONITOR, Monitor, Services
from understudy_qemu import identity, janitor, network, preflight
from understudy_qemu.accel import Accel, build_preload, choose_accel, kvm_runs
from understudy_qemu.blockreplication import BLOCK_REPLICATION, BlockReplicationOptions
from understudy_qemu.disksession import DiskSession, Replica
from understudy_qemu.features import Features
from understudy_qemu.guestfile import HYPERVISOR, QemuConfig, parse_config
from understudy_qemu.images import ImageIdentity, Images
from understudy_qemu.machine import DriveProvider, GuestPaths, ImageDrive
from understudy_qemu.primary import GATES, QemuPrimary
from understudy_qemu.probing import ProbeMonitor, probe_binary
from understudy_qemu.running import RECONNECT_S, Launched, Qemu
from understudy_qemu.secondary import QemuSecondary

if TYPE_CHECKING:
    from understudy.arbiter import Record

__all__ = ["QemuHypervisor"]

_log = logging.getLogger(__name__)

_QUIT_S = 5.0
_POLL_S = 0.2
_STATES = {
    "running": GuestState.RUNNING,
    "colo": GuestState.RUNNING,  # inside a checkpoint
    "finish-migrate": GuestState.RUNNING,  # at the begin of protection
    "shutdown": GuestState.SHUTOFF,
    "inmigrate": GuestState.INCOMING,
}
# Run states that a guest does not leave by itself; QEMU takes no checkpoint in them, and from some would abort.
_ENDED = {
    "shutdown": "it has shut down",
    "guest-panicked": "it has crashed",
    "internal-error": "QEMU stopped it because of an error of its own",
    "io-error": "QEMU stopped it because a disk failed",
}


class QemuHypervisor(Hypervisor):
    """QEMU on one host.

    Args:
        here: What it may use of this host.
    """

    name: ClassVar[str] = HYPERVISOR

    def __init__(self, here: HostContext) -> None:
        super().__init__(here)
        self._guests: dict[str, Qemu] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._mute: set[str] = set()  # guests whose monitors were silent when they were looked for
        self._kvm: dict[tuple[str, str], str] = {}
        self._said_tcg = False

    @property
    def modes(self) -> Mapping[Mode, frozenset[Gate]]:
        """Remus with a guest that waits for the barriers; COLO, where nothing waits for the devices."""
        return GATES

    def parse(
        self, table: Mapping[str, Any], *, name: str, source: Path, protection: Protection
    ) -> QemuConfig:
        """Turn the QEMU part of a guest file into a configuration; see guestfile.py."""
        return parse_config(table, name=name, source=source, protection=protection, host=self.here.host)

    # --- What is where, on this host -------------------------------------------------------------------------------

    def paths(self, config: QemuConfig) -> GuestPaths:
        """Return where the files of a guest's QEMU lie."""
        return GuestPaths(
            self.here.runtime_directory / HYPERVISOR / config.name,
            self.here.state_directory / HYPERVISOR / config.name,
        )

    def overlay_directory(self, config: QemuConfig) -> Path:
        """Return where the overlays of a guest's copy go; it need not exist."""
        return (config.overlays.directory or self.here.overlay_directory) / config.name

    def images(self, config: QemuConfig) -> Images:
        """Return the way to a guest's images."""
        return Images(config.qemu_img, self.here.state_directory / HYPERVISOR / ".images")

    async def features(self, config: QemuConfig) -> Features:
        """Return what the guest's QEMU binary can do.

        Raises:
            HypervisorError: It is not installed, or does not run.
        """
        return await probe_binary(config.qemu)

    async def accel(self, config: QemuConfig) -> tuple[Accel, str]:
        """Decide what runs a guest on this host, by trial.

        Returns:
            The accelerator, and why it does not work here or was not KVM, in words (``""``: nothing to say).
        """
        chosen = choose_accel(config.accel)
        if chosen is Accel.TCG:
            return chosen, "" if config.accel == "tcg" else "this host's CPU or kernel offers no KVM"
        key = (config.qemu, config.cpu or "host")
        if key not in self._kvm:
            self._kvm[key] = await kvm_runs(*key)
        problem = self._kvm[key]
        if problem and config.accel == "auto":
            return Accel.TCG, f"KVM does not work here: {problem}"
        return chosen, problem

    async def running(self, config: QemuConfig) -> Qemu | None:
        """Return the guest's QEMU on this host with live monitors, ``None`` if none runs.

        Everybody on this host shares the object: a QMP socket serves one client at a time.

        Raises:
            MonitorSilent: It runs, but its monitor does not answer.
        """
        async with self._locks.setdefault(config.name, asyncio.Lock()):
            known = self._guests.get(config.name)
            if known is not None and not known.process.alive:
                del self._guests[config.name]
                await known.close()
                known = None
            if known is None:
                name = f"{config.name} on {self.here.host}"
                # One that was found mute is asked again and again; nobody wants to wait long each time.
                patience = {"timeout_s": RECONNECT_S} if config.name in self._mute else {}
                try:
                    known = await Qemu.adopt(self.paths(config), name=name, **patience)
                except MonitorSilent:
                    self._mute.add(config.name)
                    raise
                self._mute.discard(config.name)
                if known is not None:
                    self._guests[config.name] = known
            elif known.monitor.dead is not None:
                await known.reconnect()
            return known

    # --- Contract: tell ----------------------------------------------------------------------------------------------

    async def facts(self, config: GuestConfig) -> Mapping[str, Any]:
        """Return what the other host's preflight, and its copy, must know; preflight.py has the members."""
        return await preflight.facts(self, _ours(config))

    async def probe(
        self, config: GuestConfig, *, side: ReplicationMode, mode: Mode, peer_facts: Mapping[str, Any]
    ) -> Sequence[Finding]:
        """Answer the preflight for this host and side, all findings at once."""
        return await preflight.probe(self, _ours(config), side=side, mode=mode, peer_facts=peer_facts)

    def probe_services(self, config: GuestConfig) -> Services:
        """Offer the monitor, reading only: what QEMU can do, and ``query-`` commands of the running guest."""
        ours = _ours(config)

        async def monitor() -> Monitor | None:
            qemu = await self.running(ours)
            return None if qemu is None else qemu.monitor

        return Services((MONITOR, ProbeMonitor(ours.qemu, monitor)))

    async def found(self) -> Sequence[FoundGuest]:
        """List every QEMU on this host, ours and others'."""
        return preflight.found(self.here.runtime_directory / HYPERVISOR)

    async def state(self, config: GuestConfig) -> GuestState:
        """Tell what this host can see of the guest."""
        try:
            qemu = await self.running(_ours(config))
            if qemu is None:
                return GuestState.ABSENT
            state = _STATES.get(await qemu.status(), GuestState.PAUSED)
        except MonitorSilent:
            return GuestState.SILENT
        except HypervisorError:
            # It died while it was asked, or cannot be asked.
            alive = self._guests.get(config.name)
            return GuestState.SILENT if alive is not None and alive.process.alive else GuestState.ABSENT
        return GuestState.INCOMING if qemu.launched.copy and state is not GuestState.SHUTOFF else state

    # --- Contract: start and stop ------------------------------------------------------------------------------------

    async def start(self, config: GuestConfig, record: Record) -> None:
        """Start the guest here, unprotected but protectable, its output open.

        Args:
            config: The guest.
            record: The record of state ``alone`` with this host as owner; its generation is written to the images.

        Raises:
            StateError: It runs here already.
            HypervisorError: An image is missing, is only a replica, or belongs to another guest; a bridge is
                missing; QEMU failed. Nothing is left running.
        """
        ours = _ours(config)
        qemu = await self.running(ours)
        if qemu is not None:
            if qemu.launched.copy:
                raise StateError(
                    f"a copy of {config.name} waits on {self.here.host}; it cannot be started beside it"
                )
            if await qemu.status() != "shutdown":
                raise StateError(f"{config.name} runs already on {self.here.host}")
            await self.discard(ours)
        await self._need_bridges(ours)
        images = self.images(ours)
        await identity.check_startable(images, ours, self.overlay_directory(ours))
        guest_id, _ = identity.known(images, ours)
        identity.claim(images, ours, record.generation, guest_id or str(uuid.uuid4()))
        accel, problem = await self.accel(ours)
        if problem and accel is Accel.KVM:
            raise HypervisorError(
                f'{config.name}: accel = "kvm" does not work on {self.here.host}: {problem}'
            )
        drives = {disk.name: ImageDrive(disk) for disk in ours.disks}
        qemu = await self.launch(ours, drives, accel=accel, copy=False)
        try:
            await self.open_outlet(ours)
            await qemu.monitor.execute("cont")
        except BaseException:
            await asyncio.shield(self.discard(ours))
            raise

    async def _need_bridges(self, config: QemuConfig) -> None:
        # Before anything is made: a guest must not run mute, and its images need not be claimed in vain.
        for nic in config.nics:
            if not await interfaces.is_bridge(nic.bridge):
                raise HypervisorError(
                    f"{config.name} was not started: there is no bridge {nic.bridge} on {self.here.host} for "
                    f"{nic.name}; make it (ip link add {nic.bridge} type bridge), or name another one in "
                    f"[host.{self.here.host}]"
                )

    async def stop(self, config: GuestConfig, *, force: bool, timeout_s: float) -> None:
        """Shut the guest down (`force`: kill it) and see it gone; right also when it does not run.

        Raises:
            MonitorSilent: It does not answer and was not asked, unless `force` is set.
            HypervisorError: It did not shut down within `timeout_s` seconds and runs on; or it did, and its overlays
                were not written into its images within `timeout_s` more.
        """
        ours = _ours(config)
        try:
            qemu = await self.running(ours)
        except MonitorSilent:
            if not force:
                raise
            qemu = None
        if qemu is not None and not force:
            await self._power_down(qemu, timeout_s)
            await self._committed(qemu, timeout_s)
            await network_down(ours)
            await self._quit(qemu)
        await self.discard(ours)

    async def _power_down(self, qemu: Qemu, timeout_s: float) -> None:
        status = await qemu.status()
        if status in {"shutdown", "prelaunch"}:
            return
        if status != "running":
            raise HypervisorError(f"{qemu.name} is {status} and cannot shut itself down")
        async with qemu.monitor.events("SHUTDOWN") as events:
            await qemu.monitor.execute("system_powerdown")
            try:
                async with asyncio.timeout(timeout_s):
                    await anext(events)
            except TimeoutError:
                text = f"{qemu.name} did not shut down within {timeout_s:g} s and runs on"
                raise HypervisorError(text) from None

    async def _committed(self, qemu: Qemu, timeout_s: float) -> None:
        # After a takeover QEMU writes the overlays into the images; until it has, the images are not the disks.
        try:
            async with asyncio.timeout(timeout_s):
                while await janitor.uncommitted(qemu):  # noqa: ASYNC110 - the job is QEMU's own, no event tells
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            text = f"{qemu.name} has shut down, but QEMU still writes its overlays into its images; try again"
            raise HypervisorError(text) from None

    async def _quit(self, qemu: Qemu) -> None:
        # Written data leave QEMU's caches here; the kill in `discard` only follows where that does not work.
        try:
            await qemu.monitor.execute("quit", timeout_s=_QUIT_S)
        except HypervisorError as error:
            _log.debug("%s: quit: %s", qemu.name, error)
        await qemu.process.wait(_QUIT_S)

    # --- Contract: sessions ------------------------------------------------------------------------------------------

    async def primary(self, config: GuestConfig) -> PrimaryDomain:
        """Open the running guest for a session.

        Raises:
            GuestNotFound: It does not run here.
            StateError: Its QEMU is there, but the guest has ended; nothing was changed.
            HypervisorError: It is a copy, or its monitor is silent.
        """
        ours = _ours(config)
        qemu = await self.running(ours)
        if qemu is None:
            raise GuestNotFound(f"{config.name} does not run on {self.here.host}")
        if qemu.launched.copy:
            raise HypervisorError(f"{qemu.name} is a copy, not the guest")
        options = parse_options(
            BlockReplicationOptions,
            config.protection.subkind_options.get(BLOCK_REPLICATION.name, {}),
            source=str(config.source),
            where=f"protection.options.{BLOCK_REPLICATION.name}",
        )
        domain = await QemuPrimary.open(
            qemu,
            config.protection.mode,
            DiskSession(len(ours.disks)),
            partial(self.discard, ours),
            checkpoint_delay_ms=options.checkpoint_delay_ms,
            bwlimit_bytes_per_s=self.here.bwlimit_bytes_per_s,
        )
        try:
            # Asked when no event is missed any more: an end from here on is told by the domain.
            status = await qemu.status()
            if status in _ENDED:
                raise StateError(
                    f"{config.name} does not run on {self.here.host}: {_ENDED[status]} (run state {status}); nothing "
                    f"was changed. understudy stop {config.name} --force clears it away, then it can be started again"
                )
        except BaseException:
            await domain.close()
            raise
        return domain

    async def secondary(self, config: GuestConfig, peer_facts: Mapping[str, Any]) -> SecondaryDomain:
        """Make ready to hold a copy; nothing is created before `SecondaryDomain.launch`."""
        ours = _ours(config)
        disks = DiskSession(
            len(ours.disks),
            replicas=_replicas(ours, peer_facts),
            images=self.images(ours),
            overlay_directory=ours.overlays.directory,
            room_ratio=ours.overlays.room_ratio,
            overwrite=ours.protection.overwrite_secondary,
        )
        return QemuSecondary(
            start=partial(self.launch, ours, accel=Accel(peer_facts["accel"]), copy=True),
            connect=partial(self.open_outlet, ours),
            discard=partial(self.discard, ours),
            disks=disks,
            config=ours,
        )

    async def sweep(self, config: GuestConfig, record: Record | None) -> Sequence[str]:
        """Clean what a dead agent left of this guest on this host; janitor.py has the rules."""
        return await janitor.sweep(self, _ours(config), record)

    # --- For both kinds of domain ------------------------------------------------------------------------------------

    async def launch(
        self,
        config: QemuConfig,
        drives: Mapping[str, DriveProvider],
        *,
        accel: Accel,
        copy: bool,
    ) -> Qemu:
        """Start a guest's QEMU, stopped, its taps down and on no bridge.

        Args:
            config: The guest.
            drives: What each disk is made of, by the disk's name.
            accel: What runs it: for a copy what the primary's facts say.
            copy: Whether it waits for its memory.

        Raises:
            HypervisorError: A tap or QEMU could not be made.

        Guarantees:
            After a failure or cancellation neither process nor tap nor socket is left.
        """
        preload = await self._preload() if accel is Accel.TCG else None
        taps = {nic.name: nic.tap for nic in config.nics}
        launched = Launched(accel.value, config.qemu, copy, taps)
        name = f"{config.name} on {self.here.host}"
        try:
            for nic in config.nics:
                await network.create_tap(nic.tap, vnet_hdr=nic.vnet_hdr, mac=nic.mac)
            qemu = await Qemu.launch(config, self.paths(config), launched, drives, name=name, preload=preload)
        except BaseException:
            await asyncio.shield(_remove_taps(config))
            raise
        self._guests[config.name] = qemu
        return qemu

    async def open_outlet(self, config: QemuConfig) -> None:
        """Put all interfaces of a guest on their bridges, up.

        Only for the owner of a record of state ``alone``; the callers have it.

        Raises:
            HypervisorError: A bridge is missing; the other interfaces are connected nevertheless.
        """
        results = await asyncio.gather(
            *(interfaces.open_way_out(nic.tap, nic.bridge) for nic in config.nics), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def discard(self, config: QemuConfig) -> None:
        """Bring all interfaces down and off their bridges, kill QEMU and see it dead, remove taps and sockets.

        In this order, also where no monitor answers. Overlays and images are not touched. Idempotent.
        """
        await network_down(config)
        await self.kill(config)
        await _remove_taps(config)

    async def kill(self, config: QemuConfig) -> None:
        """Kill a guest's QEMU and see it dead; its taps stay. Idempotent."""
        qemu = self._guests.pop(config.name, None)
        if qemu is not None:
            await qemu.kill()
        await janitor.kill_strays(self.paths(config))

    async def _preload(self) -> Path:
        library = await asyncio.to_thread(build_preload, self.here.state_directory / HYPERVISOR / ".cache")
        if not self._said_tcg:
            self._said_tcg = True
            _log.info(
                "guests run without KVM here: QEMU gets the library %s, which cures its deadlock at checkpoints, and a "
                "memory size that is no multiple of 256 KiB (8 KiB are added), which cures lost pages of QEMU before 9",
                library,
            )
        return library


async def network_down(config: QemuConfig) -> None:
    """Bring all interfaces of a guest down and off their bridges."""
    await asyncio.gather(*(interfaces.close_way_out(nic.tap) for nic in config.nics))


async def _remove_taps(config: QemuConfig) -> None:
    await asyncio.gather(*(network.remove_tap(nic.tap) for nic in config.nics))


def _replicas(config: QemuConfig, peer_facts: Mapping[str, Any]) -> Mapping[str, Replica]:
    # What the primary told about its disks, as what ours are to become.
    made = {}
    for disk in filter(lambda disk: disk.replicated, config.disks):
        size = peer_facts["disks"].get(disk.name, {}).get("size_bytes")
        if size is not None:
            replica = ImageIdentity(
                id=peer_facts["guest_id"],
                guest=config.name,
                disk=disk.name,
                generation=peer_facts["generation"],
                role=ReplicationMode.SECONDARY,
            )
            made[disk.name] = Replica(disk, size, replica)
    return made


def _ours(config: GuestConfig) -> QemuConfig:
    return cast("QemuConfig", config)
