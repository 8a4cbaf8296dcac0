"""This host's part in one guest: which engine drives it, who waits for it, what it says in a table.

An engine is made when it is needed: the owner's for a guest that runs here or shall, the standby's when another host
wants this one to hold a copy. A copy that was promoted is handed to an owner's engine; an engine whose guest went to
another host is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from understudy.agent.seat import Seat
from understudy.device import ReplicationMode
from understudy.engine import Driver, PrimarySession, SecondarySession, Surroundings
from understudy.engine.words import encode
from understudy.errors import GuestBusy, StateError
from understudy.phases import in_words
from understudy.session import PrimaryState, SecondaryState, State, owner, standby
from understudy.session.events import Ended

if TYPE_CHECKING:
    from understudy.arbiter import Record
    from understudy.hypervisor import GuestConfig, Hypervisor

__all__ = ["RECOVERY", "RUNNING_HERE", "Tenure"]

log = logging.getLogger("understudy.agent")

#: States of the owner's engine in which the guest runs here with its output open.
RUNNING_HERE = (PrimaryState.UNPROTECTED, PrimaryState.ALONE)
#: States in which an engine may be replaced by another.
_IDLE: tuple[State, ...] = (
    PrimaryState.OFF,
    PrimaryState.DISCARDED,
    SecondaryState.EMPTY,
    SecondaryState.DISCARDED,
)

_DISCARDED: tuple[State, ...] = (PrimaryState.DISCARDED, SecondaryState.DISCARDED)

RETRY_S = 0.2
VACATE_LIMIT_S = 5.0
TAKEOVER_TRIES = 50  # looks, `RETRY_S` apart, whether what a takeover leaves behind is gone
#: What is under way from the start of an agent until it has looked after a guest.
RECOVERY = "recovery"
RECOVERY_LIMIT_S = 8.0
ProgressWatcher = Callable[[str, int, int], None]


class Tenure(Seat):
    """One guest on this host.

    Args:
        name: The guest.
        host: This host.
        life: An id of this run of the agent.
        surroundings: Makes what an engine may use, for a configuration of the guest.
        changed: Called after this host's part in the guest has changed: engine replaced or state moved.
        tidy: Called when a copy has ended here, before another session can begin.
    """

    def __init__(
        self,
        name: str,
        host: str,
        life: str,
        surroundings: Callable[[GuestConfig, Hypervisor], Surroundings],
        changed: Callable[[Tenure], None],
        tidy: Callable[[str], None],
    ) -> None:
        super().__init__(name)
        self.name = name
        self.host = host
        self.busy = ""  #: what is under way, e.g. ``"protect"``; empty if nothing is
        self.problem = ""  #: what the operator should know, one sentence
        self.unsafe: tuple[str, ...] = ()  #: what an operator took upon himself for the last protection
        self.record: Record | None = None  #: as it was last seen
        self.watchers: set[ProgressWatcher] = set()
        self._life = life
        self._engines = 0
        self._surroundings = surroundings
        self._changed = changed
        self._tidy = tidy
        self._follow: asyncio.Task[None] | None = None
        self._free = asyncio.Event()  # nothing is under way

    # --- One operation at a time ---------------------------------------------------------------------------------

    @contextmanager
    def operation(self, what: str) -> Iterator[None]:
        """Do `what` with this guest, and nothing else meanwhile.

        Raises:
            GuestBusy: Something else is under way.
        """
        if self.busy:
            raise GuestBusy(f"guest {self.name} is busy on {self.host}: {self.busy} is under way")
        self.busy = what
        self._free.clear()
        try:
            yield
        finally:
            self.busy = ""
            self._free.set()

    async def free(self) -> None:
        """Wait until nothing is under way, however long that takes."""
        while self.busy:
            await self._free.wait()

    async def recovered(self) -> None:
        """Wait, bounded, until the agent has looked after what its predecessor left of this guest."""
        with suppress(TimeoutError):
            async with asyncio.timeout(RECOVERY_LIMIT_S):
                while self.busy.startswith(RECOVERY):
                    await self._free.wait()

    # --- Engines -------------------------------------------------------------------------------------------------

    @property
    def side(self) -> ReplicationMode | None:
        """Which side's engine drives the guest here, ``None`` if no engine does."""
        return self.driver.machine.side if self.driver is not None else None

    @property
    def idle(self) -> bool:
        """Whether nothing is at stake here: the engine, if any, may be replaced."""
        return self.driver is None or self.driver.state in _IDLE

    async def own(self, config: GuestConfig, hypervisor: Hypervisor) -> PrimarySession:
        """Return the owner's engine; it is made anew if another one, or none, idles here.

        Raises:
            StateError: This host holds a copy of the guest.
        """
        if isinstance(self.driver, PrimarySession) and self.driver.state is not PrimaryState.DISCARDED:
            return self.driver
        await self._vacate()
        machine = owner(self.name, self.host, self._next_life())
        driver = PrimarySession(machine, self._surroundings(config, hypervisor))
        self._install(driver)
        return driver

    async def hold(self, config: GuestConfig, hypervisor: Hypervisor) -> SecondarySession:
        """Return a new engine of the standby's side.

        Raises:
            StateError: This host runs the guest, or holds a copy of it already.
        """
        await self._vacate()
        machine = standby(self.name, self.host, self._next_life())
        driver = SecondarySession(machine, self._surroundings(config, hypervisor))
        self._install(driver)
        return driver

    async def _vacate(self) -> None:
        # What is being discarded has to be gone first; whoever follows its engine closes it then.
        with suppress(TimeoutError):
            async with asyncio.timeout(VACATE_LIMIT_S):
                while (
                    self.driver is not None and self.driver.state in _DISCARDED and self._follow is not None
                ):
                    await self._moved.wait()
        going = self.driver is not None and self.driver.state in _DISCARDED and self._follow is not None
        if self.driver is not None and (going or not self.idle):
            side, state = self.driver.machine.side.value, self.driver.state.value
            raise StateError(f"guest {self.name} has a {side} on {self.host} already: {state}")
        await self.close()

    def _next_life(self) -> str:
        # Attempts must be unique over all engines that this host ever has of a guest.
        self._engines += 1
        return f"{self._life}.{self._engines}"

    def _install(self, driver: Driver) -> None:
        loop = asyncio.get_running_loop()
        self.driver = driver
        self._run = loop.create_task(driver.run(), name=f"{self.name}: engine")
        self._run.add_done_callback(self._ran)
        self._follow = loop.create_task(self._following(driver), name=f"{self.name}: follow")

    def _ran(self, run: asyncio.Task[None]) -> None:
        if not run.cancelled() and run.exception() is not None:
            self.problem = f"the engine failed: {in_words(run.exception() or StateError('?'))}"
            log.critical(
                "guest %s: the engine failed; the guest stays as it is until the agent is restarted",
                self.name,
                exc_info=run.exception(),
                extra={"guest": self.name},
            )
        self.moved()

    async def close(self) -> None:
        """End the engine; guest and copy stay as they are. Idempotent."""
        driver, self.driver = self.driver, None
        tasks = [task for task in (self._follow, self._run) if task is not None]
        self._follow = self._run = None
        for task in tasks:
            if task is not asyncio.current_task():
                task.cancel()
        others = [task for task in tasks if task is not asyncio.current_task()]
        if others:
            await asyncio.wait(others)
        if driver is not None:
            await driver.close()

    # --- What follows by itself ----------------------------------------------------------------------------------

    def moved(self) -> None:
        """Wake those who wait for a change of state."""
        if self.driver is not None and self.driver.machine.joined is not None:
            self.record = self.driver.machine.joined
        self.wake()
        self._changed(self)

    async def _following(self, driver: Driver) -> None:
        seen: State | None = None
        every: tuple[State, ...] = (*PrimaryState, *SecondaryState)
        while True:
            others = tuple(state for state in every if state is not seen)
            seen = await driver.reach(*others)
            self.moved()
            if seen in {SecondaryState.ALONE, PrimaryState.DISCARDED, SecondaryState.DISCARDED}:
                await self.settle(driver)
                # A step that failed is repeated by the engine; what is torn down has no group any more.
                tries = 0
                while isinstance(driver, PrimarySession | SecondarySession) and driver.group is not None:
                    tries += 1
                    if seen is SecondaryState.ALONE and tries > TAKEOVER_TRIES:
                        # The guest runs here, and whoever wants to stop it must be able to.
                        left = in_words(driver.failure) if driver.failure is not None else "it does not end"
                        self.problem = f"the remains of its takeover could not be removed: {left}"
                        break
                    await asyncio.sleep(RETRY_S)
                    await self.settle(driver)
                self._tidy(self.name)
            elif seen in RUNNING_HERE:
                await self.settle(driver)
                if driver.state is seen and not self.busy:
                    self._tidy(self.name)  # what is busy tidies by itself
            if seen is SecondaryState.ALONE:
                await self._take_over(driver)
                return
            if seen in {PrimaryState.DISCARDED, SecondaryState.DISCARDED}:
                self._follow = None
                await self.close()
                self.moved()
                return

    async def _take_over(self, driver: Driver) -> None:
        # The copy is the guest now, and this host owns it: from here on it is an owner's business. The standby's
        # engine stays in its place until the owner's is made, so that nobody sees a guest without one.
        run, self._run, self._follow = self._run, None, None
        if run is not None:
            run.cancel()
            await asyncio.wait({run})
        if driver.way is not None and driver.machine.joined is not None:
            # The old primary, if it lives and was only forced out, may notice nothing by itself for long (mode colo).
            driver.way.port.notify("word", encode(Ended(driver.machine.joined)))
        await driver.close()
        machine = replace(
            owner(self.name, self.host, self._next_life()),
            state=PrimaryState.ALONE,
            joined=driver.machine.joined,
            live=True,
        )
        self._install(PrimarySession(machine, driver.around))
        self.moved()

    def told(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Tell the watchers how far an initial copy is."""
        for watcher in tuple(self.watchers):
            watcher(what, done_bytes, total_bytes)

    def row(self) -> dict[str, Any]:
        """Return what a table says of this host's part in the guest."""
        row: dict[str, Any] = {"guest": self.name, "host": self.host, "role": None, "state": "off"}
        driver = self.driver
        if driver is not None:
            machine = driver.machine
            row |= {
                "role": machine.side.value if driver.state not in _IDLE else None,
                "state": driver.state.value,
                "peer": machine.peer if driver.state not in {*_IDLE, *RUNNING_HERE} else None,
                "session": machine.session,
            }
            if isinstance(driver, SecondarySession) and driver.state not in _IDLE:
                row["epoch"] = driver.loaded
            if row["peer"] is not None:
                row["mode"] = driver.around.config.protection.mode.value
                if self.unsafe and isinstance(driver, PrimarySession):
                    row["unsafe"] = list(self.unsafe)
            if machine.cause and driver.state not in {PrimaryState.PROTECTED, SecondaryState.STANDBY}:
                row["problem"] = machine.cause
        if self.record is not None:
            row["generation"] = self.record.generation
            row["owner"] = self.record.owner
            row["record"] = self.record.state.value
        if self.busy:
            row["busy"] = self.busy
        if self.problem:
            row["problem"] = self.problem
        return row
