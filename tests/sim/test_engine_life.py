"""The engine in a simulated pair: protection with every set of gates, and what an operator does."""

from __future__ import annotations

import asyncio
from itertools import chain, combinations

import pytest

from tests.testbeds.rounds import rounds
from understudy.arbiter import RecordState
from understudy.device import Gate, Mode
from understudy.engine import SecondarySession
from understudy.errors import StateError
from understudy.session import PrimaryState, SecondaryState
from understudy.session.events import Prefer, Protect, Unprotect
from understudy.testing.clock import in_virtual_time
from understudy.testing.simhost import fails, hangs, takes
from understudy.testing.world import GUEST, SimulatedPair

P, S = PrimaryState, SecondaryState
GATES = tuple(Gate)
SUBSETS = [frozenset(s) for s in chain.from_iterable(combinations(GATES, n) for n in range(1, 4))]


def states(pair: SimulatedPair) -> list[str]:
    return [record.state.value for record in pair.arbiter.records[GUEST]]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("gates", SUBSETS, ids=lambda g: "+".join(sorted(each.value for each in g)))
def test_protect_epochs_unprotect_protect_again(gates: frozenset[Gate], early: bool) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair(gates=gates, nics=2, disks=2, early_resume=early) as pair:
            await pair.start()
            await pair.grows()
            for _ in range(2):
                await pair.protect()
                await pair.epochs(20)
                assert pair.runners() == []  # it is gated
                await pair.grows()
                await pair.unprotect()
                await pair.grows()
                await asyncio.sleep(1)
                pair.check(clean=("alpha", "beta"))
                assert pair.runners() == ["alpha"]
            assert states(pair) == ["alone", "protected", "alone", "protected", "alone"]

    scenario()


@pytest.mark.parametrize("gates", [frozenset(), frozenset(GATES)], ids=["none", "all"])
def test_colo_compares_and_checkpoints_when_outputs_differ(gates: frozenset[Gate]) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair(mode=Mode.COLO, gates=gates) as pair:
            await pair.start()
            await pair.protect()
            await pair.epochs(10)
            compared = [left for left in pair.network.log if left.epoch == 0]
            assert len(compared) > 50  # let out by comparison, not by a checkpoint
            await pair.unprotect()
            await asyncio.sleep(1)
            await pair.grows()
            pair.check(clean=("alpha", "beta"))

    scenario()


@in_virtual_time
async def test_a_hypervisor_without_gates_cannot_hold_output() -> None:
    async with SimulatedPair(gates=frozenset()) as pair:
        await pair.start()
        with pytest.raises(Exception, match="no subkind protects this device"):
            await pair.protect()
        await pair.grows()
        await asyncio.sleep(1)
        assert states(pair) == ["alone"]
        pair.check(clean=("alpha", "beta"))


@pytest.mark.parametrize(
    "step",
    [
        "primary.nic0.open",
        "primary.disk0.open",
        "primary.disk1.open",
        "secondary.nic0.open",
        "secondary.disk0.open",
        "secondary.disk1.open",
        "secondary.launch",
        "primary.copy",
        "primary.nic0.start",
        "primary.disk1.start",
        "secondary.nic0.start",
        "secondary.disk0.start",
        "primary.replicate",
        "secondary.begin",
        "primary.checkpoint",
        "primary.nic0.postsuspend",
        "secondary.disk0.cut",
        "secondary.disk1.checkpoint",
        "primary.nic0.error",
        "secondary.disk0.error",
    ],
)
@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_failing_step_of_the_setup_leaves_the_guest_and_no_trace(step: str, how: str) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair(disks=2) as pair:
            await pair.start()
            side = step.split(".", maxsplit=1)[0]
            host = pair.sites["alpha" if side == "primary" else "beta"].host
            host.scripts[step] = fails("scripted trouble") if how == "fails" else hangs()
            with pytest.raises(Exception) as raised:  # noqa: PT011 - many kinds, looked at below
                await pair.protect()
            if how == "fails" and step != "secondary.begin":
                assert "scripted trouble" in _whole(raised.value), raised.value
            await pair.grows(within_s=10)
            assert pair.runners() == ["alpha"]
            assert states(pair) == ["alone"]
            await asyncio.sleep(30)
            pair.check(clean=("alpha", "beta"))
            host.scripts.clear()
            await pair.protect()
            await pair.epochs(5)
            pair.check()

    scenario()


