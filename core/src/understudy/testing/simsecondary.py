"""The secondary's side of the simulated hypervisor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from understudy.arbiter import Record, RecordState
from understudy.device import Mode, ReplicationMode
from understudy.errors import HypervisorError
from understudy.hypervisor import DomainEvent, DomainEventKind, GuestState, SecondaryDomain
from understudy.services import Channels, Services
from understudy.testing.history import BORN, Memory
from understudy.testing.simdevices import SimulatedDisk
from understudy.testing.simhost import SIMULATED_HOST, SimulatedGuest, SimulatedHost
from understudy.testing.simstream import Json, Stream

if TYPE_CHECKING:
    from understudy.group import DeviceGroup

__all__ = ["SimulatedSecondary"]

ACCEPT_S = 60.0


class SimulatedSecondary(SecondaryDomain):
    """The copy during one session.

    Args:
        host: Where it is.
        guest: Whose copy.
        mode: How the guest is protected.
        disks: Names of its disks.
    """

    def __init__(self, host: SimulatedHost, guest: str, mode: Mode, disks: Sequence[str]) -> None:
        self.host = host
        self.guest = guest
        self.mode = mode
        self._disks = tuple(disks)
        self._services = Services((SIMULATED_HOST, host))
        self._process: SimulatedGuest | None = None
        self._group: DeviceGroup | None = None
        self._stream: Stream | None = None
        self._begun: asyncio.Future[None] | None = None
        self._loading: set[asyncio.Task[None]] = set()
        self._events: asyncio.Queue[DomainEvent | None] = asyncio.Queue()
        self._severed = False
        self._loaded = 0

    @property
    def services(self) -> Services:
        """The host."""
        return self._services

    async def launch(self, group: DeviceGroup) -> None:
        """Make the copy, without an outlet."""
        await self.host.at("secondary.launch", self.host.latency.launch_s)
        if self.guest in self.host.guests:
            raise HypervisorError(f"guest {self.guest} exists on {self.host.name} already")
        process = SimulatedGuest(self.host, self.guest, BORN, self._disks, incoming=True)
        process.listeners.append(self._events.put_nowait)
        self.host.guests[self.guest] = self._process = process
        self._group = group

    async def receive(self, channels: Channels, group: DeviceGroup) -> None:
        """Accept the stream, load the first copy."""
        sock = await channels.accept("checkpoints", timeout_s=ACCEPT_S)
        self._begun = asyncio.get_running_loop().create_future()
        try:
            await group.start_all(ReplicationMode.SECONDARY)
        except BaseException:
            sock.close()
            raise
        self._stream = await Stream.on(sock, self._take, self._lost)
        await self._begun

    async def sever(self, reason: str) -> int:
        """Cut the stream; what is half loaded is not loaded."""
        del reason
        self._severed = True
        self._end()
        await self.host.at("secondary.sever")
        return self._loaded

    async def promote(self, group: DeviceGroup, won: Record) -> None:
        """Make memory and disks agree."""
        host, process = self.host, self._need()
        if won.state is not RecordState.PROMOTING or won.standby != host.name:
            host.network.accuse(f"{host.name} promotes {self.guest} by the record {won}")
        if not self._severed:
            host.network.accuse(f"{host.name} promotes {self.guest} with its stream open")
        process.stop()
        await host.at("secondary.promote", host.latency.promote_s)
        if group.checkpointed < self._loaded:
            # The primary died between the memory's checkpoint and the devices'.
            await group.do_checkpoint_all(self._loaded)
        await group.stop_all(failover=True)
        process.overlay = None
        for disk in self._disks:
            if host.disk(self.guest, disk) != process.memory:
                host.network.accuse(
                    f"I3: {disk} holds {host.disk(self.guest, disk)}, the memory is {process.memory}"
                )
        process.state = GuestState.PAUSED

    async def open_outlet(self, won: Record) -> None:
        """Connect, announce, run."""
        host, process = self.host, self._need()
        if won.state is not RecordState.ALONE or won.owner != host.name:
            host.network.accuse(f"{host.name} opens {self.guest}'s outlet by the record {won}")
        await host.at("secondary.open_outlet", host.latency.outlet_s)
        process.outlet = True
        host.touched.discard(self.guest)
        host.network.announce(host.name, self.guest)
        process.resume()

    async def discard(self) -> None:
        """Kill the copy."""
        self._severed = True
        self._end()
        await self.host.at("secondary.discard", self.host.latency.kill_s)
        if self._process is not None:
            self._process.kill()

    async def watch(self) -> AsyncIterator[DomainEvent]:
        """Yield what happens, until `close`."""
        while (event := await self._events.get()) is not None:
            yield event

    async def close(self) -> None:
        """Let go of the stream and the copy."""
        self._end()
        if self._process is not None and self._events.put_nowait in self._process.listeners:
            self._process.listeners.remove(self._events.put_nowait)
        self._events.put_nowait(None)

    # --- The stream ----------------------------------------------------------------------------------------------

    def _need(self) -> SimulatedGuest:
        if self._process is None or self._process.state is GuestState.ABSENT:
            raise HypervisorError(f"the copy of {self.guest} is dead")
        return self._process

    def _take(self, message: Json) -> None:
        task = asyncio.get_running_loop().create_task(self._load(message), name=f"{self.guest}: load")
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)

    async def _load(self, message: Json) -> None:
        host = self.host
        try:
            await host.at(f"secondary.{message['t']}")
            await host.at("secondary.load", host.latency.load_s)
            process = self._need()
        except Exception as error:  # noqa: BLE001 - a checkpoint that cannot be loaded breaks the stream
            if self._stream is not None and self._stream.alive:
                self._stream.cut()
                self._lost(f"a checkpoint could not be loaded: {error}")
            return
        if self._severed or self._stream is None or not self._stream.alive or self._group is None:
            return
        # From here to the answer there is no await: a checkpoint is loaded whole or not at all.
        epoch = int(message.get("epoch", 0))
        memory = Memory(*message["memory"])
        for name, content in message["disks"].items():
            device = self._group.devices.get(name)
            if isinstance(device, SimulatedDisk):
                device.arrived(epoch, Memory(*content))
        process.memory = memory
        process.overlay = {}
        answer: dict[str, object] = {"t": message["t"]}
        if message["t"] == "begin":
            answer["completed"] = "completed" in host.scripts
            if self._begun is not None and not self._begun.done():
                self._begun.set_result(None)
        else:
            self._loaded = epoch
            session = self._group.setup.session
            host.network.held(self.guest, session, memory)
            self._events.put_nowait(
                DomainEvent(DomainEventKind.CHECKPOINT, f"checkpoint {epoch}", self._loaded)
            )
        if self.mode is Mode.COLO:
            process.output = self._output
            process.resume()
        self._stream.send(answer)
        await host.at("secondary.loaded")

    def _output(self, memory: Memory) -> None:
        # A copy that runs: what it produces is compared on the primary.
        if self._stream is not None and self._stream.alive and self._group is not None:
            self.host.network.produced(self.guest, self._group.setup.session, memory)
            self._stream.send({"t": "output", "count": memory.number, "digest": memory.digest})

    def _lost(self, reason: str) -> None:
        if self._begun is not None and not self._begun.done():
            self._begun.set_exception(HypervisorError(reason))
        if not self._severed:
            self._events.put_nowait(DomainEvent(DomainEventKind.STREAM_LOST, reason))

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.cut()
        if self._begun is not None and not self._begun.done():
            self._begun.set_exception(HypervisorError("the checkpoint stream was cut"))
            self._begun.exception()  # whoever waits for it is told; nobody may be
        for task in self._loading:
            task.cancel()
