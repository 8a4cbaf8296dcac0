"""The contract, run on the subkinds of devices that an operator leaves unprotected."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from understudy.device import DeviceInfo, Kind, OpenContext, Peer, ReplicationMode, Subkind
from understudy.testing import clock
from understudy.testing.subkind_bed import SubkindBed, open_context
from understudy.testing.subkind_kit import CHECKS, check_subkind
from understudy_xen.unprotected import UNBUFFERED, UNREPLICATED

DEVICES = {Kind.DISK: "disk0", Kind.NIC: "nic0"}


@pytest.mark.parametrize("subkind", [UNREPLICATED, UNBUFFERED], ids=lambda subkind: subkind.name)
def test_the_contract(subkind: Subkind) -> None:
    class Bed(SubkindBed):
        def __init__(self) -> None:
            self.subkind = subkind

        def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
            device = DeviceInfo(subkind.kind, DEVICES[subkind.kind], 0, "xen", subkind.name)
            return open_context(device, side, peer)

    @asynccontextmanager
    async def make() -> AsyncIterator[SubkindBed]:
        yield Bed()

    ran = clock.run(check_subkind(make))
    # Nothing can fail here, and that output leaves at once is what the operator has been told.
    assert set(CHECKS) - set(ran) <= {"error-told", "output-commit"}
