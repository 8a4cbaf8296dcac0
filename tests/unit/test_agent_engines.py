"""An agent's engines: what they answer, and what they repeat."""

import asyncio
from pathlib import Path

import pytest

from tests.testbeds.twoagents import two_hosts
from understudy.arbiter import Record, SwapResult
from understudy.errors import ArbiterError, StateError
from understudy.session.effects import Effect, Report
from understudy.session.events import GuestReset


async def test_a_swap_that_failed_for_no_known_reason_is_repeated_as_it_is(tmp_path: Path) -> None:
    # It may have been made: only what was refused before it was sent can never be.
    async with two_hosts(tmp_path) as hosts:
        arbiter = hosts.agents["alpha"].arbiter
        assert arbiter
        exchange = arbiter.inner.exchange
        attempts: list[str] = []

        async def made_but_not_told(expected: Record | None, desired: Record) -> SwapResult:
            attempts.append(desired.attempt)
            result = await exchange(expected, desired)
            if len(attempts) == 1:
                raise ArbiterError("its answer made no sense")
            return result

        arbiter.inner.exchange = made_but_not_told  # type: ignore[method-assign]
        starting = asyncio.create_task(hosts.call("alpha", "start", guest="web"))
        await hosts.until(lambda: hosts.world.running("web") == ["alpha"])
        await asyncio.wait({starting})
        assert len(set(attempts)) == 1
        record = await arbiter.read("web")
        assert record
        assert record.generation == 1


async def test_an_engine_that_has_ended_says_so_to_whoever_asks(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        tenure = hosts.agents["alpha"].tenure("web")
        driver, run = tenure.driver, tenure._run
        assert driver
        assert run
        asking = asyncio.create_task(driver.ask(GuestReset()))
        await asyncio.sleep(0)  # it is queued now, but not taken
        run.cancel()
        with pytest.raises(StateError, match="engine of guest web has ended"):
            await asyncio.wait_for(asking, 5)
        with pytest.raises(StateError, match="engine of guest web has ended"):
            await asyncio.wait_for(driver.ask(GuestReset()), 5)


async def test_settling_waits_for_what_an_event_asked_for_and_is_no_event(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.call("alpha", "protect", guest="web", peer="beta")
        driver = hosts.agents["alpha"].tenure("web").driver
        assert driver
        reports: list[Effect] = []
        may_end = asyncio.Event()

        async def slow(effect: Effect) -> None:
            await may_end.wait()
            reports.append(effect)

        driver._carries[Report] = slow
        driver.post(GuestReset())
        settling = asyncio.create_task(driver.settle())
        await asyncio.sleep(0.05)
        assert not settling.done()
        may_end.set()
        await asyncio.wait_for(settling, 5)
        assert reports == [Report("guest-reset")]
        await asyncio.wait_for(driver.settle(), 5)
        assert reports == [Report("guest-reset")]
