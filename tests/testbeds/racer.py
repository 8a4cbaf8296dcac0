"""One racer of `tests.testbeds.racing`: ``racer.py DIRECTORY NAME SWAPS SEED``. Prints what it was told of swaps."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

from understudy.arbiter import RecordState, following
from understudy.arbiter_directory import DirectoryArbiter


def known(directory: Path) -> int:
    """Return the latest generation that any racer was told of."""
    return max((int(path.read_text()) for path in directory.glob("told-*")), default=0)


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
        # Whoever reads after somebody was told of a generation has to see that one, or a later one.
        least = known(directory)
        old = await arbiter.read("web")
        if (old.generation if old else 0) < least:
            print("stale", least, old)  # noqa: T201 - read by the test
        attempt = f"{name}.{number}"
        host = {"owner": "all", "writer": "all", "reason": "race"}
        new = following(old, guest="web", state=RecordState.ALONE, attempt=attempt, **host)
        won, record = await arbiter.swap(old, new)
        assert record is not None
        told = directory / f"new-{name}"
        told.write_text(str(record.generation))
        told.replace(directory / f"told-{name}")
        print("won" if won else "lost", record.generation, attempt)  # noqa: T201 - read by the test
        if chance.random() < 0.2:
            await arbiter.swap(old, new)


asyncio.run(race(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
