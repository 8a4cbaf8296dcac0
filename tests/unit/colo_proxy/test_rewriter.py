"""Which rewriter works: the fresh one after a cut, the old one if the checkpoint of that cut never came."""

from __future__ import annotations

import pytest

from tests.unit.colo_proxy.qemu_model import Qemu
from understudy_colo_proxy.chain import Link
from understudy_colo_proxy.rewriter import Rewriters


@pytest.fixture
def qemu() -> Qemu:
    return Qemu()


@pytest.fixture
async def rewriters(qemu: Qemu) -> Rewriters:
    made = Rewriters(Link(qemu, "nic0", vnet_hdr=True))
    await made.begin()
    return made


def working(qemu: Qemu) -> list[str]:
    return [name for name in qemu.filters if qemu.objects[name].get("status", "on") == "on"]


def rewriter(number: int) -> str:
    return f"understudy-colo-nic0-rewriter-{number}"


async def test_a_cut_puts_a_fresh_one_in_charge_and_keeps_the_old(qemu: Qemu, rewriters: Rewriters) -> None:
    await rewriters.renew()
    assert working(qemu) == [rewriter(2)]
    assert qemu.filters == [rewriter(1), rewriter(2)]


async def test_the_next_cut_forgets_the_old_one(qemu: Qemu, rewriters: Rewriters) -> None:
    await rewriters.renew()
    await rewriters.renew()
    assert qemu.filters == [rewriter(2), rewriter(3)]
    assert working(qemu) == [rewriter(3)]
    assert rewriters.renewed_count == 2


@pytest.mark.parametrize(("loaded", "left"), [(True, 2), (False, 1)])
async def test_a_failover_keeps_the_one_that_fits(
    qemu: Qemu, rewriters: Rewriters, loaded: bool, left: int
) -> None:
    await rewriters.renew()
    await rewriters.settle(loaded=loaded)
    assert qemu.filters == working(qemu) == [rewriter(left)]


async def test_without_a_cut_there_is_nothing_to_settle(qemu: Qemu, rewriters: Rewriters) -> None:
    await rewriters.settle(loaded=True)
    assert working(qemu) == [rewriter(1)]


async def test_a_number_that_is_taken_is_left_alone(qemu: Qemu) -> None:
    link = Link(qemu, "nic0", vnet_hdr=True)
    await link.add_filter("filter-rewriter", "rewriter-1", queue="all")
    await Rewriters(link).begin()
    assert qemu.filters == [rewriter(1), rewriter(2)]
