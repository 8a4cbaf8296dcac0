"""How long a guest stands still for one remus checkpoint: by the agents, and by a bare script on an equal pair.

Pairs of hosts are made and protected in the same way, one after the other. Of every other one, both agents are killed
then, and the script of bench/bare.py goes on in their place, with the same QEMUs on the same stream: ``stop``, a write
of ``x-checkpoint-delay``, and RESUME. In turns with that it also does what holding output needs, and nothing to make
sure of anything: it puts what was sent apart while the guest stands still. Both let the guest run for as long between
two checkpoints; nobody talks to it. The pause is what QEMU's own STOP and RESUME events say.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from typing import Any

from bench.figures import Figure, ratio
from bench.lab import ENVIRONMENT, MONITOR, PRIMARY, STANDBY, guest_pair, kill_agents
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair
from understudy_qemu.demo.talk import Talk

__all__ = ["measure"]

_PAIRS = 4
_CHECKPOINTS = 60
_INTERVAL_MS = 50
_SETTLE_S = 1.5
_LIMIT_S = 60.0
_NIC = "nic0"
_PARTS = ("stop", "postsuspend", "transfer")


def measure(pairs: int = _PAIRS, checkpoints: int = _CHECKPOINTS) -> list[Figure]:
    """Take checkpoints in both ways.

    Args:
        pairs: How many pairs of hosts for each way.
        checkpoints: How many of each kind on each of them.
    """
    return asyncio.run(_measure(pairs, checkpoints))


async def _measure(pairs: int, checkpoints: int) -> list[Figure]:
    epochs: list[Mapping[str, Any]] = []
    scripted: dict[str, list[float]] = {"plain_ms": [], "held_ms": []}
    for _ in range(pairs):
        epochs += await _by_agents(checkpoints)
        run_ms = statistics.median(epoch["length_ns"] for epoch in epochs) / 1e6
        for kind, pauses_ms in (await _by_script(checkpoints, run_ms)).items():
            scripted[kind] += pauses_ms
    pause = Figure("remus_pause_ms", [epoch["pause_ns"] / 1e6 for epoch in epochs])
    parts = [
        Figure(f"remus_pause_{part}_ms", [epoch["phases_ns"][part] / 1e6 for epoch in epochs])
        for part in _PARTS
    ]
    bare = Figure("remus_bare_pause_ms", scripted["plain_ms"])
    held = Figure("remus_bare_held_pause_ms", scripted["held_ms"])
    return [
        pause,
        *parts,
        bare,
        held,
        ratio("remus_pause_vs_bare_ratio", pause, bare, aim=1.1),
        ratio("remus_pause_vs_bare_held_ratio", pause, held),
    ]


async def _by_agents(checkpoints: int) -> list[Mapping[str, Any]]:
    async with guest_pair(GuestPlan(mode="remus", period_ms=_INTERVAL_MS)) as pair:
        await _protect(pair)
        _, offset = pair.trace(PRIMARY)
        async with asyncio.timeout(_LIMIT_S):
            while True:
                rows = [row["epoch"] for row in pair.trace(PRIMARY, offset)[0] if "epoch" in row]
                if len(rows) >= checkpoints:
                    return rows[:checkpoints]
                await asyncio.sleep(_INTERVAL_MS / 1e3)


async def _by_script(checkpoints: int, run_ms: float) -> dict[str, list[float]]:
    async with guest_pair(GuestPlan(mode="remus", period_ms=_INTERVAL_MS)) as pair:
        await _protect(pair)
        kill_agents(pair, [PRIMARY, STANDBY])
        argv = [sys.executable, "-m", "bench.bare", "checkpoints", MONITOR, str(checkpoints), str(run_ms)]
        script = await pair.lab.hosts[PRIMARY].exec([*argv, _NIC], stdout=PIPE, env=ENVIRONMENT)
        async with asyncio.timeout(_LIMIT_S):
            said, _ = await script.communicate()
        pauses_ms: dict[str, list[float]] = json.loads(said)
        return pauses_ms


async def _protect(pair: Pair) -> None:
    talk = await Talk.begin(pair.lab)
    await talk.end()  # the guest is up
    await pair.command(PRIMARY, "protect", GUEST)
    await asyncio.sleep(_SETTLE_S)
