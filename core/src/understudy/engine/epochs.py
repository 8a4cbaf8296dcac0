"""The checkpoint cycle of the primary: one epoch after the other, on both hosts, and what is measured of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from understudy.errors import HypervisorError, StateError
from understudy.report import Checkpoint, EpochReport

if TYPE_CHECKING:
    from understudy.engine.surroundings import Surroundings, Way
    from understudy.group import DeviceGroup
    from understudy.hypervisor import PrimaryDomain

__all__ = ["Epochs"]


class Epochs:
    """Runs the epochs of one session, and their phases (`understudy.hypervisor.Phases`).

    Args:
        around: Guest, policy, limits and who is told.
        session: Its id.
        domain: The guest.
        group: The devices of this side.
        way: The way to the other side's devices.
        theirs: The phases that any device of the other side has; the others are not asked for.
    """

    def __init__(
        self,
        around: Surroundings,
        session: str,
        domain: PrimaryDomain,
        group: DeviceGroup,
        way: Way,
        theirs: frozenset[str],
    ) -> None:
        self._around = around
        self.session = session
        self._domain = domain
        self._group = group
        self._way = way
        self._theirs = theirs
        self._policy = around.interval(around.config) if domain.paced else None
        self._last: EpochReport | None = None
        self._checkpoint: Checkpoint | None = None
        self._resumed_ns = 0
        self._ran_since_s = asyncio.get_running_loop().time()  # about when the guest ran again
        self._hurried = asyncio.Event()
        self.committed = 0  #: number of epochs released

    def hurry(self) -> None:
        """Have the next checkpoint begin at once instead of at its time. As `understudy.services.Pace.hurry`."""
        self._hurried.set()

    async def take(self, epoch: int) -> bool:
        """Make the checkpoint that ends `epoch`, when its time has come, and see it acknowledged by both sides.

        Returns:
            Whether the barriers of the epoch were in place before it.

        Raises:
            Exception: Nothing was acknowledged: the stream broke, or a device on either side reported an error.
        """
        if self._policy is not None:
            await self._until_due(self._policy.next_ms(self._last) / 1e3)
        # A hypervisor that takes checkpoints by itself may take its time before it does.
        limit_s = self._around.limits.checkpoint_s if self._domain.paced else None
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                self._checkpoint = checkpoint = await self._domain.checkpoint(epoch, self)
        except TimeoutError as late:
            if not limit.expired():
                raise
            raise HypervisorError(f"checkpoint {epoch} was not taken within {limit_s:g} s") from late
        self._ran_since_s = asyncio.get_running_loop().time()
        # An error of any device on either side voids the acknowledgement.
        await self._both("error", epoch, self._ask_errors)
        return checkpoint.gated

    async def release(self, epoch: int) -> None:
        """Commit `epoch` on both sides and report it.

        Raises:
            StateError: Its checkpoint was not acknowledged here.
        """
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.epoch != epoch:
            raise StateError(
                f"epoch {epoch} of guest {self._around.config.name} has no acknowledged checkpoint"
            )
        counters = self._group.counters()
        began_ns = time.perf_counter_ns()
        await self._both("commit", epoch, self._group.commit)
        self.committed += 1
        self._last = self._report(checkpoint, counters, time.perf_counter_ns() - began_ns)
        self._around.telling.epoch(self._last)

    # --- Phases: called by the domain at its gates ---------------------------------------------------------------

    async def postsuspend(self, epoch: int) -> None:
        """Run every device's postsuspend on both sides; the guest is stopped."""
        await self._both("postsuspend", epoch, self._group.postsuspend)

    async def checkpoint(self, epoch: int) -> None:
        """Run every device's checkpoint step on both sides."""
        await self._both("checkpoint", epoch, self._group.do_checkpoint_all)

    async def preresume(self, epoch: int) -> None:
        """Run every device's preresume, on the primary alone; the guest is still stopped."""
        await self._group.preresume(epoch)

    async def postresume(self, epoch: int) -> None:
        """Run every device's postresume on both sides; the guest runs."""
        await self._both("postresume", epoch, self._group.postresume)

    # --- Private -------------------------------------------------------------------------------------------------

    async def _until_due(self, run_s: float) -> None:
        # Until the guest has run for so long, or a device cannot wait.
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._ran_since_s + run_s):
                await self._hurried.wait()
        # From here on it is about what the guest sends in the next epoch.
        self._hurried.clear()

    async def _ask_errors(self, _: int) -> None:
        await self._group.get_error_all()

    async def _both(self, phase: str, epoch: int, ours: Callable[[int], Awaitable[None]]) -> None:
        if phase not in self._theirs:
            await ours(epoch)
            return
        there = asyncio.ensure_future(
            self._way.port.request(
                "phase", {"phase": phase, "epoch": epoch}, timeout_s=self._around.limits.peer_s
            )
        )
        try:
            await ours(epoch)
        except BaseException:
            there.cancel()
            raise
        await there

    def _report(
        self, checkpoint: Checkpoint, counters: Mapping[str, int | float], commit_ns: int
    ) -> EpochReport:
        before_ns, self._resumed_ns = self._resumed_ns, checkpoint.resumed_ns
        return EpochReport(
            guest=self._around.config.name,
            session=self.session,
            mode=self._around.config.protection.mode,
            epoch=checkpoint.epoch,
            wall_ns=time.time_ns(),
            length_ns=checkpoint.stopped_ns - before_ns if before_ns else 0,
            pause_ns=checkpoint.resumed_ns - checkpoint.stopped_ns,
            acknowledge_ns=checkpoint.acknowledged_ns - checkpoint.stopped_ns,
            commit_ns=commit_ns,
            transferred_bytes=checkpoint.transferred_bytes,
            dirty_pages=checkpoint.dirty_pages,
            held_packets=int(_total(counters, "held_packets")),
            held_bytes=int(_total(counters, "held_bytes")),
            phases_ns={**self._group.phases_ns, **checkpoint.parts_ns},
            counters=dict(counters),
            notice=self._policy.notice() if self._policy is not None else "",
        )


def _total(counters: Mapping[str, int | float], name: str) -> float:
    return sum(value for key, value in counters.items() if key.endswith(f".{name}"))
