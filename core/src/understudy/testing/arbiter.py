"""An arbiter in memory, with a view of its own for each host that can fall silent in every way there is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import TypeVar

from understudy.arbiter import Arbiter, Record, RecordState, SwapResult
from understudy.errors import ArbiterUnavailable

__all__ = ["ArbiterView", "MemoryArbiter", "Silence"]

T = TypeVar("T")


class Silence(Enum):
    """How a call to the arbiter ends without an answer."""

    UNASKED = "unasked"  #: the request was lost: nothing was changed
    APPLIED = "applied"  #: the answer was lost: it was changed
    LATE = "late"  #: the request is under way for long: it is changed some time after everybody has given up


class MemoryArbiter(Arbiter):
    """The truth: one record per guest, and every record that ever was."""

    def __init__(self) -> None:
        self.records: dict[str, list[Record]] = {}

    def view(self, host: str) -> ArbiterView:
        """Return the arbiter as one host sees it."""
        return ArbiterView(self, host)

    def now(self, guest: str) -> Record | None:
        """Return the record that counts, at once."""
        kept = self.records.get(guest, [])
        return kept[-1] if kept else None

    def may_open(self, guest: str, host: str) -> bool:
        """Tell whether the record says ``alone`` for this host."""
        record = self.now(guest)
        return record is not None and record.state is RecordState.ALONE and record.owner == host

    async def read(self, guest: str) -> Record | None:
        """Return the record that counts."""
        return self.now(guest)

    async def exchange(self, expected: Record | None, desired: Record) -> SwapResult:
        """Carry out a swap."""
        kept = self.records.setdefault(desired.guest, [])
        current = kept[-1] if kept else None
        for made in kept:
            if made.identity == desired.identity:
                return SwapResult(won=True, record=made)
        same = (
            current is expected
            if current is None or expected is None
            else (current.generation, current.identity) == (expected.generation, expected.identity)
        )
        if not same:
            return SwapResult(won=False, record=current)
        record = replace(desired, generation=len(kept) + 1)
        kept.append(record)
        return SwapResult(won=True, record=record)

    async def history(self, guest: str) -> Sequence[Record]:
        """Return every record of a guest."""
        return tuple(self.records.get(guest, ()))

    async def guests(self) -> Sequence[str]:
        """Return all guests that have a record."""
        return sorted(guest for guest in self.records if self.now(guest) is not None)


class ArbiterView(Arbiter):
    """The arbiter as one host sees it.

    Args:
        truth: What it is.
        host: Who looks.
    """

    def __init__(self, truth: MemoryArbiter, host: str) -> None:
        self.truth = truth
        self.host = host
        self.silence: Silence | None = None  #: how all calls end from now on; ``None``: they are answered
        self.script: list[Silence | None] = []  #: how the next calls end, one by one, before `silence` counts
        self.delay_s = 0.001
        self.deadline_s = 0.5  #: after which a call without an answer is given up
        self.late_s = 2.0  #: after which a late swap is made
        self.calls = 0
        self.dead = False  #: the agent that looked is dead: whatever it still asks is never sent

    async def read(self, guest: str) -> Record | None:
        """Return the record that counts."""
        return await self._call(lambda: self.truth.read(guest), changes=False)

    async def exchange(self, expected: Record | None, desired: Record) -> SwapResult:
        """Carry out a swap."""
        return await self._call(lambda: self.truth.exchange(expected, desired))

    async def history(self, guest: str) -> Sequence[Record]:
        """Return every record of a guest."""
        return await self._call(lambda: self.truth.history(guest), changes=False)

    async def guests(self) -> Sequence[str]:
        """Return all guests that have a record."""
        return await self._call(self.truth.guests, changes=False)

    async def _call(self, work: Callable[[], Awaitable[T]], *, changes: bool = True) -> T:
        self.calls += 1
        silence = self.script.pop(0) if self.script else self.silence
        await asyncio.sleep(self.delay_s)
        if self.dead:
            raise ArbiterUnavailable(f"the agent of {self.host} is dead")
        if silence is None:
            answer = await work()
            await asyncio.sleep(self.delay_s)
            return answer
        if changes and silence is Silence.APPLIED:
            await work()
        elif changes and silence is Silence.LATE:
            asyncio.get_running_loop().call_later(self.late_s, _do, work)
        await asyncio.sleep(self.deadline_s)
        raise ArbiterUnavailable(f"{self.host} hears nothing of the arbiter ({silence.value})")


def _do(work: Callable[[], Awaitable[object]]) -> None:
    # The truth's methods never really wait: one step runs them to their end.
    step = work().__await__()
    try:
        next(step)
    except StopIteration:
        return
