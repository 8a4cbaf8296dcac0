"""Two agents in one process, with real links, sockets and an arbiter's directory, and a hypervisor made of nothing.

The fake hypervisor's guests are entries of a dictionary that all hosts share and no agent forgets: a guest outlives its
agent. Its stream is real: a byte per checkpoint over a channel, a byte back for the acknowledgement.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from understudy.agent.agent import Agent
from understudy.agent.control import Call
from understudy.arbiter import Record, RecordState
from understudy.arbiter_directory import understudy_arbiters
from understudy.builtin import understudy_intervals
from understudy.config import read_config
from understudy.device import (
    DeviceInfo,
    Finding,
    Gate,
    Kind,
    Mode,
    OpenContext,
    ProbeContext,
    Progress,
    ProtectedDevice,
    ReplicationMode,
    Severity,
    Subkind,
    Verdict,
)
from understudy.engine import Limits
from understudy.errors import HypervisorError, MonitorSilent
from understudy.group import DeviceGroup
from understudy.hookspecs import ArbiterOffer, HypervisorOffer, IntervalOffer, hookimpl
from understudy.hypervisor import (
    DomainEvent,
    DomainEventKind,
    FoundGuest,
    GuestConfig,
    GuestState,
    HostContext,
    Hypervisor,
    Phases,
    PrimaryDomain,
    Protection,
    SecondaryDomain,
)
from understudy.plugins import PluginInfo, Plugins
from understudy.report import Checkpoint
from understudy.schema import Table
from understudy.services import Channels, Services

HOST = "127.0.0.1"
LIMITS = Limits(retry_s=0.05, prepare_s=5, peer_s=2, cut_s=2, end_s=3, promote_s=5, start_s=3)


@dataclass
class World:
    """All hosts."""

    guests: dict[tuple[str, str], GuestState] = field(default_factory=dict)
    outlets: dict[tuple[str, str], bool] = field(default_factory=dict)  # may its output leave?
    foreign: dict[str, list[FoundGuest]] = field(default_factory=dict)
    swept: list[tuple[str, str, str]] = field(default_factory=list)
    found: list[Finding] = field(default_factory=list)  # what every probe finds
    slow_copy_s: float = 0.0  # how long an initial copy takes
    copying: asyncio.Event = field(default_factory=asyncio.Event)
    fail: set[str] = field(default_factory=set)  # names of steps that fail
    hold_sweep: asyncio.Event | None = None  # what a janitor waits for
    open_devices: list[tuple[str, str]] = field(default_factory=list)
    interfaces: dict[str, object] = field(default_factory=dict)  # by side, where its device was last opened
    probed: dict[str, object] = field(default_factory=dict)  # by side, where its device was last looked at
    hold_close: asyncio.Event | None = (
        None  # what every end of a primary's domain waits for, cancelled or not
    )

    def state(self, host: str, guest: str) -> GuestState:
        return self.guests.get((host, guest), GuestState.ABSENT)

    def running(self, guest: str) -> list[str]:
        return [
            host
            for (host, name), state in self.guests.items()
            if name == guest and state is GuestState.RUNNING
        ]


async def stream(sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock.setblocking(False)
    return await asyncio.open_connection(sock=sock)


class FakePrimary(PrimaryDomain):
    def __init__(self, here: FakeHypervisor, guest: str) -> None:
        self.here, self.guest = here, guest
        self.events: asyncio.Queue[DomainEvent] = asyncio.Queue()
        self.writer: asyncio.StreamWriter | None = None
        self.reader: asyncio.StreamReader | None = None

    @property
    def gates(self) -> frozenset[Gate]:
        return frozenset({Gate.POSTSUSPEND})

    @property
    def services(self) -> Services:
        return Services()

    def _set(self, state: GuestState) -> None:
        self.here.world.guests[self.here.here.host, self.guest] = state

    async def replicate(self, group: DeviceGroup, channels: Channels, progress: Progress) -> None:
        world = self.here.world
        world.copying.set()
        steps = 10
        for step in range(steps):
            progress("memory", step * 1000, steps * 1000)
            await asyncio.sleep(world.slow_copy_s / steps)
        self._set(GuestState.PAUSED)
        try:
            await group.start_all(ReplicationMode.PRIMARY)
            sock = await channels.connect("ram", timeout_s=3)
            self.reader, self.writer = await stream(sock)
            self.writer.write(b"F")
            if "replicate" in world.fail:
                raise OSError("the copy was broken on purpose")
        finally:
            self._set(GuestState.RUNNING)

    async def checkpoint(self, epoch: int, phases: Phases) -> Checkpoint:
        assert self.reader
        assert self.writer
        stopped = time.monotonic_ns()
        self._set(GuestState.PAUSED)
        try:
            await phases.postsuspend(epoch)
            self.writer.write(b"C")
        finally:
            self._set(GuestState.RUNNING)
        resumed = time.monotonic_ns()
        answer = await self.reader.read(1)
        if not answer and "notice" in self.here.world.fail:
            await asyncio.sleep(60)  # as QEMU in mode colo, which may not notice that nobody listens
        if answer != b"A":
            raise OSError("the stream ended")
        return Checkpoint(epoch, stopped, resumed, time.monotonic_ns(), gated=True, transferred_bytes=4096)

    async def sever(self, reason: str) -> None:
        if self.writer:
            self.writer.close()

    async def resume_alone(self, group: DeviceGroup) -> None:
        await group.stop_all(failover=True)
        self._set(GuestState.RUNNING)

    async def freeze(self) -> None:
        self._set(GuestState.PAUSED)

    async def discard(self) -> None:
        self._set(GuestState.ABSENT)

    async def watch(self) -> AsyncIterator[DomainEvent]:
        while True:
            yield await self.events.get()

    async def close(self) -> None:
        hold = self.here.world.hold_close
        while hold is not None and not hold.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await hold.wait()
        if self.writer:
            self.writer.close()


class FakeSecondary(SecondaryDomain):
    def __init__(self, here: FakeHypervisor, guest: str) -> None:
        self.here, self.guest = here, guest
        self.events: asyncio.Queue[DomainEvent] = asyncio.Queue()
        self.loaded = 0
        self.reading: asyncio.Task[None] | None = None
        self.writer: asyncio.StreamWriter | None = None

    @property
    def services(self) -> Services:
        return Services()

    def _set(self, state: GuestState) -> None:
        self.here.world.guests[self.here.here.host, self.guest] = state

    async def launch(self, group: DeviceGroup) -> None:
        if "launch" in self.here.world.fail:
            raise OSError("the copy cannot be launched")
        self._set(GuestState.INCOMING)

    async def receive(self, channels: Channels, group: DeviceGroup) -> None:
        sock = await channels.accept("ram", timeout_s=30)
        reader, self.writer = await stream(sock)
        assert await reader.readexactly(1) == b"F"
        await group.start_all(ReplicationMode.SECONDARY)
        self.reading = asyncio.create_task(self._read(reader, self.writer))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1) == b"C":
                self.loaded += 1
                self.events.put_nowait(DomainEvent(DomainEventKind.CHECKPOINT, count=self.loaded))
                writer.write(b"A")
        self.events.put_nowait(DomainEvent(DomainEventKind.STREAM_LOST, "the stream ended"))

    async def sever(self, reason: str) -> int:
        if self.reading:
            self.reading.cancel()
        if self.writer:
            self.writer.close()
        return self.loaded

    async def promote(self, group: DeviceGroup, won: Record) -> None:
        await group.stop_all(failover=True)
        self._set(GuestState.PAUSED)

    async def open_outlet(self, won: Record) -> None:
        self._set(GuestState.RUNNING)

    async def discard(self) -> None:
        self._set(GuestState.ABSENT)

    async def watch(self) -> AsyncIterator[DomainEvent]:
        while True:
            yield await self.events.get()

    async def close(self) -> None:
        await self.sever("closed")


class FakeHypervisor(Hypervisor):
    name = "fake"

    def __init__(self, here: HostContext, world: World) -> None:
        super().__init__(here)
        self.world = world

    @property
    def modes(self) -> Mapping[Mode, frozenset[Gate]]:
        return {Mode.REMUS: frozenset({Gate.POSTSUSPEND})}

    def parse(
        self, table: Mapping[str, Any], *, name: str, source: Path, protection: Protection
    ) -> GuestConfig:
        reader = Table(source, "", table)
        nics = reader.int("nics", 1)
        reader.done()
        devices = tuple(DeviceInfo(Kind.NIC, f"nic{i}", i, "fake") for i in range(nics))
        return GuestConfig(name, "fake", source, protection, devices)

    async def devices(self, config: GuestConfig) -> Sequence[DeviceInfo]:
        # As under Xen: the name of an interface is known while the guest runs on this host.
        if self.world.state(self.here.host, config.name) is not GuestState.RUNNING:
            return config.devices
        return [replace(device, properties={"interface": f"fake{device.index}"}) for device in config.devices]

    async def facts(self, config: GuestConfig) -> Mapping[str, Any]:
        return {"host": self.here.host}

    async def probe(
        self, config: GuestConfig, *, side: ReplicationMode, mode: Mode, peer_facts: Mapping[str, Any]
    ) -> Sequence[Finding]:
        return list(self.world.found)

    def probe_services(self, config: GuestConfig) -> Services:
        return Services()

    async def found(self) -> Sequence[FoundGuest]:
        return self.world.foreign.get(self.here.host, [])

    async def state(self, config: GuestConfig) -> GuestState:
        return self.world.state(self.here.host, config.name)

    async def start(self, config: GuestConfig, record: Record) -> None:
        if "start" in self.world.fail:
            raise OSError("no such disk")
        self.world.guests[self.here.host, config.name] = GuestState.RUNNING

    async def stop(self, config: GuestConfig, *, force: bool, timeout_s: float) -> None:
        if "stop" in self.world.fail and not force:
            await asyncio.sleep(timeout_s)
            raise HypervisorError(f"it did not shut down within {timeout_s:g} s and runs on")
        if "stop at all" in self.world.fail:
            await asyncio.sleep(3600)
        if "monitor" in self.world.fail and not force:
            raise MonitorSilent("its monitor does not answer")
        self.world.guests.pop((self.here.host, config.name), None)

    async def primary(self, config: GuestConfig) -> PrimaryDomain:
        return FakePrimary(self, config.name)

    async def secondary(self, config: GuestConfig, peer_facts: Mapping[str, Any]) -> SecondaryDomain:
        return FakeSecondary(self, config.name)

    async def sweep(self, config: GuestConfig, record: Record | None) -> Sequence[str]:
        state = record.state.value if record else "none"
        self.world.swept.append((self.here.host, config.name, state))
        if self.world.hold_sweep is not None:
            await self.world.hold_sweep.wait()
        if "sweep" in self.world.fail:
            raise OSError("a filter does not go away")
        host = self.here.host
        promoting = record is not None and record.state is RecordState.PROMOTING and record.standby == host
        others = record is not None and host != record.owner and not promoting
        if others and self.world.guests.pop((self.here.host, config.name), None) is not None:
            return ["a guest that another host owns was discarded"]
        return []


class FakeNic(ProtectedDevice):
    __slots__ = ("key", "world")

    def __init__(self, world: World, key: tuple[str, str]) -> None:
        self.world, self.key = world, key
        world.open_devices.append(key)

    async def postsuspend(self, epoch: int) -> None:
        await asyncio.sleep(0)

    async def commit(self, epoch: int) -> None:
        await asyncio.sleep(0)

    async def start(self, side: ReplicationMode) -> None:
        await asyncio.sleep(0)

    async def stop(self, *, failover: bool) -> None:
        if "stop device" in self.world.fail:
            raise OSError("it does not stop")

    async def teardown(self, verdict: Verdict) -> None:
        if self.world.fail & {"teardown", f"teardown of the {self.key[0]}"}:
            raise OSError("the gate does not open")
        self.world.open_devices.remove(self.key)

    def counters(self) -> Mapping[str, int | float]:
        return {"held_packets": 3, "held_bytes": 300}


class FakePlugin:
    """Offers the fake hypervisor and its NIC."""

    def __init__(self, world: World) -> None:
        self.world = world

    @hookimpl
    def understudy_hypervisors(self) -> Sequence[HypervisorOffer]:
        return [HypervisorOffer("fake", lambda here: FakeHypervisor(here, self.world))]

    @hookimpl
    def understudy_subkinds(self) -> Sequence[Subkind]:
        async def open_nic(context: OpenContext) -> ProtectedDevice:
            if f"open {context.device.name} of the {context.side.value}" in self.world.fail:
                await asyncio.sleep(0)  # its siblings come first
                raise OSError(f"{context.device.name} cannot be opened")
            self.world.interfaces[context.side.value] = context.device.properties.get("interface")
            return FakeNic(self.world, (context.side.value, context.device.name))

        async def probe(context: ProbeContext) -> Sequence[Finding]:
            self.world.probed[context.side.value] = context.device.properties.get("interface")
            return []

        return [Subkind("fake-nic", Kind.NIC, frozenset({Mode.REMUS}), open_nic, probe)]

    @hookimpl
    def understudy_arbiters(self) -> Sequence[ArbiterOffer]:
        return list(understudy_arbiters())

    @hookimpl
    def understudy_intervals(self) -> Sequence[IntervalOffer]:
        return list(understudy_intervals())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


class TwoHosts:
    """The hosts alpha and beta below a temporary directory."""

    def __init__(self, root: Path, guests: Sequence[str] = ("web",)) -> None:
        self.root = root
        self.world = World()
        self.ports = {"alpha": free_port(), "beta": free_port()}
        self.agents: dict[str, Agent] = {}
        for host in self.ports:
            (root / host / "guests").mkdir(parents=True)
            for guest in guests:
                self.write_guest(host, guest)
            other = "beta" if host == "alpha" else "alpha"
            self.config(host).write_text(
                f'host = "{host}"\ninsecure = true\n'
                f'[listen]\naddress = "{HOST}"\nport = {self.ports[host]}\n'
                f'[peers.{other}]\naddress = "{HOST}"\nport = {self.ports[other]}\n'
                f'[directories]\nstate = "{root}/{host}/state"\nruntime = "{root}/{host}/run"\n'
                f'guests = "{root}/{host}/guests"\n'
                f'[arbiter]\nkind = "directory"\npath = "{root}/arbiter"\n'
                "[limits]\nheartbeat_interval_ms = 50\nheartbeat_limit_ms = 3000\n"
            )

    def config(self, host: str) -> Path:
        return self.root / host / "agent.toml"

    def write_guest(
        self, host: str, guest: str, extra: str = "", interval: str = "interval_options = { period_ms = 20 }"
    ) -> None:
        text = f'name = "{guest}"\nhypervisor = "fake"\n[protection]\n{interval}\n'
        (self.root / host / "guests" / f"{guest}.toml").write_text(extra + text)

    async def boot(self, host: str) -> Agent:
        """Start the agent of a host."""
        agent = self.make(host)
        await agent.start()
        return agent

    def make(self, host: str) -> Agent:
        """Make the agent of a host without starting it."""
        plugins = Plugins()
        plugins.add(FakePlugin(self.world), PluginInfo("fake", "tests", "1", "tests"))
        agent = self.agents[host] = Agent(read_config(self.config(host)), plugins, limits=LIMITS)
        return agent

    async def crash(self, host: str) -> None:
        """End an agent as SIGKILL would, as far as one process can: nothing is undone, the socket is closed."""
        agent = self.agents.pop(host)
        for tenure in agent.tenures.values():
            watch = getattr(tenure.driver, "_watch", None)
            tasks = [task for task in (tenure._run, tenure._follow, watch) if task]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            if tenure.driver is not None:
                await tenure.driver.end_begun()
        for link in agent.links.peers.values():
            if link.connection:
                link.connection.abort("crash")
        await agent.links.close("crash")
        await agent.control.close()
        for task in tuple(agent._tasks):
            task.cancel()
        for tenure in agent.tenures.values():
            domain = getattr(tenure.driver, "domain", None)
            if domain is not None:
                await domain.close()
        agent.telling.close()

    @contextlib.contextmanager
    def arbiter_lost(self) -> Iterator[None]:
        """Put an empty directory in the arbiter's place, as when its file system is not mounted."""
        place, away = self.root / "arbiter", self.root / "away"
        place.rename(away)
        place.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(place)
            away.rename(place)

    async def call(self, host: str, method: str, **params: Any) -> Any:
        """Ask an agent as its control socket does."""
        return await self.agents[host].operations.handle(Call(method, params, lambda _: None, "tester"))

    async def linked(self) -> None:
        for host, agent in self.agents.items():
            other = "beta" if host == "alpha" else "alpha"
            await agent.links.peers[other].wait_up(5)

    async def until(self, condition: Any, timeout_s: float = 5) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - nothing tells; the deadline is above
                await asyncio.sleep(0.01)

    def role(self, host: str, guest: str = "web") -> str:
        driver = self.agents[host].tenure(guest).driver
        return driver.state.value if driver else "none"


@contextlib.asynccontextmanager
async def two_hosts(root: Path, guests: Sequence[str] = ("web",)) -> AsyncIterator[TwoHosts]:
    """Two hosts, booted and linked; closed at the end."""
    hosts = TwoHosts(root, guests)
    try:
        for host in ("alpha", "beta"):
            await hosts.boot(host)
        await hosts.linked()
        yield hosts
    finally:
        for agent in hosts.agents.values():
            await agent.close()


def errors_of(findings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the problems of the findings that are errors."""
    return [each["problem"] for each in findings if each["severity"] == Severity.ERROR.value]
