"""A primary whose agent stands still, behind filter-buffer and the kernel's block: it is silent, also when QEMU is not.

QEMU's filter-buffer lets go of what it holds by its own timer. That takes more than an hour; here it takes five
seconds, so that it happens while the agent is stopped and the other host has long taken over. The observer sits behind
the bridge, where the world is.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.test_hosts import Bed, make_bed, until
from understudy_qemu.demo.lab import Lab, stop

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(120)]

TIMER_S = 5
FRESH_S = 3
PERIOD_MS = 300
WINDOW_S = 1.0
SLACK_S = 0.5  #: between the signal and the agent's last instruction, and for packets on their way

# Read by every Python program when it starts, so by the agents; the directory is the host's own.
HURRIED = f"""
from understudy_qemu import heldnic
heldnic._INTERVAL_US = {TIMER_S * 10**6}
heldnic._FRESH_MS = {FRESH_S * 1000}
"""

# Prints when a frame of the guest leaves by an uplink, in nanoseconds of CLOCK_MONOTONIC.
OBSERVER = """
import socket, time
macs = {bytes.fromhex("5254007700%02x" % number) for number in (2, 3)}
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print("up", flush=True)
while True:
    frame, address = sock.recvfrom(64)
    if frame[6:12] in macs and address[0] in {"up0", "up1"} and address[2] == socket.PACKET_OUTGOING:
        print(time.monotonic_ns(), flush=True)
"""


class Observer:
    """What has left a host by its way to the world, told by a program inside."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.seen_ns: list[int] = []
        self._task = asyncio.ensure_future(self._read())

    @classmethod
    async def begin(cls, lab: Lab, host: str) -> Observer:
        process = await lab.hosts[host].exec([sys.executable, "-c", OBSERVER], stdout=PIPE)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"up\n"
        return cls(process)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.seen_ns.append(int(line))

    def after(self, since_ns: int) -> list[float]:
        """Return when something left since then, seconds after it."""
        return [(each - since_ns) / 1e9 for each in self.seen_ns if each > since_ns]

    async def end(self) -> None:
        await stop(self._process)
        await self._task


@asynccontextmanager
async def observed(root: Path) -> AsyncIterator[tuple[Bed, Observer]]:
    for host in ("alpha", "beta"):
        (root / host / "hurried").mkdir(parents=True)
        (root / host / "hurried" / "sitecustomize.py").write_text(HURRIED, encoding="utf-8")
    async with make_bed(root, mode="remus", draw=16, period_ms=PERIOD_MS, nics=2) as bed:
        await bed.protect()
        assert len([entry for entry in await listed(bed) if "table" in entry]) == 2, "one for each interface"
        observer = await Observer.begin(bed.pair.lab, "alpha")
        try:
            await bed.goes_on(replies=2)
            await until(lambda: bool(observer.seen_ns))
            yield bed, observer
        finally:
            await observer.end()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/srv/host/hurried")


async def listed(bed: Bed) -> list[dict[str, Any]]:
    """Return what nf_tables has on alpha."""
    done = await bed.pair.lab.hosts["alpha"].run(["nft", "--json", "list", "ruleset"])
    return [entry for entry in json.loads(done.stdout)["nftables"] if "metainfo" not in entry]


async def refuses(bed: Bed) -> bool:
    """Tell whether alpha's block has refused anything: QEMU's timer has let go of what the guest sent."""
    counters = [entry["counter"] for entry in await listed(bed) if "counter" in entry]
    return any(counter["packets"] for counter in counters if counter["name"] == "refused")


async def unblocked(bed: Bed) -> bool:
    """Tell whether nf_tables has nothing on alpha any more."""
    return not await listed(bed)


async def stop_agent(bed: Bed) -> tuple[int, int]:
    """Stop alpha's agent while its guest runs; return its process id and when, nanoseconds of CLOCK_MONOTONIC."""
    agent = bed.agent("alpha")
    async with asyncio.timeout(30):
        while True:
            _, end = bed.pair.trace("alpha")
            await until(partial(told_of_epochs, bed, end))
            os.kill(agent, signal.SIGSTOP)
            stopped_ns = time.monotonic_ns()
            last = epochs(bed, end)[-1]
            # It is told of when its commit is done, which begins when the guest runs again, for a whole period.
            if stopped_ns - last["t_ns"] + last["epoch"]["commit_ns"] < PERIOD_MS * 10**6 / 2:
                return agent, stopped_ns
            os.kill(agent, signal.SIGCONT)


async def becomes_true(condition: Callable[[], Awaitable[bool]]) -> None:
    # What is awaited happens in other processes, which tell nobody.
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def told_of_epochs(bed: Bed, start: int) -> bool:
    return bool(epochs(bed, start))


def epochs(bed: Bed, start: int) -> list[dict[str, Any]]:
    """Return what alpha's agent has told of epochs since offset `start` of its trace."""
    return [line for line in bed.pair.trace("alpha", start)[0] if "epoch" in line]


@pytest.mark.usefixtures("hurried")
async def test_nothing_leaves_while_the_agent_is_stopped_nor_when_it_wakes(tmp_path: Path) -> None:
    async with observed(tmp_path) as (bed, observer):
        agent, stopped_ns = await stop_agent(bed)
        try:
            await bed.becomes("beta", state="alone")
            await bed.goes_on(stopped_ns)
            # The old guest still runs, and its QEMU has let go of what it sent since.
            await becomes_true(lambda: refuses(bed))
            assert not bed.gone("alpha")
        finally:
            os.kill(agent, signal.SIGCONT)
        await until(lambda: bed.gone("alpha"))
        await bed.goes_on()
        assert [each for each in observer.after(stopped_ns) if each > WINDOW_S + SLACK_S] == []
        await bed.sound_on("beta")
        await becomes_true(lambda: unblocked(bed))


@pytest.mark.usefixtures("hurried")
async def test_without_the_block_the_old_guest_is_heard(tmp_path: Path) -> None:
    async with observed(tmp_path) as (bed, observer):
        agent, stopped_ns = await stop_agent(bed)
        try:
            await bed.pair.lab.hosts["alpha"].run(["nft", "flush", "ruleset"])
            await until(lambda: any(each > WINDOW_S + SLACK_S for each in observer.after(stopped_ns)))
        finally:
            os.kill(agent, signal.SIGCONT)
