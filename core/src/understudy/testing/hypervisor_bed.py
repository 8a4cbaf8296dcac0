"""The stage on which `check_hypervisor` plays: one guest, two hosts, a session taken through its life by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.arbiter import Record, RecordState
from understudy.device import Gate, ReplicationMode, Subkind, Verdict, no_progress
from understudy.errors import LinkLost
from understudy.group import DeviceGroup, GroupSetup
from understudy.hypervisor import (
    DomainEvent,
    DomainEventKind,
    GuestConfig,
    GuestState,
    Hypervisor,
    PrimaryDomain,
    SecondaryDomain,
)
from understudy.report import Checkpoint
from understudy.services import Channels
from understudy.testing.subkind_bed import ContractBroken

__all__ = ["HypervisorBed", "MakeHypervisorBed", "PlayedSession", "record_of"]

PRIMARY, SECONDARY = ReplicationMode.PRIMARY, ReplicationMode.SECONDARY
NAMES: Mapping[ReplicationMode, str] = {PRIMARY: "alpha", SECONDARY: "beta"}


class HypervisorBed:
    """Two hosts with one guest, made anew for every check; authors of hypervisors subclass it.

    The hosts' names in records are ``alpha`` (where the guest is started) and ``beta``.
    """

    subkinds: Sequence[Subkind]  #: that protect the guest's devices

    def hypervisor(self, side: ReplicationMode) -> Hypervisor:
        """Return the hypervisor of the side's host."""
        raise NotImplementedError

    def config(self, side: ReplicationMode) -> GuestConfig:
        """Return the guest as the side's host has it."""
        raise NotImplementedError

    def channels(self, side: ReplicationMode) -> Channels:
        """Return the side's end of the streams between the hosts."""
        raise NotImplementedError

    def directory(self, side: ReplicationMode) -> Path:
        """Return the guest's directory on the side's host; exists."""
        raise NotImplementedError

    def told(self, record: Record) -> None:
        """Note what the arbiter's record says from now on."""

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        """List what there is on the side's host: gates, objects, files. Compared before and after a session."""
        del side
        return ()

    async def works(self, side: ReplicationMode) -> None:
        """Return when the guest on the side's host has visibly done something, its clients included."""
        del side

    async def verify(self) -> None:
        """Raise if anything went wrong that only the world can see: a broken chain, two faces."""


MakeHypervisorBed = Callable[[], AbstractAsyncContextManager[HypervisorBed]]


def record_of(guest: str, state: RecordState, owner: ReplicationMode, generation: int) -> Record:
    """Return a record as an arbiter would hold it."""
    standby = NAMES[SECONDARY if owner is PRIMARY else PRIMARY] if state is not RecordState.ALONE else None
    return Record(
        guest=guest,
        generation=generation,
        state=state,
        owner=NAMES[owner],
        standby=standby,
        session="contract-session" if standby else None,
        writer=NAMES[owner],
        attempt=f"attempt-{generation}",
    )


