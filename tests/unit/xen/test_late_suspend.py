"""A guest that was asked to suspend and is not waited for any more: told to forget it, or resumed, by one alone."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from tests.unit.xen.hypervisor import Domains, Played
from tests.unit.xen.link import descriptors
from tests.unit.xen.xenstored import Xenstored
from understudy.arbiter import Record, RecordState
from understudy_xen import late as late_module
from understudy_xen import live as live_module
from understudy_xen import primary as primary_module
from understudy_xen.claim import ClaimTaken, claimed
from understudy_xen.guestfile import XenConfig
from understudy_xen.hypervisor import XenHypervisor
from understudy_xen.late import LateSuspends
from understudy_xen.libs import SuspendFailed, SuspendFailure
from understudy_xen.live import LiveGuest
from understudy_xen.primary import XenPrimary
from understudy_xen.xenstore import XenStoreLost

CONTROL = "/local/domain/7/control/shutdown"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "SUSPEND_S", 0.05)


@pytest.fixture
def guest(domains: Domains, store: Xenstored) -> Played:
    store["/local/domain/7/name"] = "web"
    store[CONTROL] = ""
    domains[7] = Played()
    return domains[7]


@pytest.fixture
async def live(domains: Domains, guest: Played) -> AsyncIterator[LiveGuest]:
    live = await LiveGuest.open(domains.xen(), 7, None)
    yield live
    live.close()


async def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def taken_up(store: Xenstored) -> None:
    """Play the guest's kernel, which takes up a request and then takes its time."""
    await until(lambda: store[CONTROL] == "suspend")
    store[CONTROL] = ""


# --- The primary -----------------------------------------------------------------------------------------------------


async def test_a_request_that_was_not_taken_up_is_withdrawn(live: LiveGuest, store: Xenstored) -> None:
    with pytest.raises(SuspendFailed) as failed:
        await asyncio.to_thread(live.suspend)
    assert (failed.value.failure, store[CONTROL], live.late) == (SuspendFailure.UNANSWERED, "", False)


async def test_a_request_is_withdrawn_although_its_connection_is_lost(
    live: LiveGuest, store: Xenstored
) -> None:
    asking = asyncio.ensure_future(asyncio.to_thread(live.suspend))
    await until(lambda: store[CONTROL] == "suspend")
    store.hang_up()
    with pytest.raises(XenStoreLost):
        await asking
    await asyncio.to_thread(live.bring_back, 0)
    assert (store[CONTROL], live.late) == ("", False)


async def test_one_that_was_taken_up_stays_to_be_waited_for(
    live: LiveGuest, store: Xenstored, guest: Played
) -> None:
    taking = asyncio.ensure_future(taken_up(store))
    with pytest.raises(SuspendFailed) as failed:
        await asyncio.to_thread(live.suspend)
    await taking
    await asyncio.to_thread(live.bring_back, 0)
    assert (failed.value.failure, live.late) == (SuspendFailure.TIMEOUT, True)
    guest.suspend()
    await asyncio.to_thread(live.bring_back, 0)
    assert (guest.resumed, live.late) == (1, False)


async def test_a_guest_that_is_suspended_already_is_not_asked_to_do_it_again(
    live: LiveGuest, store: Xenstored, guest: Played
) -> None:
    guest.suspend()
    await asyncio.to_thread(live.suspend)
    assert (store[CONTROL], live.late) == ("", False)


async def test_a_guest_that_another_has_is_not_let_go(live: LiveGuest, guest: Played) -> None:
    guest.suspend()
    with claimed(7), pytest.raises(ClaimTaken):
        await asyncio.to_thread(live.bring_back, 0)
    assert guest.resumed == 0


# --- Whoever looks after it then -------------------------------------------------------------------------------------


async def test_it_is_resumed_when_it_suspends_and_once(hypervisor: XenHypervisor, guest: Played) -> None:
    hypervisor.late.expect(7)
    hypervisor.late.expect(7)
    await asyncio.sleep(0)
    guest.suspend()
    await until(lambda: guest.shutdown is None)
    await hypervisor.late.call_off(7)
    guest.suspend()  # for somebody else
    await asyncio.sleep(0.15)
    assert guest.resumed == 1


