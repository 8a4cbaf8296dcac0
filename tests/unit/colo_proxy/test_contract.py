"""The subkind colo-proxy keeps the contract, on a model of QEMU's monitor and with real sockets."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import pytest

from tests.unit.colo_proxy.qemu_model import Qemu
from understudy.device import DeviceInfo, Kind, Mode, OpenContext, Peer, ReplicationMode
from understudy.services import MONITOR, Services
from understudy.testing.subkind_kit import CHECKS, SubkindBed, check_subkind, open_context
from understudy_colo_proxy.options import ColoProxyOptions
from understudy_colo_proxy.subkind import COLO_PROXY

PRIMARY = ReplicationMode.PRIMARY
DEVICE = DeviceInfo(
    Kind.NIC, "nic0", 0, "qemu", properties={"netdev": "nic0", "tap": "none", "vnet_hdr": True}
)


class Bed(SubkindBed):
    """One interface of a guest, on two hosts."""

    subkind = COLO_PROXY

    def __init__(self) -> None:
        self.qemus = {side: Qemu() for side in ReplicationMode}
        self.torn_down: set[ReplicationMode] = set()
        self.qemus[PRIMARY].copy = self.qemus[ReplicationMode.SECONDARY]

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        services = Services((MONITOR, self.qemus[side]))
        # The filter for what cannot be compared needs root and a tap; test_uncompared.py has both.
        options = ColoProxyOptions(uncompared_ipv6="allow")
        made = open_context(DEVICE, side, peer, mode=Mode.COLO, services=services, options=options)
        return dataclasses.replace(made, local_address="127.0.0.1", peer_address="127.0.0.1")

    async def before(self, step: str, side: ReplicationMode, epoch: int) -> None:
        qemu = self.qemus[side]
        if step == "postsuspend" and side is PRIMARY and not qemu.replicating:
            qemu.replicating = True
            qemu.checkpoint()
        if step == "teardown":
            qemu.commands.clear()
            self.torn_down.add(side)

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        qemu = self.qemus[side]
        asked = {command for command, _ in qemu.commands}
        if side in self.torn_down and not asked & {"object-del", "chardev-remove", "query-chardev"}:
            qemu.die()  # nothing was removed: the verdict was DISCARD, and the guest is dead
        # A guest that took over keeps its rewriter.
        return [name for name in (*qemu.objects, *qemu.chardevs, *qemu.fds) if "rewriter" not in name]


@asynccontextmanager
async def make() -> AsyncIterator[Bed]:
    bed = Bed()
    try:
        yield bed
    finally:
        for qemu in bed.qemus.values():
            if not qemu.dead:
                qemu.die()


async def cut_the_wire(bed: SubkindBed) -> None:
    assert isinstance(bed, Bed)
    bed.qemus[ReplicationMode.SECONDARY].die()


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "output-commit"])
async def test_contract(check: str) -> None:
    ran = await check_subkind(make, broken=cut_the_wire, step_s=10.0, faults=12, only=(check,))
    assert ran == (check,)
