"""Can this guest be protected? All findings of both hosts at once, each with what to do. Nothing is changed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from understudy.arbiter import RecordState
from understudy.device import Finding, ProbeContext, ReplicationMode, Severity
from understudy.errors import UnderstudyError
from understudy.hypervisor import GuestState
from understudy.matching import options_of, probe_device, refusals
from understudy.phases import in_words

if TYPE_CHECKING:
    from understudy.arbiter import Arbiter, Record
    from understudy.device import Mode, Subkind
    from understudy.hypervisor import FoundGuest, GuestConfig, Hypervisor

__all__ = ["Here", "OtherHost", "foreign", "preflight", "probe_side"]

Json = Mapping[str, Any]
T = TypeVar("T")

# A probe looks at files, monitors and interfaces; what takes longer hangs.
PROBE_LIMIT_S = 15.0

_UPON_YOURSELF = "take it upon yourself with --allow-unsafe"


@dataclass(frozen=True, slots=True)
class Here:
    """This host's half of a preflight."""

    host: str
    config: GuestConfig
    hypervisor: Hypervisor
    subkinds: Sequence[Subkind]
    arbiter: Arbiter | None
    digest: str  #: of the guest file
    agent: str  #: version of the agent


class OtherHost(Protocol):
    """The other host's half, asked over the link."""

    @property
    def name(self) -> str:
        """Its name."""

    async def look(self, guest: str, mode: Mode) -> Json:
        """Return ``facts``, ``record`` (or null), ``digest`` and ``agent`` of the other host."""

    async def probe(self, guest: str, mode: Mode, peer_facts: Json) -> Sequence[Finding]:
        """Return what the other host finds as the secondary's."""


async def preflight(here: Here, there: OtherHost) -> list[Finding]:
    """Look at both hosts.

    Args:
        here: This host, where the guest runs.
        there: The host that shall hold the copy.

    Returns:
        All findings, errors first; unsafe ones are warnings where the guest's protection allows that. Never raises
        for what is found: what cannot be looked at is a finding, too.
    """
    config, mode = here.config, here.config.protection.mode
    findings: list[Finding] = []
    findings += refusals(here.hypervisor.name, here.hypervisor.modes, here.subkinds, mode, config.devices)
    findings += await _safely(f"guest {config.name} on {here.host}", _runs(here))
    facts: Json = {}
    look: Json | None = None
    try:
        facts = await _bounded(here.hypervisor.facts(config))
    except Exception as error:  # noqa: BLE001 - all findings at once
        findings.append(_failed(f"hypervisor {here.hypervisor.name} on {here.host}", error))
    try:
        look = await _bounded(there.look(config.name, mode))
    except Exception as error:  # noqa: BLE001 - as above
        remedy = f"see that the agent on {there.name} runs, knows this guest, and can be reached"
        findings.append(Finding(Severity.ERROR, f"host {there.name}", in_words(error), remedy))
    findings += await _safely(f"arbiter on {here.host}", _records(here, there, look))
    their_facts: Json = {}
    if look is not None:
        their_facts = look["facts"]
        findings += _compare(here, there, look)
    ours = probe_side(here, ReplicationMode.PRIMARY, their_facts)
    if look is None:
        findings += await ours
    else:
        theirs = _safely(f"host {there.name}", there.probe(config.name, mode, facts))
        both = await asyncio.gather(ours, theirs)
        findings += [finding for side in both for finding in side]
    order = list(Severity)
    unique = dict.fromkeys(_weighed(finding, allowed=config.protection.allow_unsafe) for finding in findings)
    return sorted(unique, key=lambda finding: order.index(finding.severity))


async def probe_side(here: Here, side: ReplicationMode, peer_facts: Json) -> list[Finding]:
    """Look at one host, as one side: its hypervisor, and every device's subkind."""
    config, hypervisor = here.config, here.hypervisor
    mode = config.protection.mode
    if mode not in hypervisor.modes:
        return []  # that the mode is missing is said by the refusals
    subject = f"hypervisor {hypervisor.name} on {here.host}"
    findings = list(
        await _safely(subject, hypervisor.probe(config, side=side, mode=mode, peer_facts=peer_facts))
    )
    try:
        services = hypervisor.probe_services(config)
    except Exception as error:  # noqa: BLE001 - all findings at once
        return [*findings, _failed(subject, error)]
    try:
        devices = await _bounded(hypervisor.devices(config))
    except Exception as error:  # noqa: BLE001 - as above
        return [*findings, _failed(subject, error)]
    for device in devices:
        context = ProbeContext(
            guest=config.name,
            device=device,
            side=side,
            mode=mode,
            options=None,
            services=services,
            directory=hypervisor.here.overlay_directory / config.name,
            peer_facts=peer_facts,
        )
        options = partial(_options, config)
        probing = probe_device(here.subkinds, hypervisor.modes, context, options)
        findings += await _safely(f"{device.name} on {here.host}", _second(probing))
    return findings


