"""One simulated host's agent, as far as one guest is concerned: the engine that drives it, and who follows whom."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from understudy.agent.seat import Seat
from understudy.arbiter import Record
from understudy.engine import Driver, PrimarySession, SecondarySession, Surroundings
from understudy.errors import StateError, UnderstudyError
from understudy.hypervisor import GuestConfig, GuestState, HostContext
from understudy.interval import Fixed
from understudy.report import EpochReport
from understudy.session import Machine, PrimaryState, SecondaryState, State, owner, standby, successor
from understudy.session.events import GuestGone, GuestShutdown, Recover
from understudy.testing.hypervisor import SimulatedHypervisor
from understudy.testing.simdevices import simulated_subkinds
from understudy.testing.simhost import SimulatedHost

if TYPE_CHECKING:
    from understudy.testing.arbiter import ArbiterView
    from understudy.testing.world import SimulatedPair

__all__ = ["GUEST", "Site", "Telling"]

GUEST = "guest"
WATCH_S = 1.0  # between two looks at a guest that nothing protects

_P, _S = PrimaryState, SecondaryState
_IDLE: tuple[State | None, ...] = (None, _P.OFF, _S.EMPTY)
_OVER = (_P.DISCARDED, _S.DISCARDED, _S.ALONE)


class Telling:
    """What an agent tells its observers, kept.

    Args:
        pair: Where it is kept.
        host: Whose.
    """

    def __init__(self, pair: SimulatedPair, host: str) -> None:
        self.alive = True
        self._pair = pair
        self._host = host

    def epoch(self, report: EpochReport) -> None:
        """Keep a report."""
        if self.alive:
            self._pair.reports.append(report)

    def event(self, guest: str, name: str, facts: Mapping[str, Any]) -> None:
        """Keep an event."""
        if self.alive:
            self._pair.events.append((self._pair.now(), self._host, name, {"guest": guest, **facts}))

    def progress(self, guest: str, what: str, done_bytes: int, total_bytes: int) -> None:
        """Ignore progress."""


class Site(Seat):
    """One host with one life of its agent.

    Args:
        pair: Both.
        host: The host.
        config: The guest, as its file says there.
    """

    def __init__(self, pair: SimulatedPair, host: SimulatedHost, config: GuestConfig) -> None:
        super().__init__(GUEST)
        self.pair = pair
        self.host = host
        self.name = host.name
        self.config = config
        self.alive = True
        self.arbiter: ArbiterView = pair.arbiter.view(self.name)
        here = HostContext(self.name, self.name, pair.directory, pair.directory, pair.directory / self.name)
        self.hypervisor = SimulatedHypervisor(here, host, gates=pair.gates, early_resume=pair.early_resume)
        self._life = f"{self.name}{next(pair.lives)}"
        self.attending = False
        self._engines = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.telling = Telling(pair, self.name)

    @property
    def state(self) -> State | None:
        """Where the engine stands, ``None`` without one."""
        return self.driver.state if self.driver is not None else None

    # --- Engines -------------------------------------------------------------------------------------------------

    async def own(self) -> PrimarySession:
        """Return the owner's engine of this host; it is made if nothing is at stake here.

        Raises:
            StateError: This host holds a copy of the guest.
        """
        if isinstance(self.driver, PrimarySession) and self.driver.state is not _P.DISCARDED:
            return self.driver
        await self._vacate()
        driver = PrimarySession(owner(GUEST, self.name, self._next_life()), self._around())
        self._install(driver)
        return driver

    async def hold(self) -> SecondarySession:
        """Return a new engine of the standby's side.

        Raises:
            StateError: This host runs the guest, or holds a copy of it already.
        """
        await self._vacate()
        driver = SecondarySession(standby(GUEST, self.name, self._next_life()), self._around())
        self._install(driver)
        return driver

    def die(self) -> None:
        """End the agent at once; nothing that its tasks still do has any effect."""
        self.alive = False
        self.arbiter.dead = True
        self.telling.alive = False
        for task in self._tasks:
            task.cancel()

    def _next_life(self) -> str:
        self._engines += 1
        return f"{self._life}.{self._engines}"

    async def _vacate(self) -> None:
        # What is being discarded has to be gone first; the engine is closed then, by whoever follows it.
        with suppress(TimeoutError):
            async with asyncio.timeout(self.pair.limits.end_s):
                while self.state in {_P.DISCARDED, _S.DISCARDED}:
                    await self._moved.wait()
        if self.state not in _IDLE:
            raise StateError(f"guest {GUEST} is {self.state.value if self.state else None} on {self.name}")
        await self._close()

    def _install(self, driver: Driver) -> None:
        loop = asyncio.get_running_loop()
        self.driver = driver
        self._run = loop.create_task(driver.run(), name=f"{self.name}: engine")
        self._tasks = [self._run, loop.create_task(self._follow(driver), name=f"{self.name}: follow")]
        if isinstance(driver, PrimarySession):
            self._tasks.append(loop.create_task(self._watch(driver), name=f"{self.name}: watch"))
        self._run.add_done_callback(self._ran)
        self._tell_moved()

    def _ran(self, run: asyncio.Task[None]) -> None:
        if not run.cancelled() and run.exception() is not None and self.alive:
            self.pair.network.accuse(f"the engine of {self.name} failed: {run.exception()!r}")

    def _tell_moved(self) -> None:
        self.wake()
        if self.alive:
            self.pair.reattach()

    async def _close(self) -> None:
        driver, self.driver, self._run = self.driver, None, None
        tasks, self._tasks = [task for task in self._tasks if task is not asyncio.current_task()], []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if driver is not None:
            await driver.close()

    async def _follow(self, driver: Driver) -> None:
        seen: State | None = None
        every: tuple[State, ...] = (*PrimaryState, *SecondaryState)
        while True:
            seen = await driver.reach(*(state for state in every if state is not seen))
            self._tell_moved()
            if seen not in _OVER:
                continue
            assert isinstance(driver, PrimarySession | SecondarySession)  # noqa: S101 - there are no others
            await self.settle(driver)
            while driver.group is not None:  # what failed is done again
                await asyncio.sleep(0.2)
                await self.settle(driver)
            await self._hand_over(driver)
            return

    async def _watch(self, driver: PrimarySession) -> None:
        # Over a guest that nothing protects nobody else watches.
        while True:
            await asyncio.sleep(WATCH_S)
            state = await self.hypervisor.state(self.config)
            if driver.state not in {_P.UNPROTECTED, _P.ALONE} or not driver.settled:
                continue
            if state is GuestState.ABSENT:
                driver.post(GuestGone("its process is gone"))
            elif state is GuestState.SHUTOFF:
                driver.post(GuestShutdown())

    async def _hand_over(self, driver: Driver) -> None:
        # A promoted copy is an owner's business from now on; where nothing is left, nobody drives.
        next_one: Machine = successor(driver.machine)
        await self._close()
        if next_one.state is _P.UNPROTECTED:
            self._install(PrimarySession(next_one, self._around()))
        self._tell_moved()

    # --- After the agent's start ---------------------------------------------------------------------------------

    async def look(self) -> None:
        """Look after the guest as an agent does at its start: sweep, then go on from the record."""
        record = await self._read()
        await self.hypervisor.sweep(self.config, record)
        exists = await self.hypervisor.state(self.config) is not GuestState.ABSENT
        if record is None:
            return
        if record.standby == self.name:
            if exists:
                await self.hypervisor.stop(self.config, force=True, timeout_s=10)
            await self._recover_copy(record)
        elif record.owner == self.name or exists:
            await (await self.own()).ask(Recover(record, live=exists))
        self.pair.reattach()
        driver = self.driver
        if driver is not None and driver.machine.live:
            await self.reach(_P.ALONE, _P.OFF, _P.DISCARDED)
            await self.hypervisor.sweep(self.config, driver.machine.joined)

    async def attend(self) -> None:
        """Look at the record because the owner waits for this host, which drives nothing."""
        self.attending = True
        try:
            record = await self._read()
            if self.driver is None and record is not None and record.standby == self.name:
                await self._recover_copy(record)
                self.pair.reattach()
        finally:
            self.attending = False

    async def _recover_copy(self, record: Record) -> None:
        untouched = GUEST not in self.host.touched
        await (await self.hold()).ask(Recover(record, live=False, untouched=untouched))

    async def _read(self) -> Record | None:
        while True:
            try:
                return await self.arbiter.read(GUEST)
            except UnderstudyError:
                await asyncio.sleep(self.pair.limits.retry_s)

    def _around(self) -> Surroundings:
        pair = self.pair
        return Surroundings(
            config=self.config,
            hypervisor=self.hypervisor,
            arbiter=self.arbiter,
            subkinds=simulated_subkinds,
            interval=lambda _: Fixed(pair.period_ms),
            connect=lambda peer, session: pair.connect(self, peer, session),
            telling=self.telling,
            tables=pair.tables,
            limits=pair.limits,
        )
