"""How long a guest stands still for one remus checkpoint: by the agents, and by a bare script on the same two QEMUs.

On each of some pairs of hosts the agents protect a guest and take checkpoints; then both agents are killed, and the
script of bench/bare.py goes on in their place, on the same stream: ``stop``, a write of ``x-checkpoint-delay``, RESUME.
In turns with that it also does what holding output needs, and nothing to make sure of anything: it puts what was sent
apart while the guest stands still. The script lets the guest run between two checkpoints for as long as the agents did;
nobody talks to the guest. The pause is what QEMU's own STOP and RESUME events say. A ratio has one sample a pair.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures import Figure
from bench.lab import ENVIRONMENT, MONITOR, PRIMARY, STANDBY, guest_is_up, guest_pair, kill_agents
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair

__all__ = ["measure"]

_PAIRS = 6
_CHECKPOINTS = 60
_INTERVAL_MS = 50
_SETTLE_S = 1.5
_LIMIT_S = 60.0
_LOOK_S = 0.5
_NIC = "nic0"
_PARTS = ("stop", "postsuspend", "transfer")


def measure(pairs: int = _PAIRS, checkpoints: int = _CHECKPOINTS) -> list[Figure]:
    """Take checkpoints in both ways.

    Args:
        pairs: How many pairs of hosts.
        checkpoints: How many of each kind on each of them.
    """
    return asyncio.run(_measure(pairs, checkpoints))


async def _measure(pairs: int, checkpoints: int) -> list[Figure]:
    epochs: list[Mapping[str, Any]] = []
    scripted: dict[str, list[float]] = {"plain_ms": [], "held_ms": []}
    ratios: dict[str, list[float]] = {kind: [] for kind in scripted}
    for _ in range(pairs):
        async with guest_pair(GuestPlan(mode="remus", period_ms=_INTERVAL_MS)) as pair:
            await _protect(pair)
            ours = await _by_agents(pair, checkpoints)
            run_ms = statistics.median(epoch["length_ns"] for epoch in ours) / 1e6
            theirs = await _by_script(pair, checkpoints, run_ms)
        epochs += ours
        for kind, pauses_ms in theirs.items():
            scripted[kind] += pauses_ms
            ratios[kind].append(statistics.median(_pauses_ms(ours)) / statistics.median(pauses_ms))
    parts = [
        Figure(f"remus_pause_{part}_ms", [epoch["phases_ns"][part] / 1e6 for epoch in epochs])
        for part in _PARTS
    ]
    return [
        Figure("remus_pause_ms", _pauses_ms(epochs)),
        *parts,
        Figure("remus_bare_pause_ms", scripted["plain_ms"]),
        Figure("remus_bare_held_pause_ms", scripted["held_ms"]),
        Figure("remus_pause_vs_bare_ratio", ratios["plain_ms"], aim=1.1),
        Figure("remus_pause_vs_bare_held_ratio", ratios["held_ms"]),
    ]


def _pauses_ms(epochs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [epoch["pause_ns"] / 1e6 for epoch in epochs]


async def _by_agents(pair: Pair, checkpoints: int) -> list[Mapping[str, Any]]:
    _, offset = pair.trace(PRIMARY)
    async with asyncio.timeout(_LIMIT_S):
        while True:
            rows = [row["epoch"] for row in pair.trace(PRIMARY, offset)[0] if "epoch" in row]
            if len(rows) >= checkpoints:
                return rows[:checkpoints]
            await asyncio.sleep(_LOOK_S)


async def _by_script(pair: Pair, checkpoints: int, run_ms: float) -> dict[str, list[float]]:
    kill_agents(pair, [PRIMARY, STANDBY])
    argv = [sys.executable, "-m", "bench.bare", "checkpoints", MONITOR, str(checkpoints), str(run_ms), _NIC]
    script = await pair.lab.hosts[PRIMARY].exec(argv, stdout=PIPE, env=ENVIRONMENT)
    async with asyncio.timeout(_LIMIT_S):
        said, _ = await script.communicate()
    pauses_ms: dict[str, list[float]] = json.loads(said)
    return pauses_ms


async def _protect(pair: Pair) -> None:
    await guest_is_up(pair)
    await pair.command(PRIMARY, "protect", GUEST)
    await asyncio.sleep(_SETTLE_S)
