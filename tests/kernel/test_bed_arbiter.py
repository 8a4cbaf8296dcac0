"""The embedded arbiter between two kernels: its compare-and-swap holds on the file system that both share."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from tests.testbeds.bed import need
from tests.testbeds.kernel.machine import KernelDied, missing_for_kernel
from tests.testbeds.kernel.pair import Host, Pair
from tests.testbeds.racing import RACER, new_seed, newest, read, ready
from tests.testbeds.rounds import rounds

RACERS = 2  # in each kernel
SWAPS = rounds(60, 2000)  # of each racer


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    need("kernel", missing_for_kernel())
    async with Pair(memory_mib=256) as booted:
        yield booted


@pytest.fixture
def seed() -> int:
    return new_seed()


def start(pair: Pair, host: Host, life: int, seed: int) -> list[asyncio.Task[str]]:
    async def racer(number: int) -> str:
        name = f"{host.name}-{life}-{number}"
        argv = (sys.executable, RACER, pair.common, name, str(SWAPS), str(seed + number))
        return (await host.run(*argv, timeout_s=rounds(100, 1500))).output

    return [asyncio.create_task(racer(number)) for number in range(RACERS)]


@pytest.mark.timeout(rounds(120, 1700))
async def test_one_winner_of_each_generation(pair: Pair, seed: int) -> None:
    racing = start(pair, pair.alpha, 0, seed) + start(pair, pair.beta, 0, seed + 100)
    await ready(pair.common, len(racing))
    winners, lost = read(await asyncio.gather(*racing))
    assert sorted(winners) == list(range(1, await newest(pair.common, winners) + 1))
    assert len(winners) + lost == 2 * RACERS * SWAPS
    # Else there was no race: both kernels won, and somebody was beaten.
    assert {attempt.partition("-")[0] for attempt in winners.values()} == {"alpha", "beta"}
    assert lost


@pytest.mark.timeout(rounds(120, 1700))
async def test_a_kernel_that_dies_in_the_race_takes_no_generation_along(pair: Pair, seed: int) -> None:
    dying = start(pair, pair.alpha, 0, seed)
    racing = start(pair, pair.beta, 0, seed + 100)
    await ready(pair.common, 2 * RACERS)
    kept = pair.common / "arbiter" / "g-web"
    async with asyncio.timeout(60):
        while not (kept / f"{10:020d}.json").exists():  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.01)
    await pair.crash(pair.alpha)
    for each in dying:
        with suppress(KernelDied):
            await each
    await pair.start(pair.alpha)
    racing += start(pair, pair.alpha, 1, seed + 200)
    winners, _ = read(await asyncio.gather(*racing))
    # What the dead kernel won nobody was told: such generations have no winner here, but none has two.
    assert set(winners) <= set(range(1, await newest(pair.common, winners) + 1))
    assert any(attempt.startswith("alpha-1") for attempt in winners.values())
