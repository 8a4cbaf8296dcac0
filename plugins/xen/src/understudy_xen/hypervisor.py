"""Xen as a hypervisor: start and stop guests, tell what is there, prepare both sides of a session, clean up.

What a session does with a guest is in primary.py and secondary.py; the answers of the preflight are in preflight.py,
the janitor in janitor.py. A guest is the domain of its name; a copy, one with `INCOMING` behind it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from understudy import interfaces
from understudy.device import DeviceInfo, Finding, Gate, Kind, Mode, ReplicationMode
from understudy.errors import GuestNotFound, HypervisorError, StateError
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
from understudy.services import Services
from understudy_xen import copies, devicemodel, inventory, janitor, probing, toolstack
from understudy_xen.devicemodel import DeviceModel
from understudy_xen.domainconfig import INCOMING
from understudy_xen.guestfile import HYPERVISOR, Compression, SuspendVia, XenConfig, parse_config
from understudy_xen.inventory import Domain
from understudy_xen.late import LateSuspends
from understudy_xen.libs import DomainType, Way, Xen, open_xen
from understudy_xen.live import LiveGuest
from understudy_xen.pauses import StoredPauses
from understudy_xen.primary import GATES, PrimaryParts, XenPrimary
from understudy_xen.secondary import SecondaryParts, XenSecondary
from understudy_xen.watching import DomainWatch
from understudy_xen.xenstore import XenStore

if TYPE_CHECKING:
    from understudy.arbiter import Record

__all__ = ["XenHypervisor"]

_log = logging.getLogger(__name__)

_WAYS: Mapping[SuspendVia, Way | None] = {
    SuspendVia.AUTO: None,
    SuspendVia.EVENT_CHANNEL: Way.EVENT_CHANNEL,
    SuspendVia.XENSTORE: Way.XENSTORE,
}


class XenHypervisor(Hypervisor):
    """Xen on one host.

    Args:
        here: What it may use of this host.
    """

    name: ClassVar[str] = HYPERVISOR

    def __init__(self, here: HostContext) -> None:
        super().__init__(here)
        self._xen: Xen | None = None
        self.late = LateSuspends(
            lambda: self.xen, self.resume
        )  #: guests that may suspend, and nobody waits for it

    @property
    def modes(self) -> Mapping[Mode, frozenset[Gate]]:
        """Remus, with a guest that waits for the barriers and for the disks."""
        return GATES

    def parse(self, table: Mapping[str, Any], *, name: str, source: Any, protection: Protection) -> XenConfig:
        """Turn the Xen part of a guest file into a configuration; see guestfile.py."""
        return parse_config(table, name=name, source=source, protection=protection, host=self.here.host)

    # --- What is where, on this host ---------------------------------------------------------------------------------

    @property
    def xen(self) -> Xen:
        """The hypervisor of this host.

        Raises:
            XenUnavailable: It cannot be used.
        """
        if self._xen is None:
            self._xen = open_xen()
        return self._xen

    @asynccontextmanager
    async def domains(self) -> AsyncIterator[Mapping[str, Domain]]:
        """Enter with all domains of this host by name, dom0 left out."""
        async with await XenStore.open() as store:
            yield {domain.name: domain for domain in await inventory.domains(store, self.xen)}

    async def find(self, config: GuestConfig, *, copy: bool = False) -> Domain | None:
        """Return the guest's domain on this host, or its copy's, ``None`` if there is none."""
        async with await XenStore.open() as store:
            return await inventory.find(store, self.xen, config.name + (INCOMING if copy else ""))

    async def own_copy(self, config: GuestConfig) -> Domain | None:
        """Return the guest's copy on this host if an agent has made it, ``None`` if there is none."""
        copy = await self.find(config, copy=True)
        return copy if copy is not None and copy.uuid in await copies.noted(config.name) else None

    # --- Contract: tell ----------------------------------------------------------------------------------------------

    async def devices(self, config: GuestConfig) -> Sequence[DeviceInfo]:
        """Return the guest's devices, its interfaces with the names that they have on this host now."""
        domain = await self.find(config)
        if domain is None:
            return config.devices
        facts: dict[str, Mapping[str, Any]] = {}
        for nic in domain.nics:
            facts[nic.name] = {"vif": nic.interface, "mac": nic.mac, "bridge": nic.bridge}
        for device, disk in zip(_of_kind(config, Kind.DISK), domain.disks, strict=False):
            facts[device.name] = {"path": disk.target}
        return tuple(
            replace(device, properties=MappingProxyType({**device.properties, **facts.get(device.name, {})}))
            for device in config.devices
        )

    async def facts(self, config: GuestConfig) -> Mapping[str, Any]:
        """Return what the other host's preflight must know; preflight.py has the members."""
        return await probing.facts(self, _ours(config))

    async def probe(
        self,
        config: GuestConfig,
        *,
        side: ReplicationMode,
        mode: Mode,  # noqa: ARG002 - there is but one
        peer_facts: Mapping[str, Any],
    ) -> Sequence[Finding]:
        """Answer the preflight for this host and side, all findings at once."""
        return await probing.probe(self, _ours(config), side=side, peer_facts=peer_facts)

    def probe_services(self, config: GuestConfig) -> Services:  # noqa: ARG002 - the contract's signature
        """Offer nothing: no subkind needs a service of Xen's to probe."""
        return Services()

    async def found(self) -> Sequence[FoundGuest]:
        """List the domains of this host, whoever started them."""
        async with await XenStore.open() as store:
            return [
                FoundGuest(domain.name, _state(domain), await toolstack.is_ours(store, domain.domid))
                for domain in await inventory.domains(store, self.xen)
            ]

    async def state(self, config: GuestConfig) -> GuestState:
        """Tell what this host can see of the guest."""
        domain = await self.find(config) or await self.find(config, copy=True)
        return GuestState.ABSENT if domain is None else _state(domain)

    # --- Contract: start and stop ------------------------------------------------------------------------------------

    async def start(self, config: GuestConfig, record: Record) -> None:
        """Start the guest here, unprotected, its output open.

        Raises:
            StateError: It runs here already, or a copy of it waits here.
            HypervisorError: ``xl create`` failed; nothing is left running.
        """
        ours = _ours(config)
        if await self.find(config, copy=True) is not None:
            raise StateError(
                f"a copy of {config.name} waits on {self.here.host}; it cannot be started beside it"
            )
        domain = await self.find(config)
        if domain is not None:
            if _state(domain) is not GuestState.SHUTOFF:
                raise StateError(f"{config.name} runs already on {self.here.host}")
            await self.discard(domain)
        try:
            await toolstack.create(ours)
            domain = await self.find(config)
            if domain is None:
                raise HypervisorError(f"xl has created {config.name}, but there is no such domain")
            await self.mark(domain.domid, record)
        except BaseException:
            await asyncio.shield(self._undo_start(config))
            raise

    async def _undo_start(self, config: GuestConfig) -> None:
        domain = await self.find(config)
        if domain is not None:
            await self.discard(domain)

    async def mark(self, domid: int, record: Record) -> None:
        """Note in xenstore that a domain is the guest by this record."""
        async with await XenStore.open() as store:
            await toolstack.mark(store, domid, record)

    async def stop(self, config: GuestConfig, *, force: bool, timeout_s: float) -> None:
        """Shut the guest down (`force`: destroy it) and see it gone; right also when it does not run.

        A copy that ``understudy xen receive`` holds is nobody's but the operator's, and stays.

        Raises:
            HypervisorError: It did not shut down within `timeout_s` seconds and runs on, or could not be destroyed.
        """
        domain = await self.find(config)
        if domain is not None and not force and _state(domain) is not GuestState.SHUTOFF:
            await toolstack.shut_down(self.xen, domain, timeout_s)
        for domain in (await self.find(config), await self.own_copy(config)):
            if domain is not None:
                await self.discard(domain)

    async def discard(self, domain: Domain) -> None:
        """Bring a domain's interfaces down and off their bridges, then destroy it; in this order.

        What its gates hold is dropped in between: those packets lie in the guest's memory, and until they are gone the
        kernel's netback cannot let go of the interface. It waits in the one thread that makes and ends the devices of
        all domains.
        """
        for nic in domain.nics:
            for interface in (nic.interface, f"{nic.interface}-emu"):
                await interfaces.close_way_out(interface)
            for queue in await toolstack.queues(nic.interface):
                await interfaces.close_way_out(queue)
        await toolstack.destroy(self.xen, domain.domid)
        devicemodel.remove_state(domain.domid)

    async def destroy_unnamed(self, known: uuid.UUID) -> bool:
        """Destroy what libxl was killed over before it gave it a name, by its UUID; tell whether there was any."""
        return await toolstack.destroy_unnamed(self.xen, known)

    async def resume(self, domid: int) -> None:
        """Let a suspended domain and its device model run on.

        Raises:
            ClaimTaken: Somebody else is at work on it.
            HypervisorError: It does not run.
        """
        info = self.xen.domain(domid)
        if info is None:
            return
        model = DeviceModel(domid) if info.kind is DomainType.HVM else None
        # It is not to be asked for anything: whoever has its suspend event channel may keep that.
        live = await LiveGuest.open(self.xen, domid, model, way=Way.XENSTORE)
        try:
            await asyncio.to_thread(live.bring_back, 0)
        finally:
            live.close()

    # --- Contract: sessions ------------------------------------------------------------------------------------------

    async def primary(self, config: GuestConfig) -> PrimaryDomain:
        """Open the running guest for a session.

        Raises:
            GuestNotFound: It does not run here.
            StateError: It has shut down; nothing was changed.
            HypervisorError: Xen cannot be used.
        """
        ours = _ours(config)
        domain = await self.find(config)
        if domain is None:
            raise GuestNotFound(f"{config.name} does not run on {self.here.host}")
        if _state(domain) is GuestState.SHUTOFF:
            raise StateError(f"{config.name} has shut down on {self.here.host}")
        await self.late.call_off(domain.domid)
        parts = PrimaryParts(
            xen=self.xen,
            domid=domain.domid,
            pages=domain.info.pages,
            model=DeviceModel(domain.domid) if domain.kind is DomainType.HVM else None,
            way=_WAYS[ours.suspend],
            compress=ours.compression is Compression.AUTO,
            config=lambda: toolstack.configuration(domain.domid),
            let_go=lambda: self.discard(domain),
            pauses=StoredPauses(domain.domid),
            may_suspend=lambda: self.late.expect(domain.domid),
        )
        return XenPrimary(parts, DomainWatch.begin(self.xen, domain.domid))

    async def secondary(self, config: GuestConfig, peer_facts: Mapping[str, Any]) -> SecondaryDomain:  # noqa: ARG002 - the stream says more
        """Make ready to hold a copy; nothing is created before its `launch`."""
        ours = _ours(config)

        async def check() -> None:
            for copy in (False, True):
                if await self.find(config, copy=copy) is not None:
                    name = config.name + (INCOMING if copy else "")
                    raise HypervisorError(
                        f"there is a domain {name} on {self.here.host} already; destroy it if nobody needs it"
                    )

        async def destroy(domid: int) -> None:
            for copy in (True, False):
                domain = await self.find(config, copy=copy)
                if domain is not None and (domain.domid == domid or (copy and not domid)):
                    await self.discard(domain)

        async def is_guest(domid: int) -> bool:
            domain = await self.find(config)
            return domain is not None and domain.domid == domid

        def is_paused(domid: int) -> bool:
            info = self.xen.domain(domid)
            return info is not None and info.paused

        parts = SecondaryParts(
            config=ours,
            check=check,
            destroy=destroy,
            destroy_unnamed=self.destroy_unnamed,
            note=partial(copies.note, ours.name),
            forget=partial(copies.forget, ours.name),
            became_guest=self.mark,
            is_guest=is_guest,
            is_paused=is_paused,
        )
        return XenSecondary(parts)

    async def sweep(self, config: GuestConfig, record: Record | None) -> Sequence[str]:
        """Clean what a dead agent left of this guest on this host; see janitor.py."""
        return await janitor.sweep(self, _ours(config), record)


def _state(domain: Domain) -> GuestState:
    info = domain.info
    if domain.name.endswith(INCOMING):
        return GuestState.INCOMING
    if info.shutdown is not None and not info.suspended:
        return GuestState.SHUTOFF
    return GuestState.PAUSED if info.suspended or info.paused else GuestState.RUNNING


def _of_kind(config: GuestConfig, kind: Kind) -> list[DeviceInfo]:
    return [device for device in config.devices if device.kind is kind]


def _ours(config: GuestConfig) -> XenConfig:
    return cast("XenConfig", config)
