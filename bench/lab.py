"""The laboratory of the demo, as benchmarks with two whole hosts need it: agents, a guest, and files that go away."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from understudy_qemu.demo.lab import HOSTS
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair
from understudy_qemu.demo.talk import Talk
from understudy_qemu.demo.tinyguest import build_guest

__all__ = ["ENVIRONMENT", "MONITOR", "PRIMARY", "STANDBY", "guest_is_up", "guest_pair", "kill_agents"]

PRIMARY, STANDBY = HOSTS
#: The guest's monitor, inside a host.
MONITOR = f"/run/understudy/qemu/{GUEST}/qmp"
#: For programs of these benchmarks that run inside a machine.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


@asynccontextmanager
async def guest_pair(plan: GuestPlan) -> AsyncIterator[Pair]:
    """Run two hosts with an agent each, and a guest on the first one, unprotected.

    Args:
        plan: What the guest looks like.

    Guarantees:
        Afterwards, also after a failure, nothing of it runs and its files are gone.
    """
    guest = await build_guest(None)
    # Not in /tmp, which may be in memory, where disks cannot be opened past the page cache.
    root = Path(tempfile.mkdtemp(prefix="understudy-bench-", dir="/var/tmp"))
    try:
        async with Pair(root, guest, plan) as pair:
            await pair.command(PRIMARY, "start", GUEST)
            yield pair
    finally:
        await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)


async def guest_is_up(pair: Pair) -> None:
    """Wait until the guest has answered a client, and leave it alone again."""
    talk = await Talk.begin(pair.lab)
    await talk.end()


def kill_agents(pair: Pair, hosts: Collection[str]) -> None:
    """Kill the agents of `hosts`, all at one moment as far as any of them can tell; guests and copies go on."""
    agents = [
        pid
        for host in hosts
        for pid, words in pair.lab.hosts[host].processes().items()
        if "agent" in words and "run" in words
    ]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in agents:
            os.kill(pid, number)
