"""A QEMU guest on DRBD on two whole hosts, each a kernel: one dies, comes back, holds the copy, the other dies.

The client that saw the first host die is on the second one, and the other way round; what each was told must be on the
disk in the end.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator

import pytest

from tests.kernel.drbdstack import GUEST, Client, Stack, whole_stack
from tests.testbeds.bed import missing_for_qemu, need
from tests.testbeds.kernel.machine import missing_for_kernel
from tests.testbeds.rounds import rounds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(rounds(400, 1700))]


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    need("kernel", missing_for_kernel())
    need("qemu", missing_for_qemu())
    async with whole_stack() as made:
        yield made


async def test_both_hosts_die_one_after_the_other(stack: Stack) -> None:
    seed = int(os.environ.get("UNDERSTUDY_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    print(f"UNDERSTUDY_SEED={seed}")  # noqa: T201 - pytest shows it with a failure
    chance = random.Random(seed)
    here, there = stack.pair.alpha, stack.pair.beta
    await stack.command(here, "start", GUEST)
    for number in range(rounds(2, 10)):
        client = Client(there, f"client{number}")
        await client.replies(2)  # the guest has booted
        await stack.command(here, "protect", GUEST)
        await client.replies(5)
        assert "qdisc plug" in (await here.run("tc", "qdisc", "show")).output
        assert "understudy-drbd0" in (await there.run("dmsetup", "ls")).output
        await asyncio.sleep(chance.random())  # anywhere in an epoch
        await stack.crash(here)
        await stack.becomes(there, "alone")
        lines = await client.replies(5)
        assert all(line["ok"] for line in lines if "n" in line), lines[-10:]
        assert not [line for line in lines if "lost" in line]
        check = await stack.check_disk(there, lines)
        assert check.contiguous, check
        assert not check.acknowledged_lost, check
        assert not check.problems, check
        # The guest has DRBD itself now, and no gate.
        await stack.without(there, "understudy-drbd0", "dmsetup", "ls")
        await stack.without(there, "qdisc plug", "tc", "qdisc", "show")
        await stack.comes_back(here)
        here, there = there, here
