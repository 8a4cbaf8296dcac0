"""The stage on which `check_subkind` plays: one device on two hosts, and a look for what it leaves behind."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from understudy.device import (
    Decline,
    DeviceInfo,
    Mode,
    OpenContext,
    Peer,
    ProtectedDevice,
    ReplicationMode,
    Subkind,
    Verdict,
)
from understudy.errors import LinkLost, PeerError
from understudy.phases import in_words
from understudy.services import Services

__all__ = ["ContractBroken", "Half", "Make", "Pair", "Stage", "SubkindBed", "declared_beds", "open_context"]

PRIMARY, SECONDARY = ReplicationMode.PRIMARY, ReplicationMode.SECONDARY
_LOOKS = 100  # for what must have gone, within the grace


class ContractBroken(AssertionError):
    """The subkind does not do what `ProtectedDevice` and `Subkind` promise.

    Args:
        check: Name of the check.
        problem: What it did.
    """

    def __init__(self, check: str, problem: str) -> None:
        super().__init__(f"{check}: {problem}")
        self.check = check
        self.problem = problem


class SubkindBed:
    """A world for one device, both hosts of it, made anew for every check. Plugin authors subclass it."""

    subkind: Subkind  #: what is tried

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        """Return what `Subkind.open` gets on one side; see `open_context`."""
        raise NotImplementedError

    async def before(self, step: str, side: ReplicationMode, epoch: int) -> None:
        """Do what a hypervisor does before the step of the side: stop the guest, launch the copy."""

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        """List what there is on the side's host: objects, qdiscs, files. Compared before and after."""
        del side
        return ()

    async def send(self, number: int) -> None:
        """Let the primary's guest send output `number`; overridden, it makes the kit check the output commit."""

    async def escaped(self) -> Sequence[int]:
        """Return the numbers of all output that has left the primary's host, in order."""
        return ()


Make = Callable[[], AbstractAsyncContextManager[SubkindBed]]


def declared_beds() -> dict[str, Make]:
    """Return the beds that installed plugins declare for the contract of their subkinds, by subkind.

    A distribution declares them in its entry-point group ``understudy.testing``: the name is the subkind's, the
    object is what `check_subkind` takes as `make`.
    """
    found = sorted(entry_points(group="understudy.testing"), key=lambda point: point.name)
    return {point.name: point.load() for point in found}


def open_context(
    device: DeviceInfo,
    side: ReplicationMode,
    peer: Peer,
    *,
    mode: Mode = Mode.REMUS,
    services: Services | None = None,
    options: Any = None,
    directory: Path = Path("/nonexistent"),
) -> OpenContext:
    """Return a context for a bed, with addresses of the documentation's networks."""
    own, other = ("192.0.2.1", "192.0.2.2") if side is PRIMARY else ("192.0.2.2", "192.0.2.1")
    return OpenContext(
        guest="contract",
        device=device,
        side=side,
        mode=mode,
        session="contract-session",
        options=options,
        services=services or Services(),
        peer=peer,
        directory=directory,
        local_address=own,
        peer_address=other,
    )


