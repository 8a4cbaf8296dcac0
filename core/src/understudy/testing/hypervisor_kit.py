"""The contract of a hypervisor, run on any hypervisor: `check_hypervisor`.

The kit takes a guest through whole sessions without an engine, step by step as the session tables would: protect,
checkpoint, unprotect, fail over, go on alone, give up half-way; and looks at every step for what `Hypervisor`,
`PrimaryDomain` and `SecondaryDomain` promise. No pytest is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from understudy.arbiter import RecordState
from understudy.device import DeviceInfo, Finding, Gate, Mode, Verdict
from understudy.errors import GuestNotFound, HypervisorError
from understudy.hypervisor import GuestState
from understudy.phases import in_words
from understudy.report import Checkpoint
from understudy.testing.faults import Cancel, Fault
from understudy.testing.hypervisor_bed import (
    PRIMARY,
    SECONDARY,
    HypervisorBed,
    MakeHypervisorBed,
    PlayedSession,
    record_of,
)
from understudy.testing.subkind_bed import ContractBroken

__all__ = ["CHECKS", "ContractBroken", "HypervisorBed", "PlayedSession", "check_hypervisor", "record_of"]

_GATE_OF = {"postsuspend": Gate.POSTSUSPEND, "checkpoint": Gate.CHECKPOINT, "preresume": Gate.PRERESUME}
_ENDED = {PRIMARY: Verdict.KEEP, SECONDARY: Verdict.DISCARD}
_PROMOTED = {PRIMARY: Verdict.DISCARD, SECONDARY: Verdict.KEEP}


@dataclass
class _Kit:
    make: MakeHypervisorBed
    epochs: int
    step_s: float
    faults: int
    check: str = ""

    @asynccontextmanager
    async def session(self, *, started: bool = True) -> AsyncIterator[PlayedSession]:
        # A fresh world with the guest running; afterwards no session may have left a trace in it.
        async with self.make() as bed:
            session = PlayedSession(bed, self.check, self.step_s)
            before = {side: set(await bed.traces(side)) for side in (PRIMARY, SECONDARY)}
            if started:
                await session.start()
                await bed.works(PRIMARY)
            try:
                yield session
            except (HypervisorError, ExceptionGroup, TimeoutError) as error:
                raise session.complain(f"failed: {in_words(error)}") from error
            for side, had in before.items():
                if (left := set(await bed.traces(side)) - had) and session.groups:
                    raise session.complain(f"left behind on the {side.value}'s host: {sorted(left)}")
            await bed.verify()


async def check_hypervisor(
    make: MakeHypervisorBed,
    *,
    epochs: int = 3,
    step_s: float = 60.0,
    faults: int = 30,
    only: Collection[str] = (),
) -> tuple[str, ...]:
    """Run the whole contract on a hypervisor.

    Args:
        make: Makes a fresh world; entered once per run.
        epochs: How many checkpoints a session takes.
        step_s: Deadline of every step, seconds.
        faults: At how many awaits of `replicate` a cancellation is tried.
        only: Names of `CHECKS` to run, all if empty.

    Returns:
        The names of the checks that ran.

    Raises:
        ContractBroken: The first complaint.
    """
    kit = _Kit(make, epochs, step_s, faults)
    chosen = {name: check for name, check in CHECKS.items() if not only or name in only}
    for name, check in chosen.items():
        kit.check = name
        await check(kit)
    return tuple(chosen)


# --- Without a session ---


async def _descriptor(kit: _Kit) -> None:
    async with kit.session(started=False) as session:
        for side in (PRIMARY, SECONDARY):
            hypervisor, config = session.bed.hypervisor(side), session.bed.config(side)
            if not hypervisor.modes or not all(isinstance(mode, Mode) for mode in hypervisor.modes):
                raise session.complain(f"modes are {hypervisor.modes!r}")
            if config.hypervisor != hypervisor.name:
                raise session.complain(f"the configuration names {config.hypervisor}, not {hypervisor.name}")
            names = [device.name for device in config.devices]
            if len(names) != len(set(names)):
                raise session.complain(f"two devices have one name: {names}")


async def _looking_changes_nothing(kit: _Kit) -> None:
    async with kit.session() as session:
        bed = session.bed
        for side in (PRIMARY, SECONDARY):
            before, traces = await session.state(side), set(await bed.traces(side))
            hypervisor, config = bed.hypervisor(side), bed.config(side)
            facts = json.loads(json.dumps(dict(await hypervisor.facts(config))))
            for mode in hypervisor.modes:
                found = await hypervisor.probe(config, side=side, mode=mode, peer_facts=facts)
                if not all(isinstance(finding, Finding) for finding in found):
                    raise session.complain(f"probe returned {found!r}")
            hypervisor.probe_services(config)
            told = [_identity(device) for device in await hypervisor.devices(config)]
            if told != [_identity(device) for device in config.devices]:
                raise session.complain(
                    f"its devices on the {side.value}'s host are not those of its file: {told}"
                )
            await hypervisor.found()
            if await session.state(side) is not before or set(await bed.traces(side)) != traces:
                raise session.complain(f"looking changed something on the {side.value}'s host")


def _identity(device: DeviceInfo) -> tuple[object, ...]:
    return device.kind, device.name, device.index, device.hypervisor, device.subkind


async def _start_and_stop(kit: _Kit) -> None:
    async with kit.session() as session:
        bed = session.bed
        hypervisor, config = bed.hypervisor(PRIMARY), bed.config(PRIMARY)
        [found] = [each for each in await hypervisor.found() if each.name == config.name]
        if not found.ours or found.obstacle or found.state is not GuestState.RUNNING:
            raise session.complain(f"a guest that it started itself is found as {found}")
        await session.demand(SECONDARY, GuestState.ABSENT)
        await hypervisor.stop(config, force=True, timeout_s=kit.step_s)
        await session.demand(PRIMARY, GuestState.ABSENT)
        try:
            await hypervisor.primary(config)
        except GuestNotFound:
            return
        raise session.complain("primary() of a guest that does not run does not raise GuestNotFound")


async def _nothing_before_launch(kit: _Kit) -> None:
    async with kit.session() as session:
        bed = session.bed
        traces = set(await bed.traces(SECONDARY))
        copy = await bed.hypervisor(SECONDARY).secondary(bed.config(SECONDARY), {})
        await session.demand(SECONDARY, GuestState.ABSENT)
        if set(await bed.traces(SECONDARY)) != traces:
            raise session.complain("secondary() has made something before launch")
        await copy.discard()
        await copy.discard()
        await copy.close()
        await copy.close()


async def _sweep_of_nothing(kit: _Kit) -> None:
    async with kit.session() as session:
        record = record_of(session.guest, RecordState.ALONE, PRIMARY, session.generation)
        for side in (PRIMARY, SECONDARY):
            done = await session.bed.hypervisor(side).sweep(session.bed.config(side), record)
            if done:
                raise session.complain(f"the janitor of the {side.value}'s host found work: {list(done)}")
        await session.demand(PRIMARY, GuestState.RUNNING)
        await session.bed.works(PRIMARY)


# --- A session ---


async def _protected(kit: _Kit, session: PlayedSession) -> None:
    await session.open()
    await session.replicate()
    await session.demand(PRIMARY, GuestState.RUNNING)
    for _ in range(kit.epochs):
        _check_checkpoint(session, await session.checkpoint())
        await session.demand(PRIMARY, GuestState.RUNNING)
    await session.bed.works(PRIMARY)


def _check_checkpoint(session: PlayedSession, done: Checkpoint) -> None:
    if done.epoch != session.epoch:
        raise session.complain(f"checkpoint({session.epoch}) returned epoch {done.epoch}")
    if not done.stopped_ns <= min(done.resumed_ns, done.acknowledged_ns):
        raise session.complain(f"the times of {done} are in no order")
    steps = [step for step, epoch, _ in session.calls if epoch == session.epoch]
    wanted = [step for step, gate in _GATE_OF.items() if gate in session.mine.gates]
    if [step for step in steps if step in wanted] != wanted:
        raise session.complain(f"its gates are {wanted}, and it called {steps}")
    for step, _, state in session.calls:
        if step in wanted and state is GuestState.RUNNING:
            raise session.complain(f"the guest ran during {step}, which is declared as a gate")


async def _unprotect(kit: _Kit) -> None:
    async with kit.session() as session:
        await _protected(kit, session)
        async with asyncio.timeout(kit.step_s):
            await session.mine.sever("a planned end")
            session.record(RecordState.ALONE, PRIMARY)
            await session.mine.resume_alone(session.groups[PRIMARY])
            await session.copy.sever("a planned end")
            await session.copy.discard()
        await session.end(_ENDED)
        await session.demand(PRIMARY, GuestState.RUNNING)
        await session.demand(SECONDARY, GuestState.ABSENT)
        await session.bed.works(PRIMARY)


async def _secondary_lost(kit: _Kit) -> None:
    # The copy dies; the next checkpoint fails in time, and the guest goes on alone.
    async with kit.session() as session:
        await _protected(kit, session)
        async with asyncio.timeout(kit.step_s):
            await session.copy.discard()
            await session.demand(SECONDARY, GuestState.ABSENT)
            await _refused(session, "a checkpoint without a secondary")
            await session.mine.sever("the secondary is gone")
            session.record(RecordState.ALONE, PRIMARY)
            await session.mine.resume_alone(session.groups[PRIMARY])
        await session.end(_ENDED)
        await session.demand(PRIMARY, GuestState.RUNNING)
        await session.bed.works(PRIMARY)


async def _refused(session: PlayedSession, what: str) -> None:
    try:
        await session.checkpoint()
    except (HypervisorError, ExceptionGroup):
        return
    raise session.complain(f"{what} was acknowledged")


async def _failover(kit: _Kit) -> None:
    async with kit.session() as session:
        await _protected(kit, session)
        async with asyncio.timeout(kit.step_s):
            loaded = await session.copy.sever("the primary is suspected")
            if loaded < kit.epochs:
                raise session.complain(f"{kit.epochs} checkpoints were acknowledged, the copy holds {loaded}")
            if await session.copy.sever("again") != loaded:
                raise session.complain("the number of loaded checkpoints changed after the stream was cut")
            if session.loaded() not in {0, loaded}:
                raise session.complain(
                    f"its events told of {session.loaded()} checkpoints, sever of {loaded}"
                )
            await _refused(session, "a checkpoint after the copy's end of the stream was cut")
            await session.mine.sever("no acknowledgement")
            won = session.record(RecordState.PROMOTING, PRIMARY)
            await session.mine.freeze()
            await session.demand(PRIMARY, GuestState.PAUSED)
            await session.copy.promote(session.groups[SECONDARY], won)
            alone = session.record(RecordState.ALONE, SECONDARY)
            await session.copy.open_outlet(alone)
            await session.demand(SECONDARY, GuestState.RUNNING)
            await session.mine.discard()
            await session.demand(PRIMARY, GuestState.ABSENT)
        await session.end(_PROMOTED)
        await session.demand(SECONDARY, GuestState.RUNNING)
        await session.bed.works(SECONDARY)


async def _given_up_half_way(kit: _Kit) -> None:
    # `replicate` cancelled at every await: the guest runs here again, and nothing is left.
    async with kit.session() as session:
        await session.open()
        healthy = Fault(Cancel(), 0)
        await _replicate(session, healthy)
        await _gave_up(kit, session)
    every = max(1, healthy.passed // kit.faults)
    for point in range(1, healthy.passed + 1, every):
        fault = Fault(Cancel(), point)
        async with kit.session() as session:
            try:
                await session.open()
                with contextlib.suppress(asyncio.CancelledError):
                    await _replicate(session, fault)
                await session.demand(PRIMARY, GuestState.RUNNING)
                await _gave_up(kit, session)
                await session.bed.works(PRIMARY)
            except ContractBroken as error:
                raise session.complain(f"with {fault!r} of replicate: {error.problem}") from error


async def _replicate(session: PlayedSession, fault: Fault) -> None:
    bed = session.bed
    receiving = asyncio.ensure_future(
        session.copy.receive(bed.channels(SECONDARY), session.groups[SECONDARY])
    )
    try:
        async with asyncio.timeout(session.step_s):
            await fault.strike(
                session.mine.replicate(session.groups[PRIMARY], bed.channels(PRIMARY), lambda *_: None)
            )
            if not fault.struck:
                await receiving
    finally:
        receiving.cancel()
        await asyncio.wait([receiving])
        if not receiving.cancelled():
            receiving.exception()


async def _gave_up(kit: _Kit, session: PlayedSession) -> None:
    async with asyncio.timeout(kit.step_s):
        await session.mine.sever("given up")
        session.record(RecordState.ALONE, PRIMARY)
        await session.mine.resume_alone(session.groups[PRIMARY])
        await session.copy.discard()
    await session.end(_ENDED)
    await session.demand(PRIMARY, GuestState.RUNNING)
    await session.demand(SECONDARY, GuestState.ABSENT)


#: Every check by name, in the order in which they run.
CHECKS: Mapping[str, Callable[[_Kit], Awaitable[None]]] = {
    "descriptor": _descriptor,
    "looking-changes-nothing": _looking_changes_nothing,
    "start-and-stop": _start_and_stop,
    "nothing-before-launch": _nothing_before_launch,
    "sweep-of-nothing": _sweep_of_nothing,
    "unprotect": _unprotect,
    "secondary-lost": _secondary_lost,
    "failover": _failover,
    "given-up-half-way": _given_up_half_way,
}
