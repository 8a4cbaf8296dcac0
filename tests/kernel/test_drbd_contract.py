"""The subkind under the contract kit, on a real DRBD pair."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import pytest

from tests.kernel.drbdpair import SECONDARY, DrbdPair
from tests.testbeds.rounds import LONG
from understudy.device import OpenContext, Peer, ReplicationMode
from understudy.testing.subkind_kit import SubkindBed, check_subkind
from understudy_drbd.dm import MapperRefused
from understudy_drbd.subkind import DRBD
from understudy_drbd.thin import ThinVolume

pytestmark = pytest.mark.kernel


class Bed(SubkindBed):
    subkind = DRBD

    def __init__(self, pair: DrbdPair) -> None:
        self.pair = pair

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        return self.pair.context(side, peer)

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        if side is not SECONDARY:
            return ()
        pool = self.pair.pool
        volume = ThinVolume.find(pool.mapper, self.pair.lower[SECONDARY])
        found = ["suspended"] if pool.mapper.status(volume.number).suspended else []
        for epoch in range(3):
            # The pool lists no ids, but a snapshot of one that is not there is refused.
            try:
                pool.mapper.message(pool.name, f"create_snap 5 {volume.cut_id(epoch)}")
            except MapperRefused as error:
                if error.errno != errno.ENODATA:
                    raise
            else:
                pool.mapper.message(pool.name, "delete 5")
                found.append(f"cut {volume.cut_id(epoch):#x}")
        return found


async def broken(bed: SubkindBed) -> None:
    assert isinstance(bed, Bed)
    await (await bed.pair.control(SECONDARY)).disconnect()


# The disk holds no output of the guest's. The long ones make the pair anew for every fault.
LONG_CHECKS = ("faults", "teardown-at-any-time") if LONG else ()
SHORT_CHECKS = ("descriptor", "probe", "life", "unknown-request", "teardown-twice", "failover", "error-told")


@pytest.mark.parametrize("check", [*SHORT_CHECKS, *LONG_CHECKS])
@pytest.mark.timeout(1500 if LONG else 180)
async def test_the_contract(made: DrbdPair, check: str) -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[SubkindBed]:
        await made.begin()
        yield Bed(made)

    ran = await check_subkind(make, broken=broken, epochs=1, faults=2, only={check})
    assert ran == (check,)
