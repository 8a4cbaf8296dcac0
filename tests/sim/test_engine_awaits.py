"""A death at every turn of the event loop during one checkpoint cycle, and during a takeover: every await is hit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.testbeds.rounds import rounds
from understudy.device import Mode
from understudy.session import PrimaryState
from understudy.testing import clock
from understudy.testing.world import SimulatedPair

P = PrimaryState


def at_turn(turn: int, strike: Callable[[], None]) -> Callable[[], bool]:
    """Call `strike` before the event loop's turn number `turn` from now; the result tells whether that has been."""
    loop: Any = asyncio.get_running_loop()
    run_once, turns = loop._run_once, 0

    def counted() -> None:
        nonlocal turns
        turns += 1
        if turns == turn:
            strike()
        run_once()

    loop._run_once = counted
    return lambda: turns >= turn


def every_turn(case: Callable[[int], Any], step: int) -> int:
    """Run a case for each turn until its work is over before; return how many turns there were."""
    turn = 1
    while clock.run(case(turn)):
        turn += step
    return turn


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", [Mode.REMUS, Mode.COLO])
@pytest.mark.parametrize("kind", ["silent", "reset", "agent"])
@pytest.mark.parametrize("victim", ["alpha", "beta"])
def test_a_death_at_every_turn_of_two_cycles(victim: str, kind: str, mode: Mode) -> None:
    async def case(turn: int) -> bool:
        async with SimulatedPair(mode=mode, disks=2, seed=turn) as pair:
            await pair.start()
            await pair.protect()
            await pair.epochs(2)
            done = len(pair.reports) + 2
            struck = at_turn(turn, lambda: strike(pair, victim, kind))
            while len(pair.reports) < done and not struck():  # noqa: ASYNC110 - time is virtual
                await asyncio.sleep(0.002)
            if not struck():
                return False
            await asyncio.sleep(0.4)
            await pair.revive(victim)
            await pair.grows(within_s=20)
            await asyncio.sleep(3)
            assert len(pair.runners()) == 1, turn
            pair.check(clean=("alpha", "beta"))
            return True

    assert every_turn(case, rounds(29, 1)) > 60


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["silent", "agent"])
def test_a_second_death_at_every_turn_of_a_takeover(kind: str) -> None:
    async def case(turn: int) -> bool:
        async with SimulatedPair(disks=2, seed=turn) as pair:
            await pair.start()
            await pair.protect()
            await pair.epochs(2)
            pair.crash("alpha", silent=False)
            struck = at_turn(turn, lambda: strike(pair, "beta", kind))
            while not pair.runners() and not struck():  # noqa: ASYNC110 - time is virtual
                await asyncio.sleep(0.002)
            if not struck():
                return False
            await asyncio.sleep(0.5)
            await pair.revive("alpha")
            await pair.revive("beta")
            await asyncio.sleep(5)
            pair.check()
            if not pair.runners():
                await pair.decide()  # nobody may run it by himself any more
            await pair.grows(within_s=10)
            pair.check()
            return True

    assert every_turn(case, rounds(7, 1)) > 20


def strike(pair: SimulatedPair, victim: str, kind: str) -> None:
    pair.crash(victim, agent_only=kind == "agent", silent=kind == "silent")
