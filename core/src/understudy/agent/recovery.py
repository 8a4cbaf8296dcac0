"""What an agent does about guests that outlived its predecessor, and about guests that end without being asked.

At start, for every guest that has a file: the record is read, the hypervisor cleans what a dead agent left (the
janitor), and the engine's tables decide from the record and from what lives here. Nothing is ever started because a
record says ``protected``. A guest whose record says that it is alone here and that still runs is adopted.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from understudy.agent.tenure import RECOVERY, RUNNING_HERE
from understudy.arbiter import RecordState
from understudy.device import SweepContext, Verdict
from understudy.errors import ArbiterUnavailable, GuestBusy, UnderstudyError
from understudy.hypervisor import GuestState
from understudy.phases import first_failure, in_words
from understudy.session import PrimaryState
from understudy.session.events import GuestGone, GuestShutdown, Recover

if TYPE_CHECKING:
    from understudy.agent.agent import Agent
    from understudy.agent.tenure import Tenure
    from understudy.arbiter import Record
    from understudy.hypervisor import GuestConfig, Hypervisor

__all__ = ["Recovery"]

log = logging.getLogger("understudy.agent")

RETRY_S = 0.5
POLL_S = 2.0
STATE_LIMIT_S = 5.0


class Recovery:
    """Looks after guests that nobody asks about.

    Args:
        agent: This host's.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._suspected: dict[str, GuestState] = {}

    def start(self) -> None:
        """Begin, for every guest that has a file."""
        guests, problems = self._agent.files.all()
        for problem in problems:
            log.error("a guest file is left out: %s", problem)
        if self._agent.arbiter is not None:
            for name, (config, hypervisor) in guests.items():
                tenure = self._agent.tenure(name)
                self._agent.spawn(self._recover(tenure, config, hypervisor), f"recovery of {name}")
        self._agent.spawn(self._watch(), "watch over unprotected guests")

    async def _recover(self, tenure: Tenure, config: GuestConfig, hypervisor: Hypervisor) -> None:
        clock = asyncio.get_running_loop()
        while tenure.driver is None:
            began_s = clock.time()
            try:
                with tenure.operation(f"{RECOVERY} after the start of the agent"):
                    if await self._looked_after(tenure, config, hypervisor):
                        break
            except GuestBusy:
                await tenure.free()
            else:
                # An operator may step in before it is tried again: for as long as the attempt kept him out.
                await asyncio.sleep(max(POLL_S, clock.time() - began_s))
        driver = tenure.driver
        if driver is not None and driver.machine.live:
            await self._clean_decided(tenure, config, hypervisor)

    async def _looked_after(self, tenure: Tenure, config: GuestConfig, hypervisor: Hypervisor) -> bool:
        told = tenure.problem
        record = tenure.record = await self._read(tenure)
        try:
            # A read entitles nobody: around a guest that lives here nothing is opened before this agent's own
            # swap to `alone`. One to `protected` that its predecessor sent may still be on its way. What lives here
            # although another host is alone with it is discarded, and its gate with it.
            alone = (
                record is not None and record.state is RecordState.ALONE and record.owner == self._agent.host
            )
            if not alone or await hypervisor.state(config) is GuestState.ABSENT:
                await self._clean(tenure, config, hypervisor, record)
            await self._resume(tenure, config, hypervisor, record)
        except Exception as error:  # noqa: BLE001 - logged, with where it happened unless it was foreseen
            tenure.problem = f"it could not be looked after yet: {in_words(error)}"
            if tenure.problem != told:
                _log_failure(f"guest {tenure.name} could not be looked after yet", tenure, error)
            return False
        return True

    async def _clean_decided(self, tenure: Tenure, config: GuestConfig, hypervisor: Hypervisor) -> None:
        # Once this host owns the guest, or has none any more, what a dead agent had put around it can go. No session
        # may begin meanwhile: its gate would be taken for one that was left.
        decided = (*RUNNING_HERE, PrimaryState.OFF, PrimaryState.DISCARDED)
        failed = False
        while True:
            await tenure.reach(*decided)
            try:
                with tenure.operation(f"{RECOVERY}: removing what an agent left"):
                    driver = tenure.driver
                    record = driver.machine.joined if driver is not None else tenure.record
                    await self._clean(tenure, config, hypervisor, record)
            except GuestBusy:
                await tenure.free()
            except Exception as error:  # noqa: BLE001 - as above
                if not failed:
                    _log_failure("what an agent left could not be removed yet", tenure, error)
                failed = True
                tenure.problem = f"what an agent left could not be removed yet: {in_words(error)}"
                await asyncio.sleep(POLL_S)
            else:
                tenure.problem = "" if failed else tenure.problem
                return

    async def _read(self, tenure: Tenure) -> Record | None:
        arbiter = self._agent.need_arbiter()
        while True:
            try:
                record = await arbiter.read(tenure.name)
            except ArbiterUnavailable as silence:
                # Nothing follows from silence; whatever lives here stays as it is.
                if not tenure.problem:
                    log.warning("guest %s: waiting for the arbiter: %s", tenure.name, silence)
                tenure.problem = f"waiting for the arbiter: {silence}"
                await asyncio.sleep(RETRY_S)
            else:
                tenure.problem = ""
                return record

    async def _clean(
        self, tenure: Tenure, config: GuestConfig, hypervisor: Hypervisor, record: Record | None
    ) -> None:
        done: list[str] = []
        try:
            done += await hypervisor.sweep(config, record)
            done += await self._sweep_devices(config, hypervisor, record)
        finally:
            for sentence in done:
                self._agent.telling.event(tenure.name, "janitor", {"detail": sentence})

    async def _sweep_devices(
        self, config: GuestConfig, hypervisor: Hypervisor, record: Record | None
    ) -> list[str]:
        sweepers = [subkind.sweep for subkind in self._agent.subkinds() if subkind.sweep is not None]
        if not sweepers:
            return []
        # Above a guest that lives here without `alone` every gate stays; where none lives, nothing can be let out.
        if record is not None and record.state is RecordState.ALONE and record.owner == self._agent.host:
            verdict = Verdict.KEEP
        elif await hypervisor.state(config) is GuestState.ABSENT:
            verdict = Verdict.DISCARD
        else:
            return []
        context = SweepContext(config.name, await hypervisor.devices(config), verdict)
        return [sentence for sweep in sweepers for sentence in await sweep(context)]

    async def _resume(
        self, tenure: Tenure, config: GuestConfig, hypervisor: Hypervisor, record: Record | None
    ) -> None:
        state = await hypervisor.state(config)
        exists = state is not GuestState.ABSENT
        if record is None:
            if exists:
                tenure.problem = f"it is {state.value} here, but the arbiter has no record of it"
            return
        host = self._agent.host
        if record.standby == host:
            kept = exists and record.state is RecordState.PROMOTING
            if exists and not kept:
                # A copy without its stream and its devices cannot be promoted; it must not stay, either. One that was
                # being promoted may be the guest already: it is kept for an operator.
                await hypervisor.stop(config, force=True, timeout_s=self._agent.limits.end_s)
                self._agent.telling.event(
                    tenure.name, "janitor", {"detail": "killed a copy that nobody drove"}
                )
            untouched = record.state is RecordState.PROTECTED
            holding = await tenure.hold(config, hypervisor)
            await holding.ask(Recover(record, live=kept, untouched=untouched))
        elif record.owner == host or exists:
            owning = await tenure.own(config, hypervisor)
            await owning.ask(Recover(record, live=exists))

    # --- Guests that end by themselves while nothing protects them -----------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            for tenure in tuple(self._agent.tenures.values()):
                driver = tenure.driver
                if driver is None or driver.state not in RUNNING_HERE or tenure.busy:
                    self._suspected.pop(tenure.name, None)
                    continue
                around = driver.around
                try:
                    async with asyncio.timeout(STATE_LIMIT_S):
                        state = await around.hypervisor.state(around.config)
                except (TimeoutError, OSError, UnderstudyError) as error:
                    log.debug("guest %s: its state is not known: %s", tenure.name, error)
                    continue
                # A guest that is just being started is absent, too.
                if driver.settled:
                    self._judge(tenure, state)

    def _judge(self, tenure: Tenure, state: GuestState) -> None:
        # Twice in a row: an operation may have been at it when the hypervisor looked.
        before, self._suspected[tenure.name] = self._suspected.get(tenure.name), state
        driver = tenure.driver
        if driver is None or driver.state not in RUNNING_HERE or tenure.busy or before is not state:
            return
        if state is GuestState.SHUTOFF:
            driver.post(GuestShutdown())
        elif state is GuestState.ABSENT:
            driver.post(GuestGone("its process is gone"))


def _log_failure(what: str, tenure: Tenure, error: Exception) -> None:
    # What was foreseen is told in words; the rest with where it happened.
    foreseen = isinstance(first_failure(error), UnderstudyError)
    words = in_words(first_failure(error))
    log.error("%s: %s", what, words, exc_info=None if foreseen else error, extra={"guest": tenure.name})
