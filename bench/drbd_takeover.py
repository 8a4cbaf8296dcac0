"""From suspicion to a survivor that runs: a disk on DRBD, one that QEMU replicates, a plug gate, whole agents.

The two kernels are user-mode-linux, in which starting a process, a fault of a page and a table of the device mapper are
many times dearer than on a host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures import Figure
from tests.kernel.drbdstack import GUEST, Client, whole_stack

__all__ = ["measure"]

_KILLS = 4
_REPLIES = 5


def measure(kills: int = _KILLS) -> list[Figure]:
    """Kill one host after the other, the guest protected again each time.

    Args:
        kills: How many.
    """
    return [Figure("drbd_takeover_ms", asyncio.run(_measure(kills)), aim=500)]


async def _measure(kills: int) -> list[float]:
    taken_ms: list[float] = []
    async with whole_stack() as stack:
        here, there = stack.pair.alpha, stack.pair.beta
        await stack.command(here, "start", GUEST)
        for number in range(kills):
            if number:
                await stack.comes_back(there)
            client = Client(there, f"client{number}")
            await client.replies(_REPLIES)
            await stack.command(here, "protect", GUEST)
            await client.replies(_REPLIES)
            await stack.crash(here)
            await stack.becomes(there, "alone")
            await client.replies(_REPLIES)
            taken_ms.append(_takeover_ms((await stack.command(there, "history", GUEST))["events"]))
            here, there = there, here
    return taken_ms


def _takeover_ms(events: Sequence[Mapping[str, Any]]) -> float:
    promoted_ns = max(event["time_ns"] for event in events if event["event"] == "promoted")
    suspected_ns = max(
        event["time_ns"]
        for event in events
        if event.get("to") == "suspect" and event["time_ns"] < promoted_ns
    )
    return float(promoted_ns - suspected_ns) / 1e6