def _weighed(finding: Finding, *, allowed: bool) -> Finding:
    if not finding.unsafe or finding.severity is not Severity.ERROR:
        return finding
    if allowed:
        return replace(finding, severity=Severity.WARNING)
    return replace(finding, remedy="; or ".join(filter(None, (finding.remedy, _UPON_YOURSELF))))


def foreign(host: str, found: FoundGuest) -> list[Finding]:
    """Return why a guest that Understudy did not start cannot be protected, and what would change that."""
    problem = found.obstacle or "it was not started by Understudy, and no file describes it"
    remedy = found.remedy or "write a guest file for it, shut it down, and start it with 'understudy start'"
    return [Finding(Severity.ERROR, f"guest {found.name} on {host}", problem, remedy)]


async def _runs(here: Here) -> list[Finding]:
    config = here.config
    subject = f"guest {config.name} on {here.host}"
    for found in await _bounded(here.hypervisor.found()):
        if found.name == config.name and (found.obstacle or not found.ours):
            return foreign(here.host, found)
    state = await _bounded(here.hypervisor.state(config))
    if state is GuestState.RUNNING:
        return []
    if state is GuestState.SILENT:
        remedy = (
            f"see why its hypervisor does not answer; understudy stop {config.name} --force would kill it"
        )
        return [Finding(Severity.ERROR, subject, "it is silent: its hypervisor does not answer", remedy)]
    problem = "it does not run here" if state is GuestState.ABSENT else f"it is {state.value}, not running"
    return [Finding(Severity.ERROR, subject, problem, f"start it: understudy start {config.name}")]


async def _records(here: Here, there: OtherHost, look: Json | None) -> list[Finding]:
    guest, subject = here.config.name, f"arbiter on {here.host}"
    if here.arbiter is None:
        remedy = 'add [arbiter] with kind = "directory" and a path that both hosts see'
        return [Finding(Severity.ERROR, subject, "no arbiter is configured in agent.toml", remedy)]
    record = await here.arbiter.read(guest)
    findings = _own_record(here, subject, record)
    if look is not None and look["record"] != (record.to_json() if record else None):
        ours, theirs = _told(record.to_json() if record else None), _told(look["record"])
        problem = f"{here.host} and {there.name} read different records ({ours}; {theirs})"
        remedy = "see that [arbiter] names the same place on both hosts"
        findings.append(Finding(Severity.ERROR, "arbiter", problem, remedy))
    return findings


def _own_record(here: Here, subject: str, record: Record | None) -> list[Finding]:
    guest = here.config.name
    if record is None:
        problem = "it has no record of this guest: Understudy did not start it"
        remedy = f"shut the guest down and start it with 'understudy start {guest}'"
        return [Finding(Severity.ERROR, subject, problem, remedy)]
    if record.state is not RecordState.ALONE or record.owner != here.host:
        problem = f"its record does not say that this host runs the guest alone ({record})"
        remedy = f"protect it on the host that owns it, when it is alone: understudy status {guest}"
        return [Finding(Severity.ERROR, subject, problem, remedy)]
    return []


def _compare(here: Here, there: OtherHost, look: Json) -> list[Finding]:
    findings = []
    if look["digest"] != here.digest:
        problem = f"its file is not the same on {here.host} and {there.name}"
        remedy = "copy it to the other host; what must differ goes into [host.NAME]"
        findings.append(Finding(Severity.WARNING, f"guest {here.config.name}", problem, remedy))
    if look["agent"] != here.agent:
        problem = f"agent {here.agent} on {here.host}, agent {look['agent']} on {there.name}"
        findings.append(
            Finding(Severity.WARNING, "agents", problem, "install the same version on both hosts")
        )
    return findings


def _options(config: GuestConfig, subkind: Subkind) -> Any:
    return options_of(subkind, config.protection.subkind_options, str(config.source))


def _told(record: Json | None) -> str:
    return f"generation {record['generation']}, {record['state']}" if record else "none"


async def _second(probing: Awaitable[tuple[str | None, Sequence[Finding]]]) -> Sequence[Finding]:
    return (await probing)[1]


async def _safely(subject: str, work: Awaitable[Sequence[Finding]]) -> Sequence[Finding]:
    try:
        return await _bounded(work)
    except Exception as error:  # noqa: BLE001 - all findings at once: one failure must not hide the others
        return [_failed(subject, error)]


async def _bounded(work: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            return await work
    except TimeoutError as error:
        raise UnderstudyError(f"it could not be looked at within {PROBE_LIMIT_S:g} s") from error


def _failed(subject: str, error: Exception) -> Finding:
    return Finding(Severity.ERROR, subject, in_words(error), "see the agent's log")
