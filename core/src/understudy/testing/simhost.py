"""A simulated host and the guests on it: what outlives an agent, and what even outlives the host.

Processes and gates outlive the agent and die with the host; disks outlive both.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from understudy.hypervisor import DomainEvent, DomainEventKind, GuestState
from understudy.services import ServiceKey
from understudy.testing.history import BORN, Memory, SimulatedNetwork

__all__ = [
    "SIMULATED_HOST",
    "Gate",
    "Latency",
    "Script",
    "SimulatedGuest",
    "SimulatedHost",
    "fails",
    "hangs",
    "takes",
]

Script = Callable[[], Awaitable[None]]


def fails(error: Exception | str = "scripted", after_s: float = 0.0) -> Script:
    """Return a script: the step takes its time, then raises."""

    async def script() -> None:
        await asyncio.sleep(after_s)
        raise OSError(error) if isinstance(error, str) else error

    return script


def hangs() -> Script:
    """Return a script: the step never ends by itself."""

    async def script() -> None:
        await asyncio.Event().wait()

    return script


def takes(seconds: float) -> Script:
    """Return a script: the step takes its time."""

    async def script() -> None:
        await asyncio.sleep(seconds)

    return script


@dataclass(slots=True)
class Latency:
    """How long a simulated host takes, seconds."""

    launch_s: float = 0.05
    mirror_s: float = 0.2  #: the first copy of one disk, the guest running
    memory_s: float = 0.1  #: the first copy of the memory, the guest running
    suspend_s: float = 0.0005
    load_s: float = 0.001  #: for the copy to load one checkpoint
    step_s: float = 0.0002  #: one step of a device
    promote_s: float = 0.02
    outlet_s: float = 0.005
    kill_s: float = 0.01
    boot_s: float = 0.5
    shutdown_s: float = 0.5


class Gate:
    """What holds a NIC's output on its host, like a queueing discipline: it outlives the agent.

    Args:
        guest: Whose output.
        nic: The device's name.
        session: Whose acknowledgements release it.
    """

    def __init__(self, guest: SimulatedGuest, nic: str, session: str) -> None:
        self.guest = guest
        self.nic = nic
        self.session = session
        self.held: list[Memory] = []
        self.marks: dict[int, int] = {}  #: epoch → the last count before its barrier

    def take(self, packet: Memory) -> None:
        """Hold a packet."""
        self.held.append(packet)

    def mark(self, epoch: int) -> None:
        """Put the barrier of an epoch behind everything that is held."""
        self.marks[epoch] = self.guest.memory.number

    def commit(self, epoch: int) -> None:
        """Let out what is before the barrier of an epoch."""
        if epoch not in self.marks:
            raise ValueError(f"{self.nic} has no barrier of epoch {epoch}")
        self.release_through(self.marks[epoch], epoch)
        self.marks = {each: count for each, count in self.marks.items() if each > epoch}

    def release_through(self, count: int, epoch: int) -> None:
        """Let out everything up to a count."""
        guest = self.guest
        while self.held and self.held[0].number <= count:
            guest.host.network.release(guest.host.name, guest.name, self.held.pop(0), self.session, epoch)

    def open(self) -> None:
        """Let out everything, and hold nothing any more."""
        self._remove()
        for packet in self.held:
            self.guest.host.network.open_send(self.guest.host.name, self.guest.name, packet)
        self.held.clear()

    def drop(self) -> None:
        """Drop what is held and remove the gate; the guest below it must be dead."""
        if self.guest.state is not GuestState.ABSENT:
            self.guest.host.network.accuse(
                f"{self.guest.host.name} removes {self.nic}'s gate above {self.guest.name}, which is not dead"
            )
        self._remove()
        self.held.clear()

    def _remove(self) -> None:
        self.guest.gates.pop(self.nic, None)
        self.guest.host.gates.pop((self.guest.name, self.nic), None)


class SimulatedGuest:
    """One guest's process on one host.

    Args:
        host: Where it runs.
        name: The guest.
        memory: What it remembers at first.
        disks: Names of its disks.
        incoming: It is a copy: no outlet, writes go to an overlay of its own.
    """

    def __init__(
        self, host: SimulatedHost, name: str, memory: Memory, disks: Sequence[str], *, incoming: bool = False
    ) -> None:
        self.host = host
        self.name = name
        self.memory = memory
        self.disks = tuple(disks)
        self.state = GuestState.INCOMING if incoming else GuestState.PAUSED
        self.outlet = not incoming  #: its interfaces are up and on their bridges
        self.overlay: dict[str, Memory] | None = {} if incoming else None
        self.gates: dict[str, Gate] = {}  #: by NIC; one without gates sends through its outlet
        self.output: Callable[[Memory], None] | None = None  #: who sees what a running copy produces
        self.listeners: list[Callable[[DomainEvent], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether it counts."""
        return self._timer is not None

    def resume(self) -> None:
        """Let it run, unless it has shut down or is dead."""
        if self.state in {GuestState.ABSENT, GuestState.SHUTOFF}:
            return
        if self.state is not GuestState.INCOMING:
            self.state = GuestState.RUNNING
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.host.period_s, self._count)

    def stop(self) -> None:
        """Stop it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.state is GuestState.RUNNING:
            self.state = GuestState.PAUSED

    def kill(self) -> None:
        """End the process."""
        self.stop()
        self.state = GuestState.ABSENT
        self.host.guests.pop(self.name, None)

    def shut_down(self) -> None:
        """Let the guest shut itself down; it is preserved."""
        self.stop()
        self.state = GuestState.SHUTOFF
        self.tell(DomainEventKind.SHUTDOWN, "the guest has shut down")

    def reset(self) -> None:
        """Let the guest reboot: it goes on from its disks, which hold all that it ever remembered."""
        self.tell(DomainEventKind.RESET, "the guest has rebooted")

    def panic(self) -> None:
        """Let the guest crash; it is preserved."""
        self.stop()
        self.state = GuestState.SHUTOFF
        self.tell(DomainEventKind.PANIC, "the guest has crashed")

    def die(self) -> None:
        """Let the process die, and tell whoever watches."""
        self.kill()
        self.tell(DomainEventKind.GONE, "the process is dead")

    def tell(self, kind: DomainEventKind, detail: str, count: int = 0) -> None:
        """Tell an event to whoever watches."""
        for listener in tuple(self.listeners):
            listener(DomainEvent(kind, detail, count))

    def move(self, host: SimulatedHost) -> None:
        """Make the same process, with its gates, on another object of its host."""
        process = SimulatedGuest(host, self.name, self.memory, self.disks)
        process.state, process.outlet = self.state, self.outlet
        process.overlay = None if self.overlay is None else dict(self.overlay)
        for name, old in self.gates.items():
            gate = Gate(process, name, old.session)
            gate.held, gate.marks = list(old.held), dict(old.marks)
            process.gates[name] = host.gates[self.name, name] = gate
        host.guests[self.name] = process
        if self.running:
            process.resume()

    def _count(self) -> None:
        host = self.host
        self._timer = asyncio.get_running_loop().call_later(host.period_s, self._count)
        self.memory = memory = self.memory.after(host.draw())
        host.network.born(self.name, memory)
        for disk in self.disks:
            if self.overlay is None:
                host.disks[self.name, disk] = memory
            else:
                self.overlay[disk] = memory
        if self.output is not None:
            self.output(memory)
        if not self.outlet:
            return
        if self.gates:
            for gate in self.gates.values():
                gate.take(memory)
        else:
            host.network.open_send(host.name, self.name, memory)


@dataclass
class SimulatedHost:
    """One host: its processes, gates and disks, its speed, and what goes wrong on it."""

    name: str
    network: SimulatedNetwork
    seed: int = 0
    period_s: float = 0.005  #: between two counts of a guest
    draw_chance: float = (
        1.0  #: how often a guest draws a random number; in mode colo each draw costs a checkpoint
    )
    latency: Latency = field(default_factory=Latency)
    guests: dict[str, SimulatedGuest] = field(default_factory=dict)
    disks: dict[tuple[str, str], Memory] = field(default_factory=dict)  #: (guest, disk) → what is on it
    gates: dict[tuple[str, str], Gate] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)  #: guests whose disks a promotion has begun to change
    scripts: dict[str, Script] = field(default_factory=dict)  #: by step, e.g. ``"secondary.promote"``

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.name} {self.seed}")  # noqa: S311 - to be repeatable

    def draw(self) -> int:
        """Return what a guest draws: a random number greater than 0, or 0 for nothing."""
        if self.draw_chance < 1 and self._random.random() >= self.draw_chance:
            return 0
        return self._random.getrandbits(30) + 1

    async def at(self, step: str, takes_s: float = 0.0) -> None:
        """Take the time of a step, then do what its script says."""
        await asyncio.sleep(takes_s)
        script = self.scripts.get(step)
        if script is not None:
            await script()

    def disk(self, guest: str, disk: str) -> Memory:
        """Return what is on a disk."""
        return self.disks.get((guest, disk), BORN)

    def outlive(self, *, powered: bool) -> SimulatedHost:
        """Return what is left after its agent's death, as a new object; the old one acts on nothing any more.

        So whatever a dead agent's tasks still do while they are being cleared away has no effect, as after SIGKILL.

        Args:
            powered: Only the agent died: processes and gates live on. Else disks alone are left.
        """
        after = replace(self, guests={}, gates={}, disks=dict(self.disks), touched=set(self.touched))
        after._random = self._random  # noqa: SLF001 - it is the same host
        self.network = SimulatedNetwork(judging=False)
        self.scripts = {}
        guests = list(self.guests.values())
        for guest in guests if powered else ():
            guest.move(after)
        for guest in guests:
            guest.kill()
            guest.listeners.clear()
        self.gates.clear()
        return after

    def traces(self) -> list[str]:
        """List what sessions have left on this host."""
        left = [f"gate of {guest}'s {nic}" for guest, nic in self.gates]
        return left + [f"copy of {g.name}" for g in self.guests.values() if g.state is GuestState.INCOMING]


SIMULATED_HOST: ServiceKey[SimulatedHost] = ServiceKey("simulated-host")
