"""A guest on two whole hosts, each a kernel of its own: one dies at a bad moment and comes back, then the other.

The guest has a disk on DRBD and one that QEMU replicates; its output waits in the kernel's plug. The client that saw
the first host die is on the second one, and the other way round; what each was told must be on both disks in the end.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import AsyncIterator

import pytest

from tests.kernel.drbdstack import GUEST, Client, Stack, whole_stack
from tests.kernel.wishes import AFTER_CUT, AFTER_LOAD, IN_TRANSFER, NO_GATE, NO_WAY_BACK
from tests.testbeds.bed import missing_for_qemu, need
from tests.testbeds.kernel.machine import missing_for_kernel
from tests.testbeds.kernel.pair import Host
from tests.testbeds.rounds import rounds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(rounds(600, 2400))]

AT_RANDOM = ""
#: How many checkpoints before the one under way the copy goes on from.
MOMENTS = {AFTER_CUT: 1, IN_TRANSFER: 1, AFTER_LOAD: 0, AT_RANDOM: None}
THROTTLE = "tbf rate 4mbit burst 16kb limit 300kb"


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    need("kernel", missing_for_kernel())
    need("qemu", missing_for_qemu())
    async with whole_stack(watched=True) as made:
        yield made


async def test_both_hosts_die_one_after_the_other(stack: Stack) -> None:
    seed = int(os.environ.get("UNDERSTUDY_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    print(f"UNDERSTUDY_SEED={seed}")  # noqa: T201 - pytest shows it with a failure
    chance = random.Random(seed)
    here, there = stack.pair.alpha, stack.pair.beta
    await stack.command(here, "start", GUEST)
    moments = [moment for _ in range(rounds(1, 5)) for moment in chance.sample(tuple(MOMENTS), len(MOMENTS))]
    for moment in moments:
        client = await protected(stack, here, there)
        epoch = await dies(stack, here, moment, chance)
        await stack.becomes(there, "alone")
        await client.replies(5)
        summary = await client.end()
        assert summary["connection_kept"], summary
        assert not summary["bad"], summary
        assert not summary["unanswered"], summary
        for check in await stack.check_disks(there, await client.lines()):
            assert check.contiguous, check
            assert not check.acknowledged_lost, check
            assert not check.problems, check
        if epoch is not None:
            assert await stack.promoted_at(there) == epoch - (MOMENTS[moment] or 0)
        # The guest has DRBD itself now, and no gate.
        await stack.without(there, "understudy-drbd0", "dmsetup", "ls")
        await stack.without(there, "qdisc plug", "tc", "qdisc", "show")
        await stack.comes_back(here)
        here, there = there, here

    # No client is left, so the guest writes nothing.
    one, other = await stack.halves()
    assert one == other

    await without_a_gate(stack, here, there, chance)
    await stack.comes_back(here)
    here, there = there, here
    await without_the_way_back(stack, here, there, chance)


async def protected(stack: Stack, here: Host, there: Host) -> Client:
    """Protect the guest that runs `here`; return a client on the other host that has got some replies."""
    client = Client(there, f"client-{os.urandom(4).hex()}")
    await client.replies(2)  # the guest has booted
    await stack.command(here, "protect", GUEST)
    await client.replies(5)
    gates = (await here.run("tc", "qdisc", "show")).output
    assert ("qdisc plug" in gates) is not stack.wishes(here).wished(NO_GATE)
    assert "understudy-drbd0" in (await there.run("dmsetup", "ls")).output
    return client


async def dies(stack: Stack, here: Host, moment: str, chance: random.Random) -> int | None:
    """Kill a host's kernel at a moment; return the epoch that was under way, where that is known."""
    if moment == AT_RANDOM:
        await asyncio.sleep(chance.random())
        await stack.crash(here)
        return None
    if moment == IN_TRANSFER:
        # A checkpoint takes seconds now.
        await here.run("tc", "qdisc", "replace", "dev", "vec0", "root", *THROTTLE.split())
    wishes = stack.wishes(here)
    wishes.wish(moment)
    epoch = await wishes.there(timeout_s=30)
    await stack.crash(here)
    wishes.wish()
    return epoch


# --- What must be seen -----------------------------------------------------------------------------------------------


async def without_a_gate(stack: Stack, here: Host, there: Host, chance: random.Random) -> None:
    """Let the primary die after it has said what no checkpoint holds: the client must see it."""
    stack.wishes(here).wish(NO_GATE)
    client = await protected(stack, here, there)
    await dies(stack, here, AFTER_CUT, chance)
    await stack.becomes(there, "alone")
    assert await client.harmed()


async def without_the_way_back(stack: Stack, here: Host, there: Host, chance: random.Random) -> None:
    """Promote the disk on DRBD as it is, later than the memory: the guest must see it."""
    stack.wishes(there).wish(NO_WAY_BACK)
    client = await protected(stack, here, there)
    await dies(stack, here, AFTER_CUT, chance)
    await stack.becomes(there, "alone")
    # The copy has perhaps done the same words already, with other random values.
    assert any(re.search("disk 0: BAD-(FUTURE|HASH)", what) for what in await client.harmed())
