"""A copy that hangs is noticed by asking it."""

from __future__ import annotations

import asyncio
from typing import cast

from understudy.errors import MonitorSilent
from understudy.testing.clock import in_virtual_time
from understudy_qemu.monitor import OutOfBand
from understudy_qemu.pulse import Pulse


class Monitor:
    """A second monitor that answers so often, then never."""

    def __init__(self, answers: int) -> None:
        self.answers = answers
        self.asked = 0

    async def yankable(self) -> list[object]:
        self.asked += 1
        if self.asked <= self.answers:
            return []
        await asyncio.sleep(2)
        raise MonitorSilent("no answer within 2 s")


@in_virtual_time
async def test_silence_is_told_once() -> None:
    told: list[str] = []
    monitor = Monitor(answers=3)
    Pulse(cast("OutOfBand", monitor), told.append)
    await asyncio.sleep(60)
    assert told == ["no answer within 2 s"]
    assert monitor.asked == 4


@in_virtual_time
async def test_nothing_is_asked_or_told_after_the_end() -> None:
    told: list[str] = []
    monitor = Monitor(answers=3)
    pulse = Pulse(cast("OutOfBand", monitor), told.append)
    await asyncio.sleep(1.6)  # the fourth question is on its way
    pulse.end()
    await asyncio.sleep(60)
    assert told == []
    assert monitor.asked == 4