def _whole(error: BaseException | None) -> str:
    text = ""
    while error is not None:
        text += str(error)
        if isinstance(error, BaseExceptionGroup):
            text += "".join(_whole(each) for each in error.exceptions)
        error = error.__cause__ or error.__context__
    return text


@in_virtual_time
async def test_a_guest_that_has_not_left_its_protection_is_not_protected_again() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        await pair.epochs(5)
        alpha = pair.sites["alpha"].host
        alpha.scripts["primary.sever"] = fails()
        pair.crash("beta")
        await pair.reach("alpha", P.ALONE)
        with pytest.raises(StateError, match="has not left its last protection"):
            await pair.protect()
        alpha.scripts.clear()
        await pair.grows(within_s=30)
        await pair.revive("beta")
        await pair.protect()
        await pair.epochs(5)
        pair.check()


@in_virtual_time
async def test_a_copy_that_ends_as_a_plain_migration_is_undone() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        pair.sites["beta"].host.scripts["completed"] = takes(0)
        with pytest.raises(Exception, match="plain migration"):
            await pair.protect()
        await pair.grows()
        await asyncio.sleep(1)
        pair.check(clean=("alpha", "beta"))


def test_unprotect_at_any_moment_of_the_first_copy_leaves_both_hosts_clean() -> None:
    for step in range(0, 60, rounds(5, 1)):
        _unprotect_after(0.001 + 0.008 * step)


@in_virtual_time
async def _unprotect_after(seconds: float) -> None:
    async with SimulatedPair(disks=2) as pair:
        await pair.start()
        await pair.protect(wait=False)
        await asyncio.sleep(seconds)
        driver = await pair.sites["alpha"].own()
        await driver.ask(Unprotect("changed my mind"))
        await pair.reach("alpha", P.UNPROTECTED)
        await pair.grows()
        await asyncio.sleep(5)
        pair.check(clean=("alpha", "beta"))
        assert pair.sites["beta"].state in {None, S.EMPTY, S.DISCARDED}, f"after {seconds} s"
        assert pair.runners() == ["alpha"]
        await pair.protect()
        await pair.epochs(3)
        pair.check()


@pytest.mark.parametrize("how", ["shut_down", "panic"])
def test_a_shutdown_under_protection_stops_the_guest_on_both_hosts(how: str) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair() as pair:
            await pair.start()
            await pair.protect()
            await pair.epochs(5)
            process = pair.sites["alpha"].host.guests[GUEST]
            getattr(process, how)()
            await pair.reach("alpha", P.OFF)
            await asyncio.sleep(2)
            record = pair.record()
            assert record is not None
            assert record.state is RecordState.STOPPED
            assert not pair.sites["alpha"].host.guests
            assert not pair.sites["beta"].host.guests
            pair.check(clean=("alpha", "beta"))
            # Everything it had sent before its end is out.
            assert pair.network.highest(GUEST) == process.memory.number
            await pair.start()
            await pair.grows()
            pair.check()

    scenario()


@in_virtual_time
async def test_a_shutdown_during_the_first_copy() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect(wait=False)
        await asyncio.sleep(0.2)
        pair.sites["alpha"].host.guests[GUEST].shut_down()
        await pair.reach("alpha", P.OFF)
        await asyncio.sleep(5)
        assert not pair.sites["beta"].host.guests
        pair.check(clean=("alpha", "beta"))


