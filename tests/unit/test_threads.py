"""Blocking calls with a deadline, in threads that hold nobody up."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from understudy.threads import MAX_HUNG, ThreadsHang, TimedThreads

DEADLINE_S = 30.0  # of what is expected to happen at once

# A FIFO that nobody writes to: opening it blocks in the kernel until then.
HANGS_AND_ENDS = """
import asyncio, os, sys
from understudy.threads import TimedThreads

async def main():
    try:
        await TimedThreads("test").run(os.open, sys.argv[1], os.O_RDONLY, timeout_s=0.1)
    except TimeoutError as error:
        print(error)

asyncio.run(main())
"""


async def test_what_a_call_returns_or_raises_comes_back() -> None:
    threads = TimedThreads("test")
    assert await threads.run(divmod, 7, 2, timeout_s=DEADLINE_S) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await threads.run(divmod, 7, 0, timeout_s=DEADLINE_S)
    assert threads.hung == 0


async def test_calls_that_hang_stop_further_ones_until_they_end() -> None:
    threads, gate, began = TimedThreads("test"), threading.Event(), threading.Semaphore(0)

    def hangs() -> None:
        began.release()
        gate.wait(DEADLINE_S)

    for _ in range(MAX_HUNG - 1):
        with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
            await threads.run(hangs, timeout_s=0.01)
    # One that its caller gave up hangs as well.
    task = asyncio.ensure_future(threads.run(hangs, timeout_s=DEADLINE_S))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert threads.hung == MAX_HUNG
    with pytest.raises(ThreadsHang, match=f"{MAX_HUNG} earlier calls still hang"):
        await threads.run(hangs, timeout_s=DEADLINE_S)
    gate.set()
    async with asyncio.timeout(DEADLINE_S):
        while threads.hung:  # noqa: ASYNC110 - threads, not tasks, are waited for
            await asyncio.sleep(0.005)
    assert await threads.run(os.getpid, timeout_s=DEADLINE_S) == os.getpid()


async def test_a_thread_is_used_again_and_ends_with_its_owner() -> None:
    threads = TimedThreads("test")
    [ident] = {await threads.run(threading.get_ident, timeout_s=DEADLINE_S) for _ in range(50)}
    thread = next(each for each in threading.enumerate() if each.ident == ident)
    del threads
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


async def test_a_thread_that_is_at_work_gets_no_second_call() -> None:
    threads, gate = TimedThreads("test"), threading.Event()
    first = asyncio.ensure_future(threads.run(gate.wait, DEADLINE_S, timeout_s=DEADLINE_S))
    await asyncio.sleep(0)
    assert await threads.run(gate.is_set, timeout_s=DEADLINE_S) is False
    gate.set()
    assert await first


async def test_nothing_of_a_call_lives_on_in_an_idle_thread() -> None:
    class Large:
        def use(self) -> None:
            raise ValueError("with a traceback that knows it")

    threads, large = TimedThreads("test"), Large()
    gone = weakref.ref(large)
    with pytest.raises(ValueError, match="traceback"):
        await threads.run(large.use, timeout_s=DEADLINE_S)
    del large
    async with asyncio.timeout(DEADLINE_S):
        while gone() is not None:
            gc.collect()
            await asyncio.sleep(0.005)


def test_a_call_that_hangs_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ended = subprocess.run(
        [sys.executable, "-c", HANGS_AND_ENDS, str(fifo)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert ended.stdout == "no answer within 0.1 s\n"
