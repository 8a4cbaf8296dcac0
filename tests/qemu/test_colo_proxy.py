"""The subkind colo-proxy on real QEMU processes, under the domains of the QEMU plugin, with real TCP clients."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.qemu.guestnet import GuestNet, NetHost, NetSession, run
from tests.testbeds.bed import missing_for_qemu, need
from understudy.device import Verdict
from understudy.errors import HypervisorError
from understudy_colo_proxy.primary import PrimaryNic
from understudy_qemu.accel import Accel
from understudy_qemu.demo.tinyguest import build_guest
from understudy_qemu.inventory import Inventory
from understudy_qemu.running import Qemu

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(150)]

SEED = 20


@pytest_asyncio.fixture
async def bed(tmp_path: Path) -> AsyncIterator[GuestNet]:
    need("qemu", missing_for_qemu())
    made = GuestNet(tmp_path, await build_guest(), Accel.TCG)
    try:
        made.make()
        yield made
    finally:
        await made.close()


async def protected(bed: GuestNet, nics: int = 1, draw: int = 0) -> tuple[NetHost, NetHost, NetSession]:
    alpha, beta = bed.host("alpha", nics, draw), bed.host("beta", nics, draw)
    await alpha.start()
    session = bed.session(alpha, beta)
    await session.protect()
    return alpha, beta, session


async def traces(qemu: Qemu) -> tuple[Any, list[str]]:
    """Return what the QEMU has and what hangs on its taps."""
    found = await Inventory.take(qemu.monitor)
    hooks = [run("tc", "qdisc", "show", "dev", tap) for tap in qemu.launched.taps.values()]
    return found, hooks


def nic(session: NetSession, name: str = "nic0") -> PrimaryNic:
    device = session.p_group.devices[name]
    assert isinstance(device, PrimaryNic)
    return device


async def checkpoint(session: NetSession) -> None:
    """Have a checkpoint taken, as if the outputs differed, and wait until the guest runs again."""
    async with session.running.monitor.events("RESUME") as resumes, asyncio.timeout(10):
        nic(session)._pacer.ask()
        await anext(aiter(resumes))


async def lose_primary(session: NetSession) -> None:
    """Kill the primary's QEMU and let the copy take over, as the engine does."""
    await session.kill_primary()
    assert isinstance(session.alpha, NetHost)
    await session.alpha.fence()
    session.s_group.sever_all()
    await session.fail_over()
    session.p_group.sever_all()
    await session.p_group.teardown(Verdict.DISCARD)


async def test_connection_survives_both_hosts_in_turn(bed: GuestNet) -> None:
    alpha, beta = bed.host("alpha"), bed.host("beta")
    await alpha.start()
    client = await bed.client()
    first = bed.session(alpha, beta)
    await first.protect()
    await client.replies(10)
    await lose_primary(first)
    await client.replies(10)
    # Nothing of the chain is left but the rewriter, which open connections may need.
    assert beta.qemu is not None
    monitor = beta.qemu.monitor
    objects = [entry["name"] for entry in await monitor.execute("qom-list", {"path": "/objects"})]
    ours = [name for name in objects if name.startswith("understudy-")]
    assert len(ours) == 1
    assert "-rewriter-" in ours[0]
    assert not [name for name in (await Inventory.take(monitor)).chardevs if name.startswith("understudy-")]

    gamma = bed.host("gamma")
    second = bed.session(beta, gamma, name="s2")
    await second.protect()
    await client.replies(10)
    await lose_primary(second)
    await client.replies(10)
    await client.kept()


async def test_two_interfaces(bed: GuestNet) -> None:
    alpha, _, session = await protected(bed, nics=2)
    assert alpha.qemu is not None
    clients = [await bed.client(), await bed.client(host="10.78.0.2")]
    for client in clients:
        await client.replies(10)
    assert nic(session, "nic0").counters()["unclean_checkpoint_count"] == 0
    await lose_primary(session)
    for client in clients:
        await client.replies(10)
        await client.kept()


async def test_secondary_lost_leaves_no_trace_and_another_may_come(bed: GuestNet) -> None:
    alpha, beta = bed.host("alpha"), bed.host("beta")
    qemu = await alpha.start()
    before = await traces(qemu)
    client = await bed.client()
    first = bed.session(alpha, beta)
    await first.protect()
    await client.replies(5)
    await first.kill_secondary()
    first.p_group.sever_all()
    await first.go_on_alone()
    await client.replies(5)
    assert await traces(qemu) == before
    await first.close()
    second = bed.session(alpha, bed.host("gamma"), name="s2")
    await second.protect()
    await client.replies(5)
    await lose_primary(second)
    await client.replies(5)
    await client.kept()


