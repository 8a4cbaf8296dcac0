"""The devices of one guest as a group."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.unit.device_fakes import FakeDevice, FakeWorld, deaf, fails, takes
from understudy import opening
from understudy.device import Kind, Mode, OpenContext, ProtectedDevice, ReplicationMode, Subkind, Verdict
from understudy.errors import ConfigError, DeviceError, PhaseTimeout, StateError
from understudy.group import DeviceGroup
from understudy.opening import shielded
from understudy.phases import Deadlines
from understudy.testing import clock
from understudy.testing.clock import in_virtual_time
from understudy.testing.faults import Cancel, at_every_await

PRIMARY = ReplicationMode.PRIMARY
SECONDARY = ReplicationMode.SECONDARY


def now() -> float:
    return asyncio.get_running_loop().time() - 1000


async def started(world: FakeWorld, **more: Any) -> DeviceGroup:
    group = await DeviceGroup.open(world.setup(**more))
    await group.start_all(group.side)
    return group


# --- Setup ---


@in_virtual_time
async def test_a_whole_life_in_order() -> None:
    world = FakeWorld({"disk0": {}, "disk1": {}})
    group = await started(world)
    await group.postsuspend(1)
    await group.do_checkpoint_all(1)
    await group.preresume(1)
    await group.postresume(1)
    await group.get_error_all()
    await group.commit(1)
    await group.stop_all()
    await group.remove(Verdict.KEEP)
    steps = ["open", "start primary", "postsuspend 1", "checkpoint 1", "preresume 1", "postresume 1", "error"]
    steps += ["commit 1", "stop", "teardown keep"]
    for name in ("disk0", "disk1"):
        assert [entry for entry in world.journal.of(name) if "done" not in entry] == steps
    assert list(group.devices) == ["disk0", "disk1"]
    assert group.subkinds == {"disk0": "fake", "disk1": "fake"}
    assert group.has("commit")
    assert not group.has("nonsense")
    assert set(group.phases_ns) >= {"start", "postsuspend", "commit", "stop"}


@in_virtual_time
async def test_devices_are_opened_concurrently() -> None:
    world = FakeWorld({"disk0": {"open": takes(5)}, "disk1": {"open": takes(5)}})
    group = await DeviceGroup.open(world.setup())
    assert now() == 5
    await group.teardown(Verdict.KEEP)


@pytest.mark.parametrize(("side", "verdict"), [(PRIMARY, "keep"), (SECONDARY, "discard")])
def test_half_way_setup_tears_down_in_reverse_exactly_what_was_opened(
    side: ReplicationMode, verdict: str
) -> None:
    async def main() -> None:
        world = FakeWorld(
            {
                "a": {"open": takes(2)},
                "b": {"open": takes(1)},
                "c": {"open": fails("boom", 3)},
                "d": {"open": takes(9)},
            }
        )
        group = DeviceGroup(world.setup(side=side))
        with pytest.raises(ExceptionGroup) as caught:
            await group.new()
        [error] = caught.value.exceptions
        assert isinstance(error, DeviceError)
        assert (error.device, error.subkind, error.phase) == ("c", "fake", "open")
        torn = [e for e in world.journal.entries if "teardown" in e]
        assert torn == [
            f"a:teardown {verdict}",
            "a:teardown done",
            f"b:teardown {verdict}",
            "b:teardown done",
        ]
        assert now() == 3  # d, which would have taken longer, was cancelled
        await group.teardown(Verdict.DISCARD)
        assert [e for e in world.journal.entries if "teardown" in e] == torn
        with pytest.raises(StateError):
            await group.new()

    clock.run(main())


@in_virtual_time
async def test_the_setup_error_leads_what_failed_while_undoing_it() -> None:
    world = FakeWorld({"a": {"teardown": fails("cannot remove")}, "b": {"open": fails("first", 1)}})
    with pytest.raises(ExceptionGroup) as caught:
        await DeviceGroup.open(world.setup())
    first, second = caught.value.exceptions
    assert isinstance(first, DeviceError)
    assert isinstance(second, DeviceError)
    assert (first.phase, second.phase) == ("open", "teardown")
    assert "first" in str(caught.value)


@in_virtual_time
async def test_what_a_failed_setup_leaves_is_torn_down_by_the_next_teardown() -> None:
    world = FakeWorld({"a": {"teardown": fails("not yet")}, "b": {}, "c": {"open": fails("first", 1)}})
    group = DeviceGroup(world.setup())
    with pytest.raises(ExceptionGroup):
        await group.new()
    with pytest.raises(ExceptionGroup, match="not yet"):
        await group.teardown(Verdict.KEEP)
    del world.scripts["a"]["teardown"]
    await group.teardown(Verdict.DISCARD)  # the verdict of the setup stands
    await group.teardown(Verdict.KEEP)
    torn = [entry for entry in world.journal.of("a") if entry.startswith("teardown")]
    assert torn == ["teardown keep", "teardown keep", "teardown keep", "teardown done"]
    assert world.journal.of("b").count("teardown keep") == 1
    assert world.journal.of("c") == ["open"]


@in_virtual_time
async def test_what_a_cancelled_setup_leaves_is_torn_down_by_the_next_teardown() -> None:
    world = FakeWorld({"a": {"teardown": fails("not yet")}, "b": {"open": takes(99)}})
    group = DeviceGroup(world.setup(side=SECONDARY))
    task = asyncio.ensure_future(group.new())
    await asyncio.sleep(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del world.scripts["a"]["teardown"]
    await group.teardown(Verdict.DISCARD)
    assert world.journal.of("a")[-2:] == ["teardown discard", "teardown done"]


@in_virtual_time
async def test_cancelled_setup_leaves_nothing_open_and_stays_a_cancellation() -> None:
    world = FakeWorld({"a": {"teardown": takes(1)}, "b": {"open": takes(99)}})
    group = DeviceGroup(world.setup())
    task = asyncio.ensure_future(group.new())
    await asyncio.sleep(2)
    task.cancel()
    await asyncio.sleep(0.5)
    task.cancel()  # again, while it is being undone
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.journal.of("a")[-1] == "teardown done"
    assert now() == 3


def test_what_fails_while_a_cancelled_setup_is_undone_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        world = FakeWorld({"a": {"teardown": fails("cannot remove")}, "b": {"open": takes(99)}})
        task = asyncio.ensure_future(DeviceGroup.open(world.setup()))
        await asyncio.sleep(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert "cannot remove" in caught.value.__notes__[0]

    with caplog.at_level(logging.WARNING):
        clock.run(main())
    assert "cannot remove" in caplog.text


@in_virtual_time
async def test_setup_has_a_deadline_that_progress_puts_off() -> None:
    world = FakeWorld({"disk0": {}})
    told: list[int] = []

    async def copies() -> None:
        for done in range(10):
            await asyncio.sleep(100)
            world.contexts[0].progress("disk0", done, 10)
        while True:  # stalled, but still telling the same number
            await asyncio.sleep(10)
            world.contexts[0].progress("disk0", 9, 10)

    world.scripts["disk0"]["open"] = copies
    with pytest.raises(ExceptionGroup) as caught:
        await DeviceGroup.open(world.setup(progress=lambda what, done, total: told.append(done)))
    [error] = caught.value.exceptions
    assert isinstance(error, PhaseTimeout)
    assert now() == 1120
    assert told[:10] == list(range(10))


@in_virtual_time
async def test_an_open_that_would_not_end_is_torn_down_when_it_does() -> None:
    world = FakeWorld({"a": {"open": deaf(1200)}, "b": {"open": fails("boom", 1)}})
    with pytest.raises(ExceptionGroup) as caught:
        await DeviceGroup.open(world.setup())
    assert "left behind" in str(caught.value.exceptions[1])
    assert now() == 2
    await asyncio.sleep(300)
    assert world.journal.of("a")[-1] == "teardown done"


@in_virtual_time
async def test_an_open_that_would_not_end_is_torn_down_again_where_that_fails() -> None:
    world = FakeWorld({"a": {"open": deaf(1200), "teardown": fails("not yet")}, "b": {"open": fails("boom")}})
    with pytest.raises(ExceptionGroup):
        await DeviceGroup.open(world.setup())
    await asyncio.sleep(202)
    assert 1 < world.journal.of("a").count("teardown keep") < opening.LATE_TRIES
    del world.scripts["a"]["teardown"]
    await asyncio.sleep(2)
    assert world.journal.of("a")[-1] == "teardown done"


def test_what_an_open_that_would_not_end_leaves_for_good_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        scripts = {"a": {"open": deaf(1200), "teardown": deaf(9999)}, "b": {"open": fails("boom")}}
        with pytest.raises(ExceptionGroup):
            await DeviceGroup.open(FakeWorld(scripts).setup())
        await asyncio.sleep(1000)
        assert "could not be torn down" in caplog.text
        await asyncio.sleep(9999)

    clock.run(main())


@dataclass(frozen=True)
class FakeOptions:
    delay_ms: int = 20


@in_virtual_time
async def test_options_are_parsed_before_anything_is_touched() -> None:
    world = FakeWorld({"a": {}})
    subkind = Subkind("fake", Kind.DISK, frozenset(Mode), world.open, options=FakeOptions)
    with pytest.raises(ConfigError, match=r"protection\.options\.fake\.delay_s"):
        await DeviceGroup.open(world.setup(subkinds=(subkind,), options={"fake": {"delay_s": 1}}))
    assert world.journal.entries == []
    group = await DeviceGroup.open(world.setup(subkinds=(subkind,), options={"fake": {"delay_ms": 5}}))
    assert world.contexts[0].options == FakeOptions(5)
    await group.teardown(Verdict.KEEP)


@in_virtual_time
async def test_a_guest_without_devices_is_a_group_too() -> None:
    group = await started(FakeWorld({}))
    await group.postsuspend(1)
    await group.commit(1)
    await group.stop_all(failover=True)
    await group.teardown(Verdict.DISCARD)
    assert group.counters() == {}


def test_two_devices_of_one_name_are_refused() -> None:
    setup = FakeWorld({"a": {}}).setup()
    twice = dataclasses.replace(setup, devices=[*setup.devices, *setup.devices])
    with pytest.raises(StateError, match="two devices"):
        DeviceGroup(twice)


@in_virtual_time
async def test_an_error_that_is_no_devices_goes_through_as_it_is() -> None:
    async def broken() -> None:
        raise RuntimeError("a fault of the core")

    with pytest.raises(RuntimeError):
        await shielded(broken(), "work")


# --- Start and stop ---


@in_virtual_time
async def test_a_start_that_fails_half_way_stops_what_it_started() -> None:
    world = FakeWorld({"a": {}, "b": {"start": fails("no quorum", 1)}, "c": {"start": takes(2)}})
    group = await DeviceGroup.open(world.setup())
    with pytest.raises(ExceptionGroup) as caught:
        await group.start_all(PRIMARY)
    assert [e.device for e in caught.value.exceptions if isinstance(e, DeviceError)] == ["b"]
    assert "stop" in world.journal.of("a")
    assert "stop" in world.journal.of("c")
    assert "stop" not in world.journal.of("b")
    with pytest.raises(StateError, match="no quorum"):
        await group.commit(1)
    await group.stop_all(failover=True)
    assert "stop failover" not in world.journal.of("a")
    await group.teardown(Verdict.KEEP)


@in_virtual_time
async def test_a_failed_undo_of_the_start_follows_its_cause() -> None:
    world = FakeWorld({"a": {"stop": fails("stuck")}, "b": {"start": fails("no quorum", 1)}})
    group = await DeviceGroup.open(world.setup())
    with pytest.raises(ExceptionGroup) as caught:
        await group.start_all(PRIMARY)
    assert ["no quorum" in str(e) for e in caught.value.exceptions] == [True, False]
    await group.teardown(Verdict.KEEP)


@in_virtual_time
async def test_a_cancelled_start_is_undone() -> None:
    world = FakeWorld({"a": {}, "b": {"start": takes(20)}})
    group = await DeviceGroup.open(world.setup())
    task = asyncio.ensure_future(group.start_all(PRIMARY))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.journal.of("a")[-1] == "stop done"
    await group.teardown(Verdict.KEEP)


@in_virtual_time
async def test_start_is_refused_twice_and_on_the_wrong_side() -> None:
    group = await DeviceGroup.open(FakeWorld({"a": {}}).setup())
    with pytest.raises(StateError, match="cannot start as secondary"):
        await group.start_all(SECONDARY)
    await group.start_all(PRIMARY)
    with pytest.raises(StateError, match="started before"):
        await group.start_all(PRIMARY)
    await group.teardown(Verdict.KEEP)


@in_virtual_time
async def test_stop_asks_everybody_keeps_all_errors_and_may_be_repeated() -> None:
    attempts = 0

    async def stuck_once() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise OSError("stuck")

    world = FakeWorld({"a": {"stop": stuck_once}, "b": {}})
    group = await started(world)
    with pytest.raises(ExceptionGroup):
        await group.stop_all()
    await group.stop_all(failover=True)
    await group.stop_all(failover=True)
    assert [e for e in world.journal.of("a") if "done" not in e][-2:] == ["stop", "stop failover"]
    assert world.journal.of("b").count("stop") == 1
    assert "stop failover" not in world.journal.of("b")
    with pytest.raises(StateError, match="was stopped"):
        await group.commit(1)
    await group.teardown(Verdict.KEEP)
    await group.stop_all()


def test_severing_asks_everybody_and_one_that_fails_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    cut: list[str] = []

    class Cuts(FakeDevice):
        def sever(self) -> None:
            cut.append(self.name)
            if self.name == "a":
                raise OSError("already closed")

    async def main() -> None:
        world = FakeWorld({"a": {}, "b": {}})

        async def open_one(context: OpenContext) -> ProtectedDevice:
            return Cuts(context.device.name, world.journal, {})

        setup = world.setup(subkinds=(Subkind("fake", Kind.DISK, frozenset(Mode), open_one),))
        DeviceGroup(setup).sever_all()
        group = await DeviceGroup.open(setup)
        group.sever_all()
        await group.teardown(Verdict.DISCARD)

    clock.run(main())
    assert cut == ["a", "b"]
    assert "device a (fake): sever failed" in caplog.text


# --- The cycle ---


@pytest.mark.parametrize("step", ["postsuspend", "checkpoint", "preresume", "postresume", "error", "commit"])
def test_nothing_is_committed_after_a_failure(step: str) -> None:
    async def main() -> None:
        group = await started(FakeWorld({"a": {step: fails("lost a write")}, "b": {}}))
        calls = {"checkpoint": group.do_checkpoint_all, "error": lambda _: group.get_error_all()}
        with pytest.raises(ExceptionGroup) as caught:
            await calls.get(step, getattr(group, step, None))(3)  # type: ignore[misc]
        [error] = caught.value.exceptions
        assert isinstance(error, DeviceError)
        assert (error.phase, error.epoch) == (step, None if step == "error" else 3)
        with pytest.raises(StateError, match="lost a write"):
            await group.commit(4)
        await group.teardown(Verdict.DISCARD)

    clock.run(main())


@in_virtual_time
async def test_nothing_is_committed_after_a_cancelled_step() -> None:
    world = FakeWorld({"a": {"postsuspend": takes(3)}})
    group = await started(world)
    task = asyncio.ensure_future(group.postsuspend(1))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(StateError, match="cannot be committed"):
        await group.commit(1)
    assert not any("commit" in entry for entry in world.journal.entries)
    await group.teardown(Verdict.DISCARD)


@in_virtual_time
async def test_epochs_go_up_and_are_committed_once() -> None:
    group = await started(FakeWorld({"a": {}}))
    await group.postsuspend(2)
    with pytest.raises(StateError, match="after postsuspend of epoch 2"):
        await group.postsuspend(1)
    await group.commit(2)
    with pytest.raises(StateError, match="after epoch 2"):
        await group.commit(2)
    await group.commit(5)
    assert group.checkpointed == 0
    await group.do_checkpoint_all(5)
    assert group.checkpointed == 5
    await group.teardown(Verdict.KEEP)


@in_virtual_time
async def test_steps_before_setup_before_start_and_after_the_end_are_refused() -> None:
    world = FakeWorld({"a": {}})
    group = DeviceGroup(world.setup())
    with pytest.raises(StateError, match="not set up"):
        await group.postsuspend(1)
    with pytest.raises(StateError, match="not set up"):
        await group.start_all(PRIMARY)
    await group.new()
    with pytest.raises(StateError, match="before the devices"):
        await group.postsuspend(1)
    await group.start_all(PRIMARY)
    await group.teardown(Verdict.KEEP)
    for call in (group.postsuspend(1), group.commit(1), group.get_error_all(), group.start_all(PRIMARY)):
        with pytest.raises(StateError, match="torn down"):
            await call


@in_virtual_time
async def test_preresume_is_the_primarys_alone() -> None:
    group = await started(FakeWorld({"a": {}}), side=SECONDARY)
    with pytest.raises(StateError, match="primary's"):
        await group.preresume(1)
    await group.teardown(Verdict.DISCARD)


@in_virtual_time
async def test_a_step_that_a_class_leaves_alone_costs_nothing() -> None:
    class Quiet(ProtectedDevice):
        pass

    async def open_quiet(context: OpenContext) -> ProtectedDevice:
        return Quiet()

    subkind = Subkind("quiet", Kind.DISK, frozenset(Mode), open_quiet)
    group = await started(FakeWorld({"a": {}}), subkinds=(subkind,))
    for epoch in range(1, 4):
        await group.postsuspend(epoch)
        await group.commit(epoch)
    assert group.phases_ns == {}
    # It has no step to start, but is told to stop, as it may override that alone.
    await group.stop_all()
    assert group.counters() == {}
    await group.teardown(Verdict.KEEP)


# --- Teardown ---


@in_virtual_time
async def test_teardown_runs_all_keeps_every_error_and_asks_again_only_what_failed() -> None:
    world = FakeWorld({"a": {"teardown": fails("one")}, "b": {}, "c": {"teardown": fails("two", 1)}})
    group = await started(world)
    with pytest.raises(ExceptionGroup) as caught:
        await group.teardown(Verdict.DISCARD)
    assert [e.device for e in caught.value.exceptions if isinstance(e, DeviceError)] == ["a", "c"]
    # What is not gone is still there, a closed gate perhaps: nobody may take the second answer for success.
    with pytest.raises(ExceptionGroup) as again:
        await group.teardown(Verdict.DISCARD)
    assert [e.device for e in again.value.exceptions if isinstance(e, DeviceError)] == ["a", "c"]
    assert world.journal.of("b").count("teardown discard") == 1
    world.scripts["a"].pop("teardown")
    world.scripts["c"].pop("teardown")
    await group.teardown(Verdict.DISCARD)
    entries = list(world.journal.entries)
    await group.teardown(Verdict.DISCARD)
    assert world.journal.entries == entries


def test_the_first_verdict_stands(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        world = FakeWorld({"a": {"teardown": takes(2)}})
        group = await started(world)
        first = asyncio.ensure_future(group.teardown(Verdict.DISCARD))
        await asyncio.sleep(1)
        await group.teardown(Verdict.KEEP)
        await first
        assert world.journal.of("a")[-2:] == ["teardown discard", "teardown done"]
        assert now() == 2

    with caplog.at_level(logging.WARNING):
        clock.run(main())
    assert "first verdict stands" in caplog.text


@in_virtual_time
async def test_teardown_is_bounded() -> None:
    world = FakeWorld({"a": {"teardown": deaf(1100)}, "b": {}})
    group = await started(world, deadlines=Deadlines(teardown_s=4, grace_s=1))
    with pytest.raises(ExceptionGroup) as caught:
        await group.teardown(Verdict.DISCARD)
    assert "left behind" in str(caught.value)
    assert now() == 5
    assert world.journal.of("b")[-1] == "teardown done"
    await asyncio.sleep(200)


@in_virtual_time
async def test_a_cancelled_teardown_finishes_first() -> None:
    world = FakeWorld({"a": {"teardown": takes(2)}})
    group = await started(world)
    task = asyncio.ensure_future(group.teardown(Verdict.DISCARD))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.journal.of("a")[-1] == "teardown done"
    assert now() == 2


def test_what_fails_while_a_cancelled_teardown_finishes_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        group = await started(FakeWorld({"a": {"teardown": fails("cannot remove", 2)}}))
        task = asyncio.ensure_future(group.teardown(Verdict.DISCARD))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with caplog.at_level(logging.WARNING):
        clock.run(main())
    assert "cannot remove" in caplog.text


@in_virtual_time
async def test_teardown_of_what_was_never_set_up_and_during_the_setup() -> None:
    world = FakeWorld({"a": {"open": takes(5)}})
    await DeviceGroup(world.setup()).teardown(Verdict.KEEP)
    group = DeviceGroup(world.setup())
    task = asyncio.ensure_future(group.new())
    await asyncio.sleep(1)
    with pytest.raises(StateError, match="being set up"):
        await group.teardown(Verdict.KEEP)
    await task
    await group.teardown(Verdict.KEEP)


def test_cancelled_at_any_await_of_its_life_a_group_tears_down_exactly_what_it_opened() -> None:
    async def life(group: DeviceGroup) -> None:
        await group.new()
        await group.start_all(PRIMARY)
        for epoch in (1, 2):
            await group.postsuspend(epoch)
            await group.do_checkpoint_all(epoch)
            await group.get_error_all()
            await group.commit(epoch)
        await group.stop_all()
        await group.teardown(Verdict.KEEP)

    async def main() -> int:
        tried = 0
        for fault in at_every_await(Cancel()):
            tried += 1
            world = FakeWorld({"a": {"open": takes(1)}, "b": {"commit": takes(1), "teardown": takes(1)}})
            group = DeviceGroup(world.setup())
            with contextlib.suppress(asyncio.CancelledError):
                await fault.strike(life(group))
            commits = len([e for e in world.journal.entries if ":commit " in e])
            with contextlib.suppress(StateError):
                await group.commit(9)
            if fault.struck:
                assert len([e for e in world.journal.entries if ":commit " in e]) == commits, fault
            await group.teardown(Verdict.DISCARD)
            for name in ("a", "b"):
                steps = world.journal.of(name)
                opened = "open done" in steps
                assert [s.startswith("teardown ") and "done" not in s for s in steps].count(True) == opened, (
                    fault
                )
        return tried

    assert clock.run(main()) > 10


# --- Requests and counters ---


@in_virtual_time
async def test_requests_are_served_while_a_phase_runs_and_while_others_are_opened() -> None:
    world = FakeWorld({"a": {"postsuspend": takes(3)}, "b": {"open": takes(4)}})
    group = DeviceGroup(world.setup())
    early = asyncio.ensure_future(group.serve("b", "early", {}))
    setup = asyncio.ensure_future(group.new())
    await asyncio.sleep(1)
    assert await group.serve("a", "export", {"port": 1}) == {"device": "a", "port": 1}
    assert now() == 1
    await setup
    assert await early == {"device": "b"}
    await group.start_all(PRIMARY)
    phase = asyncio.ensure_future(group.postsuspend(1))
    await asyncio.sleep(1)
    await group.serve("a", "status", {})
    assert not phase.done()
    await phase
    await group.teardown(Verdict.KEEP)


@in_virtual_time
async def test_requests_that_cannot_be_served_say_why() -> None:
    world = FakeWorld(
        {"a": {"serve": fails("busy")}, "b": {"serve": takes(99)}, "c": {"serve": fails(StateError("no"))}}
    )
    group = await DeviceGroup.open(world.setup(deadlines=Deadlines(serve_s=5)))
    with pytest.raises(StateError, match="no device 'nic0'"):
        await group.serve("nic0", "x", {})
    with pytest.raises(DeviceError, match="busy") as caught:
        await group.serve("a", "x", {})
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(PhaseTimeout, match="no answer to 'x' within 5 s"):
        await group.serve("b", "x", {})
    with pytest.raises(StateError, match="no"):
        await group.serve("c", "x", {})
    await group.teardown(Verdict.KEEP)


@in_virtual_time
async def test_whoever_waits_for_a_device_learns_that_its_setup_failed() -> None:
    world = FakeWorld({"a": {"open": fails("boom", 1)}})
    group = DeviceGroup(world.setup())
    waiting = asyncio.ensure_future(group.serve("a", "x", {}))
    with pytest.raises(ExceptionGroup):
        await group.new()
    with pytest.raises(StateError, match="not open"):
        await waiting


def test_counters_are_named_after_their_devices_and_a_broken_one_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(FakeDevice):
        def counters(self) -> Mapping[str, int | float]:
            raise KeyError("held_packets")

    async def main() -> None:
        world = FakeWorld({"a": {}, "b": {}})

        async def open_one(context: OpenContext) -> ProtectedDevice:
            device = await world.open(context)
            return Broken("b", world.journal, {}) if context.device.name == "b" else device

        group = await started(world, subkinds=(Subkind("fake", Kind.DISK, frozenset(Mode), open_one),))
        assert group.counters() == {"a.steps": 4}
        assert group.counters() == {"a.steps": 4}
        await group.teardown(Verdict.KEEP)

    with caplog.at_level(logging.ERROR):
        clock.run(main())
    assert caplog.text.count("counters failed") == 1
