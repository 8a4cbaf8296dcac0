"""What the command line can have an agent do. docs/reference/command-line.md shows the JSON of each answer."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from understudy._version import __version__
from understudy.agent.overview import Overview
from understudy.agent.tenure import RUNNING_HERE, Tenure
from understudy.device import Finding, Mode, Severity
from understudy.engine import PrimarySession, SecondarySession
from understudy.errors import GuestBusy, HypervisorError, MonitorSilent, PreflightFailed, StateError
from understudy.hypervisor import GuestState
from understudy.phases import first_failure, in_words
from understudy.session import PrimaryState, SecondaryState
from understudy.session.events import Force, GuestShutdown, Protect, Recover, Start, Unprotect

if TYPE_CHECKING:
    from understudy.agent.agent import Agent
    from understudy.agent.control import Call
    from understudy.hypervisor import GuestConfig, Hypervisor

__all__ = ["WITHDRAW_LIMIT_S", "Operations"]

Json = dict[str, Any]

log = logging.getLogger("understudy.agent")

# Past the engine's own limits: what has not ended after this long is told as it stands.
MARGIN_S = 30.0
# For each protection that is given up when the agent is stopped.
WITHDRAW_LIMIT_S = 20.0

_P, _S = PrimaryState, SecondaryState
_GONE = (_P.OFF, _P.DISCARDED)
#: States in which a protection has ended, one way or the other.
_ENDED = (*RUNNING_HERE, *_GONE, _P.FENCED, _P.RECOVERING)

_TURN = (
    "; its record leaves it to the standby. If that host is lost for good: "
    "understudy failover GUEST --force --reason TEXT"
)
#: What to do about a guest that cannot be started, by state.
_HINTS: Mapping[Any, str] = {_P.RECOVERING: _TURN, _P.FENCED: _TURN}


class Operations:
    """Carries out what the command line asks for.

    Args:
        agent: This host's.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._protecting: dict[str, asyncio.Task[Json]] = {}
        self.overview = Overview(agent)
        self._methods: Mapping[str, Callable[[Call], Awaitable[Any]]] = {
            "names": self.overview.names,
            "list": self.overview.table,
            "status": self.overview.status,
            "check": self.overview.check,
            "history": self.overview.history,
            "start": self._start,
            "stop": self._stop,
            "protect": self._protect,
            "unprotect": self._unprotect,
            "failover": self._failover,
        }

    async def handle(self, call: Call) -> Any:
        """Carry out one request of the command line.

        Raises:
            StateError: There is no such method.
        """
        method = self._methods.get(call.method)
        if method is None:
            raise StateError(f"this agent ({__version__}) knows no {call.method!r}")
        return await method(call)

    # --- Start and stop ------------------------------------------------------------------------------------------

    async def _start(self, call: Call) -> Json:
        guest = call.str("guest")
        config, hypervisor = self._agent.files.load(guest)
        arbiter = self._agent.need_arbiter()
        tenure = await self._tenure(guest)
        with tenure.operation("start"):
            record = tenure.record = await arbiter.read(guest)
            host = self._agent.host
            if record is not None and record.owner != host:
                raise StateError(
                    f"guest {guest} belongs to {record.owner} ({record}); it was not started here"
                )
            driver = await tenure.own(config, hypervisor)
            if driver.state is not _P.OFF:
                hint = _HINTS.get(driver.state, "")
                raise StateError(f"guest {guest} is not off on {host}: {driver.state.value}{hint}")
            state = await self.overview.state(config, hypervisor)
            if state is not GuestState.ABSENT:
                raise StateError(f"guest {guest} exists on {host} already: {state.value}")
            driver.failure = None
            driver.around = self._agent.surroundings(config, hypervisor)
            if driver.machine.joined != record:
                await driver.ask(Recover(record, live=False))
            if driver.state is _P.OFF:
                await driver.ask(Start())
            after = await self._reach(tenure, "start", *RUNNING_HERE, *_GONE, _P.RECOVERING)
            if after not in RUNNING_HERE or driver.failure is not None:
                raise tenure.failure(f"guest {guest} was not started")
            return self._told(tenure)

    async def _stop(self, call: Call) -> Json:
        guest, force = call.str("guest"), bool(call.params.get("force"))
        timeout_s = float(call.params.get("timeout_s") or 60.0)
        tenure = await self._tenure(guest)
        driver = self._owner(tenure)
        if driver.state in {_P.PROTECTED, _P.LEAVING}:
            call.note(f"{guest} is protected; its protection is ended first")
            await self._leave(tenure, "it is being shut down")
        with tenure.operation("stop"):
            if driver.state not in RUNNING_HERE:
                raise StateError(
                    f"guest {guest} is {driver.state.value} on {self._agent.host}; nothing was done"
                )
            how = "killed" if force else f"asked to shut down; that may take {timeout_s:g} s"
            call.note(f"{guest} is being {how}")
            await self._end_guest(driver, force=force, timeout_s=timeout_s)
            driver.post(GuestShutdown())
            await self._reach(tenure, "stop", *_GONE)
            return {"guest": guest, "host": self._agent.host, "state": "off"}

    async def _end_guest(self, driver: PrimarySession, *, force: bool, timeout_s: float) -> None:
        # Bounded here and not by the hypervisor alone, which may hang in its turn. What fails leaves the guest as the
        # text says; one that shuts down after all, later, is seen by the watch over unprotected guests.
        around = driver.around
        guest = around.config.name
        hint = "" if force else f"; understudy stop {guest} --force kills it"
        limit_s = 2 * timeout_s + MARGIN_S
        try:
            async with asyncio.timeout(limit_s):
                await around.hypervisor.stop(around.config, force=force, timeout_s=timeout_s)
        except TimeoutError:
            problem = (
                f"guest {guest} was not stopped: its hypervisor has not answered within {limit_s:g} s{hint}"
            )
            raise HypervisorError(problem) from None
        except MonitorSilent as silence:
            raise MonitorSilent(f"guest {guest} was not stopped: {silence}{hint}") from silence
        except HypervisorError as error:
            raise HypervisorError(f"guest {guest} was not stopped: {error}{hint}") from error

    # --- Protection ----------------------------------------------------------------------------------------------

    async def _protect(self, call: Call) -> Json:
        guest = call.str("guest")
        mode = Mode(call.params["mode"]) if call.params.get("mode") else None
        interval_ms = call.params.get("interval_ms")
        allow_unsafe = bool(call.params.get("allow_unsafe"))
        config, hypervisor = self._agent.files.load(
            guest, mode=mode, interval_ms=interval_ms, allow_unsafe=allow_unsafe
        )
        tenure = await self._tenure(guest)
        if tenure.busy:
            raise GuestBusy(f"guest {guest} is busy on {self._agent.host}: {tenure.busy} is under way")
        peer = self.overview.peer_of(config, call.params.get("peer"))
        work = self._protecting_guest(call, tenure, config, hypervisor, peer)
        task = self._agent.spawn(work, f"protect {guest}")
        self._protecting[guest] = task
        task.add_done_callback(lambda _: self._protecting.pop(guest, None))
        if not call.params.get("wait", True):
            # Nobody waits for its outcome: it is told in every table until the next attempt.
            task.add_done_callback(lambda done: self._note_outcome(tenure, done))
            return {"guest": guest, "host": self._agent.host, "peer": peer, "state": "syncing"}
        try:
            return cast("Json", await asyncio.shield(task))
        except asyncio.CancelledError:
            # The client has gone: nothing half-made may stay.
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            raise

    def _note_outcome(self, tenure: Tenure, done: asyncio.Task[Json]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            tenure.problem = f"it was not protected: {in_words(first_failure(error))}"

    async def _protecting_guest(
        self, call: Call, tenure: Tenure, config: GuestConfig, hypervisor: Hypervisor, peer: str
    ) -> Json:
        guest = tenure.name
        began = time.monotonic()
        if not isinstance(tenure.driver, PrimarySession):
            # It does not run here. Telling why must not keep the host where it does from having its copy here.
            await self._fits(guest, config, hypervisor, peer)
            self._owner(tenure)
        with tenure.operation("protect"):
            tenure.problem = ""
            findings = await self._fits(guest, config, hypervisor, peer)
            for finding in findings:
                if finding.severity is Severity.WARNING:
                    call.note(str(finding))
            tenure.unsafe = tuple(
                f"{finding.subject}: {finding.problem}" for finding in findings if finding.unsafe
            )
            driver = self._owner(tenure)
            if driver.state not in RUNNING_HERE:
                raise StateError(
                    f"guest {guest} is {driver.state.value} on {self._agent.host}; nothing was done"
                )
            if driver.group is not None:
                # A new session would have devices of its own, and nobody would ask these again.
                why = (
                    in_words(first_failure(driver.failure))
                    if driver.failure is not None
                    else "it does not end"
                )
                raise StateError(
                    f"what the last protection of guest {guest} left is still being removed: {why}; try again later"
                )
            driver.failure = None
            driver.around = self._agent.surroundings(config, hypervisor)
            driver.bwlimit_bytes_per_s = int(call.params.get("bwlimit_bytes_per_s") or 0)
            self._agent.figures.forget(guest)
            session = secrets.token_hex(8)
            tenure.watchers.add(call.progress)
            try:
                await driver.ask(Protect(session, peer, config.protection.prefer_primary))
                after = await tenure.reach(_P.PROTECTED, *_ENDED)
            except asyncio.CancelledError:
                await self._call_off(tenure, peer, session)
                raise
            finally:
                tenure.watchers.discard(call.progress)
            if after is not _P.PROTECTED:
                await self._agent.neighbours.settle(peer, guest, session)
                self._agent.tidy(guest)
                raise tenure.failure(f"guest {guest} could not be protected; it is {after.value}")
            return {
                "guest": guest,
                "host": self._agent.host,
                "peer": peer,
                "mode": config.protection.mode.value,
                "session": session,
                "state": "protected",
                "generation": driver.machine.joined.generation if driver.machine.joined else None,
                "took_ms": round((time.monotonic() - began) * 1000),
            }

    async def _fits(
        self, guest: str, config: GuestConfig, hypervisor: Hypervisor, peer: str
    ) -> Sequence[Finding]:
        findings = await self.overview.preflight(config, hypervisor, peer)
        if any(finding.severity is Severity.ERROR for finding in findings):
            raise PreflightFailed(guest, findings)
        return findings

    async def _call_off(self, tenure: Tenure, peer: str, session: str) -> None:
        # In a task of its own: whoever called it off may go away while it is undone.
        async def undo() -> None:
            driver = tenure.driver
            if isinstance(driver, PrimarySession):
                with suppress(StateError):
                    await driver.ask(Unprotect("it was called off"))
            await self._reach(tenure, "unprotect", *_ENDED)
            await self._agent.neighbours.settle(peer, tenure.name, session)
            self._agent.tidy(tenure.name)

        undoing = asyncio.ensure_future(undo())
        while not undoing.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({undoing})
        if undoing.exception() is not None:
            log.error(
                "guest %s: calling off its protection failed", tenure.name, exc_info=undoing.exception()
            )

    async def _unprotect(self, call: Call) -> Json:
        guest = call.str("guest")
        tenure = self._agent.tenure(guest)
        protecting = self._protecting.get(guest)
        if protecting is not None:
            protecting.cancel()
            await asyncio.wait({protecting})
        else:
            await self._leave(tenure, "unprotect")
        return self._told(tenure)

    async def _leave(self, tenure: Tenure, reason: str) -> None:
        driver = self._owner(tenure)
        with tenure.operation("unprotect"):
            if driver.state in RUNNING_HERE:
                raise StateError(f"guest {tenure.name} is not protected; it runs on {self._agent.host}")
            peer, session = driver.machine.peer, driver.machine.session
            driver.failure = None
            await driver.ask(Unprotect(reason))
            after = await self._reach(tenure, "unprotect", *_ENDED)
            if peer and session:
                await self._agent.neighbours.settle(peer, tenure.name, session)
            self._agent.tidy(tenure.name)
            if after not in RUNNING_HERE:
                raise tenure.failure(f"guest {tenure.name} is {after.value} on {self._agent.host}")

    async def _failover(self, call: Call) -> Json:
        guest, force = call.str("guest"), bool(call.params.get("force"))
        operator, reason = call.str("operator", "") or call.user, call.str("reason", "")
        if force and not reason:
            raise StateError("a forced failover needs a reason: it is kept in the history")
        tenure = await self._tenure(guest)
        driver = tenure.driver
        host = self._agent.host
        holds = isinstance(driver, SecondarySession) and not tenure.idle
        waits = isinstance(driver, PrimarySession) and driver.state in {_P.FENCED, _P.RECOVERING}
        if driver is None or not (holds or waits):
            owner = f"; it belongs to {tenure.record.owner}" if tenure.record else ""
            raise StateError(f"{host} holds no copy of guest {guest}{owner}")
        with tenure.operation("failover"):
            if driver.state is _S.STANDBY and not force:
                raise StateError(
                    f"the pair of guest {guest} is healthy: {driver.machine.peer or 'the other host'} runs it. "
                    "--force --reason TEXT lets this host go on with it all the same"
                )
            if force:
                record = driver.machine.joined
                if holds and record is not None:
                    await self._agent.neighbours.defer(record.owner, guest)
                try:
                    await driver.ask(Force(operator, reason))
                except StateError:
                    if tenure.driver is driver:
                        raise
                    # It has taken over by itself meanwhile, and another engine has its place.
            over = (*RUNNING_HERE, _S.DISCARDED, _S.KEPT, *_GONE)
            limit_s = self._agent.limits.promote_s + self._agent.limits.cut_s + MARGIN_S
            try:
                after = await tenure.reach(*over, timeout_s=limit_s)
            except TimeoutError:
                stands = tenure.driver.state.value if tenure.driver is not None else "gone"
                raise StateError(
                    f"guest {guest} is still {stands} after {limit_s:g} s; see its history"
                ) from None
            if after not in RUNNING_HERE:
                owner = tenure.record.owner if tenure.record is not None else "nobody"
                raise tenure.failure(
                    f"guest {guest} does not go on here ({after.value}); its record names {owner}"
                )
            return self._told(tenure)

    # --- The end of the agent ------------------------------------------------------------------------------------

    async def withdraw(self) -> None:
        """End every protection that this host takes part in, in good order; bounded."""

        async def one(tenure: Tenure) -> None:
            driver = tenure.driver
            try:
                async with asyncio.timeout(WITHDRAW_LIMIT_S):
                    protecting = self._protecting.get(tenure.name)
                    if protecting is not None:
                        protecting.cancel()
                        await asyncio.wait({protecting})
                    elif isinstance(driver, PrimarySession) and driver.state in {_P.SYNCING, _P.PROTECTED}:
                        await self._leave(tenure, f"the agent on {self._agent.host} is being stopped")
                    elif isinstance(driver, SecondarySession) and not tenure.idle:
                        await self._ask_owner(tenure, driver)
            except Exception as error:  # noqa: BLE001 - whatever it was, the other guests have their turn
                problem = in_words(first_failure(error))
                log.warning("guest %s: its protection could not be ended: %s", tenure.name, problem)

        await asyncio.gather(*(one(tenure) for tenure in tuple(self._agent.tenures.values())))

    async def _ask_owner(self, tenure: Tenure, driver: SecondarySession) -> None:
        machine = driver.machine
        owner = machine.joined.owner if machine.joined is not None else machine.peer
        if driver.state in {_S.SYNCING, _S.STANDBY} and owner is not None:
            params = {"guest": tenure.name, "session": machine.session}
            await self._agent.neighbours.host(owner).ask("yield", params, timeout_s=WITHDRAW_LIMIT_S)
        await tenure.reach(_S.DISCARDED, _S.EMPTY, _S.KEPT, *RUNNING_HERE)

    async def yield_guest(self, guest: str, peer: str) -> Json:
        """End the protection of a guest because the host that holds its copy asks for it."""
        tenure = self._agent.tenure(guest)
        protecting = self._protecting.get(guest)
        if protecting is not None:
            protecting.cancel()
            await asyncio.wait({protecting})
            return {}
        driver = self._owner(tenure)
        if driver.machine.peer != peer:
            raise StateError(f"{peer} does not hold the copy of guest {guest}")
        driver.failure = None
        await driver.ask(Unprotect(f"the agent on {peer} is being stopped"))
        await self._reach(tenure, "unprotect", *_ENDED)
        return {}

    # --- Shared --------------------------------------------------------------------------------------------------

    async def rows(self) -> list[Json]:
        """Return the table of this host."""
        return await self.overview.rows()

    async def _tenure(self, guest: str) -> Tenure:
        tenure = self._agent.tenure(guest)
        await tenure.recovered()
        return tenure

    def _owner(self, tenure: Tenure) -> PrimarySession:
        driver = tenure.driver
        if isinstance(driver, PrimarySession) and driver.state not in _GONE:
            return driver
        if isinstance(driver, SecondarySession) and not tenure.idle:
            owner = tenure.record.owner if tenure.record is not None else driver.machine.peer
            raise StateError(
                f"{self._agent.host} holds the copy of guest {tenure.name}; do that on {owner or 'the other host'}"
            )
        if driver is None and tenure.name not in self._agent.files.all()[0]:
            self._agent.files.load(tenure.name)  # says what is wrong
        raise StateError(f"guest {tenure.name} does not run on {self._agent.host}")

    async def _reach(self, tenure: Tenure, what: str, *states: PrimaryState) -> Any:
        limits = self._agent.limits
        limit_s = max(limits.start_s, limits.end_s + limits.cut_s) + MARGIN_S
        try:
            return await tenure.reach(*states, timeout_s=limit_s)
        except TimeoutError:
            stands = tenure.driver.state.value if tenure.driver is not None else "gone"
            problem = f"{what} of guest {tenure.name} has not ended after {limit_s:g} s: it is {stands}"
            raise StateError(problem) from None

    def _told(self, tenure: Tenure) -> Json:
        record = tenure.driver.machine.joined if tenure.driver is not None else tenure.record
        return {
            "guest": tenure.name,
            "host": self._agent.host,
            "state": tenure.driver.state.value if tenure.driver is not None else "off",
            "generation": record.generation if record is not None else None,
        }