async def test_nothing_leaves_while_the_secondary_is_mute(bed: GuestNet) -> None:
    alpha, _, session = await protected(bed)
    client = await bed.client()
    assert alpha.qemu is not None
    session.hang_secondary()
    hung_ns = time.monotonic_ns()
    with pytest.raises(TimeoutError):
        await client.replies(3, timeout_s=3.0)
    session.p_group.sever_all()
    await session.primary.sever("test")
    await session.primary.resume_alone(session.p_group)
    with pytest.raises(TimeoutError):
        await client.replies(3, timeout_s=2.0)
    # What was compared before may still arrive, even after the cut: QEMU's main loop, which lets it out, may have
    # waited for the disks until then. A word that was sent later nobody compared.
    assert not [line for line in client.lines if line.get("t_send_ns", 0) > hung_ns]
    await session.p_group.teardown(Verdict.KEEP)
    await client.replies(5)
    await client.kept()


async def test_a_mute_secondary_under_a_flood_does_not_hang_the_primary(bed: GuestNet) -> None:
    # filter-mirror writes from QEMU's main loop and waits while the secondary takes nothing.
    # Hung in the middle of a checkpoint, the guest stands still and takes in no flood: none comes of its own accord,
    # and the first one is over when a client has been answered.
    alpha, beta = bed.host("alpha"), bed.host("beta")
    qemu = await alpha.start()
    session = bed.session(alpha, beta, delay_ms=60_000)
    session.options = {"checkpoint_delay_ms": 60_000}
    await session.protect()
    early = await bed.client()
    await early.replies(5)
    await early.kept()
    session.hang_secondary()
    await bed.flood(20.0)
    device = nic(session)
    async with asyncio.timeout(30):
        before = 0
        # The flood takes a moment to begin; what counts is that so much is on the way and no more gets on.
        while before <= 8 << 20 or device.on_the_way() > before:
            before = device.on_the_way()
            await asyncio.sleep(0.5)
    session.p_group.sever_all()
    began = time.monotonic()
    assert await qemu.monitor.execute("query-status", timeout_s=3.0)
    assert time.monotonic() - began < 2.5
    await session.primary.sever("test")
    await session.primary.resume_alone(session.p_group)
    await session.p_group.teardown(Verdict.KEEP)
    client = await bed.client()
    await client.replies(3)
    await client.kept()


async def test_connections_opened_around_checkpoints_are_answered(bed: GuestNet) -> None:
    # Under QEMU's own checkpoints 12 of 300 such connections had no answer until the comparison lost its patience.
    alpha, beta = bed.host("alpha"), bed.host("beta")
    await alpha.start()
    session = bed.session(alpha, beta, delay_ms=60_000)
    session.options = {"compare_timeout_ms": 10_000, "checkpoint_delay_ms": 60_000}
    await session.protect()
    opener = await bed.opener()
    dice = random.Random(SEED)
    for _ in range(5):
        middle = time.time() + 0.05
        opener.at([middle + dice.uniform(-0.007, 0.003) for _ in range(3)])
        await asyncio.sleep(middle - time.time())
        await checkpoint(session)
        await asyncio.sleep(0.1)  # the handshakes that the checkpoint cut in two end
    found = await opener.end()
    assert len(found) == 15
    assert not [told for told in found if told["lost"]], f"seed {SEED}"
    assert not [told for told in found if told["first_reply_s"] > 8.0], f"seed {SEED}: {found}"


async def test_connections_opened_around_a_checkpoint_survive(bed: GuestNet) -> None:
    _, _, session = await protected(bed)
    opener = await bed.opener()
    dice = random.Random(SEED)
    middle = time.time() + 0.2
    opener.at([middle + dice.uniform(-0.012, 0.012) for _ in range(10)])
    await asyncio.sleep(middle - time.time())
    await checkpoint(session)
    await lose_primary(session)
    await asyncio.sleep(2.0)  # the clients talk to the survivor meanwhile
    found = await opener.end()
    assert not [told for told in found if told["lost"]], found
    assert all(told["words"] > 5 for told in found), found


async def test_what_only_one_copy_says_is_in_a_checkpoint_before_it_leaves(bed: GuestNet) -> None:
    # Every fifth word the guest draws a random number, each copy another one, and tells it to the client, which
    # demands to hear the consequences for ever after, also from the copy.
    _, _, session = await protected(bed, draw=5)
    client = await bed.client()
    await client.replies(40)
    counters = nic(session).counters()
    assert counters["mismatch_count"] >= 5, counters
    assert counters["asked_checkpoint_count"] >= 5, counters
    await lose_primary(session)
    await client.replies(20)
    await client.kept()


async def test_a_filter_that_somebody_removes_is_missed(bed: GuestNet) -> None:
    alpha, _, session = await protected(bed)
    device = nic(session)
    await device.error()
    run("tc", "qdisc", "del", "dev", alpha.config.nics[0].tap, "clsact")
    device._look_at = 0.0
    with pytest.raises(HypervisorError, match="removed the filter"):
        await device.error()


async def test_what_is_done_is_counted(bed: GuestNet) -> None:
    _, _, session = await protected(bed)
    client = await bed.client()
    await client.replies(5)
    before = nic(session).counters()
    await checkpoint(session)
    after = nic(session).counters()
    assert after["asked_checkpoint_count"] > before["asked_checkpoint_count"]
    assert after["unclean_checkpoint_count"] == before["unclean_checkpoint_count"] == 0
    assert 0 < after["cut_ms"] < 2000
    await client.kept()
