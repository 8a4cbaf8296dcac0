"""The subkind on a real DRBD pair: two nodes in one kernel."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.drbdpair import (
    PRIMARY,
    SECONDARY,
    Disk,
    DrbdPair,
    Session,
    Straight,
    differences,
)
from tests.kernel.thinpool import run
from tests.testbeds.rounds import rounds
from understudy.device import (
    Decline,
    DeviceInfo,
    Kind,
    ProbeContext,
    ReplicationMode,
    Severity,
    SweepContext,
    Verdict,
)
from understudy.errors import StateError, UnderstudyError
from understudy_drbd import control as control_module
from understudy_drbd.checkpoints import CheckpointRefused, Checkpoints
from understudy_drbd.control import Control, ToolFailed
from understudy_drbd.dm import MapperRefused
from understudy_drbd.fork import DRBD_CHECKPOINT
from understudy_drbd.genl import Genl
from understudy_drbd.resource import Resource
from understudy_drbd.secondary import SecondaryDisk
from understudy_drbd.subkind import DRBD

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]


@pytest.mark.parametrize("seed", range(rounds(2, 10)))
async def test_thirty_epochs_a_takeover_and_the_way_back(pair: DrbdPair, seed: int) -> None:
    await there_and_back(pair, random.Random(seed))


async def test_the_same_through_the_tools_alone(pair: DrbdPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Genl, "find", lambda _: None)  # as with DRBD 9
    await there_and_back(pair, random.Random(0))


async def there_and_back(pair: DrbdPair, chance: random.Random) -> None:
    disk = Disk(pair.devices[PRIMARY], chance)
    session = await Session.open(pair)
    for _ in range(chance.randrange(1, 31)):
        disk.write(4)
        await session.checkpoint()
    committed = dict(disk.expected)
    disk.write(6)
    if chance.random() < 0.5:
        await session.checkpoint(commit=False)  # held, whether or not the primary ever hears of it
        committed = dict(disk.expected)
        disk.write(6)
    # It is on the secondary's disk, in no checkpoint.
    assert not differences(pair.lower[SECONDARY], disk.expected)

    session.secondary.sever()
    await session.secondary.stop(failover=True)
    assert (await pair.state(SECONDARY)).role == "Primary"
    promoted = Disk(pair.devices[SECONDARY], chance)
    promoted.expected = committed
    assert not differences(promoted.device, committed)

    # The guest goes on there; the old primary, which did not crash, gives its own writes up.
    promoted.write(8)
    await session.primary.stop(failover=True)
    await session.secondary.teardown(Verdict.KEEP)
    await session.primary.teardown(Verdict.DISCARD)
    await pair.mirrored()
    promoted.write(8)
    for side in (PRIMARY, SECONDARY):
        assert not differences(pair.lower[side], promoted.expected)


@pytest.mark.parametrize("extents", ["1", "2"])
async def test_all_is_copied_back_where_the_log_of_a_crashed_primary_is_too_short(
    pair: DrbdPair, extents: str
) -> None:
    # The kernel's least log covers 268 MiB: here the disk is small and the log is said to be.
    control = await pair.control(SECONDARY)
    control.resource = replace(control.resource, options={("disk", "al-extents"): extents})
    device = await SecondaryDisk.open(pair.context(SECONDARY, Straight()), control)
    await device.serve("cut", {"epoch": 1})
    await device.checkpoint(1)
    await device.stop(failover=True)
    behind = (await pair.state(SECONDARY)).out_of_sync_bytes
    assert behind == (0 if extents == "2" else int(run("blockdev", "--getsize64", pair.devices[SECONDARY])))
    await device.teardown(Verdict.KEEP)


async def test_an_old_primary_gives_way_when_nobody_has_it_open_any_more(
    pair: DrbdPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = await pair.control(PRIMARY)
    with pair.devices[PRIMARY].open("rb") as held:
        monkeypatch.setattr(control_module, "_RELEASE_S", 0.5)
        with pytest.raises(ToolFailed, match="held open"):
            await control.demote()
        monkeypatch.undo()
        asyncio.get_running_loop().call_later(0.5, held.close)
        await control.demote()
        assert held.closed
    assert (await pair.state(PRIMARY)).role == "Secondary"


async def test_a_takeover_without_a_checkpoint_is_refused(pair: DrbdPair) -> None:
    session = await Session.open(pair)
    with pytest.raises(StateError, match="no checkpoint"):
        await session.secondary.stop(failover=True)
    assert (await pair.state(SECONDARY)).mirrored
    for each in (session.secondary, session.primary):
        await each.teardown(Verdict.KEEP)


async def test_a_mirror_that_is_not_whole_ends_the_protection(pair: DrbdPair) -> None:
    session = await Session.open(pair)
    await session.checkpoint()
    await (await pair.control(SECONDARY)).disconnect()
    await (await pair.control(PRIMARY)).until("WFConnection", timeout_s=30)
    with pytest.raises(
        UnderstudyError, match="alpha is not Connected and UpToDate on both hosts: WFConnection"
    ):
        await session.primary.postsuspend(2)
    for each in (session.primary, session.secondary):
        with pytest.raises(UnderstudyError, match="not Connected and UpToDate"):
            await each.error()
    for each in (session.secondary, session.primary):
        await each.stop(failover=False)
        await each.teardown(Verdict.KEEP)
    assert (await pair.state(PRIMARY)).role == "Primary"


async def test_a_failover_that_failed_is_undone(pair: DrbdPair) -> None:
    disk = Disk(pair.devices[PRIMARY], random.Random(1))
    session = await Session.open(pair)
    disk.write(4)
    await session.checkpoint()
    disk.write(4)
    await session.secondary.stop(failover=True)
    await session.primary.stop(failover=True)
    # The takeover failed later on; the old primary goes on and must find its mirror again, with all it wrote.
    await session.secondary.teardown(Verdict.DISCARD)
    await session.primary.teardown(Verdict.KEEP)
    disk.write(4)
    await pair.mirrored()
    assert (await pair.state(PRIMARY)).role == "Primary"
    for side in (PRIMARY, SECONDARY):
        assert not differences(pair.lower[side], disk.expected)


@pytest.mark.parametrize("fails", ["disconnect", "detach", "attach", "promote", "distrust_peer"])
async def test_a_takeover_that_failed_half_way_is_finished(
    pair: DrbdPair, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    disk = Disk(pair.devices[PRIMARY], random.Random(1))
    session = await Session.open(pair)
    disk.write(4)
    await session.checkpoint()
    committed = dict(disk.expected)
    disk.write(4)
    monkeypatch.setattr(Resource, "log_covers", lambda *_: False)
    step = getattr(Control, fails)

    async def once(self: Control) -> None:
        monkeypatch.setattr(Control, fails, step)
        await step(self)
        raise UnderstudyError("no answer in time")  # though it was done

    monkeypatch.setattr(Control, fails, once)
    with pytest.raises(UnderstudyError, match="no answer in time"):
        await session.secondary.stop(failover=True)
    await session.secondary.stop(failover=True)
    state = await pair.state(SECONDARY)
    assert state.role == "Primary"
    assert state.out_of_sync_bytes == int(run("blockdev", "--getsize64", pair.devices[SECONDARY]))
    assert not differences(pair.devices[SECONDARY], committed)
    for each, verdict in ((session.secondary, Verdict.KEEP), (session.primary, Verdict.DISCARD)):
        await each.teardown(verdict)


async def test_nothing_is_left_of_a_planned_end(pair: DrbdPair) -> None:
    session = await Session.open(pair)
    await session.checkpoint()
    await session.checkpoint(commit=False)
    for each in (session.primary, session.secondary):
        await each.stop(failover=False)
        await each.teardown(Verdict.KEEP)
    assert (await pair.state(PRIMARY)).mirrored
    for cut in range(0xE00008, 0xE0000C):
        with pytest.raises(MapperRefused, match="delete"):
            pair.pool.mapper.message(pair.pool.name, f"delete {cut}")


async def test_two_disks_that_are_no_mirror_of_each_other_are_refused(pair: DrbdPair) -> None:
    class Stranger:
        async def request(self, *_: object, timeout_s: float) -> dict[str, str]:
            return {"generation": "0123456789ABCDEE", "resource": "gamma"}

    with pytest.raises(UnderstudyError, match=r"alpha here and gamma on the other host.*not one mirror"):
        await DRBD.open(pair.context(PRIMARY, Stranger()))


async def test_a_session_begins_on_the_right_side(pair: DrbdPair) -> None:
    turned = replace(pair, devices={PRIMARY: pair.devices[SECONDARY], SECONDARY: pair.devices[PRIMARY]})
    with pytest.raises(UnderstudyError, match="alpha is Primary here, not Secondary"):
        await DRBD.open(turned.context(SECONDARY, Straight()))


def probe_context(pair: DrbdPair, side: ReplicationMode, path: Path | None = None) -> ProbeContext:
    context = pair.context(side, Straight())
    device = context.device if path is None else replace(context.device, properties={"path": str(path)})
    return ProbeContext("contract", device, side, context.mode, None, context.services, context.directory)


async def test_check_finds_the_pair_fit_and_its_primary_without_a_thin_volume(pair: DrbdPair) -> None:
    assert await DRBD.probe(probe_context(pair, SECONDARY)) == []
    answer = await DRBD.probe(probe_context(pair, PRIMARY))
    assert not isinstance(answer, Decline)
    [finding] = answer
    assert finding.severity is Severity.WARNING
    assert "below DRBD resource alpha there is no thin volume" in finding.problem


async def test_check_says_what_is_wrong_with_the_pair(pair: DrbdPair) -> None:
    await (await pair.control(SECONDARY)).disconnect()
    answer = await DRBD.probe(probe_context(pair, SECONDARY))
    assert not isinstance(answer, Decline)
    [finding] = answer
    assert "StandAlone Secondary/Unknown" in finding.problem
    assert "drbdadm connect beta" in finding.remedy


async def test_what_is_no_drbd_device_is_declined_with_what_would_help(
    pair: DrbdPair, tmp_path: Path
) -> None:
    for path in (pair.lower[PRIMARY], tmp_path / "image", tmp_path):
        probing = probe_context(pair, PRIMARY, path)
        opening = replace(pair.context(PRIMARY, Straight()), device=probing.device)
        for answer in (await DRBD.probe(probing), await DRBD.open(opening)):
            assert isinstance(answer, Decline)
            assert answer.reason.startswith(f"{path} is no DRBD device")
            assert "a thin volume below" in answer.reason


async def test_stock_drbd_has_no_checkpoints_of_its_own(pair: DrbdPair) -> None:
    for answer in (
        await DRBD_CHECKPOINT.probe(probe_context(pair, PRIMARY)),
        await DRBD_CHECKPOINT.open(pair.context(PRIMARY, Straight())),
    ):
        assert isinstance(answer, Decline)
        assert answer.reason == "DRBD resource alpha does not use the Remus fork's protocol D"
    checkpoints = Checkpoints(pair.devices[PRIMARY])
    try:
        with pytest.raises(CheckpointRefused, match="this DRBD has no checkpoints"):
            await checkpoints.send(timeout_s=10)
    finally:
        checkpoints.close()


async def sweep(pair: DrbdPair, side: ReplicationMode, verdict: Verdict) -> Sequence[str]:
    assert DRBD.sweep is not None
    device = pair.context(side, Straight()).device
    nic = DeviceInfo(Kind.NIC, "nic0", 0, "sim")
    return await DRBD.sweep(SweepContext("contract", [nic, device], verdict))


async def test_the_janitor_of_a_healthy_pair_does_nothing(pair: DrbdPair) -> None:
    for side in (PRIMARY, SECONDARY):
        for verdict in Verdict:
            assert await sweep(pair, side, verdict) == []
    assert (await pair.state(PRIMARY)).mirrored
    assert (await pair.state(PRIMARY)).role == "Primary"


async def test_the_janitor_after_a_takeover_whose_agents_both_died(pair: DrbdPair) -> None:
    disk = Disk(pair.devices[PRIMARY], random.Random(3))
    session = await Session.open(pair)
    disk.write(4)
    await session.checkpoint()
    promoted = Disk(pair.devices[SECONDARY], random.Random(4))
    promoted.expected = dict(disk.expected)
    disk.write(4)
    session.primary.sever()
    await session.secondary.stop(failover=True)
    promoted.write(4)

    [sentence] = await sweep(pair, PRIMARY, Verdict.DISCARD)
    assert "alpha is no longer primary and is copied from the other host as a whole" in sentence
    [sentence] = await sweep(pair, SECONDARY, Verdict.KEEP)
    assert "removed the checkpoints" in sentence
    await pair.mirrored()
    for side in (PRIMARY, SECONDARY):
        assert await sweep(pair, side, Verdict.DISCARD if side is PRIMARY else Verdict.KEEP) == []
        assert not differences(pair.lower[side], promoted.expected)
