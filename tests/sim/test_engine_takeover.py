"""Losses in a simulated pair: who goes on, that only one does, and that nothing acknowledged is missing."""

from __future__ import annotations

import asyncio

import pytest

from tests.testbeds.rounds import rounds
from understudy.arbiter import RecordState
from understudy.device import Gate, Mode
from understudy.session import PrimaryState, SecondaryState
from understudy.testing.arbiter import Silence
from understudy.testing.clock import in_virtual_time
from understudy.testing.simhost import fails, hangs
from understudy.testing.world import GUEST, SimulatedPair

P, S = PrimaryState, SecondaryState
MODES = [Mode.REMUS, Mode.COLO]


async def protected(pair: SimulatedPair, epochs: int = 5) -> None:
    await pair.start()
    await pair.protect()
    await pair.epochs(epochs)


async def settled(pair: SimulatedPair, runner: str) -> None:
    """One host serves the guest, nothing was violated; and it can be protected again."""
    await pair.grows(within_s=20)
    await asyncio.sleep(3)
    assert pair.runners() == [runner]
    pair.check(clean=("alpha", "beta"))
    record = pair.record()
    assert record is not None
    assert (record.state, record.owner) == (RecordState.ALONE, runner)
    await pair.protect(runner)
    await pair.epochs(3)
    pair.check()


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "reset"])
@pytest.mark.parametrize("mode", MODES)
def test_the_primary_host_dies_at_every_moment_of_a_cycle(mode: Mode, silent: bool) -> None:
    for step in range(0, 40, rounds(5, 1)):
        _primary_dies(mode, silent, 0.0008 * step)


@in_virtual_time
async def _primary_dies(mode: Mode, silent: bool, after_s: float) -> None:
    async with SimulatedPair(mode=mode, disks=2, seed=int(after_s * 1e6)) as pair:
        await protected(pair, 3)
        await asyncio.sleep(after_s)
        pair.crash("alpha", silent=silent)
        await pair.reach("beta", P.UNPROTECTED, P.ALONE)
        await pair.grows()
        await pair.revive("alpha")
        await settled(pair, "beta")


@pytest.mark.parametrize("mode", MODES)
def test_the_secondary_host_dies_at_every_moment_of_a_cycle(mode: Mode) -> None:
    for step in range(0, 30, rounds(5, 1)):
        _secondary_dies(mode, step % 2 == 0, 0.0011 * step)


@in_virtual_time
async def _secondary_dies(mode: Mode, silent: bool, after_s: float) -> None:
    async with SimulatedPair(mode=mode, disks=2, seed=int(after_s * 1e6)) as pair:
        await protected(pair, 3)
        await asyncio.sleep(after_s)
        pair.crash("beta", silent=silent)
        await pair.reach("alpha", P.ALONE)
        await pair.grows()
        await pair.revive("beta")
        await settled(pair, "alpha")


def test_the_primary_host_dies_at_every_moment_of_the_first_copy() -> None:
    for step in range(0, 50, rounds(5, 1)):
        _dies_while_syncing("alpha", 0.01 * step)


def test_the_secondary_host_dies_at_every_moment_of_the_first_copy() -> None:
    for step in range(0, 50, rounds(5, 1)):
        _dies_while_syncing("beta", 0.01 * step)


@in_virtual_time
async def _dies_while_syncing(victim: str, after_s: float) -> None:
    async with SimulatedPair(disks=2) as pair:
        await pair.start()
        await pair.protect(wait=False)
        await asyncio.sleep(after_s)
        record = pair.record()
        assert record is not None
        pair.crash(victim)
        await asyncio.sleep(3)
        await pair.revive(victim)
        await asyncio.sleep(1)
        now = pair.record()
        assert now is not None
        if now.state is RecordState.ALONE and now.owner == "alpha" and not pair.runners():
            await pair.start("alpha")  # a cold start: it had died before anybody could take over
        await settled(pair, now.owner)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("senders", [("alpha", "beta"), ("alpha",), ("beta",)], ids=["both", "there", "back"])
def test_a_cut_cable_leaves_exactly_one(mode: Mode, senders: tuple[str, ...]) -> None:
    for step in range(0, 10, rounds(4, 1)):
        _cut(mode, senders, 0.003 * step)


