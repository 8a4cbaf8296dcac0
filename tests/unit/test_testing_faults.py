"""Faults at every await."""

from __future__ import annotations

import asyncio

import pytest

from understudy.testing.clock import in_virtual_time
from understudy.testing.faults import (
    Cancel,
    Fault,
    InjectedFault,
    Raise,
    at_every_await,
    at_random_awaits,
    count_awaits,
)


async def work(log: list[str]) -> str:
    try:
        await asyncio.sleep(1)
        log.append("one")
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.sleep(2), timeout=5)
        log.append("two")
        return "done"
    finally:
        await asyncio.sleep(1)
        log.append("cleaned")


@in_virtual_time
async def test_every_await_is_hit_once_by_a_cancellation() -> None:
    logs = []
    for fault in at_every_await(Cancel()):
        log: list[str] = []
        logs.append(log)
        if not await _cancelled(fault, log):
            assert not fault.struck
    assert logs[0] == ["cleaned"]
    assert logs[-1] == ["one", "two", "cleaned"]
    assert len(logs) == await count_awaits(work([])) + 1


async def _cancelled(fault: Fault, log: list[str]) -> bool:
    try:
        await fault.strike(work(log))
    except asyncio.CancelledError:
        return True
    return False


@in_virtual_time
async def test_every_await_is_hit_once_by_an_error() -> None:
    outcomes: list[str] = []
    for fault in at_every_await(Raise()):
        try:
            outcomes.append(await fault.strike(work([])))
        except InjectedFault as error:
            outcomes.append(str(error))
    assert set(outcomes) == {"injected", "done"}
    assert outcomes[-1] == "done"


@in_virtual_time
async def test_the_work_may_cope_with_the_fault() -> None:
    async def copes() -> int:
        try:
            await asyncio.sleep(1)
        except OSError:
            return 1
        return 0

    fault = Fault(Raise(lambda: OSError("x")), 1)
    assert await fault.strike(copes()) == 1
    assert "struck" in repr(fault)
    assert "not reached" in repr(Fault(Cancel(), 9))


@in_virtual_time
async def test_the_caller_goes_on_after_a_cancellation() -> None:
    assert await _cancelled(Fault(Cancel(), 1), [])
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    async with asyncio.timeout(5):
        await asyncio.sleep(1)


@in_virtual_time
async def test_a_cancellation_from_outside_passes_through() -> None:
    log: list[str] = []
    task = asyncio.ensure_future(Fault(Cancel(), 99).strike(work(log)))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["cleaned"]


@in_virtual_time
async def test_work_without_end_is_given_up() -> None:
    async def forever() -> None:
        while True:
            try:
                await asyncio.sleep(1)
            except InjectedFault:
                return

    faults = at_every_await(Raise(), limit=5)
    for _ in range(5):
        await next(faults).strike(forever())
    with pytest.raises(AssertionError, match="more than 5"):
        next(faults)


def test_random_points_repeat_with_their_seed() -> None:
    def points(seed: int) -> list[int]:
        return [f.point for f in at_random_awaits(Cancel(), points=50, rounds=20, seed=seed)]

    assert points(1) == points(1)
    assert points(1) != points(2)
    assert set(points(1)) <= set(range(1, 51))
