"""What the command line gets to see: tables, details, the preflight, the history. Nothing here changes anything."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from understudy._version import __version__
from understudy.agent.faults import finding_row
from understudy.agent.tenure import RUNNING_HERE
from understudy.device import Finding, Mode, Severity
from understudy.errors import ArbiterError, GuestNotFound, LinkLost, StateError, UnderstudyError
from understudy.hypervisor import GuestState
from understudy.phases import in_words
from understudy.preflight import Here, foreign, preflight

if TYPE_CHECKING:
    from understudy.agent.agent import Agent
    from understudy.agent.control import Call
    from understudy.hypervisor import FoundGuest, GuestConfig, Hypervisor

__all__ = ["Overview"]

Json = dict[str, Any]

log = logging.getLogger("understudy.agent")

STATE_LIMIT_S = 3.0
ARBITER_LIMIT_S = 2.0
LINK_LIMIT_S = 2.0


class Overview:
    """Answers questions.

    Args:
        agent: This host's.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def names(self, _: Call) -> Json:
        """Return the names of all guests, for the shell's completion."""
        guests, _problems = self._agent.files.all()
        return {"guests": sorted(guests)}

    # --- Tables --------------------------------------------------------------------------------------------------

    async def table(self, _: Call) -> Json:
        """Return the table of this host and all others that answer."""
        own, others = await asyncio.gather(self.rows(), self._agent.neighbours.rows())
        rows = own + others
        # A host on which a guest is off says nothing while another one has it.
        taken = {row["guest"] for row in rows if row.get("role") == "primary"}
        shown = [row for row in rows if row.get("role") or row["state"] != "off" or row["guest"] not in taken]
        _guests, problems = self._agent.files.all()
        shown.sort(key=lambda row: (row["guest"], row.get("role") != "primary", row["host"]))
        return {"host": self._agent.host, "guests": shown, "warnings": [*self._agent.warnings(), *problems]}

    async def rows(self) -> list[Json]:
        """Return the table of this host."""
        guests, _problems = self._agent.files.all()
        names = sorted({*guests, *self._agent.tenures})
        known = [self._row(name, guests.get(name)) for name in names]
        rows = list(await asyncio.gather(*known))
        foreigners = [found for found in await self._found() if found.name not in guests and not found.ours]
        return rows + [self._foreigner(found) for found in foreigners]

    def _foreigner(self, found: FoundGuest) -> Json:
        return {
            "guest": found.name,
            "host": self._agent.host,
            "role": None,
            "state": found.state.value,
            "problem": found.obstacle or "it was not started by Understudy",
        }

    async def _row(self, name: str, described: tuple[GuestConfig, Hypervisor] | None) -> Json:
        tenure = self._agent.tenure(name)
        row = tenure.row()
        if described is not None and (row["role"] is None or tenure.driver is None):
            state = await self.state(*described)
            if state is not GuestState.ABSENT:
                row["state"] = state.value
            if tenure.record is None and self._agent.arbiter is not None:
                with suppress(TimeoutError, ArbiterError):
                    async with asyncio.timeout(ARBITER_LIMIT_S):
                        tenure.record = await self._agent.arbiter.read(name)
        elif tenure.driver is not None and tenure.driver.state in RUNNING_HERE and described is not None:
            state = await self.state(*described)
            if state is not GuestState.RUNNING:
                row["problem"] = row.get("problem") or f"its hypervisor says that it is {state.value}"
        if row["role"] == "primary" and row.get("peer"):
            row |= self._agent.figures.row(name, time.time_ns())
            if notice := row.pop("notice", ""):
                row["problem"] = row.get("problem") or notice
        return row

    async def state(self, config: GuestConfig, hypervisor: Hypervisor) -> GuestState:
        """Return what the hypervisor says of a guest; a hypervisor that hangs is a silent guest."""
        try:
            async with asyncio.timeout(STATE_LIMIT_S):
                return await hypervisor.state(config)
        except (TimeoutError, UnderstudyError, OSError):
            return GuestState.SILENT

    async def _found(self) -> Sequence[FoundGuest]:
        found: list[FoundGuest] = []
        for hypervisor in self._agent.hypervisors.values():
            try:
                async with asyncio.timeout(STATE_LIMIT_S):
                    found += await hypervisor.found()
            except (TimeoutError, UnderstudyError, OSError) as error:
                log.warning("hypervisor %s cannot list its guests: %s", hypervisor.name, in_words(error))
        return found

    async def status(self, call: Call) -> Json:
        """Return this host, its peers and guests; or one guest in detail."""
        guest = call.params.get("guest")
        table = await self.table(call)
        if guest:
            table["guests"] = [row for row in table["guests"] if row["guest"] == guest]
            if not table["guests"]:
                self._agent.files.load(guest)  # says why it is not known
            return table | await self._detail(guest)
        agent = self._agent
        peers = [
            {
                "name": link.name,
                "up": link.up,
                "problem": link.problem,
                "agent": link.agent,
                "address": link.address,
            }
            for link in agent.links.peers.values()
        ]
        return table | {
            "agent": __version__,
            "listen": f"{agent.config.address} port {agent.config.port}",
            "peers": peers,
            "arbiter": await self._arbiter(),
        }

    async def _arbiter(self) -> Json:
        agent = self._agent
        told: Json = {"kind": agent.config.arbiter_kind, "up": False, "problem": "none is configured"}
        if agent.arbiter is None:
            return told
        try:
            async with asyncio.timeout(ARBITER_LIMIT_S):
                await agent.arbiter.guests()
        except (TimeoutError, ArbiterError) as error:
            return told | {"problem": in_words(error) or "no answer"}
        return told | {"up": True, "problem": ""}

    async def _detail(self, guest: str) -> Json:
        agent = self._agent
        record = None
        with suppress(TimeoutError, ArbiterError):
            async with asyncio.timeout(ARBITER_LIMIT_S):
                record = await agent.arbiter.read(guest) if agent.arbiter is not None else None
        return {
            "guest": guest,
            "record": record.to_json() if record else None,
            "figures": agent.figures.row(guest, time.time_ns()),
            "events": list(agent.history.read(guest, 10)),
        }

    async def history(self, call: Call) -> Json:
        """Return what happened to a guest on this host, and its records."""
        agent, guest = self._agent, call.str("guest")
        limit = int(call.params.get("limit") or 0)
        events = list(agent.history.read(guest, limit))
        records: list[Json] = []
        with suppress(TimeoutError, ArbiterError):
            async with asyncio.timeout(ARBITER_LIMIT_S):
                if agent.arbiter is not None:
                    records = [record.to_json() for record in await agent.arbiter.history(guest)]
        if not events and not records:
            agent.files.load(guest)
        return {"guest": guest, "host": agent.host, "events": events, "records": records[-limit:]}

    # --- Preflight -----------------------------------------------------------------------------------------------

    async def check(self, call: Call) -> Json:
        """Return everything that stands in the way of protecting a guest."""
        mode = Mode(call.params["mode"]) if call.params.get("mode") else None
        guest = call.str("guest")
        try:
            config, hypervisor = self._agent.files.load(
                guest, mode=mode, allow_unsafe=bool(call.params.get("allow_unsafe"))
            )
        except GuestNotFound:
            found = [each for each in await self._found() if each.name == guest]
            if not found:
                raise
            return self._verdict(guest, "-", "-", foreign(self._agent.host, found[0]))
        peer = self.peer_of(config, call.params.get("peer"))
        findings = await self.preflight(config, hypervisor, peer)
        return self._verdict(guest, peer, config.protection.mode.value, findings)

    def _verdict(self, guest: str, peer: str, mode: str, findings: Sequence[Finding]) -> Json:
        return {
            "guest": guest,
            "host": self._agent.host,
            "peer": peer,
            "mode": mode,
            "protectable": all(finding.severity is not Severity.ERROR for finding in findings),
            "findings": [finding_row(finding) for finding in findings],
        }

    async def preflight(self, config: GuestConfig, hypervisor: Hypervisor, peer: str) -> Sequence[Finding]:
        """Look at this host and `peer`; see `understudy.preflight.preflight`."""
        agent = self._agent
        with suppress(
            LinkLost
        ):  # an agent that has just been started; what is wrong is said by the preflight
            if peer in agent.links.peers:
                await agent.links.peers[peer].wait_up(LINK_LIMIT_S)
        here = Here(
            host=agent.host,
            config=config,
            hypervisor=hypervisor,
            subkinds=agent.subkinds(),
            arbiter=agent.arbiter,
            digest=agent.files.digest(config.name),
            agent=__version__,
        )
        findings = list(await preflight(here, agent.neighbours.host(peer)))
        if agent.config.insecure:
            problem = "what the hosts send each other, the guest's memory too, is neither encrypted nor authenticated"
            remedy = "keep the link on a network that nobody else can reach"
            findings.append(Finding(Severity.NOTE, "insecure = true", problem, remedy))
        return findings

    def peer_of(self, config: GuestConfig, given: str | None) -> str:
        """Return the host that shall hold a copy: as given, as the guest file says, or the only one there is.

        Raises:
            StateError: Nothing says which.
        """
        peers = sorted(self._agent.links.peers)
        peer = given or config.protection.peer
        if not peer and len(peers) == 1:
            return peers[0]
        if not peer:
            known = ", ".join(peers) or "none is configured in agent.toml"
            raise StateError(f"which host shall hold the copy of {config.name}? Give --peer (peers: {known})")
        if peer not in peers:
            known = ", ".join(peers) or "none is configured in agent.toml"
            raise StateError(f"{self._agent.host} has no peer {peer!r} (peers: {known})")
        return peer
