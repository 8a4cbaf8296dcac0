"""One step of every device: siblings, deadlines, cancellation, errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from understudy.errors import DeviceError, LinkLost, PhaseTimeout
from understudy.phases import Step, first_failure, in_words, run_phase
from understudy.testing import clock
from understudy.testing.clock import in_virtual_time


def step(name: str, call: Callable[..., Coroutine[Any, Any, None]]) -> Step:
    return Step(name, f"{name}-kind", call)


def sleeper(seconds: float, log: list[str], name: str) -> Callable[..., Coroutine[Any, Any, None]]:
    async def call(epoch: int) -> None:
        await asyncio.sleep(seconds)
        log.append(f"{name}:{epoch}")

    return call


def failing(seconds: float, error: BaseException) -> Callable[..., Coroutine[Any, Any, None]]:
    async def call(epoch: int) -> None:
        await asyncio.sleep(seconds)
        raise error

    return call


async def swallower(epoch: int) -> None:
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if asyncio.get_running_loop().time() > 1050:
                raise


def now() -> float:
    return asyncio.get_running_loop().time() - 1000


@in_virtual_time
async def test_no_step_costs_no_turn_of_the_loop() -> None:
    turns: list[int] = []
    asyncio.get_running_loop().call_soon(turns.append, 1)
    await run_phase("commit", [], 1, epoch=1, deadline_s=1)
    assert turns == []
    await asyncio.sleep(0)


@in_virtual_time
async def test_steps_run_concurrently_and_get_their_argument() -> None:
    log: list[str] = []
    steps = [step("a", sleeper(2, log, "a")), step("b", sleeper(1, log, "b"))]
    await run_phase("commit", steps, 7, epoch=7, deadline_s=5)
    assert log == ["b:7", "a:7"]
    assert now() == 2


@in_virtual_time
async def test_a_failure_does_not_cancel_siblings_and_says_who_and_when() -> None:
    log: list[str] = []
    cause = OSError("no such device")
    steps = [step("slow", sleeper(3, log, "slow")), step("bad", failing(1, cause))]
    with pytest.raises(ExceptionGroup) as caught:
        await run_phase("postsuspend", steps, 4, epoch=4, deadline_s=5)
    assert log == ["slow:4"]
    [error] = caught.value.exceptions
    assert isinstance(error, DeviceError)
    assert (error.device, error.subkind, error.phase, error.epoch) == ("bad", "bad-kind", "postsuspend", 4)
    assert error.__cause__ is cause
    assert str(error) == "device bad (bad-kind): postsuspend in epoch 4: OSError: no such device"


@in_virtual_time
async def test_the_first_failure_in_time_leads_not_the_first_in_order() -> None:
    steps = [step(n, failing(s, ValueError(n))) for n, s in (("a", 3), ("b", 1), ("c", 2))]
    with pytest.raises(ExceptionGroup) as caught:
        await run_phase("commit", steps, 1, deadline_s=5)
    assert [e.device for e in caught.value.exceptions if isinstance(e, DeviceError)] == ["b", "c", "a"]
    assert first_failure(caught.value) is caught.value.exceptions[0]
    assert "device b" in str(caught.value)


@in_virtual_time
async def test_a_late_step_is_cancelled_and_told_after_an_earlier_failure() -> None:
    log: list[str] = []
    steps = [step("late", sleeper(99, log, "late")), step("bad", failing(1, ValueError("x")))]
    with pytest.raises(ExceptionGroup) as caught:
        await run_phase("commit", steps, 1, epoch=1, deadline_s=5)
    first, second = caught.value.exceptions
    assert not isinstance(first, PhaseTimeout)
    assert isinstance(second, PhaseTimeout)
    assert second.device == "late"
    assert "5 s" in str(second)
    assert (log, now()) == ([], 5)


@in_virtual_time
async def test_a_step_that_returns_after_its_cancellation_is_still_late() -> None:
    async def tidy(epoch: int) -> None:
        try:
            await asyncio.sleep(99)
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)

    with pytest.raises(ExceptionGroup) as caught:
        await run_phase("commit", [step("tidy", tidy)], 1, deadline_s=5)
    assert isinstance(caught.value.exceptions[0], PhaseTimeout)
    assert now() == 5.5


@in_virtual_time
async def test_what_a_late_step_raises_is_the_cause_of_its_timeout() -> None:
    async def call(epoch: int) -> None:
        try:
            await asyncio.sleep(99)
        finally:
            raise OSError("could not undo")

    with pytest.raises(ExceptionGroup) as caught:
        await run_phase("commit", [step("d", call)], 1, deadline_s=5)
    [error] = caught.value.exceptions
    assert isinstance(error, PhaseTimeout)
    assert isinstance(error.__cause__, OSError)


def test_a_step_that_swallows_its_cancellation_is_left_behind_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        log: list[str] = []
        steps = [step("deaf", swallower), step("good", sleeper(1, log, "good"))]
        with pytest.raises(ExceptionGroup) as caught:
            await run_phase("stop", steps, 1, deadline_s=5, grace_s=2)
        assert now() == 7
        [error] = caught.value.exceptions
        assert isinstance(error, PhaseTimeout)
        assert error.device == "deaf"
        assert "left behind" in str(error)
        # It is still remembered, and its end is told.
        [task] = [
            t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "swallower" in repr(t)
        ]
        await asyncio.sleep(50)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)

    with caplog.at_level(logging.WARNING):
        clock.run(main())
    assert "left behind has ended" in caplog.text


@in_virtual_time
async def test_cancelled_from_outside_ends_the_steps_and_goes_on_as_cancellation() -> None:
    log: list[str] = []
    ended: list[str] = []

    async def tidy(epoch: int) -> None:
        try:
            await asyncio.sleep(99)
        finally:
            await asyncio.sleep(0.25)
            ended.append("tidy")

    steps = [step("a", tidy), step("b", sleeper(50, log, "b"))]
    task = asyncio.ensure_future(run_phase("commit", steps, 1, deadline_s=60))
    await asyncio.sleep(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (ended, log, now()) == (["tidy"], [], 2.25)


def test_cancelled_again_and_again_it_still_ends_within_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(
            run_phase("commit", [step("deaf", swallower)], 1, deadline_s=60, grace_s=2)
        )
        await asyncio.sleep(1)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.1)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert now() == pytest.approx(3)
        await asyncio.sleep(50)

    with caplog.at_level(logging.WARNING):
        clock.run(main(), strict=False)
    assert "device deaf" in caplog.text


def test_what_fails_while_being_cancelled_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        steps = [step("bad", failing(1, ValueError("x"))), step("a", sleeper(99, [], "a"))]
        task = asyncio.ensure_future(run_phase("commit", steps, 1, deadline_s=60))
        await asyncio.sleep(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with caplog.at_level(logging.WARNING):
        clock.run(main())
    assert "device bad" in caplog.text


def test_a_failure_in_the_turn_of_the_cancellation_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def bad(epoch: int) -> None:
            await gate.wait()
            raise ValueError("in the same turn")

        steps = [step("bad", bad), step("a", sleeper(99, [], "a"))]
        task = asyncio.ensure_future(run_phase("commit", steps, 1, deadline_s=60))
        await asyncio.sleep(1)
        gate.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with caplog.at_level(logging.WARNING):
        clock.run(main())
    assert "in the same turn" in caplog.text


@in_virtual_time
async def test_a_step_that_is_cancelled_by_somebody_else_is_a_failure_of_the_device() -> None:
    async def call(epoch: int) -> None:
        raise asyncio.CancelledError

    with pytest.raises(ExceptionGroup) as caught:
        await run_phase("commit", [step("d", call)], 1, deadline_s=5)
    assert "not by the core" in str(caught.value)


@in_virtual_time
async def test_a_step_that_is_no_coroutine_function_stops_nobody() -> None:
    def wrong(epoch: int) -> None:
        return None

    log: list[str] = []
    steps = [step("wrong", wrong), step("good", sleeper(1, log, "good"))]  # type: ignore[arg-type]
    with pytest.raises(ExceptionGroup) as caught:
        await run_phase("commit", steps, 1, deadline_s=5)
    assert isinstance(caught.value.exceptions[0].__cause__, TypeError)
    assert log == ["good:1"]
    with pytest.raises(ExceptionGroup):
        await run_phase("commit", steps[:1], 1, deadline_s=5)


@in_virtual_time
async def test_an_error_that_names_the_device_already_is_not_wrapped_again() -> None:
    mine = DeviceError("d", "d-kind", "commit", 3, "known")
    other = DeviceError("elsewhere", "x", "serve", None, "far away")
    with pytest.raises(ExceptionGroup) as caught:
        await run_phase(
            "commit", [step("d", failing(1, mine)), step("e", failing(2, other))], 3, deadline_s=5
        )
    first, second = caught.value.exceptions
    assert first is mine
    assert isinstance(second, DeviceError)
    assert (second.device, second.__cause__) == ("e", other)


@in_virtual_time
async def test_all_or_nothing_cancels_the_others_at_the_first_failure() -> None:
    log: list[str] = []
    ended: list[float] = []

    async def long(epoch: int) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(now())

    steps = [
        step("long", long),
        step("bad", failing(1, ValueError("x"))),
        step("fast", sleeper(0.5, log, "fast")),
    ]
    with pytest.raises(ExceptionGroup) as caught:
        await run_phase("open", steps, 1, deadline_s=7200, all_or_nothing=True)
    assert [str(e.__cause__) for e in caught.value.exceptions] == ["x"]
    assert (ended, log) == ([1.0], ["fast:1"])


@in_virtual_time
async def test_all_or_nothing_with_a_step_that_never_starts() -> None:
    steps = [step("wrong", lambda _: 1), step("long", sleeper(3600, [], "l"))]  # type: ignore[arg-type,return-value]
    with pytest.raises(ExceptionGroup):
        await run_phase("open", steps, 1, deadline_s=7200, all_or_nothing=True)
    assert now() == 0


@in_virtual_time
async def test_a_deadline_that_counts_from_the_last_progress() -> None:
    moved_at = 1000.0

    async def copy(epoch: int) -> None:
        nonlocal moved_at
        for _ in range(10):
            await asyncio.sleep(4)
            moved_at = asyncio.get_running_loop().time()
        await asyncio.sleep(99)

    with pytest.raises(ExceptionGroup) as caught:
        await run_phase("open", [step("d", copy)], 1, deadline_s=5, progressed=lambda: moved_at)
    assert isinstance(caught.value.exceptions[0], PhaseTimeout)
    assert now() == 45


def test_foreign_errors_are_told_with_their_type() -> None:
    assert in_words(KeyError("x")) == "KeyError: 'x'"
    assert in_words(TimeoutError()) == "TimeoutError"
    assert in_words(LinkLost("the cable")) == "the cable"
