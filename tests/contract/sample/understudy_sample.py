"""A NIC subkind on a host of dictionaries, and the bed that its distribution declares for the contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from understudy import (
    DeviceInfo,
    Gate,
    Kind,
    Mode,
    OpenContext,
    Peer,
    ProtectedDevice,
    Subkind,
    Verdict,
    hookimpl,
)
from understudy.device import ReplicationMode
from understudy.services import ServiceKey, Services
from understudy.testing.subkind_kit import SubkindBed, open_context

HOST: ServiceKey[dict[str, Any]] = ServiceKey("sample-host")


class SampleBuffer(ProtectedDevice):
    """Holds what the guest sends until its epoch is committed."""

    def __init__(self, context: OpenContext) -> None:
        self.host = context.services.get(HOST)
        self.side = context.side
        self.closed: list[tuple[int, list[int]]] = []

    async def open(self) -> None:
        # Nothing is made before the last await: an open that fails or is cancelled leaves nothing.
        await asyncio.sleep(0)
        self.host["gate"] = []

    async def postsuspend(self, epoch: int) -> None:
        if self.side is ReplicationMode.PRIMARY:
            self.closed.append((epoch, self.host["gate"]))
            self.host["gate"] = []

    async def commit(self, epoch: int) -> None:
        while self.closed and self.closed[0][0] <= epoch:
            self.host["wire"] += self.closed.pop(0)[1]

    async def teardown(self, verdict: Verdict) -> None:
        gate = self.host.pop("gate", [])
        if verdict is Verdict.KEEP and self.side is ReplicationMode.PRIMARY:
            self.host["wire"] += [number for _, numbers in self.closed for number in numbers] + gate
        self.closed = []


async def open_sample(context: OpenContext) -> ProtectedDevice | None:
    """Claim NICs on hosts of dictionaries."""
    if not context.services.has(HOST):
        return None
    device = SampleBuffer(context)
    await device.open()
    return device


SAMPLE = Subkind(
    "sample-buffer", Kind.NIC, frozenset({Mode.REMUS}), open_sample, needs=frozenset({Gate.POSTSUSPEND})
)


@hookimpl
def understudy_subkinds() -> Iterable[Subkind]:
    """Offer the sample."""
    return [SAMPLE]


class SampleBed(SubkindBed):
    """Two hosts of dictionaries."""

    subkind = SAMPLE

    def __init__(self) -> None:
        self.hosts: dict[ReplicationMode, dict[str, Any]] = {side: {"wire": []} for side in ReplicationMode}

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        device = DeviceInfo(Kind.NIC, "nic0", 0, "sample")
        return open_context(device, side, peer, services=Services((HOST, self.hosts[side])))

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        return list(self.hosts[side])

    async def send(self, number: int) -> None:
        self.hosts[ReplicationMode.PRIMARY]["gate"].append(number)

    async def escaped(self) -> Sequence[int]:
        return self.hosts[ReplicationMode.PRIMARY]["wire"]  # type: ignore[no-any-return]


@asynccontextmanager
async def make_bed() -> AsyncIterator[SubkindBed]:
    """Make a world; declared in the entry-point group ``understudy.testing``."""
    yield SampleBed()
