"""Take clean checkpoints: one pacer per guest and session, shared by its NICs.

Left alone, QEMU takes a checkpoint whenever outputs differ, and whatever was on its way to the two copies at that
moment reaches only one of them, or reaches the secondary's filters twice or with the wrong numbers (see rewriter.py).
So colo-compare is told to notify us instead of QEMU (its ``notify_dev``), and the pacer makes the cut first:

1. hold: what comes for the guest waits in a filter-buffer on the primary;
2. drain: all that was mirrored so far has been taken by the secondary's filters, and the guest has taken in what it
   got (see vcpus.py);
3. cut: the copy is stopped and gets a fresh rewriter;
4. trigger: QEMU takes its checkpoint as it always does; both sides run again;
5. release: what was held goes to the guest, and by the mirror to the copy.

A checkpoint that QEMU takes without us (its own delay, a `hurry` of the domain) is as right as under QEMU alone. If
the agent dies, QEMU's own delay, a little longer than ours, takes over the pace, and the hold lets go by itself. The
same holds when the pacing fails, whatever the reason: it is logged, and `Pacer.check` raises it before the next commit.

Source: QEMU migration/colo.c (colo_checkpoint_notify, migrate-set-parameters), net/colo-compare.c
(colo_compare_inconsistency_notify).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Protocol, TypeVar
from weakref import WeakValueDictionary

from understudy.errors import HypervisorError, UnderstudyError
from understudy.phases import in_words
from understudy.services import Monitor
from understudy_colo_proxy.vcpus import Vcpus
from understudy_colo_proxy.wires import drained

__all__ = ["Paced", "Pacer", "pacer_of"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_CUT_S: Final = 2.0  # for hold, drain and cut; a checkpoint without them is still right
_CATCH_UP_S: Final = 0.1  # for the guest to take in what it got; a processor may be overcommitted
_CHECKPOINT_S: Final = 10.0  # from the trigger to the RESUME
_RELEASE_S: Final = 5.0
_SAFETY_MS: Final = 1000  # by how much QEMU's own delay is longer than ours


class Paced(Protocol):
    """What the pacer asks of one NIC on the primary."""

    async def hold(self, *, on: bool) -> None:
        """Hold what comes for the guest, or let it go."""

    def on_the_way(self) -> int:
        """Return how many mirrored bytes the secondary's host has not confirmed."""

    async def cut(self) -> bool:
        """Have the other half stop the copy and take a fresh rewriter; tells whether it did."""


