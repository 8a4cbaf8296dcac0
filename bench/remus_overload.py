"""What filter-buffer holds when a guest sends more than QEMU's queue takes in an interval, and what is lost of it.

The guest answers numbered echoes, first unprotected, then protected at an interval in which twice as many packets are
sent as a queue of QEMU takes. The gate asks for checkpoints before their time; what it holds is what each commit let
out. Whether anything was lost is seen from outside: the client counts the echoes that were never answered, and the same
at the same rate without protection tells what was lost elsewhere. Only echoes asked for while the gate is there count:
a guest that stands still for the first copy of its memory cannot take in all that is sent to it meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bench.echoes import SLICE_NS
from bench.figures import Figure
from bench.lab import ENVIRONMENT, PRIMARY, guest_is_up, guest_pair
from understudy_qemu.demo.lab import stop
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair
from understudy_qemu.heldnic import QUEUE_PACKETS

__all__ = ["measure"]

_ADDRESS = "10.77.0.2"
_NIC = "nic0"
# No more than a guest's kernel answers also when a checkpoint has held it up: what Linux has to send by ICMP beyond
# 128 KiB it drops itself, unseen from here.
_RATE_HZ = 1000.0
_INTERVAL_MS = round(2 * QUEUE_PACKETS / _RATE_HZ * 1e3)
_FIRST_RATIO = 0.4  # of that rate, until the first checkpoint
_SETTLE_S = 8.0  # the checkpoints before the time have found their pace
_MEASURE_S = 16.0
_DRAIN_S = 2 * _INTERVAL_MS / 1e3
_LIMIT_S = 2 * _DRAIN_S + 60

Slices = Sequence[tuple[int, int, int]]


class _Client:
    # Asks for echoes, none at first.

    def __init__(self, process: Process) -> None:
        self._process = process

    def rate(self, rate_hz: float) -> None:
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        self._process.stdin.write(f"{rate_hz}\n".encode())

    async def end(self) -> Slices:
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        self._process.stdin.close()
        said, _ = await self._process.communicate()
        return [(which, asked, answered) for which, asked, answered in json.loads(said)]


@asynccontextmanager
async def _client(pair: Pair) -> AsyncIterator[_Client]:
    argv = [sys.executable, "-m", "bench.echoes", _ADDRESS, "--drain-s", str(_DRAIN_S)]
    process = await pair.lab.client.exec(argv, stdin=PIPE, stdout=PIPE, env=ENVIRONMENT)
    try:
        yield _Client(process)
    finally:
        if process.returncode is None:
            await stop(process)


def measure(measure_s: float = _MEASURE_S) -> list[Figure]:
    """Overload the gate.

    Args:
        measure_s: For how long, with and without protection.
    """
    return asyncio.run(_measure(measure_s))


async def _measure(measure_s: float) -> list[Figure]:
    async with guest_pair(GuestPlan(mode="remus")) as pair:
        await guest_is_up(pair)
        async with _client(pair) as client, asyncio.timeout(_LIMIT_S + 2 * measure_s):
            client.rate(_RATE_HZ)
            await asyncio.sleep(_SETTLE_S)
            alone = await _for(measure_s)
            # The gate reckons how fast it fills from the epoch before, and of the first one it knows nothing.
            client.rate(_RATE_HZ * _FIRST_RATIO)
            await pair.command(PRIMARY, "protect", GUEST, "--interval", str(_INTERVAL_MS))
            client.rate(_RATE_HZ)
            await asyncio.sleep(_SETTLE_S)
            _, offset = pair.trace(PRIMARY)
            gated = await _for(measure_s)
            rows, _ = pair.trace(PRIMARY, offset)
            slices = await client.end()
        status = await pair.command(PRIMARY, "status", GUEST)
    epochs = [row["epoch"]["counters"] for row in rows if "epoch" in row]
    if len(epochs) < 2:  # noqa: PLR2004 - what the first one tells is of before
        told = [f"{row['state']} on {row['host']}: {row.get('problem')}" for row in status["guests"]]
        raise RuntimeError(f"the guest was not protected all the time: {'; '.join(told)}")
    asked_hz, lost = _within(slices, gated)
    _, lost_alone = _within(slices, alone)
    return [
        Figure(
            "remus_overload_sent_per_queue_ratio",
            [hz * _INTERVAL_MS / 1e3 / QUEUE_PACKETS for hz in asked_hz],
        ),
        Figure("remus_overload_held_packets", _counters(epochs, "released_packets"), aim=QUEUE_PACKETS - 1),
        Figure("remus_overload_held_bytes", _counters(epochs, "released_bytes")),
        Figure("remus_overload_checkpoints_per_s", [len(epochs) / measure_s]),
        Figure("remus_overload_dropped_packets", [sum(lost)], aim=0),
        Figure("remus_overload_unprotected_dropped_packets", [sum(lost_alone)]),
        Figure("remus_overload_full_epochs", [max(_counters(epochs, "full_epoch_count"))], aim=0),
        Figure("remus_overload_refused_packets", [max(_counters(epochs, "refused_packets"))], aim=0),
    ]


async def _for(seconds: float) -> tuple[int, int]:
    began_ns = time.monotonic_ns()
    await asyncio.sleep(seconds)
    return began_ns, time.monotonic_ns()


def _within(slices: Slices, span_ns: tuple[int, int]) -> tuple[list[float], list[int]]:
    # Echoes a second, and how many were not answered, of each slice that lies in a span as a whole.
    began_ns, ended_ns = span_ns
    inside = [
        (asked, asked - answered)
        for which, asked, answered in slices
        if began_ns <= which * SLICE_NS and (which + 1) * SLICE_NS <= ended_ns
    ]
    return [asked * 1e9 / SLICE_NS for asked, _ in inside], [lost for _, lost in inside]


def _counters(epochs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    # A report is made before its own commit and tells of the commit before.
    return [epoch[f"{_NIC}.{name}"] for epoch in epochs[1:]]
