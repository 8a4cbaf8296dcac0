"""Simulated subkinds: NICs that hold or compare output, disks that travel with the stream or by their own way."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from understudy.device import (
    Decline,
    Kind,
    Mode,
    OpenContext,
    ProtectedDevice,
    ReplicationMode,
    Subkind,
    Verdict,
)
from understudy.device import Gate as Waits
from understudy.testing.history import Memory
from understudy.testing.simhost import SIMULATED_HOST, Gate

__all__ = ["SimulatedCompare", "SimulatedDisk", "SimulatedNic", "simulated_subkinds"]

Json = Mapping[str, Any]
PRIMARY = ReplicationMode.PRIMARY


class _Simulated(ProtectedDevice):
    # What both kinds share: where they are, and the scripts of their steps.

    __slots__ = ("guest", "here", "host", "mode", "name", "peer", "session")

    def __init__(self, here: OpenContext) -> None:
        self.here = here
        self.host = here.services.get(SIMULATED_HOST)
        self.guest = here.guest
        self.name = here.device.name
        self.session = here.session
        self.mode = here.mode
        self.peer = here.peer

    async def at(self, step: str, takes_s: float | None = None) -> None:
        """Take the time of a step and do what its script says: ``"primary.nic0.start"``."""
        side = self.here.side.value
        await self.host.at(
            f"{side}.{self.name}.{step}", self.host.latency.step_s if takes_s is None else takes_s
        )


class SimulatedNic(_Simulated):
    """Holds output until it is acknowledged; what lets it wait is said by the subclass."""

    __slots__ = ("gate",)

    def __init__(self, here: OpenContext) -> None:
        super().__init__(here)
        self.gate: Gate | None = None

    async def start(self, side: ReplicationMode) -> None:
        """Put the gate above the stopped guest."""
        await self.at("start")
        process = self.host.guests.get(self.guest)
        if side is PRIMARY and process is not None:
            self.gate = Gate(process, self.name, self.session)
            process.gates[self.name] = self.host.gates[self.guest, self.name] = self.gate

    async def error(self) -> None:
        """Raise what the script says."""
        await self.at("error", 0.0)

    async def commit(self, epoch: int) -> None:
        """Let out what is before the epoch's barrier."""
        if self.gate is not None:
            await self.at("commit")
            self.gate.commit(epoch)

    async def teardown(self, verdict: Verdict) -> None:
        """Remove the gate."""
        gate, self.gate = self.gate, None
        try:
            await self.at("teardown")
        finally:
            if gate is not None and self.host.gates.get((self.guest, self.name)) is gate:
                gate.open() if verdict is Verdict.KEEP else gate.drop()

    async def barrier(self, epoch: int, step: str) -> None:
        """Put the barrier of an epoch, on the primary."""
        if self.here.side is PRIMARY and self.gate is not None:
            await self.at(step)
            self.gate.mark(epoch)

    def counters(self) -> Mapping[str, int | float]:
        """Return how much is held."""
        return {"held_packets": len(self.gate.held)} if self.gate is not None else {}


class _AtPostsuspend(SimulatedNic):
    __slots__ = ()

    async def postsuspend(self, epoch: int) -> None:
        await self.barrier(epoch, "postsuspend")


class _AtCheckpoint(SimulatedNic):
    __slots__ = ()

    async def checkpoint(self, epoch: int) -> None:
        await self.barrier(epoch, "checkpoint")


class _AtPreresume(SimulatedNic):
    __slots__ = ()

    async def preresume(self, epoch: int) -> None:
        await self.barrier(epoch, "preresume")


class SimulatedCompare(SimulatedNic):
    """Lets output out that the running copy has produced too; the hypervisor tells what that is."""

    __slots__ = ("theirs",)

    def __init__(self, here: OpenContext) -> None:
        super().__init__(here)
        self.theirs: dict[int, int] = {}  #: the copy's output since the last checkpoint, count → digest

    def compare(self) -> bool:
        """Let out what is equal on both sides, and tell whether something differs."""
        gate = self.gate
        while gate is not None and gate.held and gate.held[0].number in self.theirs:
            packet = gate.held[0]
            if self.theirs[packet.number] != packet.digest:
                return True
            gate.release_through(packet.number, 0)
        return False

    def checkpointed(self, count: int, epoch: int) -> None:
        """Let out what an acknowledged checkpoint explains; what the copy produced before it says nothing more."""
        self.theirs.clear()
        if self.gate is not None:
            self.gate.release_through(count, epoch)

    async def commit(self, epoch: int) -> None:
        """Leave it to the comparison."""