class _ToGroup:
    # A device's way to its other half: that half's group, on the other side.

    def __init__(self, session: PlayedSession, other: ReplicationMode, device: str) -> None:
        self.session = session
        self.other = other
        self.device = device

    async def request(self, method: str, params: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        group = self.session.groups.get(self.other)
        if group is None:
            raise LinkLost("the other host has no devices yet")
        async with asyncio.timeout(timeout_s):
            return await group.serve(self.device, method, params)


class _Asked:
    # What the domain calls at its gates: both hosts' devices, and a note of when and in which state.

    def __init__(self, session: PlayedSession) -> None:
        self.session = session

    async def _ask(self, step: str, epoch: int, *sides: ReplicationMode) -> None:
        session = self.session
        session.calls.append((step, epoch, await session.state(PRIMARY)))
        for side in sides:
            group = session.groups[side]
            ask = group.do_checkpoint_all if step == "checkpoint" else getattr(group, step)
            await ask(epoch)

    async def postsuspend(self, epoch: int) -> None:
        await self._ask("postsuspend", epoch, PRIMARY, SECONDARY)

    async def checkpoint(self, epoch: int) -> None:
        await self._ask("checkpoint", epoch, PRIMARY, SECONDARY)

    async def preresume(self, epoch: int) -> None:
        await self._ask("preresume", epoch, PRIMARY)

    async def postresume(self, epoch: int) -> None:
        await self._ask("postresume", epoch, PRIMARY, SECONDARY)


@dataclass
class PlayedSession:
    """One session, played step by step without an engine.

    Args:
        bed: The world.
        check: Name of the check, for complaints.
        step_s: Deadline of every step, seconds.
    """

    bed: HypervisorBed
    check: str
    step_s: float

    def __post_init__(self) -> None:
        self.groups: dict[ReplicationMode, DeviceGroup] = {}
        self.calls: list[tuple[str, int, GuestState]] = []
        self.events: list[DomainEvent] = []
        self.epoch = 0
        self.generation = 1
        self.primary: PrimaryDomain | None = None
        self.secondary: SecondaryDomain | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def guest(self) -> str:
        """The guest's name."""
        return self.bed.config(PRIMARY).name

    @property
    def mine(self) -> PrimaryDomain:
        """The primary's domain, once it is open."""
        assert self.primary is not None  # noqa: S101 - the script opens it first
        return self.primary

    @property
    def copy(self) -> SecondaryDomain:
        """The secondary's domain, once it is open."""
        assert self.secondary is not None  # noqa: S101 - the script opens it first
        return self.secondary

    def complain(self, problem: str) -> ContractBroken:
        """Return a complaint of this check."""
        return ContractBroken(self.check, problem)

    async def state(self, side: ReplicationMode) -> GuestState:
        """Tell what the side's hypervisor sees of the guest."""
        return await self.bed.hypervisor(side).state(self.bed.config(side))

    async def demand(self, side: ReplicationMode, *states: GuestState) -> None:
        """Complain unless the guest is in one of the states on the side's host."""
        if (seen := await self.state(side)) not in states:
            wanted = " or ".join(state.value for state in states)
            raise self.complain(f"the guest is {seen.value} on the {side.value}'s host, not {wanted}")

    def record(self, state: RecordState, owner: ReplicationMode) -> Record:
        """Let a swap win, and return the record."""
        self.generation += 1
        won = record_of(self.guest, state, owner, self.generation)
        self.bed.told(won)
        return won

    async def start(self) -> None:
        """Start the guest on the primary's host."""
        async with asyncio.timeout(self.step_s):
            won = self.record(RecordState.ALONE, PRIMARY)
            await self.bed.hypervisor(PRIMARY).start(self.bed.config(PRIMARY), won)
        await self.demand(PRIMARY, GuestState.RUNNING)

    async def open(self) -> None:
        """Open both domains and both groups, and launch the copy."""
        bed = self.bed
        async with asyncio.timeout(self.step_s):
            facts = await bed.hypervisor(PRIMARY).facts(bed.config(PRIMARY))
            self.secondary = await bed.hypervisor(SECONDARY).secondary(bed.config(SECONDARY), facts)
            await self.demand(SECONDARY, GuestState.ABSENT)
            await self._devices(SECONDARY, self.secondary)
            await self.secondary.launch(self.groups[SECONDARY])
            await self.demand(SECONDARY, GuestState.INCOMING)
            self.primary = await bed.hypervisor(PRIMARY).primary(bed.config(PRIMARY))
            await self._devices(PRIMARY, self.primary)
        self._watching = asyncio.ensure_future(self._watch(self.secondary))

    async def _watch(self, domain: SecondaryDomain) -> None:
        async for event in domain.watch():
            self.events.append(event)

    async def _devices(self, side: ReplicationMode, domain: PrimaryDomain | SecondaryDomain) -> None:
        config, hypervisor = self.bed.config(side), self.bed.hypervisor(side)
        other = SECONDARY if side is PRIMARY else PRIMARY
        gates = hypervisor.modes[config.protection.mode]
        setup = GroupSetup(
            guest=config.name,
            session="contract-session",
            side=side,
            mode=config.protection.mode,
            devices=await hypervisor.devices(config),
            subkinds=self.bed.subkinds,
            gates=gates,
            services=domain.services,
            peer=lambda device: _ToGroup(self, other, device),
            directory=self.bed.directory(side),
            local_address="127.0.0.1",
            peer_address="127.0.0.1",
            options=config.protection.subkind_options,
        )
        # Known before it is open: the other half may ask while it is being opened.
        self.groups[side] = DeviceGroup(setup)
        await self.groups[side].new()

    async def replicate(self) -> None:
        """Copy the guest; afterwards both sides replicate."""
        receiving = asyncio.ensure_future(
            self.copy.receive(self.bed.channels(SECONDARY), self.groups[SECONDARY])
        )
        try:
            async with asyncio.timeout(self.step_s):
                await self.mine.replicate(self.groups[PRIMARY], self.bed.channels(PRIMARY), no_progress)
                await receiving
        finally:
            receiving.cancel()
            await asyncio.wait([receiving])
            if not receiving.cancelled():
                receiving.exception()

    async def checkpoint(self) -> Checkpoint:
        """Take the next checkpoint, and commit it on both sides."""
        self.epoch += 1
        self.calls.clear()
        async with asyncio.timeout(self.step_s):
            await self.mine.hurry()
            done = await self.mine.checkpoint(self.epoch, _Asked(self))
            for group in self.groups.values():
                await group.get_error_all()
            for group in self.groups.values():
                await group.commit(self.epoch)
        return done

    # --- The end ---

    async def end(self, verdicts: Mapping[ReplicationMode, Verdict]) -> None:
        """Tear both groups down and close both domains."""
        async with asyncio.timeout(self.step_s):
            for side, group in self.groups.items():
                await group.teardown(verdicts[side])
            for domain in (self.primary, self.secondary):
                if domain is not None:
                    await domain.close()
                    await domain.close()
            if self._watching is not None:
                await self._watching

    def loaded(self) -> int:
        """Return how many checkpoints the copy has told of."""
        counts = [event.count for event in self.events if event.kind is DomainEventKind.CHECKPOINT]
        if counts != sorted(set(counts)):
            raise self.complain(f"the copy's checkpoint events do not count up: {counts}")
        return counts[-1] if counts else 0

    def gates(self) -> frozenset[Gate]:
        """Return the gates that the primary's domain declares."""
        return self.mine.gates