class Half:
    """One half's way to the other one: in the same process, but as strict as a wire.

    Args:
        pair: The device on both hosts.
        other: The side that is asked.
    """

    def __init__(self, pair: Pair, other: ReplicationMode) -> None:
        self.pair = pair
        self.other = other

    async def request(self, method: str, params: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        """Ask the other half. As `understudy.Peer.request`."""
        device = self.pair.devices.get(self.other)
        if self.pair.lost or device is None:
            raise LinkLost(f"the {self.other.value} is gone")
        try:
            async with asyncio.timeout(timeout_s):
                answer = await device.serve(method, json.loads(json.dumps(params)))
        except TimeoutError:
            raise LinkLost(f"no answer to {method!r} in {timeout_s:g} s") from None
        except Exception as error:
            raise PeerError(in_words(error), type(error).__name__) from error
        return json.loads(json.dumps(answer))  # type: ignore[no-any-return]


class Pair:
    """The device on both hosts, and the script that takes it through its life.

    Args:
        stage: How to run a step.
        bed: The world.
    """

    def __init__(self, stage: Stage, bed: SubkindBed) -> None:
        self.stage = stage
        self.bed = bed
        self.devices: dict[ReplicationMode, ProtectedDevice] = {}
        self.started: set[ReplicationMode] = set()
        self.lost = False  #: the hosts do not hear of each other any more

    def script(self) -> list[tuple[str, ReplicationMode, int]]:
        """Return every step of a healthy life but the teardown, in order: step, side, epoch."""
        steps = [("open", SECONDARY, 0), ("open", PRIMARY, 0), ("start", SECONDARY, 0), ("start", PRIMARY, 0)]
        for epoch in range(1, self.stage.epochs + 1):
            for step in ("postsuspend", "checkpoint", "preresume", "postresume", "error", "commit"):
                sides = (PRIMARY,) if step == "preresume" else (PRIMARY, SECONDARY)
                steps += [(step, side, epoch) for side in sides]
        return [*steps, ("stop", PRIMARY, 0), ("stop", SECONDARY, 0)]

    def work(self, step: str, side: ReplicationMode, epoch: int) -> Coroutine[Any, Any, None]:
        """Return the coroutine of a step, not yet begun."""
        if step == "open":
            return self._open(side)
        device = self.devices[side]
        if step == "start":
            return self._start(side)
        if step == "error":
            return device.error()
        if step == "stop":
            return device.stop(failover=False)
        return getattr(device, step)(epoch)  # type: ignore[no-any-return]

    async def _open(self, side: ReplicationMode) -> None:
        other = PRIMARY if side is SECONDARY else SECONDARY
        answer: object = await self.bed.subkind.open(self.bed.context(side, Half(self, other)))
        if not isinstance(answer, ProtectedDevice):
            reason = answer.reason if isinstance(answer, Decline) else repr(answer)
            raise self.stage.broken(f"open on the {side.value} did not claim the bed's own device: {reason}")
        self.devices[side] = answer

    async def _start(self, side: ReplicationMode) -> None:
        await self.devices[side].start(side)
        self.started.add(side)

    async def run(self, *, until: int | None = None) -> None:
        """Take the first `until` steps of the script, all if ``None``; every one must succeed."""
        for step, side, epoch in self.script()[:until]:
            await self.take(step, side, epoch)

    async def take(self, step: str, side: ReplicationMode, epoch: int) -> None:
        """Take one step, which must succeed."""
        await self.bed.before(step, side, epoch)
        where = f"{step} on the {side.value}" + (f" of epoch {epoch}" if epoch else "")
        await self.stage.bounded(where, self.work(step, side, epoch))

    async def teardown(self, verdict: Verdict, *sides: ReplicationMode) -> None:
        """Tear the opened halves down, which must succeed."""
        for side in sides or (PRIMARY, SECONDARY):
            if side in self.devices:
                await self.bed.before("teardown", side, 0)
                await self.stage.bounded(
                    f"teardown on the {side.value}", self.devices[side].teardown(verdict)
                )


@dataclass
class Stage:
    """How every run of a kit is made; the fields are the arguments of `check_subkind`."""

    make: Make
    breaks: Callable[[SubkindBed], Awaitable[None]] | None
    epochs: int
    step_s: float
    grace_s: float
    faults: int
    seed: int
    check: str = ""  #: name of the check that runs

    def broken(self, problem: str) -> ContractBroken:
        """Return a complaint of the check that runs."""
        return ContractBroken(self.check, problem)

    @asynccontextmanager
    async def pair(self, story: str = "") -> AsyncIterator[Pair]:
        """Make a fresh world, and look for what is left in it at the end."""
        async with self.make() as bed:
            tasks, fds = asyncio.all_tasks(), _open_fds()
            before = {side: set(await bed.traces(side)) for side in ReplicationMode}
            pair = Pair(self, bed)
            yield pair
            for side in ReplicationMode:
                await self._none_left(f"on the {side.value}'s host{story}", before[side], bed, side)
            await self._settled(f"a task{story}", asyncio.all_tasks, tasks)
            await self._settled(f"a file descriptor{story}", _open_fds, fds)

    async def _none_left(self, where: str, before: set[str], bed: SubkindBed, side: ReplicationMode) -> None:
        after = set(await bed.traces(side))
        if after != before:
            more, less = sorted(after - before), sorted(before - after)
            raise self.broken(f"{where}: left behind {more or 'nothing'}, missing {less or 'nothing'}")

    async def _settled(self, what: str, look: Callable[[], set[Any]], before: set[Any]) -> None:
        # Transports close and cancelled tasks end a few turns of the loop later. Turns are counted, not seconds: a
        # machine that is busy with something else may be away for a second between two of them.
        for _ in range(_LOOKS):
            if not look() - before:
                return
            await asyncio.sleep(self.grace_s / _LOOKS)
        if left := look() - before:
            raise self.broken(f"{what} is left: {', '.join(sorted(map(str, left)))}")

    async def bounded(self, where: str, work: Coroutine[Any, Any, object]) -> None:
        """Run a step that must end in time, without an error."""
        error = await self.outcome(where, work)
        if error is not None:
            raise self.broken(f"{where} failed: {in_words(error)}") from error

    async def outcome(self, where: str, work: Coroutine[Any, Any, object]) -> BaseException | None:
        """Tell how a step ended; that it ends is demanded: in time, or when it is cancelled for being late."""
        if not inspect.iscoroutine(work):
            raise self.broken(f"{where} is no coroutine: is an 'async' missing?")
        task = asyncio.ensure_future(work)
        _, late = await asyncio.wait([task], timeout=self.step_s)
        if late:
            task.cancel()
            _, deaf = await asyncio.wait([task], timeout=self.grace_s)
            how = f" and did not end within {self.grace_s:g} s after its cancellation" if deaf else ""
            raise self.broken(f"{where} took longer than {self.step_s:g} s{how}")
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if isinstance(error, ContractBroken):
            raise error
        return error

    def points(self, passed: int) -> Sequence[int]:
        """Choose which of a step's await points are tried."""
        everywhere = range(1, passed + 1)
        if passed <= self.faults:
            return everywhere
        return sorted(random.Random(self.seed).sample(everywhere, self.faults))  # noqa: S311 - to be repeatable


def _open_fds() -> set[str]:
    # Number and target; the descriptor of this very listing is gone again, and not a trace.
    fds: set[str] = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are wanted, not paths
        try:
            fds.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")  # noqa: PTH115
        except FileNotFoundError:
            continue
    return fds
