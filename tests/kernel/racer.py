"""One racer of test_bed_arbiter.py: ``racer.py DIRECTORY NAME SWAPS SEED``. Prints what it was told of each swap."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

from understudy.arbiter import RecordState, following
from understudy.arbiter_directory import DirectoryArbiter


async def race(directory: Path, name: str, swaps: int, seed: int) -> None:
    """Swap from whatever is there, again and again, now and then the same swap twice."""
    arbiter = DirectoryArbiter(directory / "arbiter", timeout_s=60, keep=64)
    chance = random.Random(seed)
    (directory / f"ready-{name}").touch()
    deadline = time.monotonic() + 60
    while not (directory / "go").exists():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody said go")
        await asyncio.sleep(0.005)
    for number in range(swaps):
        old = await arbiter.read("web")
        attempt = f"{name}.{number}"
        host = {"owner": "all", "writer": "all", "reason": "race"}
        new = following(old, guest="web", state=RecordState.ALONE, attempt=attempt, **host)
        won, record = await arbiter.swap(old, new)
        assert record is not None
        print("won" if won else "lost", record.generation, attempt)  # noqa: T201 - read by the test
        if chance.random() < 0.2:
            await arbiter.swap(old, new)


asyncio.run(race(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