async def test_a_session_that_ends_leaves_it_to_be_looked_after(
    hypervisor: XenHypervisor,
    config: XenConfig,
    guest: Played,
    store: Xenstored,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(primary_module, "SUSPEND_S", 0.05)
    hypervisor.late.expect(7)
    primary = await hypervisor.primary(config)
    assert isinstance(primary, XenPrimary)
    guest.suspend()
    await asyncio.sleep(0.15)
    assert guest.resumed == 0  # it is the session's
    guest.shutdown = None
    live = primary._live = await LiveGuest.open(hypervisor.xen, 7, None)
    taking = asyncio.ensure_future(taken_up(store))
    with pytest.raises(SuspendFailed):
        await asyncio.to_thread(live.suspend)
    await taking
    await primary._run_again()
    await primary.close()
    guest.suspend()
    await until(lambda: guest.shutdown is None)
    await hypervisor.late.call_off(7)
    assert guest.resumed == 1


async def test_whoever_has_the_claim_resumes_it_himself(hypervisor: XenHypervisor, guest: Played) -> None:
    guest.suspend()
    with claimed(7):
        hypervisor.late.expect(7)
        await asyncio.sleep(0.05)
        await hypervisor.late.call_off(7)
    assert guest.resumed == 0


async def test_whoever_had_the_claim_may_die(
    hypervisor: XenHypervisor, guest: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_module, "_AGAIN_S", 0.02)
    guest.suspend()
    with claimed(7):
        hypervisor.late.expect(7)
        await asyncio.sleep(0.05)
    await until(lambda: guest.shutdown is None)
    await hypervisor.late.call_off(7)


async def test_a_xenstored_that_cannot_be_asked_for_a_moment_leaves_nobody_suspended(
    hypervisor: XenHypervisor,
    guest: Played,
    store: Xenstored,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(late_module, "_AGAIN_S", 0.02)
    away = store.place.rename(store.place.with_name("away"))
    guest.suspend()
    hypervisor.late.expect(7)
    await until(lambda: "has suspended late, and is not resumed yet" in caplog.text)
    away.rename(store.place)
    await until(lambda: guest.shutdown is None)
    await hypervisor.late.call_off(7)
    assert guest.resumed == 1


async def test_a_guest_that_offers_an_event_channel_is_resumed_without_it(
    hypervisor: XenHypervisor, guest: Played, store: Xenstored
) -> None:
    store["/local/domain/7/device/suspend/event-channel"] = "3"
    guest.suspend()
    await hypervisor.resume(7)
    assert guest.resumed == 1


async def test_a_xenstored_that_does_not_answer_holds_up_nobody_else(
    hypervisor: XenHypervisor, guest: Played, store: Xenstored
) -> None:
    store.place.unlink()
    before = descriptors()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(store.place))
        silent.listen()
        began_s = time.monotonic()
        resuming = [asyncio.create_task(hypervisor.resume(7)) for _ in range(2)]
        await asyncio.sleep(0.05)
        resuming[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await resuming[0]
        assert time.monotonic() - began_s < 2.5  # a request has 5 s
    with pytest.raises(XenStoreLost):
        await resuming[1]
    await until(lambda: descriptors() <= before)


async def test_after_it_was_called_off_nothing_is_done(hypervisor: XenHypervisor, guest: Played) -> None:
    hypervisor.late.expect(7)
    await asyncio.sleep(0)
    await hypervisor.late.call_off(7)
    guest.suspend()
    await asyncio.sleep(0.15)
    assert guest.resumed == 0


async def test_it_is_not_waited_for_for_ever(domains: Domains, guest: Played) -> None:
    xen, resumed = domains.xen(), []

    async def resume(domid: int) -> None:
        resumed.append(domid)

    late = LateSuspends(lambda: xen, resume, late_s=0.01)
    late.expect(7)
    await asyncio.sleep(0.2)
    guest.suspend()
    await late.call_off(7)
    assert not resumed


# --- The janitor -----------------------------------------------------------------------------------------------------


ALONE = Record("web", 4, RecordState.ALONE, "alpha", None, None, "alpha", "a4")


async def test_a_request_of_a_dead_agent_is_withdrawn(
    hypervisor: XenHypervisor, config: XenConfig, guest: Played, store: Xenstored
) -> None:
    store[CONTROL] = "suspend"
    done = await hypervisor.sweep(config, ALONE)
    assert done == ["web was asked to suspend, and had not taken that up: withdrawn"]
    assert store[CONTROL] == ""


async def test_a_request_of_somebody_alive_is_left_to_him(
    hypervisor: XenHypervisor, config: XenConfig, guest: Played, store: Xenstored
) -> None:
    store[CONTROL] = "suspend"
    with claimed(7):
        assert await hypervisor.sweep(config, ALONE) == []
        guest.suspend()
        (said,) = await hypervisor.sweep(config, ALONE)
        await hypervisor.late.call_off(7)
    assert "web is suspended: domain 7 is being saved or protected by understudy already" in said
    assert (store[CONTROL], guest.resumed) == ("suspend", 0)


async def test_a_guest_that_has_taken_up_what_a_dead_agent_asked_is_resumed(
    hypervisor: XenHypervisor, config: XenConfig, guest: Played
) -> None:
    assert await hypervisor.sweep(config, ALONE) == []
    guest.suspend()
    await until(lambda: guest.shutdown is None)
    await hypervisor.late.call_off(7)
    assert guest.resumed == 1


async def test_nothing_is_withdrawn_where_the_record_does_not_say_that_it_runs_here(
    hypervisor: XenHypervisor, config: XenConfig, guest: Played, store: Xenstored
) -> None:
    store[CONTROL] = "suspend"
    undecided = replace(ALONE, state=RecordState.PROTECTED, standby="beta")
    assert await hypervisor.sweep(config, undecided) == []
    assert store[CONTROL] == "suspend"