@in_virtual_time
async def _cut(mode: Mode, senders: tuple[str, ...], after_s: float) -> None:
    async with SimulatedPair(mode=mode, disks=2, seed=int(after_s * 1e6)) as pair:
        await protected(pair, 3)
        await asyncio.sleep(after_s)
        pair.cable.cut(*senders)
        await pair.grows(within_s=20)
        await asyncio.sleep(5)
        runners = pair.runners()
        assert len(runners) == 1
        loser = "beta" if runners == ["alpha"] else "alpha"
        assert GUEST not in pair.sites[loser].host.guests  # fenced, then discarded
        pair.mend()
        await settled(pair, runners[0])


@pytest.mark.parametrize("silence", list(Silence))
@pytest.mark.parametrize("victim", ["alpha", "beta"])
def test_without_the_arbiter_a_side_that_needs_a_decision_waits(victim: str, silence: Silence) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair() as pair:
            await protected(pair)
            survivor = "beta" if victim == "alpha" else "alpha"
            view = pair.sites[survivor].arbiter
            view.silence = silence
            await pair.epochs(5)  # a healthy pair goes on undisturbed
            pair.crash(victim)
            await asyncio.sleep(10)
            assert pair.runners() == []
            assert "waiting-for-arbiter" in {name for _, host, name, _ in pair.events if host == survivor}
            view.silence = None
            await pair.grows(within_s=10)
            await pair.revive(victim)
            await settled(pair, survivor)

    scenario()


@pytest.mark.parametrize("silence", list(Silence))
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_cut_cable_and_an_arbiter_that_answers_late(silence: Silence, calls: int) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair() as pair:
            await protected(pair)
            pair.sites["alpha"].arbiter.script = [silence] * calls
            pair.sites["beta"].arbiter.script = [silence] * (4 - calls)
            pair.cable.cut("alpha", "beta")
            await pair.grows(within_s=30)
            await asyncio.sleep(5)
            pair.mend()
            await settled(pair, pair.runners()[0])

    scenario()


@pytest.mark.parametrize("silence", list(Silence))
def test_protecting_with_an_arbiter_that_falls_silent(silence: Silence) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair() as pair:
            await pair.start()
            pair.sites["alpha"].arbiter.script = [silence] * 2
            await pair.protect()
            await pair.epochs(5)
            pair.sites["alpha"].arbiter.script = [silence] * 2
            await pair.unprotect()
            await settled(pair, "alpha")

    scenario()


@pytest.mark.parametrize("how", ["fails", "hangs"])
@pytest.mark.parametrize("step", ["secondary.promote", "secondary.disk0.stop"])
def test_a_promotion_that_fails_half_way_keeps_the_copy_for_an_operator(step: str, how: str) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair() as pair:
            await protected(pair)
            host = pair.sites["beta"].host
            host.scripts[step] = fails("scripted") if how == "fails" else hangs()
            pair.crash("alpha")
            await pair.reach("beta", S.KEPT, within_s=100)
            assert pair.runners() == []
            await pair.revive("alpha")
            await asyncio.sleep(5)
            assert pair.runners() == []
            assert pair.sites["alpha"].state is P.FENCED
            host.scripts.clear()
            pair.check()
            await pair.force("beta")
            await pair.reach("beta", P.UNPROTECTED, P.ALONE)
            await settled(pair, "beta")

    scenario()


@in_virtual_time
async def test_a_kept_copy_is_given_up_for_the_old_primary_by_force() -> None:
    async with SimulatedPair() as pair:
        await protected(pair)
        pair.sites["beta"].host.scripts["secondary.promote"] = fails()
        pair.cable.cut("alpha", "beta")
        pair.sites["alpha"].arbiter.silence = Silence.UNASKED  # beta shall win
        await pair.reach("beta", S.KEPT)
        pair.sites["alpha"].arbiter.silence = None
        await pair.reach("alpha", P.FENCED)
        assert pair.runners() == []
        await pair.force("alpha")
        await pair.grows()
        pair.mend()
        pair.sites["beta"].host.scripts.clear()
        await settled(pair, "alpha")


async def promoting(pair: SimulatedPair) -> None:
    while (record := pair.record()) is None or record.state is not RecordState.PROMOTING:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("fenced", [False, True])
def test_a_copy_that_dies_before_its_promotion_is_released_to_the_old_primary(fenced: bool) -> None:
    _released(fenced)


