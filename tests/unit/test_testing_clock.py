"""The virtual clock."""

from __future__ import annotations

import asyncio
import threading

import pytest

from understudy.testing import clock
from understudy.testing.clock import NothingHappens, TasksLeft, in_virtual_time


@in_virtual_time
async def test_hours_pass_at_once_and_in_order() -> None:
    loop = asyncio.get_running_loop()
    order: list[str] = []
    loop.call_later(7200, order.append, "two hours")
    loop.call_later(3600, order.append, "one hour")
    await asyncio.sleep(9000)
    assert order == ["one hour", "two hours"]
    assert loop.time() == 10000


def test_timeouts_are_virtual() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(86400):
                await asyncio.Event().wait()

    clock.run(main())


def test_a_stuck_program_is_told() -> None:
    with pytest.raises(NothingHappens):
        clock.run(asyncio.Event().wait(), patience_s=0.01)


def test_a_thread_may_wake_the_loop() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[int] = loop.create_future()
        threading.Thread(target=loop.call_soon_threadsafe, args=(answer.set_result, 5)).start()
        return await answer

    assert clock.run(main()) == 5


def test_tasks_that_are_left_are_named() -> None:
    async def forgotten() -> None:
        await asyncio.sleep(1)

    async def main() -> None:
        main.task = asyncio.ensure_future(forgotten())  # type: ignore[attr-defined]

    with pytest.raises(TasksLeft, match="forgotten"):
        clock.run(main())
    clock.run(main(), strict=False)


def test_a_task_that_never_ends_does_not_hang_the_test() -> None:
    async def deaf() -> None:
        while True:
            try:
                await asyncio.sleep(1e9)
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        main.task = asyncio.ensure_future(deaf())  # type: ignore[attr-defined]
        main.task._log_destroy_pending = False  # type: ignore[attr-defined]
        await asyncio.sleep(1)

    with pytest.raises(TasksLeft, match="ignore their cancellation"):
        clock.run(main())
