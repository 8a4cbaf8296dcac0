"""I1, seen by an observer that is not ours: nothing of an epoch is outside before that epoch was acknowledged.

The guest sends at random, the process that has its gate is slow (stopped for up to 300 ms at random moments) and has to
share its only processor with one that is always busy. What is outside is captured with the kernel's own time of
arrival; the time of each acknowledgement is taken before anybody is told of it.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.kernel.netbuffer_bed import ARP, IPV4, IPV6, UNKNOWN, Lan, Seen
from tests.testbeds.rounds import rounds

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(900)]

EPOCHS = rounds(150, 1000)  # of each kind of disturbance


@asynccontextmanager
async def controller(guest: int = 0) -> AsyncIterator[Process]:
    """Run the process that has a guest's gate, until the end of the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kernel.netbuffer_controller", str(guest)),
        stdin=PIPE,
        stdout=PIPE,
        env=os.environ | {"PYTHONPATH": "."},
    )
    try:
        assert process.stdout
        assert (await process.stdout.readline()).strip() == b"ready"
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def busy() -> AsyncIterator[None]:
    """Take as much of the processor as there is to be had."""
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "while :; do :; done")
    try:
        yield
    finally:
        process.kill()
        await process.wait()


async def told(process: Process, word: str, epoch: int) -> None:
    """Have the controller do something, and wait for it."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{word} {epoch}\n".encode())
    assert (await process.stdout.readline()).decode().split() == [word, str(epoch)]


async def slowed(process: Process, chance: random.Random) -> None:
    """Stop the controller again and again, for up to 300 ms."""
    while True:
        await asyncio.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("disturbed", ["random load", "slow controller", "contention"])
async def test_nothing_is_outside_before_it_is_acknowledged(disturbed: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - for a repetition
    chance = random.Random(seed)
    with Lan() as lan:
        async with controller() as process:
            if disturbed == "slow controller":
                slowing = asyncio.create_task(slowed(process, chance))
                seen, acknowledged_ns, sent = await epochs_of(lan, process, chance, EPOCHS)
                slowing.cancel()
                process.send_signal(signal.SIGCONT)
            elif disturbed == "contention":
                async with busy():
                    seen, acknowledged_ns, sent = await epochs_of(lan, process, chance, EPOCHS)
            else:
                seen, acknowledged_ns, sent = await epochs_of(lan, process, chance, EPOCHS)
    early = [each for each in seen if each.at_ns < acknowledged_ns.get(each.epoch, sys.maxsize)]
    assert early == []
    # All of it, once, in order: a gate that lets nothing out would be early with nothing, too.
    assert [(each.epoch, each.number) for each in seen] == sent
    assert len(sent) > EPOCHS


async def test_the_observer_sees_a_gate_that_opens_too_early() -> None:
    chance = random.Random(1)
    with Lan() as lan:
        async with controller() as process:
            seen, acknowledged_ns, _ = await epochs_of(lan, process, chance, 20, early=True)
    assert [each for each in seen if each.at_ns < acknowledged_ns[each.epoch]]


async def epochs_of(
    lan: Lan, process: Process, chance: random.Random, epochs: int, *, early: bool = False
) -> tuple[list[Seen], dict[int, int], list[tuple[int, int]]]:
    """Let the guest send and its epochs be acknowledged; tell what was seen, when acknowledged, what was sent."""
    seen: list[Seen] = []
    acknowledged_ns: dict[int, int] = {}
    sent: list[tuple[int, int]] = []
    number = 0
    for epoch in range(1, epochs + 1):
        # While the acknowledgement of the epoch before is on its way the guest runs on: two bursts, around it.
        for burst in range(2):
            count = chance.choice((0, 1, 3, 20))
            lan.send(epoch, range(number, number + count), protocol=chance.choice((IPV4, IPV6, ARP, UNKNOWN)))
            sent += [(epoch, each) for each in range(number, number + count)]
            number += count
            if burst == 0 and epoch > 1:
                await asyncio.sleep(chance.uniform(0, 0.004))
                if not early:
                    acknowledged_ns[epoch - 1] = time.time_ns()
                await told(process, "commit", epoch - 1)
                acknowledged_ns.setdefault(epoch - 1, time.time_ns())
            seen += [each for each in lan.captured() if each.guest == 0]
        # What is still on its way to the gate joins the next epoch, and leaves with it: later, never earlier.
        await told(process, "barrier", epoch)
    # The last burst has come to the gate when this returns, in time for the epoch after the last one.
    seen += await lan.outside()
    for epoch in (epochs, epochs + 1):
        acknowledged_ns[epoch] = time.time_ns()
        await told(process, "commit", epoch)
        await told(process, "barrier", epoch + 1)
    seen += await lan.outside()
    return [each for each in seen if each.guest == 0], acknowledged_ns, sent