class SimulatedDisk(_Simulated):
    """Keeps the secondary's disk one checkpoint behind, with the way back until the commit.

    Args:
        here: As for `Subkind.open`.
        by_peer: Its content goes to its other half by itself, not with the hypervisor's stream.
    """

    __slots__ = ("by_peer", "committed", "held", "taken")

    def __init__(self, here: OpenContext, *, by_peer: bool) -> None:
        super().__init__(here)
        self.by_peer = by_peer
        self.held: dict[int, Memory] = {}  #: secondary: content at each checkpoint since the last commit
        self.taken: int | None = None  #: secondary: the checkpoint that it would promote
        self.committed = 0

    def content(self) -> Memory:
        """Return what is on this host's disk."""
        return self.host.disk(self.guest, self.name)

    def arrived(self, epoch: int, content: Memory) -> None:
        """Keep the content at a checkpoint; a number seen before is a new try."""
        self.held[epoch] = content

    async def start(self, side: ReplicationMode) -> None:
        """Bring the other half to what is on this disk now."""
        await self.at("start")
        if side is PRIMARY and self.by_peer:
            await self.peer.request("cut", {"epoch": 0, "content": list(self.content())}, timeout_s=5)

    async def checkpoint(self, epoch: int) -> None:
        """Take in the checkpoint."""
        if self.here.side is not PRIMARY:
            await self.at("checkpoint")
            if epoch not in self.held:
                raise OSError(f"{self.name} was not told the content at epoch {epoch}")
            self.taken = epoch

    async def error(self) -> None:
        """Raise what the script says."""
        await self.at("error", 0.0)

    async def commit(self, epoch: int) -> None:
        """Give up the way back to older checkpoints."""
        if self.here.side is not PRIMARY:
            await self.at("commit")
            self.committed = epoch
            self.held = {each: content for each, content in self.held.items() if each >= epoch}

    async def stop(self, *, failover: bool) -> None:
        """Make the disk what the taken checkpoint says, on the secondary that goes on."""
        await self.at("stop")
        if failover and self.here.side is not PRIMARY and self.taken is not None:
            process = self.host.guests.get(self.guest)
            content = self.held[self.taken]
            if self.mode is Mode.COLO and process is not None and process.overlay:
                content = process.overlay.get(self.name, content)
            self.host.touched.add(self.guest)
            self.host.disks[self.guest, self.name] = content

    async def teardown(self, verdict: Verdict) -> None:
        """Forget what is held."""
        del verdict
        await self.at("teardown")
        self.held.clear()

    async def serve(self, method: str, params: Json) -> Json:
        """Take the content at the end of an epoch from the other half."""
        if method != "cut":
            return await super().serve(method, params)
        await self.at("cut")
        count, digest, parent = params["content"]
        self.arrived(int(params["epoch"]), Memory(count, digest, parent))
        return {}


class _ByPeer(SimulatedDisk):
    __slots__ = ()

    async def postsuspend(self, epoch: int) -> None:
        if self.here.side is PRIMARY:
            await self.at("postsuspend")
            await self.peer.request("cut", {"epoch": epoch, "content": list(self.content())}, timeout_s=5)


async def _open(make: type[_Simulated], here: OpenContext) -> ProtectedDevice | Decline:
    if not here.services.has(SIMULATED_HOST):
        return Decline("the hypervisor is no simulation")
    device = make(here) if not issubclass(make, SimulatedDisk) else make(here, by_peer=make is _ByPeer)
    if here.device.kind is Kind.DISK and here.side is PRIMARY:
        for tenth in range(10):
            here.progress(here.device.name, tenth, 10)
            await device.at("open", device.host.latency.mirror_s / 10)
    else:
        await device.at("open")
    return device


def simulated_subkinds() -> tuple[Subkind, ...]:
    """Return all simulated subkinds: in mode remus one NIC for each gate that a hypervisor may have."""
    remus, colo = frozenset({Mode.REMUS}), frozenset({Mode.COLO})
    nics = (
        (_AtPostsuspend, Waits.POSTSUSPEND),
        (_AtCheckpoint, Waits.CHECKPOINT),
        (_AtPreresume, Waits.PRERESUME),
    )
    buffers = tuple(
        Subkind(
            name=f"simulated-buffer-{gate.value}",
            kind=Kind.NIC,
            modes=remus,
            open=partial(_open, make),
            priority=10 + place,
            needs=frozenset({gate}),
        )
        for place, (make, gate) in enumerate(nics)
    )
    compare = Subkind("simulated-compare", Kind.NIC, colo, partial(_open, SimulatedCompare), priority=20)
    drbd = Subkind(
        "simulated-drbd",
        Kind.DISK,
        remus,
        partial(_open, _ByPeer),
        priority=10,
        needs=frozenset({Waits.POSTSUSPEND}),
    )
    stream = Subkind(
        "simulated-replication", Kind.DISK, remus | colo, partial(_open, SimulatedDisk), priority=20
    )
    return (*buffers, compare, drbd, stream)
