"""The contract of a device subkind, run on any subkind: `check_subkind`.

::

    @asynccontextmanager
    async def make():
        yield MyBed()          # a fresh world for every check: both hosts, one device

    await check_subkind(make)

The kit plays both hosts: it opens the secondary's half, then the primary's, lets the two halves talk, takes them
through epochs and tears them down; then again with a fault at every await of every step, with the other half gone,
and with both verdicts. After every run nothing may be left: no task, no file descriptor, nothing of what the bed calls
traces. No pytest is needed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import get_type_hints

from understudy.device import Decline, Finding, ProbeContext, ProtectedDevice, ReplicationMode, Verdict
from understudy.testing.faults import Cancel, Fault, Raise
from understudy.testing.subkind_bed import (
    PRIMARY,
    SECONDARY,
    ContractBroken,
    Half,
    Make,
    Stage,
    SubkindBed,
    declared_beds,
    open_context,
)

__all__ = ["CHECKS", "ContractBroken", "SubkindBed", "check_subkind", "declared_beds", "open_context"]

_UNITS = (
    *("_ns", "_us", "_ms", "_s", "_bytes", "_kib", "_mib", "_pages", "_packets", "_sectors"),
    *("_ratio", "_share", "_count", "_port", "_per_s"),
)
_DO_AND_UNDO = 2  # what a cancelled step may still have to do, in times of the whole step


async def check_subkind(
    make: Make,
    *,
    broken: Callable[[SubkindBed], Awaitable[None]] | None = None,
    epochs: int = 2,
    step_s: float = 30.0,
    grace_s: float = 1.0,
    faults: int = 100,
    seed: int = 0,
    only: Collection[str] = (),
) -> tuple[str, ...]:
    """Run the whole contract on a subkind.

    Args:
        make: Makes a fresh world; entered once per run, hundreds of times with faults.
        broken: Breaks the device so that its next `error` must raise.
        epochs: How many epochs a healthy run takes.
        step_s: Deadline of every step, seconds.
        grace_s: How long a cancelled step may take to end, seconds, besides finishing what it does and undoing it:
            for these it has twice the time that it takes undisturbed on this machine.
        faults: How many await points of one step are tried; all of them if there are not more.
        seed: Chooses among more than that; part of every complaint.
        only: Names of `CHECKS` to run, all if empty.

    Returns:
        The names of the checks that ran.

    Raises:
        ContractBroken: The first complaint.
    """
    stage = Stage(make, broken, epochs, step_s, grace_s, faults, seed)
    ran = []
    for name, check in CHECKS.items():
        if only and name not in only:
            continue
        stage.check = name
        if await check(stage) is not False:
            ran.append(name)
    return tuple(ran)


async def _descriptor(stage: Stage) -> None:
    async with stage.pair() as pair:
        subkind = pair.bed.subkind
        if not re.fullmatch(r"[a-z][a-z0-9-]*", subkind.name):
            raise stage.broken(f"the name {subkind.name!r} is not of small letters, digits and dashes")
        if not subkind.modes:
            raise stage.broken("it serves no mode")
        if subkind.options is not None:
            _check_options(stage, subkind.options)
        context = pair.bed.context(PRIMARY, Half(pair, SECONDARY))
        if context.device.kind is not subkind.kind or context.mode not in subkind.modes:
            raise stage.broken("the bed's context has a device or a mode that the subkind does not serve")


def _check_options(stage: Stage, options: type) -> None:
    if not dataclasses.is_dataclass(options):
        raise stage.broken(f"options is {options!r}, not a dataclass")
    if not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise stage.broken(f"{options.__name__} is not frozen")
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise stage.broken(f"{options.__name__}.{field.name} has no default")
        if hints[field.name] in {int, float} and not field.name.endswith(_UNITS):
            raise stage.broken(
                f"{options.__name__}.{field.name} has no unit in its name ({', '.join(_UNITS)})"
            )


async def _probe(stage: Stage) -> None:
    async with stage.pair() as pair:
        for side in ReplicationMode:
            before = set(await pair.bed.traces(side))
            open_ = pair.bed.context(side, Half(pair, side))
            context = ProbeContext(
                guest=open_.guest,
                device=open_.device,
                side=side,
                mode=open_.mode,
                options=open_.options,
                services=open_.services,
                directory=open_.directory,
            )
            answer = await pair.bed.subkind.probe(context)
            if not isinstance(answer, Decline) and not all(isinstance(each, Finding) for each in answer):
                raise stage.broken(f"probe returned {answer!r}, neither findings nor a Decline")
            if set(await pair.bed.traces(side)) != before:
                raise stage.broken(f"probe changed something on the {side.value}'s host")


async def _life(stage: Stage) -> None:
    for verdict in Verdict:
        async with stage.pair(f" after a whole life, {verdict.value}") as pair:
            await pair.run()
            for side, device in pair.devices.items():
                _check_methods(stage, device)
                numbers = json.loads(json.dumps(dict(device.counters())))
                if any(
                    isinstance(value, bool) or not isinstance(value, int | float)
                    for value in numbers.values()
                ):
                    raise stage.broken(f"counters on the {side.value} are not all numbers: {numbers}")
            await pair.teardown(verdict)


def _check_methods(stage: Stage, device: ProtectedDevice) -> None:
    for name, method in inspect.getmembers(ProtectedDevice, inspect.iscoroutinefunction):
        if not inspect.iscoroutinefunction(getattr(device, name)):
            raise stage.broken(f"{type(device).__name__}.{name} is not async")
        if (
            list(inspect.signature(getattr(device, name)).parameters)
            != list(inspect.signature(method).parameters)[1:]
        ):
            raise stage.broken(f"{type(device).__name__}.{name} has other parameters than ProtectedDevice's")


async def _teardown_at_any_time(stage: Stage) -> None:
    async with stage.pair() as pair:
        steps = pair.script()
    for until in range(1, len(steps) + 1):
        step, side, epoch = steps[until - 1]
        for verdict in Verdict:
            async with stage.pair(
                f" after a teardown ({verdict.value}) after {step} {epoch} on {side.value}"
            ) as pair:
                await pair.run(until=until)
                await pair.teardown(verdict)


async def _teardown_twice(stage: Stage) -> None:
    async with stage.pair() as pair:
        await pair.run()
        await pair.teardown(Verdict.DISCARD)
        await pair.teardown(Verdict.DISCARD)


async def _failover(stage: Stage) -> None:
    # The other half is gone without a word: what is left goes on, with the verdict of the one who won.
    for survivor in ReplicationMode:
        async with stage.pair(f" after a failover to the {survivor.value}") as pair:
            await pair.run(until=-2)
            pair.lost = True
            await pair.bed.before("failover", survivor, 0)
            if inspect.iscoroutinefunction(pair.devices[survivor].sever):
                raise stage.broken(f"sever on the {survivor.value} is async; nobody can wait for it then")
            pair.devices[survivor].sever()
            pair.devices[survivor].sever()
            await stage.bounded(
                f"stop(failover=True) on the {survivor.value}", pair.devices[survivor].stop(failover=True)
            )
            await pair.teardown(Verdict.KEEP, survivor)
            loser = PRIMARY if survivor is SECONDARY else SECONDARY
            await pair.teardown(Verdict.DISCARD, loser)


async def _faults(stage: Stage) -> None:
    # A fault at every await of every step: whatever the step makes of it, teardown leaves nothing behind.
    async with stage.pair() as pair:
        steps = pair.script()
    # One epoch is enough: the others are the same again.
    for index, (step, side, epoch) in enumerate(steps):
        if epoch > 1:
            continue
        for what in (Cancel(), Raise()):
            healthy = Fault(what, 0)
            undisturbed_s = await _strike(stage, index, healthy)
            for point in stage.points(healthy.passed):
                fault = Fault(what, point)
                try:
                    await _strike(stage, index, fault, undisturbed_s)
                except ContractBroken as error:
                    where = f"with {fault!r} of {step} on the {side.value} (seed {stage.seed})"
                    raise ContractBroken(stage.check, f"{where}: {error.problem}") from error


async def _strike(stage: Stage, index: int, fault: Fault, undisturbed_s: float = 0.0) -> float:
    # Tells how long the step took, seconds.
    clock = asyncio.get_running_loop().time
    async with stage.pair() as pair:
        steps = pair.script()
        step, side, epoch = steps[index]
        await pair.run(until=index)
        await pair.bed.before(step, side, epoch)
        where = f"{step} on the {side.value}"
        began_s = clock()
        await stage.outcome(where, fault.strike(pair.work(step, side, epoch)))
        ended_s = clock()
        late_s = ended_s - fault.struck_at
        # It may have to wait for a thread to do the whole step, and undo it: on a busy machine that takes seconds.
        if (
            fault.struck
            and isinstance(fault.what, Cancel)
            and late_s > stage.grace_s + _DO_AND_UNDO * undisturbed_s
        ):
            raise stage.broken(
                f"{where} took {late_s:.1f} s to end after its cancellation, and {undisturbed_s:.1f} s undisturbed"
            )
        if step != "stop":
            for opened in pair.started:
                # It may fail after the fault; it must end, and teardown must clean up all the same.
                await stage.outcome(f"stop on the {opened.value}", pair.devices[opened].stop(failover=True))
        await pair.teardown(Verdict.DISCARD)
    return ended_s - began_s


async def _unknown_request(stage: Stage) -> None:
    async with stage.pair() as pair:
        await pair.run(until=2)
        for side, device in pair.devices.items():
            error = await stage.outcome(f"serve on the {side.value}", device.serve("no-such-request", {}))
            if error is None or isinstance(error, asyncio.CancelledError):
                raise stage.broken(
                    f"the {side.value} answers a request that does not exist instead of raising"
                )
        await pair.teardown(Verdict.DISCARD)


async def _error_told(stage: Stage) -> bool | None:
    if stage.breaks is None:
        return False
    async with stage.pair(" after a device broke") as pair:
        await pair.run(until=-2)
        await stage.breaks(pair.bed)
        errors = [await stage.outcome("error", device.error()) for device in pair.devices.values()]
        if not any(errors):
            raise stage.broken("a device was broken, and error() raises on neither side")
        for device in pair.devices.values():
            await stage.outcome("stop", device.stop(failover=True))
        await pair.teardown(Verdict.DISCARD)
    return None


async def _output_commit(stage: Stage) -> bool | None:
    for verdict in Verdict:
        async with stage.pair() as pair:
            bed = pair.bed
            if type(bed).send is SubkindBed.send:
                return False
            await pair.run(until=4)
            for epoch in (1, 2):
                await bed.send(epoch)
                for step in ("postsuspend", "checkpoint", "preresume", "postresume", "error"):
                    await pair.take(step, PRIMARY, epoch)
                    if step != "preresume":
                        await pair.take(step, SECONDARY, epoch)
                # Output of the next epoch, sent before the commit of this one, stays.
                await bed.send(epoch + 100)
                await _expect(stage, bed, epoch - 1, f"before commit({epoch})")
                await pair.take("commit", SECONDARY, epoch)
                await pair.take("commit", PRIMARY, epoch)
                await _expect(stage, bed, epoch, f"after commit({epoch})")
            await pair.teardown(verdict)
            everything = [1, 101, 2, 102]
            escaped = list(await bed.escaped())
            wanted = everything if verdict is Verdict.KEEP else everything[:3]
            if escaped != wanted:
                raise stage.broken(
                    f"after teardown({verdict.value}) {escaped} has left the host instead of {wanted}"
                )
    return None


async def _expect(stage: Stage, bed: SubkindBed, committed: int, when: str) -> None:
    # Output 100 + n was sent at the beginning of epoch n + 1.
    wanted = [1, 101, 2][: max(0, 2 * committed - 1)]
    escaped = list(await bed.escaped())
    if escaped != wanted:
        raise stage.broken(f"{when} {escaped} has left the host instead of {wanted}")


#: Every check by name, in the order in which they run; one that returns False did not apply to the bed.
CHECKS: Mapping[str, Callable[[Stage], Awaitable[bool | None]]] = {
    "descriptor": _descriptor,
    "probe": _probe,
    "life": _life,
    "unknown-request": _unknown_request,
    "teardown-at-any-time": _teardown_at_any_time,
    "teardown-twice": _teardown_twice,
    "failover": _failover,
    "error-told": _error_told,
    "output-commit": _output_commit,
    "faults": _faults,
}
