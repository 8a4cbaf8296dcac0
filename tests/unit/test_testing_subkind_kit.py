"""The contract kit must pass a good subkind and catch every kind of bad one, by the right check."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from understudy.device import (
    Decline,
    DeviceInfo,
    Finding,
    Kind,
    Mode,
    OpenContext,
    Peer,
    ProbeContext,
    ProtectedDevice,
    ReplicationMode,
    Severity,
    Subkind,
    Verdict,
)
from understudy.testing import clock
from understudy.testing.subkind_kit import CHECKS, ContractBroken, SubkindBed, check_subkind, open_context

NIC = DeviceInfo(Kind.NIC, "nic0", 0, "sim")
PRIMARY = ReplicationMode.PRIMARY


class World:
    """Two hosts with things on them, and a wire out of the primary."""

    def __init__(self) -> None:
        self.things: dict[ReplicationMode, set[str]] = {side: set() for side in ReplicationMode}
        self.wire: list[int] = []
        self.device: GoodNic | None = None
        self.broken = False


class GoodNic(ProtectedDevice):
    """Holds output epoch by epoch, on a host where everything takes a turn of the loop."""

    def __init__(self, world: World, context: OpenContext) -> None:
        self.world = world
        self.side = context.side
        self.peer = context.peer
        self.things = world.things[context.side]
        self.open_epoch: list[int] = []
        self.closed: dict[int, list[int]] = {}

    async def open(self) -> None:
        try:
            for thing in ("ifb", "qdisc", "filter"):
                self.things.add(thing)
                await asyncio.sleep(0.001)
            if self.side is PRIMARY:
                await self.peer.request("hello", {"from": self.side.value}, timeout_s=1)
                self.world.device = self
        except BaseException:
            self.things.clear()
            raise

    async def start(self, side: ReplicationMode) -> None:
        await asyncio.sleep(0.001)

    async def postsuspend(self, epoch: int) -> None:
        self.closed[epoch] = self.open_epoch
        self.open_epoch = []
        await asyncio.sleep(0.001)

    async def commit(self, epoch: int) -> None:
        await asyncio.sleep(0.001)
        for number in sorted(e for e in self.closed if e <= epoch):
            self.world.wire += self.closed.pop(number)

    async def error(self) -> None:
        if self.world.broken:
            raise OSError("a packet was dropped")

    async def stop(self, *, failover: bool) -> None:
        await asyncio.sleep(0.001)

    async def teardown(self, verdict: Verdict) -> None:
        if self.side is PRIMARY and verdict is Verdict.KEEP:
            for packets in (*self.closed.values(), self.open_epoch):
                self.world.wire += packets
        self.closed, self.open_epoch = {}, []
        await asyncio.sleep(0.001)
        self.things.clear()

    async def serve(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        if method == "hello":
            return {"heard": params["from"]}
        return await super().serve(method, params)

    def counters(self) -> Mapping[str, int | float]:
        return {"held_packets": len(self.open_epoch)}


@dataclass(frozen=True, slots=True)
class Options:
    limit_packets: int = 100
    policy: str = "stall"


async def probe(context: ProbeContext) -> Sequence[Finding] | Decline:
    return [Finding(Severity.NOTE, context.device.name, "held by a list")]


class Bed(SubkindBed):
    def __init__(self, subkind: Subkind, world: World, device: DeviceInfo = NIC) -> None:
        self.subkind = subkind
        self.world = world
        self.info = device

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        return open_context(self.info, side, peer, options=Options())

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        return self.world.things[side]

    async def send(self, number: int) -> None:
        assert self.world.device is not None
        self.world.device.open_epoch.append(number)

    async def escaped(self) -> Sequence[int]:
        return self.world.wire


def run_kit(device: type[GoodNic] = GoodNic, info: DeviceInfo = NIC, **changes: Any) -> tuple[str, ...]:
    async def break_it(bed: SubkindBed) -> None:
        assert isinstance(bed, Bed)
        bed.world.broken = True

    @asynccontextmanager
    async def make() -> AsyncIterator[SubkindBed]:
        world = World()

        async def open_(context: OpenContext) -> ProtectedDevice:
            made = device(world, context)
            await made.open()
            return made

        subkind = Subkind("list", Kind.NIC, frozenset(Mode), open_, probe, options=Options)
        yield Bed(Subkind(**{n: changes.get(n, getattr(subkind, n)) for n in subkind.__slots__}), world, info)

    return clock.run(check_subkind(make, broken=break_it, step_s=5), strict=False)


def test_a_good_subkind_passes_every_check() -> None:
    assert run_kit() == tuple(CHECKS)


def test_a_cancelled_step_may_finish_what_it_does_and_undo_it() -> None:
    # 2 s each, as on a host that is busy: a fixed second says something about the host alone.
    class Slow(GoodNic):
        async def open(self) -> None:
            making = asyncio.ensure_future(asyncio.sleep(2))
            try:
                await asyncio.shield(making)
                await super().open()
            except BaseException:
                await asyncio.wait([making])
                await asyncio.sleep(2)
                self.things.clear()
                raise

    assert "faults" in run_kit(Slow)


def test_checks_that_do_not_apply_are_not_counted() -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[SubkindBed]:
        async def open_(context: OpenContext) -> ProtectedDevice:
            return ProtectedDevice()

        class Plain(SubkindBed):
            subkind = Subkind("plain", Kind.NIC, frozenset(Mode), open_)

            def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
                return open_context(NIC, side, peer)

        yield Plain()

    ran = clock.run(check_subkind(make))
    assert set(CHECKS) - set(ran) == {"error-told", "output-commit"}
    assert clock.run(check_subkind(make, only=("life",))) == ("life",)


# --- Bad ones, one for each promise ---


class LeavesQdisc(GoodNic):
    async def teardown(self, verdict: Verdict) -> None:
        await super().teardown(verdict)
        self.things.add("qdisc")


class LeavesHalfAnOpen(GoodNic):
    async def open(self) -> None:
        self.things.add("ifb")
        await asyncio.sleep(0.001)
        await super().open()


class LeavesTask(GoodNic):
    async def start(self, side: ReplicationMode) -> None:
        self.task = asyncio.ensure_future(asyncio.sleep(3600))


class LeavesFd(GoodNic):
    async def start(self, side: ReplicationMode) -> None:
        os.open("/dev/null", os.O_RDONLY)


class SwallowsCancellation(GoodNic):
    async def postsuspend(self, epoch: int) -> None:
        try:
            await asyncio.sleep(0.1)
        except asyncio.CancelledError:
            await asyncio.sleep(3)
        await super().postsuspend(epoch)


class HangsForEver(GoodNic):
    async def postsuspend(self, epoch: int) -> None:
        await asyncio.sleep(1e9)


class DeafForEver(GoodNic):
    async def commit(self, epoch: int) -> None:
        until = asyncio.get_running_loop().time() + 100
        while asyncio.get_running_loop().time() < until:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                continue


class SecondTeardownRaises(GoodNic):
    async def teardown(self, verdict: Verdict) -> None:
        if not self.things:
            raise RuntimeError("already gone")
        await super().teardown(verdict)


class NeedsStartForTeardown(GoodNic):
    started = False

    async def start(self, side: ReplicationMode) -> None:
        self.started = True

    async def teardown(self, verdict: Verdict) -> None:
        if self.started:
            await super().teardown(verdict)


class AnswersEverything(GoodNic):
    async def serve(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        return {}


class NeedsPeerToEnd(GoodNic):
    async def teardown(self, verdict: Verdict) -> None:
        await self.peer.request("hello", {"from": "x"}, timeout_s=1)
        await super().teardown(verdict)


class NeedsPeerToStop(GoodNic):
    async def stop(self, *, failover: bool) -> None:
        await self.peer.request("hello", {"from": "x"}, timeout_s=1)


class SeversLater(GoodNic):
    async def sever(self) -> None:  # type: ignore[override]
        await asyncio.sleep(1)


class HidesErrors(GoodNic):
    async def error(self) -> None:
        return


class ReleasesEarly(GoodNic):
    async def postsuspend(self, epoch: int) -> None:
        self.world.wire += self.open_epoch
        self.open_epoch = []


class ReleasesTooMuch(GoodNic):
    async def commit(self, epoch: int) -> None:
        await super().commit(epoch)
        self.world.wire += self.open_epoch
        self.open_epoch = []


class NeverReleases(GoodNic):
    async def commit(self, epoch: int) -> None:
        return


class IgnoresVerdict(GoodNic):
    async def teardown(self, verdict: Verdict) -> None:
        await super().teardown(Verdict.KEEP)


class DropsOnKeep(GoodNic):
    async def teardown(self, verdict: Verdict) -> None:
        await super().teardown(Verdict.DISCARD)


class SpeaksNoJson(GoodNic):
    async def serve(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"heard": {1, 2}} if method == "hello" else await super().serve(method, params)


class CountsWords(GoodNic):
    def counters(self) -> Mapping[str, int | float]:
        return {"held": "many"}  # type: ignore[dict-item]


class NotAsync(GoodNic):
    def commit(self, epoch: int) -> None:  # type: ignore[override]
        return None


class OtherParameters(GoodNic):
    async def stop(self, *, failover: bool, force: bool = False) -> None:
        return


@pytest.mark.parametrize(
    ("device", "check"),
    [
        (LeavesQdisc, "life"),
        (LeavesHalfAnOpen, "faults"),
        (LeavesTask, "life"),
        (LeavesFd, "life"),
        (SwallowsCancellation, "faults"),
        (HangsForEver, "life"),
        (DeafForEver, "life"),
        (SecondTeardownRaises, "teardown-twice"),
        (NeedsStartForTeardown, "unknown-request"),
        (AnswersEverything, "unknown-request"),
        (NeedsPeerToEnd, "teardown-at-any-time"),
        (NeedsPeerToStop, "failover"),
        (SeversLater, "failover"),
        (HidesErrors, "error-told"),
        (ReleasesEarly, "output-commit"),
        (ReleasesTooMuch, "output-commit"),
        (NeverReleases, "output-commit"),
        (IgnoresVerdict, "output-commit"),
        (DropsOnKeep, "output-commit"),
        (SpeaksNoJson, "life"),
        (CountsWords, "life"),
        (NotAsync, "life"),
        (OtherParameters, "life"),
    ],
)
def test_a_bad_device_is_caught(device: type[GoodNic], check: str) -> None:
    with pytest.raises(ContractBroken) as caught:
        run_kit(device)
    assert caught.value.check == check, str(caught.value)


@dataclass
class Thawed:
    limit_packets: int = 1


@dataclass(frozen=True)
class NoUnit:
    limit: int = 1


@dataclass(frozen=True)
class NoDefault:
    limit_packets: int


async def meddling_probe(context: ProbeContext) -> Sequence[Finding]:
    raise AssertionError("replaced in the test")


async def talking_probe(context: ProbeContext) -> Sequence[Finding]:
    return ["fine"]  # type: ignore[list-item]


async def declining_open(context: OpenContext) -> Decline:
    return Decline("not today")


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"name": "Big Name"}, "descriptor"),
        ({"modes": frozenset()}, "descriptor"),
        ({"modes": frozenset({Mode.COLO})}, "descriptor"),
        ({"options": int}, "descriptor"),
        ({"options": Thawed}, "descriptor"),
        ({"options": NoUnit}, "descriptor"),
        ({"options": NoDefault}, "descriptor"),
        ({"probe": talking_probe}, "probe"),
        ({"open": declining_open}, "life"),
    ],
)
def test_a_bad_descriptor_is_caught(changes: dict[str, Any], check: str) -> None:
    with pytest.raises(ContractBroken) as caught:
        run_kit(**changes)
    assert caught.value.check == check, str(caught.value)


def test_a_probe_that_changes_something_is_caught() -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[SubkindBed]:
        world = World()

        async def meddles(context: ProbeContext) -> Sequence[Finding]:
            world.things[context.side].add("qdisc")
            return ()

        async def open_(context: OpenContext) -> ProtectedDevice:
            return GoodNic(world, context)

        yield Bed(Subkind("list", Kind.NIC, frozenset(Mode), open_, meddles), world)

    with pytest.raises(ContractBroken, match="probe changed something"):
        clock.run(check_subkind(make))
