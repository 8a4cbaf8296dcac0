"""A host dies, hypervisor and all; its guests go on at the other one, and their clients never notice.

Everything is done by `understudy` in two real Xen hosts. A host is killed with SIGKILL: no end of the stream arrives,
no connection is closed, only silence. One story, because a boot is what costs:

1. Two guests run on alpha, protected to beta, one of them, by the operator's wish, without a gate. Alpha dies. The
   client of the gated one goes on; that of the other one has seen what the copy does not know.
2. Alpha comes back. The guest on beta is protected to it, and a new guest on alpha to beta, at the same time: two
   streams in opposite directions. Beta dies: the first guest goes on at alpha, the other one goes on there alone.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

import pytest

from tests.testbeds.rounds import rounds
from tests.testbeds.xen.guests import Nic
from tests.xen.client import CounterClient
from tests.xen.site import Site, XenSite

pytestmark = [pytest.mark.xen, pytest.mark.timeout(600)]

SEEDS = rounds(1, 5)
ANSWER_S = 60.0
TAKEOVER_S = 60.0  # silence, takeover, and the client's own retransmission timer, all on busy processors
LOST_S = 15.0  # beyond the other client's first replies, which came the same way
OTHER = "10.9.0.51"
THIRD = "10.9.0.52"


def _nic(number: int) -> tuple[Nic, ...]:
    return (Nic(mac=f"00:16:3e:00:00:{number:02x}"),)


async def _stays(client: CounterClient, count: int) -> None:
    await client.more(count, timeout_s=TAKEOVER_S)
    client.verify()


async def _is_lost(client: CounterClient) -> bool:
    try:
        await client.more(5, timeout_s=LOST_S)
        client.verify()
    except (TimeoutError, ConnectionError, AssertionError):
        return True
    return False


async def _state(site: XenSite, on_alpha: bool, guest: str) -> tuple[str, str]:
    row = await site.row(site.pair.alpha if on_alpha else site.pair.beta, guest)
    return row["role"], row["state"]


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_connections_survive_the_death_of_one_host_after_the_other(seed: int) -> None:
    chosen = random.Random(seed)
    async with Site() as site, AsyncExitStack() as clients:
        pair = site.pair
        vcpus = 1 + seed % 2
        await site.describe("web", vcpus=vcpus)
        await site.describe("open", subkind="unbuffered", nics=_nic(0x33), address=OTHER)
        for name in ("web", "open"):
            await site.ask(pair.alpha, "start", name)
        web = await clients.enter_async_context(CounterClient(pair))
        careless = await clients.enter_async_context(CounterClient(pair, address=OTHER))
        await asyncio.gather(*(client.more(5, timeout_s=ANSWER_S) for client in (web, careless)))
        await site.protect(pair.alpha, "web")
        await site.protect(pair.alpha, "open", "--allow-unsafe")
        await web.more(chosen.randrange(10, 80), timeout_s=ANSWER_S)
        # Right after a reply that no checkpoint can contain yet: one takes ten times as long as a kill.
        await careless.more(1, timeout_s=ANSWER_S)
        await pair.crash(pair.alpha)
        await _stays(web, 20)
        assert await _state(site, False, "web") == ("primary", "alone")
        assert await _state(site, False, "open") == ("primary", "alone")
        assert await _is_lost(careless), "nothing was held, and the client's replies are right all the same"

        await pair.start(pair.alpha)
        await site.equip(pair.alpha)
        await site.describe("web", vcpus=vcpus)
        await site.ask(pair.beta, "stop", "open", "--force")
        await site.describe("third", nics=_nic(0x34), address=THIRD)
        await site.ask(pair.alpha, "start", "third")
        third = await clients.enter_async_context(CounterClient(pair, address=THIRD))
        await third.more(5, timeout_s=ANSWER_S)
        await asyncio.gather(site.protect(pair.beta, "web"), site.protect(pair.alpha, "third"))
        await asyncio.gather(*(client.more(30, timeout_s=ANSWER_S) for client in (web, third)))
        assert await _state(site, True, "third") == ("primary", "protected")
        await pair.crash(pair.beta)
        await asyncio.gather(_stays(web, 20), _stays(third, 20))
        assert await _state(site, True, "web") == ("primary", "alone")
        assert await _state(site, True, "third") == ("primary", "alone")
        assert not web.ended
        assert not third.ended
