"""What one phase costs over 1, 4 and 16 devices whose step does nothing, beside a bare task group in the same run."""

from __future__ import annotations

import asyncio
import time

from bench.figures import Figure, ratio
from understudy.phases import Step, run_phase

__all__ = ["measure"]

_SAMPLES = 400
_PER_SAMPLE = 5


class _Device:
    async def postsuspend(self, epoch: int) -> None:
        """Do nothing."""


async def _ours(count: int) -> list[float]:
    steps = [Step(f"disk{index}", "none", _Device().postsuspend) for index in range(count)]
    samples = []
    for epoch in range(_SAMPLES):
        started = time.perf_counter()
        for _ in range(_PER_SAMPLE):
            await run_phase("postsuspend", steps, epoch, epoch=epoch, deadline_s=5.0)
        samples.append((time.perf_counter() - started) / _PER_SAMPLE * 1e6)
    return samples


async def _task_group(count: int) -> list[float]:
    # What it is compared with: it has no deadline and cancels siblings, so it could not be used instead.
    devices = [_Device() for _ in range(count)]
    samples = []
    for epoch in range(_SAMPLES):
        started = time.perf_counter()
        for _ in range(_PER_SAMPLE):
            async with asyncio.TaskGroup() as group:
                for device in devices:
                    group.create_task(device.postsuspend(epoch))
        samples.append((time.perf_counter() - started) / _PER_SAMPLE * 1e6)
    return samples


def measure() -> list[Figure]:
    """Measure 1, 4 and 16 devices."""
    figures = []
    for count, aim in ((1, None), (4, None), (16, 120.0)):
        ours = Figure(f"phase_{count}_devices_us", asyncio.run(_ours(count)), aim)
        bare = Figure(f"task_group_{count}_us", asyncio.run(_task_group(count)))
        figures += [ours, bare, ratio(f"phase_{count}_vs_task_group_ratio", ours, bare)]
    return figures
