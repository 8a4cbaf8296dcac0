"""The subkind ``netbuffer`` keeps the contract, on a real kernel: with a fault at every await, and both verdicts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from tests.kernel.netbuffer_bed import Lan, device, interfaces, run
from understudy.device import OpenContext, Peer, ReplicationMode
from understudy.testing.subkind_kit import CHECKS, SubkindBed, check_subkind, open_context
from understudy_netbuffer.options import NetbufferOptions
from understudy_netbuffer.subkind import NETBUFFER

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]

OPTIONS = NetbufferOptions(limit_bytes=65_536, when_full="unprotect")
FLAGS = Path("/sys/class/net/vif0/flags")


def qdiscs() -> list[str]:
    """Return the kinds of the qdiscs of the guest's interface."""
    with IPRoute() as ip:
        return [str(each.get_attr("TCA_KIND")) for each in ip.get_qdiscs(index=socket.if_nametoindex("vif0"))]


def is_up() -> bool:
    """Tell whether the guest's interface is up."""
    return bool(int(FLAGS.read_text(encoding="ascii"), 16) & 1)


class Bed(SubkindBed):
    """One interface of a guest on a bridge that lives longer than it."""

    subkind = NETBUFFER

    def __init__(self, lan: Lan) -> None:
        self.lan = lan
        self._escaped: list[int] = []

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        return open_context(device(), side, peer, options=OPTIONS)

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        if side is ReplicationMode.SECONDARY:
            return ()
        return [*interfaces(), *await asyncio.to_thread(qdiscs)]

    async def send(self, number: int) -> None:
        # A mark takes the same way through the host behind it: when it arrives, this has come to the gate.
        self.lan.send(0, [number])
        self._escaped += await self.lan.numbers()

    async def escaped(self) -> Sequence[int]:
        self._escaped += await self.lan.numbers()
        return list(self._escaped)


async def test_it_keeps_the_contract() -> None:
    with Lan() as lan:

        @asynccontextmanager
        async def make() -> AsyncIterator[SubkindBed]:
            if not is_up():  # a verdict of DISCARD has brought it down
                await asyncio.to_thread(run, "ip", "link", "set", "vif0", "up")
            yield Bed(lan)

        async def overfilled(bed: SubkindBed) -> None:
            lan.send(0, range(70), size=1000)
            await lan.outside()

        ran = await check_subkind(make, broken=overfilled, epochs=2)
        assert set(ran) == set(CHECKS)