@in_virtual_time
async def _released(fenced: bool) -> None:
    async with SimulatedPair() as pair:
        await protected(pair)
        pair.cable.cut("alpha", "beta")
        view = pair.sites["alpha"].arbiter
        view.silence = Silence.UNASKED
        theirs = pair.sites["beta"].arbiter
        theirs.script, theirs.silence = [Silence.APPLIED], Silence.UNASKED
        await promoting(pair)
        if fenced:
            view.silence = None
            await pair.reach("alpha", P.FENCED)
        pair.sites["beta"].host.guests[GUEST].die()
        await asyncio.sleep(2)
        view.silence = theirs.silence = None
        await pair.grows(within_s=20)
        assert "released" in {r.state.value for r in await pair.arbiter.history(GUEST)}
        pair.mend()
        await settled(pair, "alpha")


@pytest.mark.parametrize("mode", MODES)
def test_the_guest_dies_on_the_primary_and_the_standby_goes_on(mode: Mode) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair(mode=mode) as pair:
            await protected(pair)
            pair.sites["alpha"].host.guests[GUEST].die()
            await pair.reach("beta", P.UNPROTECTED, P.ALONE)
            await settled(pair, "beta")

    scenario()


@in_virtual_time
async def test_the_copy_dies_and_the_guest_goes_on() -> None:
    async with SimulatedPair() as pair:
        await protected(pair)
        pair.sites["beta"].host.guests[GUEST].die()
        await pair.reach("alpha", P.ALONE)
        await settled(pair, "alpha")


@pytest.mark.parametrize(
    "step",
    [
        "primary.checkpoint",
        "primary.nic0.postsuspend",
        "primary.disk0.postsuspend",
        "primary.nic0.error",
        "primary.disk0.error",
        "primary.nic0.commit",
        "secondary.load",
        "secondary.disk0.cut",
        "secondary.disk0.checkpoint",
        "secondary.disk0.error",
        "secondary.disk0.commit",
    ],
)
@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_step_of_the_cycle_that_fails_ends_the_protection_not_the_guest(step: str, how: str) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair() as pair:
            await protected(pair)
            host = pair.sites["alpha" if step.startswith("primary") else "beta"].host
            host.scripts[step] = fails("scripted") if how == "fails" else hangs()
            await pair.reach("alpha", P.ALONE, P.DISCARDED, within_s=60)
            host.scripts.clear()
            await pair.grows()
            await asyncio.sleep(10)
            assert len(pair.runners()) == 1
            await settled(pair, pair.runners()[0])

    scenario()


@pytest.mark.parametrize("victim", ["alpha", "beta"])
def test_an_agent_dies_alone_and_comes_back(victim: str) -> None:
    for step in range(0, 20, rounds(5, 1)):
        _agent_dies(victim, 0.002 * step)


@in_virtual_time
async def _agent_dies(victim: str, after_s: float) -> None:
    async with SimulatedPair(disks=2, seed=int(after_s * 1e6)) as pair:
        await protected(pair, 3)
        await asyncio.sleep(after_s)
        pair.crash(victim, agent_only=True)
        await asyncio.sleep(0.5 if int(after_s * 1000) % 4 else 3)
        await pair.revive(victim)
        await pair.grows(within_s=20)
        await asyncio.sleep(3)
        assert len(pair.runners()) == 1
        await settled(pair, pair.runners()[0])


@in_virtual_time
async def test_one_host_after_the_other_dies_ten_times() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        here, there = "alpha", "beta"
        for _ in range(10):
            await pair.protect(here)
            await pair.epochs(4)
            pair.crash(here)
            await pair.reach(there, P.UNPROTECTED, P.ALONE)
            await pair.grows()
            await pair.revive(here)
            await pair.reach(here, P.OFF, P.DISCARDED)
            await asyncio.sleep(1)
            here, there = there, here
        pair.check(clean=("alpha", "beta"))


@pytest.mark.parametrize(
    "gates", [frozenset({Gate.POSTSUSPEND}), frozenset({Gate.PRERESUME}), frozenset({Gate.CHECKPOINT})]
)
def test_every_gate_alone_survives_a_takeover(gates: frozenset[Gate]) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair(gates=gates, early_resume=True) as pair:
            await protected(pair)
            pair.crash("alpha")
            await pair.grows()
            await pair.revive("alpha")
            await settled(pair, "beta")

    scenario()