class Pacer:
    """Takes the checkpoints of one guest in mode colo.

    Args:
        monitor: Of the primary's QEMU.
        longest_ms: The longest time between two checkpoints; QEMU's own value if that is shorter.
    """

    def __init__(self, monitor: Monitor, longest_ms: int) -> None:
        self._monitor = monitor
        self._longest_ms = longest_ms
        self._members: list[Paced] = []
        self._task: asyncio.Task[None] | None = None
        self._listening = asyncio.Event()
        self._asked = asyncio.Event()
        self._changed = asyncio.Event()
        self._vcpus = Vcpus(())
        self._resumes = 0
        self._resumed_at = 0.0
        self._over = False
        self.failure: Exception | None = None  #: what ended the pacing; a session must not go on with it
        self.asked_count = 0  #: checkpoints taken because outputs differed or one was missing for too long
        self.delay_count = 0  #: checkpoints taken because the longest time had passed
        self.unclean_count = 0  #: checkpoints taken without a cut, because the other host was too slow
        self.cut_ms = 0.0  #: how long the last cut took

    async def join(self, member: Paced) -> None:
        """Add a NIC whose chain is complete; from the guest's next RESUME on checkpoints are taken.

        Returns when no event can be missed any more.
        """
        self._members.append(member)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="pacer of COLO's checkpoints")
        listening = asyncio.create_task(self._listening.wait())
        try:
            await asyncio.wait({listening, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
        self.check()

    async def leave(self, member: Paced) -> None:
        """Take a NIC out; without any the pacing ends. Idempotent.

        Guarantees:
            After the last one has left, no checkpoint is triggered by us.
        """
        if member in self._members:
            self._members.remove(member)
        if not self._members and self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})

    def ask(self) -> None:
        """Ask for a checkpoint: colo-compare has found a difference."""
        self._asked.set()

    def check(self) -> None:
        """Raise what ended the pacing, if anything did."""
        if self.failure is not None:
            raise self.failure

    # --- The task ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            async with self._monitor.events("RESUME", "COLO_EXIT") as events:
                self._listening.set()
                pacing = asyncio.create_task(self._pace(), name="COLO's checkpoints")
                try:
                    async for event in events:
                        if event.name == "RESUME":
                            self._resumes += 1
                            self._resumed_at = asyncio.get_running_loop().time()
                        else:
                            self._over = True
                        self._changed.set()
                        if self._over:
                            break
                    await pacing
                finally:
                    pacing.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await pacing
        except Exception as error:  # noqa: BLE001 - told by `check`, before the next commit
            self._fail(error)
            self._listening.set()

    async def _pace(self) -> None:
        try:
            await self._until(lambda: self._resumes > 0)
            while not self._over and (await self._monitor.execute("query-migrate")).get("status") != "colo":
                seen = self._resumes  # the guest was resumed by something else: replication has not begun
                await self._until(lambda seen=seen: self._resumes > seen)  # type: ignore[misc]
            answer = await self._monitor.execute("query-migrate-parameters")
            delay_ms = min(self._longest_ms, int(answer.get("x-checkpoint-delay", self._longest_ms)))
            self._vcpus = await Vcpus.of(self._monitor)
            self._asked.set()  # the first one entitles the secondary to the guest: at once
            while not self._over and self.failure is None:
                late_in_s = self._resumed_at + delay_ms / 1000 - asyncio.get_running_loop().time()
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(late_in_s, 0.0)):
                        await self._asked.wait()
                if not self._over:
                    await self._checkpoint(delay_ms)
        except Exception as error:  # noqa: BLE001 - whatever it was, the session must not go on unpaced in silence
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # After the end of COLO, or of the last NIC, everything may fail and nothing matters.
        if self._over or not self._members:
            return
        if self.failure is None:
            foreseen = isinstance(error, UnderstudyError)
            _log.warning(
                "no more checkpoints are taken by us: %s",
                in_words(error),
                exc_info=None if foreseen else error,
            )
        self.failure = self.failure or error

    async def _checkpoint(self, delay_ms: int) -> None:
        members = tuple(self._members)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            if not await self._clean_cut(members):
                self.unclean_count += 1
            self.cut_ms = (loop.time() - began) * 1000
            if self._asked.is_set():
                self.asked_count += 1
            else:
                self.delay_count += 1
            # What is asked for from here on may be of the time after this checkpoint.
            self._asked.clear()
            before = self._resumes
            await self._monitor.execute(
                "migrate-set-parameters", {"x-checkpoint-delay": delay_ms + _SAFETY_MS}
            )
            async with asyncio.timeout(_CHECKPOINT_S):
                await self._until(lambda: self._resumes > before)
        except TimeoutError:
            raise HypervisorError(
                f"a checkpoint that was asked for has not come within {_CHECKPOINT_S:g} s"
            ) from None
        finally:
            await asyncio.shield(self._release(members))

    async def _clean_cut(self, members: tuple[Paced, ...]) -> bool:
        try:
            async with asyncio.timeout(_CUT_S):
                await _all(lambda member: member.hold(on=True), members)
                if not await drained(lambda: sum(member.on_the_way() for member in members), _CUT_S):
                    return False
                caught_up = await self._vcpus.caught_up(_CATCH_UP_S)
                return all(await _all(lambda member: member.cut(), members)) and caught_up
        except TimeoutError:
            return False
        except (UnderstudyError, OSError) as error:
            _log.info("a checkpoint without a cut: %s", in_words(error))
            return False

    async def _release(self, members: tuple[Paced, ...]) -> None:
        # Raises nothing: it must not take the place of what went wrong before.
        try:
            async with asyncio.timeout(_RELEASE_S):
                await _all(lambda member: member.hold(on=False), members)
        except TimeoutError:
            self._fail(
                HypervisorError(f"what was held for the guest was not released within {_RELEASE_S:g} s")
            )
        except Exception as error:  # noqa: BLE001 - as in `_pace`
            self._fail(error)

    async def _until(self, condition: Callable[[], bool]) -> None:
        # Ends also when COLO does; the caller looks at `_over`.
        while not condition() and not self._over:
            self._changed.clear()
            await self._changed.wait()


async def _all(call: Callable[[Paced], Awaitable[T]], members: tuple[Paced, ...]) -> list[T]:
    done = await asyncio.gather(*(call(member) for member in members), return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return [result for result in done if not isinstance(result, BaseException)]


# One pacer for all NICs of a guest, because a checkpoint is of the whole guest; it lives as long as one of them does.
_pacers: WeakValueDictionary[tuple[str, str, int], Pacer] = WeakValueDictionary()


def pacer_of(guest: str, session: str, monitor: Monitor, longest_ms: int) -> Pacer:
    """Return the pacer of a guest's session, made for the first NIC that asks; arguments as for `Pacer`."""
    key = (guest, session, id(monitor))
    found = _pacers.get(key)
    if found is None:
        found = _pacers[key] = Pacer(monitor, longest_ms)
    return found
