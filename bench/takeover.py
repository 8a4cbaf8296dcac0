"""From suspicion to a survivor that runs: by the agents, and by a bare script that gives only documented commands.

Each sample has a fresh pair of hosts, protected in the same way by the same agents; the cable of the primary's host
is cut and the host killed. Then either the other host's agent takes over, from its suspicion on, the arbiter's swaps
included; or that agent is killed too and the script of bench/bare.py does it, connected beforehand, after as long a
silence as the agent needed to suspect (a client's TCP sends again after 0.2, 0.6, 1.4, ... s: its next reply depends
on that).

Both hosts' disks and the arbiter's directory lie on one file system here, so a swap's fsync would also write what the
guests' disks have in the cache: 2 to 10 ms that no pair of real hosts has. Therefore the cache is written before the
host is lost, in both ways. The swaps stay durable.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from typing import Any

from bench.figures import Figure, ratio
from bench.lab import ENVIRONMENT, MONITOR, PRIMARY, STANDBY, guest_pair, kill_agents
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair
from understudy_qemu.demo.talk import Talk
from understudy_qemu.network import tap_name

__all__ = ["measure"]

_SAMPLES = 5
_PROTECTED_S = 1.5
_LIMIT_S = 20.0
_REPLIES = 3
_COLO_DRAW = 512  # as in the demo

Moments = tuple[int, int]  # suspicion and survivor running, CLOCK_MONOTONIC in ns
TakeOver = Callable[[Pair, int, int], Awaitable[Moments]]


def measure(samples: int = _SAMPLES) -> list[Figure]:
    """Lose a host again and again, with the two ways to take over in turns.

    Args:
        samples: How many of each.
    """
    return asyncio.run(_measure(samples))


async def _measure(samples: int) -> list[Figure]:
    figures: dict[str, list[float]] = {}
    for _ in range(samples):
        silence_ns = 0
        for way, take_over in (("", _by_agent), ("bare_", _by_script)):
            lost_ns, suspect_ns, running_ns, reply_ns = await _sample(take_over, silence_ns)
            silence_ns = suspect_ns - lost_ns
            figures.setdefault(f"{way}takeover_ms", []).append((running_ns - suspect_ns) / 1e6)
            figures.setdefault(f"{way}first_reply_ms", []).append((reply_ns - suspect_ns) / 1e6)
    made = {name: Figure(name, values) for name, values in figures.items()}
    return [
        *made.values(),
        ratio("takeover_vs_bare_ratio", made["takeover_ms"], made["bare_takeover_ms"], aim=1.2),
        ratio("first_reply_vs_bare_ratio", made["first_reply_ms"], made["bare_first_reply_ms"]),
    ]


async def _sample(take_over: TakeOver, silence_ns: int) -> tuple[int, int, int, int]:
    # The moments of the loss, of the suspicion, of the survivor running and of the client's next reply.
    async with guest_pair(GuestPlan(mode="colo", draw=_COLO_DRAW)) as pair:
        talk = await Talk.begin(pair.lab)
        try:
            await pair.protect(PRIMARY, show=False)
            await asyncio.sleep(_PROTECTED_S)
            await asyncio.to_thread(os.sync)
            lost_ns = await pair.lose(PRIMARY)
            suspect_ns, running_ns = await take_over(pair, lost_ns, silence_ns)
            reply = await talk.replies_after(suspect_ns, _REPLIES, _LIMIT_S)
            return lost_ns, suspect_ns, running_ns, reply.t_ns
        finally:
            await talk.end()


async def _by_agent(pair: Pair, lost_ns: int, _: int) -> Moments:
    until = time.monotonic() + _LIMIT_S
    while time.monotonic() < until:
        rows = [row for row in pair.trace(STANDBY)[0] if "event" in row and row["t_ns"] > lost_ns]
        suspect_ns = _first(rows, lambda row: row["facts"].get("to") == "suspect")
        running_ns = _first(rows, lambda row: row["event"] == "promoted")
        if suspect_ns and running_ns:
            return suspect_ns, running_ns
        await asyncio.sleep(0.02)
    raise TimeoutError(f"{STANDBY} did not take the guest over: {pair.last_words(STANDBY)}")


def _first(rows: list[dict[str, Any]], found: Callable[[dict[str, Any]], bool]) -> int:
    return next((int(row["t_ns"]) for row in rows if found(row)), 0)


async def _by_script(pair: Pair, lost_ns: int, silence_ns: int) -> Moments:
    host = pair.lab.hosts[STANDBY]
    tap = f"{tap_name(STANDBY, GUEST, 'nic0')}=br0"
    argv = [sys.executable, "-m", "bench.bare", "takeover", MONITOR, tap]
    script = await host.exec(argv, stdin=PIPE, stdout=PIPE, env=ENVIRONMENT)
    assert script.stdin is not None  # noqa: S101 - pipes were asked for
    assert script.stdout is not None  # noqa: S101
    async with asyncio.timeout(_LIMIT_S):
        await script.stdout.readline()
        kill_agents(pair, [STANDBY])
        script.stdin.write(f"{lost_ns + silence_ns}\n".encode())
        said = await script.stdout.readline()
        await script.wait()
    moments = json.loads(said)
    return int(moments["began_ns"]), int(moments["running_ns"])