@in_virtual_time
async def test_stopping_the_guest_after_its_protection() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        await pair.unprotect()
        pair.sites["alpha"].host.guests[GUEST].shut_down()
        await pair.reach("alpha", P.OFF)
        assert states(pair)[-1] == "stopped"
        pair.check(clean=("alpha", "beta"))


@in_virtual_time
async def test_a_reboot_under_protection_changes_nothing() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        pair.sites["alpha"].host.guests[GUEST].reset()
        await pair.epochs(5)
        assert pair.sites["alpha"].state is P.PROTECTED
        assert pair.sites["beta"].state is S.STANDBY
        pair.check()


@in_virtual_time
async def test_a_repeated_request_to_prepare_is_refused_and_changes_nothing() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect(wait=False)
        await pair.reach("beta", S.SYNCING)
        beta, alpha = pair.sites["beta"].driver, pair.sites["alpha"].driver
        assert isinstance(beta, SecondarySession)
        assert alpha is not None
        [session] = beta._asked
        record = pair.arbiter.records[GUEST][-1].to_json()
        again = {"session": session, "record": record, "mode": "remus", "facts": {}}
        with pytest.raises(StateError, match="is being prepared already"):
            await beta.serve("prepare", again)
        await pair.reach("alpha", P.PROTECTED)
        await pair.epochs(3)
        pair.check()


@in_virtual_time
async def test_a_request_to_prepare_from_an_older_record_is_refused() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        beta = pair.sites["beta"].driver
        assert isinstance(beta, SecondarySession)
        record = pair.arbiter.records[GUEST][-1].to_json()
        with pytest.raises(StateError, match="takes no new copy here while it is standby"):
            await beta.serve("prepare", {"session": "newer", "record": record, "mode": "remus", "facts": {}})
        await pair.epochs(3)
        pair.check()


@in_virtual_time
async def test_why_a_copy_failed_is_no_cause_once_there_is_one() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        driver = pair.sites["alpha"].driver
        assert driver is not None
        driver.told("failure", {"detail": "late"})
        assert driver.failure is None
        await pair.unprotect()
        driver.told("failure", {"detail": "later"})
        assert driver.failure is None


@in_virtual_time
async def test_a_second_protect_is_refused_and_changes_nothing() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        driver = await pair.sites["alpha"].own()
        with pytest.raises(StateError, match="Protect is not possible while the primary is protected"):
            await driver.ask(Protect("another", "beta"))
        await pair.epochs(5)
        pair.check()


@in_virtual_time
async def test_an_operator_moves_a_healthy_guest_by_force() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        await pair.epochs(5)
        await pair.force("beta")
        await pair.grows()
        assert pair.runners() == ["beta"]
        record = pair.record()
        assert record is not None
        assert (record.owner, record.state) == ("beta", RecordState.ALONE)
        assert "an operator" in {r.forced_by for r in await pair.arbiter.history(GUEST)}
        await asyncio.sleep(5)
        pair.check(clean=("alpha", "beta"))
        assert GUEST not in pair.sites["alpha"].host.guests
        await pair.protect("beta")
        await pair.epochs(5)
        pair.check()


@in_virtual_time
async def test_the_preference_for_the_primary_is_put_into_the_record_and_obeyed() -> None:
    async with SimulatedPair(prefer_primary=True) as pair:
        await pair.start()
        await pair.protect()
        await pair.epochs(5)
        pair.crash("alpha")
        await asyncio.sleep(10)
        assert pair.runners() == []  # nobody may, but by force
        assert pair.sites["beta"].state is S.SUSPECT
        await pair.force("beta")
        await pair.grows()
        assert pair.runners() == ["beta"]
        pair.check()


@in_virtual_time
async def test_the_preference_can_be_withdrawn_while_protected() -> None:
    async with SimulatedPair(prefer_primary=True) as pair:
        await pair.start()
        await pair.protect()
        driver = await pair.sites["alpha"].own()
        await driver.ask(Prefer(primary=False))
        await pair.epochs(5)
        pair.crash("alpha")
        await pair.grows()
        assert pair.runners() == ["beta"]
        pair.check()
