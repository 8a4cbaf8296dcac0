"""The two halves of an interface: what they make, in which order they take it away, and what they leave alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.unit.colo_proxy.qemu_model import Qemu
from tests.unit.colo_proxy.test_contract import Bed
from understudy.device import Peer, ProtectedDevice, ReplicationMode, Verdict
from understudy.errors import HypervisorError
from understudy_colo_proxy import wires
from understudy_colo_proxy.chain import Link
from understudy_colo_proxy.subkind import COLO_PROXY

PRIMARY, SECONDARY = ReplicationMode.PRIMARY, ReplicationMode.SECONDARY
PREFIX = "understudy-colo-nic0-"


class Way:
    """The way to the other half, once there is one."""

    def __init__(self) -> None:
        self.other: ProtectedDevice | None = None

    async def request(self, method: str, params: object, *, timeout_s: float) -> object:
        assert self.other is not None
        async with asyncio.timeout(timeout_s):
            return await self.other.serve(method, params)  # type: ignore[arg-type]


@dataclass
class Halves:
    """Both halves on their models."""

    bed: Bed
    ways: dict[ReplicationMode, Way]
    opened: dict[ReplicationMode, ProtectedDevice]

    def qemu(self, side: ReplicationMode) -> Qemu:
        return self.bed.qemus[side]

    async def open(self, side: ReplicationMode) -> ProtectedDevice:
        peer: Peer = self.ways[side]  # type: ignore[assignment]
        device = await COLO_PROXY.open(self.bed.context(side, peer))
        assert isinstance(device, ProtectedDevice)
        other = PRIMARY if side is SECONDARY else SECONDARY
        self.opened[side] = self.ways[other].other = device
        return device

    async def begin(self) -> tuple[ProtectedDevice, ProtectedDevice]:
        secondary, primary = await self.open(SECONDARY), await self.open(PRIMARY)
        await asyncio.gather(secondary.start(SECONDARY), primary.start(PRIMARY))
        return primary, secondary


@pytest.fixture
async def halves() -> AsyncIterator[Halves]:
    made = Halves(Bed(), {side: Way() for side in ReplicationMode}, {})
    yield made
    for side, device in made.opened.items():
        await device.teardown(Verdict.DISCARD)
        made.qemu(side).die()


def parts(names: object) -> list[str]:
    return [str(name).removeprefix(PREFIX) for name in names]  # type: ignore[attr-defined]


async def test_opening_makes_nothing_that_carries_traffic(halves: Halves) -> None:
    await halves.open(SECONDARY)
    await halves.open(PRIMARY)
    assert not halves.qemu(PRIMARY).filters
    assert not halves.qemu(SECONDARY).commands
    assert parts(halves.qemu(PRIMARY).objects) == ["iothread"]


async def test_the_chain_of_the_primary_in_order(halves: Halves) -> None:
    await halves.begin()
    qemu = halves.qemu(PRIMARY)
    assert parts(qemu.filters) == ["hold", "mirror", "redirect-in", "redirect-out"]
    assert qemu.objects[PREFIX + "hold"]["status"] == "off"
    compare = qemu.objects[PREFIX + "compare"]
    assert (compare["compare_timeout"], compare["expired_scan_cycle"], compare["max_queue_size"]) == (
        500,
        100,
        1024,
    )
    assert compare["notify_dev"] == PREFIX + "mismatch"
    # Nothing bypasses the comparison at any moment: its input is closed last.
    made = [given["id"] for command, given in qemu.commands if command == "object-add"]
    assert parts(made)[-2:] == ["compare", "redirect-out"]


async def test_the_chain_of_the_secondary_in_order(halves: Halves) -> None:
    await halves.begin()
    assert parts(halves.qemu(SECONDARY).filters) == ["redirect-in", "redirect-out", "rewriter-1"]


async def test_a_survivors_rewriter_stays_between_hold_and_mirror(halves: Halves) -> None:
    qemu = halves.qemu(PRIMARY)
    link = Link(qemu, "nic0", vnet_hdr=True)
    await link.add_filter("filter-rewriter", "rewriter-7", queue="all")
    primary, _ = await halves.begin()
    assert parts(qemu.filters) == ["hold", "rewriter-7", "mirror", "redirect-in", "redirect-out"]
    await primary.stop(failover=True)
    await primary.teardown(Verdict.KEEP)
    assert parts(qemu.filters) == ["rewriter-7"]
    assert not qemu.chardevs


async def test_what_a_dead_agent_left_is_removed_before_a_new_session(halves: Halves) -> None:
    first, _ = await halves.begin()
    qemu = halves.qemu(PRIMARY)
    left = set(qemu.objects)
    first._close()  # type: ignore[attr-defined]
    await first._pacer.leave(first)  # type: ignore[attr-defined]
    halves.bed.qemus[SECONDARY].die()
    halves.bed.qemus[SECONDARY] = Qemu()
    await halves.opened[SECONDARY].teardown(Verdict.DISCARD)
    await halves.begin()
    assert set(qemu.objects) == left


async def test_the_gate_opens_at_the_first_and_what_is_held_leaves(halves: Halves) -> None:
    primary, _ = await halves.begin()
    qemu = halves.qemu(PRIMARY)
    await primary.stop(failover=True)
    qemu.commands.clear()
    await primary.teardown(Verdict.KEEP)
    removed = [given["id"] for command, given in qemu.commands if command == "object-del"]
    assert parts(removed) == ["redirect-out", "compare", "redirect-in", "mirror", "hold", "iothread"]
    assert not qemu.objects
    assert not qemu.chardevs


async def test_discard_touches_nothing_of_a_qemu_that_answers(halves: Halves) -> None:
    primary, _ = await halves.begin()
    qemu = halves.qemu(PRIMARY)
    await primary.stop(failover=True)
    before = set(qemu.objects)
    await primary.teardown(Verdict.DISCARD)
    assert set(qemu.objects) == before


async def test_the_gate_stays_closed_after_stop(halves: Halves) -> None:
    primary, _ = await halves.begin()
    qemu = halves.qemu(PRIMARY)
    await primary.stop(failover=True)
    assert {"compare", "redirect-out"} <= set(parts(qemu.objects))
    assert qemu.objects[PREFIX + "hold"]["status"] == "off"


async def test_a_lost_half_is_told(halves: Halves) -> None:
    primary, secondary = await halves.begin()
    await primary.error()
    await secondary.error()
    secondary.sever()
    with pytest.raises(HypervisorError, match="lost"):
        await secondary.error()
    assert await wires.drained(lambda: int(wires.established(primary._wires())), 5)  # type: ignore[attr-defined]
    with pytest.raises(HypervisorError, match="lost"):
        await primary.error()


async def test_a_copy_that_never_starts_stops_the_primary(
    halves: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("understudy_colo_proxy.primary._READY_S", 0.02)
    await halves.open(SECONDARY)
    primary = await halves.open(PRIMARY)
    with pytest.raises(TimeoutError):
        await primary.start(PRIMARY)
    assert not halves.qemu(PRIMARY).filters


@pytest.mark.parametrize("command", ["chardev-add", "object-add"])
async def test_a_qemu_that_refuses_keeps_nothing(halves: Halves, command: str) -> None:
    qemu = halves.qemu(PRIMARY)
    seen = []

    def refuse(asked: str, given: object) -> str:
        seen.append(asked)
        return "no" if asked == command and seen.count(command) in {1, 3} else ""

    qemu.refuse = refuse
    await halves.open(SECONDARY)
    with pytest.raises(HypervisorError, match="no"):
        await halves.open(PRIMARY)
    assert not qemu.objects
    assert not qemu.chardevs
    assert not qemu.fds
