"""What an agent does about a guest that outlived its predecessor."""

import asyncio
from pathlib import Path

import pytest

from tests.testbeds.twoagents import two_hosts
from understudy.arbiter import Arbiter, RecordState, following
from understudy.errors import GuestBusy
from understudy.hypervisor import GuestState


async def beta_promotes(arbiter: Arbiter) -> None:
    """Write the records of a protection by alpha whose standby beta has begun to promote."""
    record = await arbiter.read("web")
    assert record
    for state, writer in ((RecordState.PROTECTED, "alpha"), (RecordState.PROMOTING, "beta")):
        wanted = following(
            record, state=state, standby="beta", session="s", writer=writer, attempt=state.value
        )
        won, record = await arbiter.swap(record, wanted)
        assert won
        assert record


async def test_a_guest_that_outlived_its_agent_is_stopped_while_the_standby_promotes(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.crash("alpha")
        await beta_promotes(hosts.agents["beta"].need_arbiter())
        await hosts.boot("alpha")
        await hosts.until(lambda: hosts.role("alpha") == "fenced")
        await hosts.until(lambda: hosts.world.state("alpha", "web") is GuestState.PAUSED)


async def test_nothing_begins_while_what_an_agent_left_is_removed(tmp_path: Path) -> None:
    # A session that began meanwhile would lose its gate to the janitor.
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.crash("alpha")
        hosts.world.swept.clear()
        hosts.world.hold_sweep = asyncio.Event()
        await hosts.boot("alpha")
        tenure = hosts.agents["alpha"].tenure("web")
        await hosts.until(lambda: hosts.world.swept)
        assert hosts.role("alpha") == "alone"
        with pytest.raises(GuestBusy, match="removing what an agent left"), tenure.operation("protect"):
            pass
        hosts.world.hold_sweep.set()
        await hosts.until(lambda: not tenure.busy)
        await hosts.linked()
        assert (await hosts.call("alpha", "protect", guest="web"))["state"] == "protected"
        assert hosts.world.swept == [("alpha", "web", "alone")]


async def test_what_an_agent_left_is_removed_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("understudy.agent.recovery.POLL_S", 0.02)
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.crash("alpha")
        hosts.world.fail.add("sweep")
        await hosts.boot("alpha")
        tenure = hosts.agents["alpha"].tenure("web")
        await hosts.until(lambda: "a filter does not go away" in tenure.problem)
        hosts.world.fail.clear()
        await hosts.until(lambda: not tenure.problem)
        assert hosts.world.running("web") == ["alpha"]


async def test_a_copy_whose_promotion_was_cut_short_is_kept_and_can_be_forced(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await beta_promotes(hosts.agents["beta"].need_arbiter())
        # Both die in the middle of it; the copy, perhaps the guest already, outlives its agent.
        await hosts.crash("alpha")
        hosts.world.guests.pop(("alpha", "web"))
        await hosts.crash("beta")
        hosts.world.guests["beta", "web"] = GuestState.RUNNING
        await hosts.boot("beta")
        await hosts.until(lambda: hosts.role("beta") == "kept")
        assert hosts.world.running("web") == ["beta"]
        await hosts.call("beta", "failover", guest="web", force=True, reason="the old host is gone")
        await hosts.until(lambda: hosts.role("beta") == "alone")
        assert hosts.world.running("web") == ["beta"]


async def test_a_guest_is_looked_after_again_until_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("understudy.agent.recovery.POLL_S", 0.02)
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.crash("alpha")
        hosts.world.guests.pop(("alpha", "web"))
        hosts.world.fail.add("sweep")
        await hosts.boot("alpha")
        tenure = hosts.agents["alpha"].tenure("web")
        await hosts.until(lambda: "a filter does not go away" in tenure.problem)
        hosts.world.fail.clear()
        await hosts.until(lambda: not tenure.problem and tenure.driver is not None)
