"""Whether a guest has caught up is read from what its threads do."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.colo_proxy.qemu_model import Qemu
from understudy_colo_proxy.vcpus import Vcpus


def thread(proc: Path, tid: int, state: str, ran_ns: int) -> None:
    place = proc / str(tid)
    place.mkdir(exist_ok=True)
    (place / "stat").write_text(f"{tid} (CPU 0/KVM) ) {state} 1 2 3")
    (place / "schedstat").write_text(f"{ran_ns} 5 6\n")


async def test_sleeping_processors_have_caught_up(tmp_path: Path) -> None:
    for tid in (7, 8):
        thread(tmp_path, tid, "S", 1)
    assert await Vcpus([7, 8], tmp_path).caught_up(5)


async def test_a_processor_that_gets_no_time_has_not(tmp_path: Path) -> None:
    thread(tmp_path, 7, "S", 1)
    thread(tmp_path, 8, "R", 1)
    assert not await Vcpus([7, 8], tmp_path).caught_up(0.01)


async def test_a_busy_one_has_when_it_has_run_for_long_enough(tmp_path: Path) -> None:
    thread(tmp_path, 7, "R", 1_000)
    waiting = asyncio.create_task(Vcpus([7], tmp_path).caught_up(5))
    await asyncio.sleep(0)
    thread(tmp_path, 7, "R", 10_001_000)
    assert await waiting


@pytest.mark.parametrize("threads", [[], [1 << 30]])
async def test_threads_that_cannot_be_seen_are_not_waited_for(tmp_path: Path, threads: list[int]) -> None:
    assert await Vcpus(threads, tmp_path).caught_up(5)


async def test_qemu_tells_the_threads() -> None:
    assert (await Vcpus.of(Qemu()))._threads == (1 << 30,)
