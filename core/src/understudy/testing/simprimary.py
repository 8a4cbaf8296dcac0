"""The primary's side of the simulated hypervisor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from understudy.device import Gate, Mode, Progress, ReplicationMode
from understudy.errors import HypervisorError, NotReplicating
from understudy.hypervisor import DomainEvent, DomainEventKind, GuestState, Phases, PrimaryDomain
from understudy.report import Checkpoint
from understudy.services import Channels, Services
from understudy.testing.history import Memory
from understudy.testing.simdevices import SimulatedCompare, SimulatedDisk
from understudy.testing.simhost import SIMULATED_HOST, SimulatedGuest
from understudy.testing.simstream import Json, Stream

if TYPE_CHECKING:
    from understudy.group import DeviceGroup

__all__ = ["ACKNOWLEDGE_S", "SimulatedPrimary"]

ACKNOWLEDGE_S = 2.0  # how long the acknowledgement of one checkpoint may take
CONNECT_S = 5.0
CALM_S = 1.0  # in mode colo a checkpoint is taken at least this often


class SimulatedPrimary(PrimaryDomain):
    """The guest during one session.

    Args:
        process: The guest.
        mode: How it is protected.
        gates: At which phases it waits for the devices.
        early_resume: It runs again before the acknowledgement where no gate is in the way.
    """

    def __init__(
        self, process: SimulatedGuest, mode: Mode, gates: frozenset[Gate], *, early_resume: bool
    ) -> None:
        self.process = process
        self.host = process.host
        self.mode = mode
        self._gates = gates
        # In mode colo what the copy produced before the checkpoint must not be compared with what comes after it.
        self._early = early_resume and mode is not Mode.COLO
        self._services = Services((SIMULATED_HOST, self.host))
        self._stream: Stream | None = None
        self._answers: dict[str, asyncio.Future[Json]] = {}
        self._differs = asyncio.Event()
        self._group: DeviceGroup | None = None
        self._events: asyncio.Queue[DomainEvent | None] = asyncio.Queue()
        self._frozen = False
        process.listeners.append(self._events.put_nowait)

    @property
    def gates(self) -> frozenset[Gate]:
        """The gates it was made with."""
        return self._gates

    @property
    def services(self) -> Services:
        """The host."""
        return self._services

    @property
    def paced(self) -> bool:
        """Mode colo checkpoints by itself."""
        return self.mode is not Mode.COLO

    async def replicate(self, group: DeviceGroup, channels: Channels, progress: Progress) -> None:
        """Send the memory, start the devices while the guest is stopped, run on behind the gates."""
        process, host = self.process, self.host
        sock = await channels.connect("checkpoints", timeout_s=CONNECT_S)
        self._stream = await Stream.on(sock, self._take, self._lost)
        try:
            for tenth in range(10):
                progress("memory", tenth, 10)
                await host.at("primary.copy", host.latency.memory_s / 10)
            process.stop()
            await group.start_all(ReplicationMode.PRIMARY)
            self._group = group
            await host.at("primary.replicate", host.latency.suspend_s)
            answer = await self._ask("begin", {"memory": list(process.memory), **self._disks()})
            if answer.get("completed"):
                raise NotReplicating("the copy ended as a plain migration")
        except BaseException:
            self._end("it could not be begun")
            process.resume()
            raise
        self._run()

    async def checkpoint(self, epoch: int, phases: Phases) -> Checkpoint:
        """Stop the guest, have the copy load what it is now, run on."""
        process, host = self.process, self.host
        if not self.paced:
            with suppress(TimeoutError):
                async with asyncio.timeout(CALM_S):
                    await self._differs.wait()
            self._differs.clear()
        self._need_stream()
        stopped_ns = time.monotonic_ns()
        process.stop()
        await host.at("primary.checkpoint", host.latency.suspend_s)
        if Gate.POSTSUSPEND in self._gates:
            await phases.postsuspend(epoch)
        memory = process.memory
        asking = asyncio.ensure_future(
            self._ask("checkpoint", {"epoch": epoch, "memory": list(memory), **self._disks()})
        )
        try:
            if self._early and Gate.CHECKPOINT not in self._gates:
                resumed_ns = await self._resume(epoch, phases)
                await asking
                acknowledged_ns = self._acknowledged(memory, epoch)
                await phases.checkpoint(epoch)
            else:
                await asking
                acknowledged_ns = self._acknowledged(memory, epoch)
                if Gate.CHECKPOINT in self._gates:
                    await phases.checkpoint(epoch)
                resumed_ns = await self._resume(epoch, phases)
                if Gate.CHECKPOINT not in self._gates:
                    await phases.checkpoint(epoch)
            await phases.postresume(epoch)
        finally:
            asking.cancel()
        return Checkpoint(epoch, stopped_ns, resumed_ns, acknowledged_ns, gated=True)

    async def hurry(self) -> None:
        """Take the next checkpoint of mode colo now."""
        self._differs.set()

    async def sever(self, reason: str) -> None:
        """Cut the stream."""
        self._end(reason)
        await self.host.at("primary.sever")

    async def resume_alone(self, group: DeviceGroup) -> None:
        """Leave replication and run."""
        await self.host.at("primary.resume_alone")
        try:
            await group.stop_all(failover=True)
        finally:
            self._frozen = False  # if it was fenced: the standby gave the guest back
            self._run()

    async def freeze(self) -> None:
        """Stop the guest for good."""
        self._frozen = True
        self.process.stop()
        await self.host.at("primary.freeze")

    async def discard(self) -> None:
        """Interfaces down, then the guest killed."""
        self.process.outlet = False
        await self.host.at("primary.discard", self.host.latency.kill_s)
        self.process.kill()

    async def watch(self) -> AsyncIterator[DomainEvent]:
        """Yield what the guest does, until `close`."""
        while (event := await self._events.get()) is not None:
            yield event

    async def close(self) -> None:
        """Let go of the stream and the guest."""
        self._end("the session is closed")
        if self._events.put_nowait in self.process.listeners:
            self.process.listeners.remove(self._events.put_nowait)
        self._events.put_nowait(None)

    # --- Private -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if not self._frozen:
            self.process.resume()

    async def _resume(self, epoch: int, phases: Phases) -> int:
        if Gate.PRERESUME in self._gates:
            await phases.preresume(epoch)
        self._need_stream()
        self._run()
        return time.monotonic_ns()

    def _acknowledged(self, memory: Memory, epoch: int) -> int:
        # The comparison lets out by itself what the checkpoint explains, as QEMU does.
        for device in self._compares():
            device.checkpointed(memory.number, epoch)
        return time.monotonic_ns()

    def _compares(self) -> list[SimulatedCompare]:
        devices = self._group.devices.values() if self._group is not None else ()
        return [device for device in devices if isinstance(device, SimulatedCompare)]

    def _disks(self) -> dict[str, Any]:
        group = self._group
        carried = {
            name: list(device.content())
            for name, device in (group.devices.items() if group is not None else ())
            if isinstance(device, SimulatedDisk) and not device.by_peer
        }
        return {"disks": carried}

    def _need_stream(self) -> None:
        if self._stream is None or not self._stream.alive:
            raise HypervisorError("the checkpoint stream is broken")

    async def _ask(self, what: str, facts: dict[str, Any]) -> Json:
        self._need_stream()
        assert self._stream is not None  # noqa: S101 - that is what was needed
        answer: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._answers[what] = answer
        self._stream.send({"t": what, **facts})
        try:
            async with asyncio.timeout(ACKNOWLEDGE_S):
                return await answer
        except TimeoutError:
            self._end("no acknowledgement")
            raise HypervisorError(f"no acknowledgement within {ACKNOWLEDGE_S:g} s") from None
        finally:
            self._answers.pop(what, None)

    def _take(self, message: Json) -> None:
        if message["t"] == "output":
            for device in self._compares():
                device.theirs[message["count"]] = message["digest"]
                if device.compare():
                    self._differs.set()
            return
        answer = self._answers.get(message["t"])
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _lost(self, reason: str) -> None:
        self._end(reason)
        if self.process.state is not GuestState.ABSENT:
            self._events.put_nowait(DomainEvent(DomainEventKind.STREAM_LOST, reason))

    def _end(self, reason: str) -> None:
        if self._stream is not None:
            self._stream.cut()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(HypervisorError(f"the checkpoint stream was cut: {reason}"))
