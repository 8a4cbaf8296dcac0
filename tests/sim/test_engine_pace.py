"""A device that cannot hold the guest's output any longer has the next checkpoint begin at once."""

from __future__ import annotations

import asyncio

import pytest

from understudy.engine.primary import PrimarySession
from understudy.errors import StateError
from understudy.services import PACE, ServiceKey, Services
from understudy.testing.clock import in_virtual_time
from understudy.testing.world import SimulatedPair


def engine_of(pair: SimulatedPair) -> PrimarySession:
    driver = pair.sites["alpha"].driver
    assert isinstance(driver, PrimarySession)
    return driver


def test_a_hurried_checkpoint_begins_at_once_and_the_next_one_at_its_time() -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with SimulatedPair() as pair:
            pair.period_ms = 1000.0
            await pair.start()
            await pair.protect()
            group = engine_of(pair).group
            assert group
            await pair.epochs(1)
            took_s = []
            for hurried in (True, False, True):
                began = asyncio.get_running_loop().time()
                if hurried:
                    group.setup.services.get(PACE).hurry()
                await pair.epochs(1)
                took_s.append(asyncio.get_running_loop().time() - began)
            assert took_s[0] < 0.5 < took_s[1]
            assert took_s[2] < 0.5

    scenario()


def test_a_service_that_is_added_goes_before_the_old_one() -> None:
    one: ServiceKey[int] = ServiceKey("one")
    two: ServiceKey[int] = ServiceKey("two")
    services = Services((one, 1))
    more = services.plus((one, 11), (two, 2))
    assert (more.get(one), more.get(two)) == (11, 2)
    assert services.get(one) == 1
    with pytest.raises(StateError, match="offered: one"):
        services.get(two)
