"""The primary's host dies, hypervisor and all; the guest goes on at the other one, and its client never notices.

Everything is done by `understudy` in two real Xen hosts. The host is killed with SIGKILL: no end of the stream arrives,
no connection is closed, only silence. Afterwards the dead host is started again, the guest is protected to it, and the
other one dies: what was the secondary is a primary like any other.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.testbeds.rounds import rounds
from tests.xen.client import CounterClient
from tests.xen.site import Site, XenSite

pytestmark = [pytest.mark.xen, pytest.mark.timeout(420)]

SEEDS = rounds(1, 5)
TAKEOVER_S = 60.0  # silence, takeover, and the client's own retransmission timer, all on busy processors
LOST_S = 20.0  # past what any takeover here took; a client without a reply by then has none to hope for


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[XenSite]:
    async with Site() as made:
        yield made


async def _protected(site: XenSite, kind: str, subkind: str = "auto", *more: str) -> None:
    await site.describe(kind=kind, subkind=subkind, memory_mib=96 if kind == "pvh" else 128)
    await site.ask(site.pair.alpha, "start", "web")


async def _die(site: XenSite, client: CounterClient, primary_is_alpha: bool, seed: int) -> None:
    pair = site.pair
    primary, secondary = (pair.alpha, pair.beta) if primary_is_alpha else (pair.beta, pair.alpha)
    await site.protect(primary)
    await client.more(random.Random(seed).randrange(5, 60), timeout_s=60)
    await pair.crash(primary)
    before = len(client.replies)
    await client.more(20, timeout_s=TAKEOVER_S)
    client.verify()
    assert len(client.replies) >= before + 20
    row = await site.row(secondary)
    assert (row["role"], row["state"]) == ("primary", "alone"), row


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_the_connection_survives_the_death_of_either_host(site: XenSite, seed: int) -> None:
    pair = site.pair
    await _protected(site, "pvh")
    async with CounterClient(pair) as client:
        await _die(site, client, True, seed)
        await pair.start(pair.alpha)
        await site.equip(pair.alpha)
        await site.describe()
        await _die(site, client, False, seed + 1000)
        await pair.start(pair.beta)
        await site.equip(pair.beta)
        await site.describe()
        print(f"seed {seed}: {len(client.replies)} replies, longest gap {client.longest_gap_s():.1f} s")  # noqa: T201
    await site.ask(pair.alpha, "stop", "web", "--force")


@pytest.mark.asyncio(loop_scope="module")
async def test_control_without_the_gate_the_connection_is_lost(site: XenSite) -> None:
    pair = site.pair
    await _protected(site, "pvh", "unbuffered")
    async with CounterClient(pair) as client:
        await client.more(5, timeout_s=60)
        await site.protect(pair.alpha, "web", "--allow-unsafe")
        await client.more(20, timeout_s=60)
        await pair.crash(pair.alpha)
        before = len(client.replies)
        lost = False
        try:
            await client.more(20, timeout_s=LOST_S)
            client.verify()
        except (TimeoutError, ConnectionError, AssertionError):
            lost = True
        assert lost, f"nothing was held, and all {len(client.replies) - before} replies are right"
