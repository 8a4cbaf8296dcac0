"""What both sides of a session have in common: the queue of events, the step, the effects, the arbiter."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from understudy.engine.words import decode, encode
from understudy.errors import ArbiterUnavailable, IllegalChange, StateError, UnderstudyError
from understudy.phases import first_failure
from understudy.session.effects import Effect, ReadRecord, Report, Swap, TellPeer
from understudy.session.events import Event, Failed, Lost, NoAnswer, PeerLost, RecordRead, Won
from understudy.session.machine import step

if TYPE_CHECKING:
    from understudy.arbiter import Record
    from understudy.engine.surroundings import Surroundings, Way
    from understudy.session.machine import Machine, State

__all__ = ["Driver"]

Json = Mapping[str, Any]
Carry = Callable[[Any], Awaitable[None]]

log = logging.getLogger("understudy.engine")

LONGEST_RETRY_S = 10.0  # between two attempts at an effect that keeps failing


@dataclass(slots=True)
class _Queued:
    event: Event | None  # ``None``: only the place in the queue counts
    answer: asyncio.Future[None] | None  # of whoever asked, told when the event's effects are done or refused


class Driver(ABC):
    """Drives the machine of one guest on one host.

    Args:
        machine: Where it starts.
        surroundings: What it may use.
    """

    def __init__(self, machine: Machine, surroundings: Surroundings) -> None:
        self.machine = machine
        self.around = surroundings
        self.failure: BaseException | None = (
            None  #: the first failure of this session, with everything attached
        )
        self.way: Way | None = None
        self._queue: asyncio.Queue[_Queued] = asyncio.Queue()
        self._taking = False
        self._ended = False
        self._begun: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._stamps: dict[
            str, str
        ] = {}  # attempt → when it was first sent: a repeat must be the same record
        self._failures: dict[type[Effect], int] = {}  # how often in a row each kind of effect failed
        self._carries = self.effects()
        self._carries |= {
            Swap: self._swap,
            ReadRecord: self._read_record,
            TellPeer: self._tell_peer,
            Report: self._report,
        }

    @property
    def guest(self) -> str:
        """Name of the guest."""
        return self.machine.guest

    @property
    def state(self) -> State:
        """Where the machine stands."""
        return self.machine.state

    @abstractmethod
    def effects(self) -> dict[type[Effect], Carry]:
        """Return what this side does for each effect of its tables."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine; guest and copy stay as they are. Idempotent."""

    # --- Events in ---------------------------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """Queue an event that just happened. One that means nothing in the state it finds is logged and dropped."""
        self._queue.put_nowait(_Queued(event, None))

    async def ask(self, event: Event) -> None:
        """Queue an event that somebody wants, and wait until its effects are done or begun.

        Raises:
            StateError: It is not possible in this state; nothing was changed. Or the engine has ended before it came
                to that.
        """
        await self._enqueue(event)

    async def settle(self) -> None:
        """Wait until every event that has come so far is taken, and what it asked for is done or begun.

        Raises:
            StateError: The engine has ended before it came to that.
        """
        await self._enqueue(None)

    async def _enqueue(self, event: Event | None) -> None:
        if self._ended:
            raise StateError(self._over())
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Queued(event, answer))
        await answer

    @property
    def settled(self) -> bool:
        """Whether every event has been taken and what it asked for is done or begun; else the state runs ahead."""
        return not self._taking and self._queue.empty()

    async def reach(self, *states: State) -> State:
        """Wait until the machine is in one of `states` and return it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.machine.state in states)
            return self.machine.state

    async def run(self) -> None:
        """Take events until cancelled."""
        try:
            while True:
                queued = await self._queue.get()
                self._taking = True
                await self._take(queued)
                self._taking = False
        finally:
            self._ended = True
            self._answer_all()
            for task in self._begun:
                task.cancel()
            if self._begun:
                await asyncio.wait(self._begun)

    def _over(self) -> str:
        side, state = self.machine.side.value, self.machine.state.value
        return f"the {side}'s engine of guest {self.guest} has ended ({state})"

    def _answer_all(self) -> None:
        # Nobody takes what is still queued: whoever waits for it must hear so, or he would wait for ever.
        while not self._queue.empty():
            answer = self._queue.get_nowait().answer
            if answer is not None and not answer.done():
                answer.set_exception(StateError(self._over()))

    async def _take(self, queued: _Queued) -> None:
        try:
            await self._step(queued)
        finally:
            if queued.answer is not None and not queued.answer.done():
                queued.answer.set_exception(StateError(self._over()))

    async def _step(self, queued: _Queued) -> None:
        try:
            if queued.event is not None:
                await self._react(queued.event)
        except StateError as refused:
            if queued.answer is not None:
                if not queued.answer.done():
                    queued.answer.set_exception(refused)
            else:
                log.info("%s", refused, extra={"guest": self.guest, "session": self.machine.session})
            return
        if queued.answer is not None and not queued.answer.done():
            queued.answer.set_result(None)

    async def _react(self, event: Event) -> None:
        before = self.machine.state
        self.machine, effects = step(self.machine, event, self.around.tables)
        if self.machine.state is not before:
            self._event(
                "state",
                {"from": before.value, "to": self.machine.state.value, "cause": type(event).__name__},
            )
        for effect in effects:
            if not await self._carry_out(effect):
                break
        async with self._changed:
            self._changed.notify_all()

    # --- Effects out -------------------------------------------------------------------------------------------------

    async def _carry_out(self, effect: Effect) -> bool:
        try:
            await self._carries[type(effect)](effect)
        except Exception as error:  # noqa: BLE001 - whatever failed, the tables decide what follows
            self.fail(effect, error)
            return False
        self._failures.pop(type(effect), None)
        return True

    def fail(self, effect: Effect, error: BaseException) -> None:
        """Note a failure and post it as the event `Failed`. The first one is kept whole."""
        cause = first_failure(error)
        detail = str(cause) if isinstance(cause, UnderstudyError) else f"{type(cause).__name__}: {cause}"
        log.warning(
            "guest %s: %s failed: %s",
            self.guest,
            type(effect).__name__,
            detail,
            extra={"session": self.machine.session},
        )
        self.failure = self.failure or error
        # What keeps failing is tried again and again, but not in a hurry.
        kind, failed = type(effect), Failed(effect, detail)
        times = self._failures[kind] = self._failures.get(kind, 0) + 1
        if times == 1:
            self.post(failed)
        else:
            delay_s = min(self.around.limits.retry_s * 2.0 ** min(times - 2, 16), LONGEST_RETRY_S)
            asyncio.get_running_loop().call_later(delay_s, self._fail_still, failed, times)

    def _fail_still(self, failed: Failed, times: int) -> None:
        # What has succeeded meanwhile is over; the next session must not be ended by it.
        if self._failures.get(type(failed.effect)) == times:
            self.post(failed)

    def begin(self, effect: Effect, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin an effect that answers with an event later; its failure is posted as `Failed`."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 - as _carry_out
                self.fail(effect, error)

        task = asyncio.get_running_loop().create_task(
            guarded(), name=f"{self.guest}: {type(effect).__name__}"
        )
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        # Cancelled before it began, the work itself was never awaited; closing it is nothing otherwise.
        task.add_done_callback(lambda _: work.close())
        return task

    async def _swap(self, effect: Swap) -> None:
        self.begin(effect, self._swapping(effect))

    async def _swapping(self, effect: Swap) -> None:
        desired = effect.desired
        stamp = self._stamps.setdefault(desired.attempt, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        if effect.again:
            await asyncio.sleep(self.around.limits.retry_s)
        try:
            won, record = await self.around.arbiter.swap(effect.expected, replace(desired, written_at=stamp))
        except ArbiterUnavailable as silence:
            self.post(NoAnswer(desired.attempt, str(silence)))
        except IllegalChange as refused:
            # Refused before it was sent: it can never be made, and the record that counts has to be seen.
            self.failure = self.failure or refused
            self.post(Lost(desired.attempt, await self._read(desired.attempt)))
        else:
            self._event("swap", {"won": won, "wanted": desired.state.value, "record": _told(record)})
            self.post(Won(record) if won and record is not None else Lost(desired.attempt, record))

    async def _read(self, attempt: str) -> Record | None:
        while True:
            with suppress(ArbiterUnavailable):
                return await self.around.arbiter.read(self.guest)
            self.post(NoAnswer("", f"after the refused swap {attempt}"))
            await asyncio.sleep(self.around.limits.retry_s)

    async def _read_record(self, effect: ReadRecord) -> None:
        self.begin(effect, self._reading(effect))

    async def _reading(self, effect: ReadRecord) -> None:
        if effect.again:
            await asyncio.sleep(self.around.limits.retry_s)
        try:
            record = await self.around.arbiter.read(self.guest)
        except ArbiterUnavailable as silence:
            self.post(NoAnswer("", str(silence)))
        else:
            self.post(RecordRead(record))

    async def _tell_peer(self, effect: TellPeer) -> None:
        if self.way is not None:
            self.way.port.notify("word", encode(effect.word))

    async def _report(self, effect: Report) -> None:
        self._event(effect.what, {"detail": effect.detail})

    def _event(self, name: str, facts: Mapping[str, Any]) -> None:
        shared = {
            "side": self.machine.side.value,
            "session": self.machine.session,
            "state": self.machine.state.value,
        }
        self.around.telling.event(self.guest, name, shared | dict(facts))

    # --- The other host ----------------------------------------------------------------------------------------------

    def attach(self, way: Way) -> None:
        """Use `way` for this session from now on; an earlier one is closed.

        It stays until the engine is closed or another session begins: words that end a session are its last ones.
        """
        self.detach()
        self.way = way
        way.port.serve(self.serve, self._note)
        way.port.on_lost(lambda lost: self._lost(way, str(lost)))

    def _lost(self, way: Way, detail: str) -> None:
        if self.way is way:
            self.post(PeerLost(detail))

    def detach(self) -> None:
        """End the conversation of the session that is over. Idempotent."""
        if self.way is not None:
            way, self.way = self.way, None
            way.port.close()

    async def serve(self, method: str, params: Json) -> Json:
        """Answer a request of the other side's engine."""
        raise StateError(
            f"the {self.machine.side.value} of {self.guest} answers no {method!r}, got {dict(params)!r}"
        )

    def _note(self, method: str, params: Json) -> None:
        if method == "word":
            self.post(decode(params))
        else:
            self.told(method, params)

    def told(self, method: str, params: Json) -> None:
        """Take a note of the other side's engine that is no word of the tables."""
        log.info(
            "guest %s: the other host told %r %r, which means nothing here", self.guest, method, dict(params)
        )

    async def end_begun(self) -> None:
        """Cancel what was begun and has not ended, swaps and reads included, and wait for it, bounded."""
        tasks = [task for task in self._begun if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self.around.limits.end_s)


def _told(record: Record | None) -> Mapping[str, Any] | None:
    return None if record is None else record.to_json()
