"""What leaves a gate in the kernel, and when; with real packets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.netbuffer_bed import (
    ARP,
    IPV4,
    IPV6,
    UNKNOWN,
    VLAN,
    Lan,
    interfaces,
    no_trace,
    opened,
    run,
    spoken,
)
from understudy.device import ReplicationMode, Verdict

pytestmark = pytest.mark.kernel


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made, no_trace():
        yield made


async def open_and_remove() -> None:
    nic = await opened(start=False)
    await nic.teardown(Verdict.KEEP)


def test_the_driver_comes_without_interfaces_that_nobody_asked_for() -> None:
    # systemd's configuration of modprobe would hide it, where systemd is.
    asked = Path("/etc/modprobe.d/zz-two.conf")
    run("modprobe", "-r", "-q", "ifb")
    try:
        asked.write_text("options ifb numifbs=2\n", encoding="ascii")
        run("modprobe", "ifb")
        assert {"ifb0", "ifb1"} <= set(interfaces()), "this is no test of anything"
        run("modprobe", "-r", "ifb")
        with Lan(), no_trace():
            asyncio.run(open_and_remove())
    finally:
        asked.unlink()


async def test_everything_passes_an_open_gate_and_nothing_a_closed_one(lan: Lan) -> None:
    nic = await opened(start=False)
    lan.send(0, range(5))
    assert await lan.numbers() == [0, 1, 2, 3, 4]
    await nic.start(ReplicationMode.PRIMARY)
    lan.send(1, range(5))
    assert await lan.numbers() == []
    await nic.teardown(Verdict.KEEP)
    assert await lan.numbers() == [0, 1, 2, 3, 4]
    lan.send(2, range(5))
    assert await lan.numbers() == [0, 1, 2, 3, 4]


async def test_an_epoch_leaves_whole_in_order_and_alone(lan: Lan) -> None:
    nic = await opened()
    for epoch in range(1, 30):
        await spoken(lan, nic, epoch, range(epoch % 4))  # some epochs are empty
        await nic.postsuspend(epoch)
        await spoken(lan, nic, epoch + 1, [100, 101])
        await nic.error()
        assert nic.counters()["held_packets"] == epoch % 4 + (2 if epoch > 1 else 0)
        await nic.commit(epoch)
        before = [(epoch, 100), (epoch, 101)] if epoch > 1 else []
        wanted = [*before, *((epoch, number) for number in range(epoch % 4))]
        assert [(each.epoch, each.number) for each in await lan.outside()] == wanted
    await nic.teardown(Verdict.DISCARD)
    assert await lan.numbers() == []


@pytest.mark.parametrize("protocol", [IPV4, IPV6, ARP, VLAN, UNKNOWN], ids=hex)
async def test_every_protocol_is_held(lan: Lan, protocol: int) -> None:
    nic = await opened()
    await spoken(lan, nic, 1, range(3), protocol=protocol)
    assert await lan.numbers() == []
    await nic.postsuspend(1)
    await nic.commit(1)
    seen = await lan.outside()
    arrives_as = UNKNOWN if protocol == VLAN else protocol  # without its tag
    assert [(each.number, each.protocol) for each in seen] == [(number, arrives_as) for number in range(3)]
    await nic.teardown(Verdict.KEEP)


async def test_an_epoch_that_was_not_released_joins_the_next_one(lan: Lan) -> None:
    nic = await opened()
    await spoken(lan, nic, 1, [1])
    await nic.postsuspend(1)
    await spoken(lan, nic, 2, [2])
    # Nobody acknowledged epoch 1 by itself: a second barrier would make the kernel forget the first one's packets.
    await nic.postsuspend(2)
    await spoken(lan, nic, 3, [3])
    assert await lan.numbers() == []
    await nic.commit(2)
    assert await lan.numbers() == [1]
    await nic.postsuspend(3)
    await nic.commit(3)
    assert await lan.numbers() == [2, 3]
    await nic.teardown(Verdict.DISCARD)


async def test_a_commit_without_a_barrier_of_its_epoch_releases_nothing(lan: Lan) -> None:
    nic = await opened()
    await spoken(lan, nic, 1, [1])
    await nic.commit(1)
    await nic.commit(1)
    assert await lan.numbers() == []
    await nic.postsuspend(2)
    await nic.commit(1)
    assert await lan.numbers() == []
    await nic.commit(2)
    await nic.commit(2)
    assert await lan.numbers() == [1]
    await nic.teardown(Verdict.DISCARD)


async def test_what_was_on_its_way_at_the_start_shortens_no_epoch(lan: Lan) -> None:
    # Packets in the plug when it closes belong to no epoch: a release would come short by as many, for ever.
    nic = await opened(start=False)
    for epoch in range(1, 20):
        lan.send(0, range(50))
        await nic.start(ReplicationMode.PRIMARY)
        await nic.stop(failover=False)
        await lan.outside()
        await spoken(lan, nic, epoch, [1, 2, 3])
        await nic.postsuspend(epoch)
        await nic.commit(epoch)
        assert (await lan.numbers())[-3:] == [1, 2, 3]
    await nic.teardown(Verdict.DISCARD)


async def test_a_discarded_interface_is_down_before_its_gate_is_gone(lan: Lan) -> None:
    nic = await opened()
    await spoken(lan, nic, 1, [1])
    await nic.teardown(Verdict.DISCARD)
    await nic.teardown(Verdict.DISCARD)
    assert "state DOWN" in run("ip", "link", "show", "vif0")
    assert await lan.numbers() == []


async def test_a_kernel_without_matchall_redirects_by_u32(lan: Lan) -> None:
    barred = Path("/etc/modprobe.d/without-matchall.conf")
    run("modprobe", "-r", "cls_matchall")
    await asyncio.to_thread(barred.write_text, "install cls_matchall /bin/false\n")
    try:
        nic = await opened()
        assert "u32" in run("tc", "filter", "show", "dev", "vif0", "ingress")
        for epoch, protocol in enumerate((IPV4, IPV6, ARP), start=1):
            await spoken(lan, nic, epoch, [epoch], protocol=protocol)
            assert await lan.numbers() == []
            await nic.postsuspend(epoch)
            await nic.commit(epoch)
            assert await lan.numbers() == [epoch]
        await nic.teardown(Verdict.KEEP)
    finally:
        await asyncio.to_thread(barred.unlink)
