"""Races for the records of the embedded arbiter, between hosts that share its directory."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Final

from understudy.arbiter_directory import DirectoryArbiter

__all__ = ["RACER", "new_seed", "newest", "read", "ready"]

RACER: Final = Path(__file__).with_name("racer.py")  #: ``RACER DIRECTORY NAME SWAPS SEED`` is one racer


def new_seed() -> int:
    """Return the seed that was asked for, or a new one, and print it."""
    seed = int(os.environ.get("UNDERSTUDY_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    print(f"UNDERSTUDY_SEED={seed}")  # noqa: T201 - pytest shows it with a failure
    return seed


async def ready(directory: Path, racers: int, timeout_s: float = 60.0) -> None:
    """Wait until so many racers wait for the start, and give it.

    Raises:
        TimeoutError: they do not come.
    """
    async with asyncio.timeout(timeout_s):
        while _waiting(directory) < racers:  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.02)
    (directory / "go").touch()


def _waiting(directory: Path) -> int:
    return len(list(directory.glob("ready-*")))


def read(outputs: list[str]) -> tuple[dict[int, str], int]:
    """Return who was told that it won which generation, and how many were told that they lost."""
    winners: dict[int, str] = {}
    lost = 0
    for line in "".join(outputs).splitlines():
        word, generation, attempt = line.split(maxsplit=2)
        assert word != "stale", f"who could know of generation {generation} has read {attempt}"
        if word == "won":
            assert winners.setdefault(int(generation), attempt) == attempt, f"two winners of {generation}"
        else:
            lost += 1
    return winners, lost


async def newest(directory: Path, winners: dict[int, str]) -> int:
    """Return the last generation, after checking that the records that are kept are those of the winners."""
    kept = await DirectoryArbiter(directory / "arbiter").history("web")
    assert [each.generation for each in kept] == list(range(kept[0].generation, kept[-1].generation + 1))
    for record in kept:
        assert winners.get(record.generation, record.attempt) == record.attempt
    return kept[-1].generation
