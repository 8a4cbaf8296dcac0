"""The other agents, outside and at the beginning of sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from understudy._version import __version__
from understudy.agent.faults import finding_row
from understudy.agent.remote import RemoteHost, open_way
from understudy.device import Mode, ReplicationMode
from understudy.engine import SecondarySession
from understudy.errors import GuestNotFound, LinkError, LinkLost, PeerError, StateError
from understudy.preflight import Here, probe_side
from understudy.session import PrimaryState, SecondaryState

if TYPE_CHECKING:
    from understudy.agent.agent import Agent
    from understudy.agent.tenure import Tenure
    from understudy.engine import Way
    from understudy.hypervisor import GuestConfig
    from understudy.link import Conversation, PeerLink

__all__ = ["Neighbours"]

Json = Mapping[str, Any]

log = logging.getLogger("understudy.agent")

JOIN_LIMIT_S = 10.0
LINK_LIMIT_S = 5.0
SETTLE_LIMIT_S = 30.0
ROWS_LIMIT_S = 2.0
# How long an owner waits for a standby that is forced to take over; cutting a stream takes milliseconds.
DEFER_S = 2.0

#: States in which an engine that lost the other host, or was made anew, has something to say to it.
_TALKATIVE = frozenset(
    {
        PrimaryState.SUSPECT,
        PrimaryState.FENCED,
        PrimaryState.RECOVERING,
        SecondaryState.EMPTY,
        SecondaryState.SUSPECT,
        SecondaryState.PROMOTING,
        SecondaryState.KEPT,
        SecondaryState.RELEASING,
    }
)


class Neighbours:
    """Talks with the agents of the other hosts.

    Args:
        agent: This host's.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._open: dict[str, Conversation] = {}

    def host(self, name: str) -> RemoteHost:
        """Return another host.

        Raises:
            StateError: There is none of this name.
        """
        link = self._agent.links.peers.get(name)
        if link is None:
            known = ", ".join(sorted(self._agent.links.peers)) or "none is configured"
            raise StateError(f"{self._agent.host} has no peer {name!r} (peers: {known})")
        return RemoteHost(link, self._open.get(name))

    def up(self, name: str) -> bool:
        """Tell whether the link to a host is up."""
        link = self._agent.links.peers.get(name)
        return link is not None and link.up

    # --- Links come and go ---------------------------------------------------------------------------------------

    def changed(self, link: PeerLink) -> None:
        """Take that a link has come up or gone down."""
        if not link.up:
            self._open.pop(link.name, None)
            return
        conversation = link.open("agent")
        conversation.serve(partial(self._serve, link))
        self._open[link.name] = conversation
        for tenure in self._agent.tenures.values():
            self._reattach(tenure, link)

    def moved(self, tenure: Tenure) -> None:
        """Take that this host's part in a guest has changed: it may have something to say to the other host."""
        driver = tenure.driver
        peer = driver.machine.peer if driver is not None else None
        link = self._agent.links.peers.get(peer or "")
        if link is not None and link.up:
            self._reattach(tenure, link)

    def _reattach(self, tenure: Tenure, link: PeerLink) -> None:
        # A session that goes on after its connection was lost, or in a new life of the agent, needs a new way.
        driver = tenure.driver
        if driver is None or driver.state not in _TALKATIVE:
            return
        machine = driver.machine
        record = machine.joined
        peer = machine.peer
        if peer is None and record is not None:
            peer = record.owner if machine.side is ReplicationMode.SECONDARY else record.standby
        if peer != link.name or machine.session is None:
            return
        if driver.way is not None and driver.way.port.lost is None:
            return
        try:
            driver.attach(open_way(link, tenure.name, machine.session, self._agent.config.address))
        except (LinkLost, ValueError) as error:
            log.info("guest %s: no new way to %s: %s", tenure.name, link.name, error)

    # --- The beginning of a session, on the owner's host ---------------------------------------------------------

    async def connect(self, config: GuestConfig, peer: str, session: str) -> Way:
        """Return the way to the other host for a new session; an engine waits for it there.

        Raises:
            LinkError: The other host cannot be reached, or refuses.
            StateError: There is no such host.
        """
        remote = self.host(peer)
        link = self._agent.links.peers[peer]
        await link.wait_up(LINK_LIMIT_S)
        way = open_way(link, config.name, session, self._agent.config.address)
        params = {"guest": config.name, "session": session, "mode": config.protection.mode.value}
        try:
            await self.host(peer).ask("join", params, timeout_s=JOIN_LIMIT_S)
        except PeerError as error:
            way.port.close()
            raise PeerError(
                f"{remote.name} refuses to hold a copy of {config.name}: {error}", error.kind
            ) from error
        except BaseException:
            way.port.close()
            raise
        return way

    async def settle(self, peer: str, guest: str, session: str) -> None:
        """Wait until the other host has nothing of a session left; silently give up if it cannot be asked."""
        params = {"guest": guest, "session": session}
        try:
            await self.host(peer).ask("settle", params, timeout_s=SETTLE_LIMIT_S)
        except (LinkError, StateError) as error:
            log.warning("guest %s: whether %s has cleaned up is not known: %s", guest, peer, error)

    async def rows(self) -> list[dict[str, Any]]:
        """Return the tables of all hosts that can be asked."""

        async def ask(name: str) -> list[dict[str, Any]]:
            with suppress(LinkError, KeyError):
                answer = await self.host(name).ask("rows", {}, timeout_s=ROWS_LIMIT_S)
                return list(answer["rows"])
            return []

        tables = await asyncio.gather(*(ask(name) for name in self._agent.links.peers))
        return [row for table in tables for row in table]

    # --- What other agents ask -----------------------------------------------------------------------------------

    async def _serve(self, link: PeerLink, method: str, params: Json) -> Json:
        guest, session = str(params.get("guest")), str(params.get("session"))
        match method:
            case "rows":
                answer: Json = {"rows": await self._agent.operations.rows()}
            case "look":
                answer = await self._look(guest, Mode(params["mode"]))
            case "probe":
                answer = await self._probe(guest, Mode(params["mode"]), params["peer_facts"])
            case "join":
                answer = await self._join(link, guest, session, Mode(params["mode"]))
            case "settle":
                answer = await self._settle(guest, session)
            case "defer":
                answer = self._defer(link, guest)
            case "yield":
                answer = await self._agent.operations.yield_guest(guest, link.name)
            case _:
                raise StateError(f"agents answer no {method!r}")
        return answer

    async def _look(self, guest: str, mode: Mode) -> Json:
        agent = self._agent
        config, hypervisor = self._load(guest, mode)
        record = await agent.need_arbiter().read(guest)
        return {
            "facts": dict(await hypervisor.facts(config)),
            "record": record.to_json() if record else None,
            "digest": agent.files.digest(guest),
            "agent": __version__,
        }

    async def _probe(self, guest: str, mode: Mode, peer_facts: Json) -> Json:
        agent = self._agent
        config, hypervisor = self._load(guest, mode)
        here = Here(
            host=agent.host,
            config=config,
            hypervisor=hypervisor,
            subkinds=agent.subkinds(),
            arbiter=agent.arbiter,
            digest=agent.files.digest(guest),
            agent=__version__,
        )
        found = await probe_side(here, ReplicationMode.SECONDARY, peer_facts)
        return {"findings": [finding_row(finding) for finding in found]}

    def _load(self, guest: str, mode: Mode) -> tuple[GuestConfig, Any]:
        try:
            return self._agent.files.load(guest, mode=mode)
        except GuestNotFound as error:
            raise GuestNotFound(
                f"{error} on {self._agent.host}: copy the guest's file to that host"
            ) from error

    async def _join(self, link: PeerLink, guest: str, session: str, mode: Mode) -> Json:
        config, hypervisor = self._load(guest, mode)
        tenure = self._agent.tenure(guest)
        await tenure.recovered()
        with tenure.operation(f"joining the protection that {link.name} asked for"):
            driver = await tenure.hold(config, hypervisor)
            driver.attach(open_way(link, guest, session, self._agent.config.address))
        return {}

    def _defer(self, link: PeerLink, guest: str) -> Json:
        tenure = self._agent.tenures.get(guest)
        machine = tenure.driver.machine if tenure is not None and tenure.driver is not None else None
        if machine is None or machine.peer != link.name or self._agent.arbiter is None:
            raise StateError(f"guest {guest} is not protected by {link.name}")
        self._agent.arbiter.defer(guest, DEFER_S)
        return {}

    async def defer(self, peer: str, guest: str) -> None:
        """Ask the owner of a guest not to go on alone at once when this host, by force, cuts the stream."""
        with suppress(LinkError, StateError):
            await self.host(peer).ask("defer", {"guest": guest}, timeout_s=DEFER_S)

    async def _settle(self, guest: str, session: str) -> Json:
        tenure = self._agent.tenures.get(guest)
        if tenure is None or not isinstance(tenure.driver, SecondarySession):
            return {"state": "none"}
        if tenure.driver.machine.session != session:
            return {"state": "other"}
        over = (SecondaryState.EMPTY, SecondaryState.DISCARDED, SecondaryState.ALONE, SecondaryState.KEPT)
        state = await tenure.reach(*over, *PrimaryState, timeout_s=SETTLE_LIMIT_S - 1)
        return {"state": state.value}
