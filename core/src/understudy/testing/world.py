"""Two simulated hosts with an agent each, an arbiter, a cable: everything of a protected guest in one event loop.

Engines, session tables and device groups are the real ones. Simulated are the host, the hypervisor, the devices, the
cable, the arbiter, and the agent around the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from understudy.arbiter import Record
from understudy.device import Gate, Mode
from understudy.engine import Driver, Limits, Way
from understudy.errors import LinkLost, PeerError, StateError
from understudy.report import EpochReport
from understudy.session import TABLES, PrimaryState, SecondaryState, State, Tables
from understudy.session.events import Force, Protect, Recover, Start, Unprotect
from understudy.testing.arbiter import MemoryArbiter
from understudy.testing.history import SimulatedNetwork
from understudy.testing.hypervisor import EVERY_GATE, simulated_config
from understudy.testing.link import SimulatedCable
from understudy.testing.simagent import GUEST, Site
from understudy.testing.simchannels import Trench
from understudy.testing.simhost import SimulatedHost

__all__ = ["GUEST", "HOSTS", "SimulatedPair"]

HOSTS = ("alpha", "beta")

_P, _S = PrimaryState, SecondaryState
# An engine in one of these may have something to say after its connection was lost.
_TALKATIVE: tuple[State, ...] = (
    _P.SUSPECT,
    _P.FENCED,
    _P.RECOVERING,
    _S.EMPTY,
    _S.SUSPECT,
    _S.PROMOTING,
    _S.KEPT,
    _S.RELEASING,
)


_LIMITS = Limits(
    retry_s=0.1,
    prepare_s=10.0,
    peer_s=1.0,
    stall_s=4.0,
    checkpoint_s=4.0,
    cut_s=2.0,
    end_s=5.0,
)


class SimulatedPair:
    """Two hosts, ``alpha`` and ``beta``, and one guest; an asynchronous context manager.

    Args:
        mode: How the guest is protected.
        gates: At which phases the hypervisor lets it wait.
        seed: Of everything random.
        nics: How many it has.
        disks: Likewise.
        early_resume: It runs again before the acknowledgement where no gate is in the way.
        prefer_primary: The standby must not promote unless an operator forces it.
        tables: The session tables; tests give mutants.
        limits: How long the engines wait.
    """

    def __init__(  # noqa: PLR0913 - every property of a world, by name
        self,
        *,
        mode: Mode = Mode.REMUS,
        gates: frozenset[Gate] = EVERY_GATE,
        seed: int = 0,
        nics: int = 1,
        disks: int = 1,
        early_resume: bool = False,
        prefer_primary: bool = False,
        tables: Tables = TABLES,
        limits: Limits | None = None,
    ) -> None:
        self.mode = mode
        self.gates = gates
        self.early_resume = early_resume
        self.prefer_primary = prefer_primary
        self.tables = tables
        self.limits = limits or Limits(
            retry_s=0.1, prepare_s=10.0, peer_s=1.0, cut_s=2.0, end_s=5.0, stall_s=4.0, checkpoint_s=4.0
        )
        self.period_ms = 25.0
        self.lives = itertools.count(1)
        self.sessions = itertools.count(1)
        self.reports: list[EpochReport] = []
        self.events: list[tuple[float, str, str, Mapping[str, Any]]] = []
        self.cable = SimulatedCable(seed=seed)
        self.arbiter = MemoryArbiter()
        self.network = SimulatedNetwork(self.arbiter.may_open)
        self._seed = seed
        self._temporary = tempfile.TemporaryDirectory(prefix="understudy-simulation-")
        self.directory = Path(self._temporary.name)
        self._trenches: list[Trench] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.config = simulated_config(GUEST, mode=mode, nics=nics, disks=disks)
        self.sites: dict[str, Site] = {}
        self._buried: list[Site] = []  # kept, so that the tasks of the dead end in `close` and not at random

    async def __aenter__(self) -> Self:
        for number, name in enumerate(HOSTS):
            host = SimulatedHost(name, self.network, seed=self._seed * 2 + number)
            host.draw_chance = 1.0 if self.mode is Mode.REMUS else 0.02
            self.sites[name] = Site(self, host, self.config)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End everything."""
        for trench in self._trenches:
            trench.close()
        for site in self.sites.values():
            self._bury(site, powered=False)
        mine = asyncio.current_task()
        for _ in range(20):
            left = {task for task in asyncio.all_tasks() if task is not mine}
            if not left:
                break
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=1)
        await asyncio.sleep(0)
        self._temporary.cleanup()

    def now(self) -> float:
        """Return the event loop's time."""
        return asyncio.get_running_loop().time()

    def record(self) -> Record | None:
        """Return the guest's record, as it is."""
        return self.arbiter.now(GUEST)

    # --- What an operator does -----------------------------------------------------------------------------------

    async def start(self, name: str = "alpha") -> None:
        """Start the guest on a host."""
        site = self.sites[name]
        driver = await site.own()
        record = await site.arbiter.read(GUEST)
        if driver.machine.joined != record:
            await driver.ask(Recover(record, live=False))
        await driver.ask(Start())
        await site.reach(_P.UNPROTECTED, _P.ALONE)

    async def protect(self, name: str = "alpha", *, wait: bool = True) -> str:
        """Protect the guest that runs on a host, and return the session."""
        other = next(each for each in HOSTS if each != name)
        session = f"session{next(self.sessions)}"
        driver = await self.sites[name].own()
        await driver.ask(Protect(session, other, self.prefer_primary))
        if wait:
            state = await self.reach(
                name, _P.PROTECTED, _P.UNPROTECTED, _P.ALONE, _P.OFF, _P.FENCED, _P.DISCARDED, within_s=300
            )
            if state is not _P.PROTECTED:
                raise self.sites[name].failure(f"not protected but {state.value}")
            await self.reach(other, _S.STANDBY)
        return session

    async def unprotect(self, name: str = "alpha") -> None:
        """End the protection."""
        driver = await self.sites[name].own()
        await driver.ask(Unprotect("the test says so"))
        await self.sites[name].reach(_P.UNPROTECTED, _P.ALONE, _P.OFF)

    async def force(self, name: str) -> None:
        """Force a host to go on with the guest."""
        driver = self.sites[name].driver
        if driver is None:
            raise StateError(f"{name} has nothing to go on with")
        await driver.ask(Force("an operator", "the test says so"))

    async def decide(self) -> str:
        """Do what a careful operator does when nobody runs the guest any more, and return what that was.

        A copy that lives is preferred to the disks of the host that ran the guest last, and those to the disks of a
        host that died in its promotion, which may be a mixture.
        """
        record = self.record()
        if record is None:
            raise StateError("the guest has no record")
        drivers = {name: site.driver for name, site in self.sites.items()}
        states = {name: site.state for name, site in self.sites.items()}
        kept = [n for n, driver in drivers.items() if driver is not None and driver.state is _S.KEPT]
        living = [n for n in kept if (driver := drivers[n]) is not None and driver.machine.live]
        held = [n for n in HOSTS if record.prefer_primary and states[n] is _S.SUSPECT]
        fenced = [n for n in HOSTS if states[n] is _P.FENCED]
        for name in (*living, *held, *(fenced if kept else ()), *kept):
            await self.force(name)
            return f"force {name}"
        if record.state.value != "promoting" and states[record.owner] in {None, _P.OFF, _P.DISCARDED}:
            await self.start(record.owner)
            return f"start {record.owner}"
        return "wait"

    # --- What goes wrong -----------------------------------------------------------------------------------------

    def crash(self, name: str, *, agent_only: bool = False, silent: bool = True) -> None:
        """Kill a host, or only its agent, at once: nothing that was under way there has any effect any more.

        Args:
            name: Which host.
            agent_only: Processes and gates live on.
            silent: The other host hears nothing; else the dead one's kernel closes its connections.
        """
        self._bury(self.sites[name], powered=agent_only, silent=silent and not agent_only)

    async def revive(self, name: str) -> None:
        """Let a host, or its agent, come back; returns when it has looked after its guest or waits for the arbiter."""
        site = self.sites[name]
        if site.alive:
            return
        site = self.sites[name] = Site(self, site.host, self.config)
        self._spawn(site.look(), f"{name} looks after its guest")
        await asyncio.sleep(0)

    def mend(self) -> None:
        """Mend the cable."""
        self.cable.mend()
        self.reattach()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._looked)

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.network.accuse(f"{task.get_name()}: {task.exception()!r}")

    def _bury(self, site: Site, *, powered: bool, silent: bool = True) -> None:
        if not site.alive:
            if not powered:  # its agent was dead before, now the rest is
                site.host = site.host.outlive(powered=False)
            return
        site.die()
        self._buried.append(site)
        self.cable.die(site.name, silent=silent)
        for trench in self._trenches:
            trench.die(site.name, silent=silent)
        # The dead agent's tasks go on for a moment, on things that nobody sees any more.
        site.host = site.host.outlive(powered=powered)

    # --- The way between the agents ------------------------------------------------------------------------------

    async def connect(self, site: Site, peer: str, session: str) -> Way:
        """Return the way to the other host for a new session; its engine waits there."""
        try:
            async with asyncio.timeout(2.0):
                while not self._reachable(site.name, peer):  # noqa: ASYNC110 - time is virtual
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise LinkLost(f"{peer} cannot be reached") from None
        await asyncio.sleep(2 * self.cable.delay_s)
        other = self.sites[peer]
        try:
            driver = await other.hold()
        except StateError as refused:
            raise PeerError(str(refused), type(refused).__name__) from refused
        if not (site.alive and other.alive):
            raise LinkLost(f"{peer} cannot be reached any more")
        ways = self._ways(session)
        driver.attach(ways[peer])
        return ways[site.name]

    def _reachable(self, name: str, peer: str) -> bool:
        cut = self.cable.is_cut(name) or self.cable.is_cut(peer)
        return not cut and self.sites[peer].alive and self.sites[name].alive

    def _ways(self, session: str) -> dict[str, Way]:
        connection = self.cable.connect(session, *HOSTS)
        trench = Trench(self.cable, *HOSTS)
        self._trenches.append(trench)
        return {name: Way(connection.ports[name], trench.of(name), connection.peers[name]) for name in HOSTS}

    def reattach(self) -> None:
        """Give sessions that go on a new way where theirs was lost and the cable is whole."""
        if len(self.sites) < len(HOSTS) or not self._reachable(*HOSTS):
            return
        for site in self.sites.values():
            driver = site.driver
            if driver is None or not _needs_way(driver):
                continue
            ways = self._ways(driver.machine.session or "")
            for each in self.sites.values():
                theirs = each.driver
                if theirs is not None and _talks(theirs) and theirs.machine.session == driver.machine.session:
                    theirs.attach(ways[each.name])
        for site, other in (tuple(self.sites.values()), tuple(self.sites.values())[::-1]):
            if site.state is _P.RECOVERING and other.driver is None and not other.attending:
                # It is the other host's turn, which drives nothing: it has to look, and to say so.
                self._spawn(other.attend(), f"{other.name} attends to the guest")

    # --- What a test looks at ------------------------------------------------------------------------------------

    def check(self, *, clean: Iterable[str] = ()) -> None:
        """Raise if an invariant was violated, or if a session has left anything on the hosts of `clean`."""
        self.network.check()
        for name in clean:
            traces = self.sites[name].host.traces()
            if traces:
                raise AssertionError(f"{name} is not clean: {traces}")

    async def grows(self, by: int = 5, within_s: float = 5.0) -> None:
        """Wait until so many new packets have left: the guest is served.

        Raises:
            AssertionError: They did not, in time.
        """
        goal = self.network.highest(GUEST) + by
        until = self.now() + within_s
        while self.network.highest(GUEST) < goal:
            if self.now() > until:
                states = {name: site.state for name, site in self.sites.items()}
                raise AssertionError(f"the guest is not served: {states}, {self.record()}")
            await asyncio.sleep(0.01)

    async def epochs(self, more: int = 10, within_s: float = 10.0) -> None:
        """Wait until so many more epochs have been committed.

        Raises:
            AssertionError: They were not, in time.
        """
        goal = len(self.reports) + more
        until = self.now() + within_s
        while len(self.reports) < goal:
            if self.now() > until:
                raise AssertionError(f"{goal - len(self.reports)} epochs are missing")
            await asyncio.sleep(0.005)

    async def reach(self, name: str, *states: State, within_s: float = 20.0) -> State:
        """Wait until the engine of a host is in one of `states` and has done what leads there.

        Raises:
            AssertionError: It did not come to that in time.
        """
        try:
            return await self.sites[name].reach(*states, timeout_s=within_s)
        except TimeoutError:
            found = {each: site.state for each, site in self.sites.items()}
            raise AssertionError(f"{name} never was in {states}: {found}, {self.record()}") from None

    def runners(self) -> list[str]:
        """Return the hosts that let the guest's output out."""
        return [
            name
            for name, site in self.sites.items()
            if (process := site.host.guests.get(GUEST)) is not None
            and process.running
            and process.outlet
            and not process.gates
        ]


def _talks(driver: Driver) -> bool:
    return driver.state in _TALKATIVE and driver.machine.session is not None


def _needs_way(driver: Driver) -> bool:
    return _talks(driver) and (driver.way is None or driver.way.port.lost is not None)
