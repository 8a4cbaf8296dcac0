"""Mode remus on a host without plug: checkpoints a second, and what they add to a client's requests.

Two whole hosts, a guest whose output the subkind filter-buffer holds, and a client with one TCP connection that sends a
request every 223 ms: no multiple of an interval, so that requests meet an epoch at any point. One and the same guest is
measured unprotected and protected in turns, at each interval.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.figures import Figure
from bench.lab import PRIMARY, guest_pair
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair
from understudy_qemu.demo.talk import Talk

__all__ = ["measure"]

_INTERVALS_MS = (20, 50, 100)
_ROUNDS = 3
_WINDOW_S = 5
_SETTLE_S = 1.0
_REQUESTS_MS = 223.0
_SECOND_NS = 1_000_000_000


def measure(
    intervals_ms: Sequence[int] = _INTERVALS_MS, rounds: int = _ROUNDS, window_s: int = _WINDOW_S
) -> list[Figure]:
    """Measure at some intervals.

    Args:
        intervals_ms: From one checkpoint to the next, as `understudy protect --interval` takes them.
        rounds: How often each is measured.
        window_s: How long, whole seconds; the guest is watched unprotected for as long before.
    """
    return asyncio.run(_measure(intervals_ms, rounds, window_s))


@dataclass(frozen=True, slots=True)
class _Seen:
    # At one interval.
    checkpoints_per_s: list[float] = field(default_factory=list)  # in each second
    pause_ms: list[float] = field(default_factory=list)
    added_ms: list[float] = field(default_factory=list)  # by request, to the median without protection


async def _measure(intervals_ms: Sequence[int], rounds: int, window_s: int) -> list[Figure]:
    seen = {interval_ms: _Seen() for interval_ms in intervals_ms}
    unprotected_ms: list[float] = []
    async with guest_pair(GuestPlan(mode="remus")) as pair:
        talk = await Talk.begin(pair.lab, interval_ms=_REQUESTS_MS)
        try:
            for _ in range(rounds):
                for interval_ms in intervals_ms:
                    await asyncio.sleep(_SETTLE_S)
                    plain_ms = await _requests_ms(talk, window_s)
                    unprotected_ms += plain_ms
                    await _protected(pair, talk, seen[interval_ms], plain_ms, interval_ms, window_s)
        finally:
            await talk.end()
    if talk.problems:
        raise RuntimeError(f"the client was answered wrongly: {talk.problems}")
    figures = [Figure("remus_unprotected_latency_ms", unprotected_ms)]
    for interval_ms, at in seen.items():
        name = f"remus_{interval_ms}ms"
        figures += [
            Figure(f"{name}_checkpoints_per_s", at.checkpoints_per_s),
            Figure(f"{name}_added_latency_ms", at.added_ms),
            Figure(f"{name}_pause_ms", at.pause_ms),
        ]
    return figures


async def _protected(
    pair: Pair, talk: Talk, seen: _Seen, plain_ms: Sequence[float], interval_ms: int, window_s: int
) -> None:
    await pair.command(PRIMARY, "protect", GUEST, "--interval", str(interval_ms))
    await asyncio.sleep(_SETTLE_S)
    _, offset = pair.trace(PRIMARY)
    began_ns = time.monotonic_ns()
    requests_ms = await _requests_ms(talk, window_s)
    rows = [row for row in pair.trace(PRIMARY, offset)[0] if "epoch" in row]
    for second in range(window_s):
        since_ns = began_ns + second * _SECOND_NS
        count = sum(since_ns <= row["t_ns"] < since_ns + _SECOND_NS for row in rows)
        seen.checkpoints_per_s.append(float(count))
    seen.pause_ms.extend(row["epoch"]["pause_ns"] / 1e6 for row in rows)
    plain = statistics.median(plain_ms)
    seen.added_ms.extend(each - plain for each in requests_ms)
    await pair.command(PRIMARY, "unprotect", GUEST)


async def _requests_ms(talk: Talk, window_s: int) -> list[float]:
    # How long requests took that were both sent and answered from now on; the newest one is answered soon after.
    began_ns = time.monotonic_ns()
    await asyncio.sleep(window_s)
    return [each.rtt_ns / 1e6 for each in talk.replies if each.t_ns - each.rtt_ns >= began_ns]
