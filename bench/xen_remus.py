"""Our checkpoint loop beside stock ``xl remus``: the same guest, interval and blackhole, in turns, in one Xen host.

Both are looked at from dom0 in the same way: a probe asks the hypervisor about every millisecond whether the guest is
suspended, which gives the checkpoints and their pauses, and the kernel tells how much processor time the toolstack's
processes took. What the toolstack says of itself is not used. Over the link, for the record, two hosts: acknowledged
checkpoints of a protected guest, as `understudy status` tells them.

Source: tools/xl/xl_migrate.c (main_remus: -F -n -d -b) of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

from bench.figures import Figure, ratio
from tests.testbeds.xen.guests import linux
from tests.testbeds.xen.host import XenHost
from tests.testbeds.xen.machine import Plug
from tests.testbeds.xen.network import Network
from tests.xen.client import CounterClient
from tests.xen.site import Site

__all__ = ["measure"]

_INTERVAL_MS: Final = 100
_TURNS: Final = 3
_INSIDE_S: Final = 900.0
_PROTECTED_REPLIES: Final = 60
_RATIO: Final = 0.8


def measure(turns: int = _TURNS) -> list[Figure]:
    """Run both in turns, then protect a guest over the link.

    Args:
        turns: Of each of the two.
    """
    samples = asyncio.run(_beside_stock(turns))
    link = asyncio.run(_over_the_link())
    ours, theirs = samples["ours"], samples["stock"]
    figures = {
        name: (
            Figure(f"xen_{name}", ours[key]),
            Figure(f"xen_xl_{name}", theirs[key]),
        )
        for name, key in (("pause_ms", "pause_ms"), ("cpu_ms", "cpu_ms"), ("per_minute", "per_minute"))
    }
    rate = figures["per_minute"]
    return [
        *(figure for pair in figures.values() for figure in pair),
        ratio("xen_pause_vs_xl_ratio", *figures["pause_ms"], aim=_RATIO),
        ratio("xen_cpu_vs_xl_ratio", *figures["cpu_ms"], aim=_RATIO),
        Figure("xen_rate_vs_xl_ratio", [rate[0].value / rate[1].value], floor=1.0),
        Figure("xen_link_pause_ms", [link["pause_p50_ms"]]),
        Figure("xen_link_acknowledge_ms", [link["acknowledge_p50_ms"]]),
        Figure("xen_link_per_minute", [60 * link["checkpoints_per_s"]]),
    ]


async def _beside_stock(turns: int) -> dict[str, Any]:
    with Network(1) as network:
        async with await XenHost.boot(plug=Plug(network, 1)) as host:
            await host.run("sh", "-c", "cat >/run/web.cfg", text=linux("web"))
            words = ("python3", "-m", "bench.xen_inside", str(turns), str(_INTERVAL_MS))
            done = await host.run(*words, timeout_s=_INSIDE_S)
    print(done.errors, file=sys.stderr)
    return dict(json.loads(done.output))


async def _over_the_link() -> dict[str, float]:
    async with Site() as site:
        pair = site.pair
        await site.describe("web", interval_ms=_INTERVAL_MS)
        await site.ask(pair.alpha, "start", "web")
        async with CounterClient(pair) as client:
            await client.more(5, timeout_s=60)
            await site.protect(pair.alpha)
            await client.more(_PROTECTED_REPLIES, timeout_s=60)
            return dict(await site.row(pair.alpha))
