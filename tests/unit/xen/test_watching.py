"""What happens to a domain without being asked for is told once, whatever becomes of xenstored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest

from tests.unit.xen.hypervisor import Domains, Played
from tests.unit.xen.link import descriptors
from tests.unit.xen.xenstored import Xenstored
from understudy.hypervisor import DomainEvent, DomainEventKind
from understudy_xen import watching as watching_module
from understudy_xen.libs import ShutdownReason, Xen
from understudy_xen.watching import DomainWatch

SOON_S = 10.0


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching_module, "_AGAIN_S", 0.02)


@pytest.fixture
def guest(domains: Domains, store: Xenstored) -> Played:
    domains[7] = Played()
    return domains[7]


@pytest.fixture
async def watch(domains: Domains, guest: Played) -> AsyncIterator[DomainWatch]:
    watch = DomainWatch.begin(domains.xen(), 7)
    yield watch
    await watch.close()


async def told(watch: DomainWatch) -> DomainEvent:
    async with asyncio.timeout(SOON_S):
        return await anext(watch.events())


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (ShutdownReason.POWEROFF, DomainEventKind.SHUTDOWN),
        (ShutdownReason.REBOOT, DomainEventKind.SHUTDOWN),
        (ShutdownReason.CRASH, DomainEventKind.PANIC),
    ],
)
async def test_an_end_is_told_as_soon_as_xenstored_tells_and_once(
    watch: DomainWatch, guest: Played, store: Xenstored, reason: ShutdownReason, kind: DomainEventKind
) -> None:
    await asyncio.sleep(0.05)
    guest.shutdown = ShutdownReason.SUSPEND  # a checkpoint's
    store.tell("@releaseDomain")
    await asyncio.sleep(0.05)
    assert watch._queue.empty()
    guest.shutdown = reason
    store.tell("@releaseDomain")
    assert (await told(watch)).kind is kind
    store.tell("@releaseDomain")
    await asyncio.sleep(0.05)
    assert watch._queue.empty()


async def test_a_domain_that_is_gone_is_told_also_without_xenstored(
    watch: DomainWatch, domains: Domains, store: Xenstored
) -> None:
    await asyncio.sleep(0.05)
    store.place.unlink()
    store.hang_up()
    del domains[7]
    assert (await told(watch)).kind is DomainEventKind.GONE


async def test_one_that_is_being_destroyed_is_told_before_its_interfaces_are_gone(
    watch: DomainWatch, guest: Played, store: Xenstored
) -> None:
    backend = "/local/domain/0/backend/vif/7/0/online"
    store[backend] = "1"
    guest.pauses = 1
    store.tell("@releaseDomain")
    await asyncio.sleep(0.05)
    assert watch._queue.empty()  # an administrator's pause
    store[backend] = "0"
    store.tell("@releaseDomain")
    event = await told(watch)
    assert (event.kind, event.detail) == (DomainEventKind.GONE, "domain 7 is being destroyed")


async def test_nothing_is_left_of_it_however_it_ended(domains: Domains, guest: Played) -> None:
    before = descriptors()
    for xen in (domains.xen(), cast("Xen", None)):  # with the second one it fails at once
        watch = DomainWatch.begin(xen, 7)
        await asyncio.sleep(0.05)
        await watch.close()
        await watch.close()
        assert watch._savers.fileno() == -1
    await asyncio.sleep(0.05)
    assert not {each for each in descriptors() - before if "eventpoll" not in each}
