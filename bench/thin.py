"""What a cut of a thin volume costs, beside the same three steps by ``dmsetup``, in the kernel bed, on memory.

Both take turns on one volume, each after the same writes. ``thin_cut_ms`` is the cut itself, while nobody can write to
the volume; ``thin_cut_from_loop_ms`` is the way from the event loop through a thread of its own and back besides, which
is dear in the bed's kernel.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bench.bed import answer, is_inside, measured_inside
from bench.figures import Figure, ratio

if TYPE_CHECKING:
    from understudy_drbd.thin import ThinVolume

__all__ = ["measure"]

_ROUNDS = 60
_SIZE_MIB = 64
_WRITES = 16
_BLOCK_BYTES = 65_536
_DEADLINE_S = 300.0


def measure() -> list[Figure]:
    """Measure inside one fresh kernel."""
    samples = measured_inside("bench.thin", _DEADLINE_S)
    cut = Figure("thin_cut_ms", samples["thin_cut_ms"], 1.0)
    recorded = [Figure(name, samples[name]) for name in ("thin_cut_from_loop_ms", "thin_drop_ms")]
    rival = Figure("thin_cut_dmsetup_ms", samples["thin_cut_dmsetup_ms"])
    return [cut, *recorded, rival, ratio("thin_cut_vs_dmsetup_ratio", cut, rival, 0.02)]


# --- Inside ----------------------------------------------------------------------------------------------------------


async def _measure(directory: Path) -> dict[str, list[float]]:
    from tests.kernel.thinpool import run, thin_pool  # noqa: PLC0415 - only where the plugin is needed
    from understudy_drbd.control import threads  # noqa: PLC0415 - as above
    from understudy_drbd.thin import ThinVolume  # noqa: PLC0415 - as above

    cuts: list[float] = []
    from_loop: list[float] = []
    drops: list[float] = []
    rivals: list[float] = []
    with ExitStack() as stack:
        pool = stack.enter_context(thin_pool(directory, 4 * _SIZE_MIB))
        path = stack.enter_context(pool.volume("understudy-bench", 1, _SIZE_MIB))
        volume = ThinVolume.find(pool.mapper, path)
        for epoch in range(1, _ROUNDS + 1):
            await asyncio.to_thread(_write, path, epoch)
            cuts.append(_timed(partial(volume.cut, epoch)))
            drops.append(_timed(partial(volume.drop, epoch)))
            await asyncio.to_thread(_write, path, epoch)
            began_ns = time.perf_counter_ns()
            await threads.run(volume.cut, epoch, timeout_s=10)
            from_loop.append((time.perf_counter_ns() - began_ns) / 1e6)
            await threads.run(volume.drop, epoch, timeout_s=10)
            await asyncio.to_thread(_write, path, epoch)
            rivals.append(await asyncio.to_thread(_by_dmsetup, run, volume, pool.name))
    return {
        "thin_cut_ms": cuts,
        "thin_cut_from_loop_ms": from_loop,
        "thin_drop_ms": drops,
        "thin_cut_dmsetup_ms": rivals,
    }


def _timed(call: Callable[[], None]) -> float:
    began_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began_ns) / 1e6


def _write(path: Path, epoch: int) -> None:
    # What a guest writes in an epoch; it has ended when the volume is cut.
    fd = os.open(path, os.O_WRONLY)
    try:
        for number in range(_WRITES):
            place = (epoch * 37 + number * 61) % (_SIZE_MIB << 20 >> 16)
            os.pwrite(fd, bytes([epoch % 256]) * _BLOCK_BYTES, place * _BLOCK_BYTES)
        os.fsync(fd)
    finally:
        os.close(fd)


def _by_dmsetup(run: Callable[..., str], volume: ThinVolume, pool: str) -> float:
    began_ns = time.perf_counter_ns()
    run("dmsetup", "suspend", volume.name)
    run("dmsetup", "message", pool, "0", f"create_snap 9 {volume.identity}")
    run("dmsetup", "resume", volume.name)
    taken_ms = (time.perf_counter_ns() - began_ns) / 1e6
    run("dmsetup", "message", pool, "0", "delete 9")
    return taken_ms


def _inside() -> None:
    with TemporaryDirectory() as directory:
        answer(asyncio.run(_measure(Path(directory))))


if __name__ == "__main__" and is_inside():
    _inside()
