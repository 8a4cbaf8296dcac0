"""An interface whose output QEMU holds until its checkpoint is acknowledged, behind a block in the kernel.

Two of QEMU's filter-buffer objects stand between the guest and its tap, and the block behind them::

    guest → <nic>-epoch → <nic>-ended → tap → block → bridge

``<nic>-epoch`` takes in what the guest sends. While the guest is stopped at the end of an epoch, ``<nic>-epoch`` is
switched off and on again, which moves its packets to ``<nic>-ended``. When the secondary has acknowledged that epoch, a
commit opens the block, for a *window* of one second at most, switches ``<nic>-ended`` off and on, which lets its
packets out, and closes the block. Then, while the guest runs, it tells the block that what leaves in the next minute is
*fresh*; if that was too long ago at the end of an epoch, it is told again before the switch.

**What is guaranteed.** QEMU's objects alone are no gate that stays shut: each flushes its queue by a timer, after more
than an hour of the guest's running time since it was last switched on. With the block, whatever an agent's death, stop
or slowness does, between any two of these steps:

* Nothing leaves but in a window, and a window opens only after an acknowledgement. An agent that is stopped for ever
  leaves a block that is closed, or closes by itself within a second.
* What leaves in a window was acknowledged. ``<nic>-ended`` holds what was sent until the last stop of the guest, and
  something later only if the timer of ``<nic>-epoch`` has struck since. That timer begins after the minute of what is
  fresh has begun, and takes more than an hour; the guest's time never runs faster than the host's. The minute begins
  anew only when the window of that epoch is closed for good, and before the next epoch is put apart. So the timer
  strikes when no window has an effect any more: an agent that slept so long lets out nothing, whatever it was about to
  do.

This compares two clocks of one host, the kernel's and QEMU's, with an hour to spare, and none of different hosts.

**What is not**, and makes it the weaker gate:

* QEMU flushes when somebody else tells it to (``object-del``, a switch, ``quit``): outside a window such packets are
  dropped, counted and told; inside, which lasts a moment, or a second if the agent has died in it, they leave. Our own
  agent kills a guest whose output is worth nothing, and never tells it to quit.
* A queue takes 10000 packets, and QEMU does not tell when it drops one. What leaves is counted: a guest that may soon
  send so many gets its next checkpoint early, and when an epoch was full, that is told, or ends the protection.
* QEMU must run without ``-icount``, and nobody else may empty the kernel's rule set in a window.

Source: Cully et al., Remus (NSDI 2008), section 4.4; QEMU net/filter-buffer.c (filter_buffer_release_timer,
filter_buffer_status_changed), net/filter.c, net/queue.c (qemu_net_queue_append_iov).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from understudy.device import ProtectedDevice, ReplicationMode, Verdict
from understudy.errors import HypervisorError
from understudy.services import Monitor, Pace
from understudy_qemu.nfnetlink import Count

__all__ = ["QUEUE_PACKETS", "Block", "FilterBufferOptions", "HeldNic"]

_log = logging.getLogger(__name__)

QUEUE_PACKETS: Final = 10_000  #: what QEMU's queue takes
_INTERVAL_US: Final = 4_000_000_000  # the longest that fits into 32 bits
_WINDOW_MS: Final = 1000
_FRESH_MS: Final = 60_000
_STALE_S: Final = 20.0  # after that it is told anew: the commit comes within what is left
_NEWEST: Final = "epoch"
_ENDED: Final = "ended"


@dataclass(frozen=True, slots=True)
class FilterBufferOptions:
    """``[protection.options.filter-buffer]``."""

    early_share: float = 0.2
    """At which share of QEMU's queue of 10000 packets the next checkpoint is asked for before its time, 0 to 1.

    How full it is QEMU does not tell; it is reckoned from how fast the guest sent in the epoch before.
    """

    when_full: Literal["unprotect", "tell"] = "unprotect"
    """What is done when the queue was full all the same, so that QEMU may have dropped packets.

    ``unprotect`` ends the protection: the guest goes on alone, its output leaves. ``tell`` logs and counts it.
    """

    def __post_init__(self) -> None:
        if not 0 < self.early_share <= 1:
            raise ValueError("early_share must lie between 0 and 1")


class Block(Protocol):
    """What is asked of the kernel's block (`understudy_qemu.egressblock.EgressBlock`)."""

    async def close(self) -> tuple[Count, Count]:
        """Let nothing pass; return what has passed and what was refused since it was made."""

    async def renew(self, for_ms: int) -> bool:
        """Let windows have an effect for so long; tell whether the block was there, and put it back if not."""

    async def open_for(self, window_ms: int) -> bool:
        """Let packets pass for so long at most; tell whether the block was there, and put it back, closed, if not."""

    async def remove(self) -> bool:
        """Remove it; tell whether it was there."""

    async def remove_below_nothing(self) -> bool:
        """Remove it if the interface is down or gone; tell whether it was there."""


class HeldNic(ProtectedDevice):
    """An interface of the primary whose output is held.

    Args:
        name: Of the device; the objects' names begin with it.
        netdev: QEMU's name of the interface's backend.
        monitor: Of the guest.
        block: At the interface's tap, in place, everything passes.
        options: What the operator chose.
        pace: Begins checkpoints before their time, if anybody does.
    """

    def __init__(
        self,
        name: str,
        netdev: str,
        monitor: Monitor,
        block: Block,
        options: FilterBufferOptions = FilterBufferOptions(),
        pace: Pace | None = None,
    ) -> None:
        self._name = name
        self._netdev = netdev
        self._monitor = monitor
        self._block = block
        self._options = options
        self._pace = pace
        self._ended_epoch = 0  # the newest epoch that <nic>-ended holds anything of
        self._ended_s = 0.0  # about when that was
        self._length_s = 0.0  # of the epoch that ended then, about
        self._fresh_s = -math.inf  # when the minute of what is fresh began, or before that
        self._apart = asyncio.Lock()  # held while an epoch is put apart, or the minute begun
        self._open = False  # <nic>-ended may have been left switched off
        self._counted = (Count(0, 0), Count(0, 0))
        self._released = Count(0, 0)
        self._released_epoch = 0
        self._refused_packets = 0
        self._lost_block_count = 0
        self._full_epoch_count = 0
        self._early_count = 0
        self._full = ""
        self._early: asyncio.TimerHandle | None = None

    async def start(self, side: ReplicationMode) -> None:  # noqa: ARG002 - made for the primary alone
        """Begin to hold; the guest is stopped.

        Raises:
            HypervisorError: QEMU or the kernel refuses.
        """
        self._counted = await self._block.close()
        self._ended_s = time.monotonic()
        # A filter that is added later sees the guest's packets earlier.
        for which in (_ENDED, _NEWEST):
            await self._monitor.execute(
                "object-add",
                {
                    "qom-type": "filter-buffer",
                    "id": self._id(which),
                    "netdev": self._netdev,
                    "queue": "rx",
                    "interval": _INTERVAL_US,
                },
            )

    async def postsuspend(self, epoch: int) -> None:
        """Put what was sent in `epoch` apart from what will be sent; the guest is stopped."""
        self._forget_early()
        async with self._apart:
            # Before the switch, which begins the timer anew: what is fresh is over long before the timer strikes.
            if time.monotonic() > self._fresh_s + _STALE_S:
                await self._renew()
            now_s = time.monotonic()
            # A commit that has not begun to let anything out must not begin any more.
            self._ended_epoch, self._length_s, self._ended_s = epoch, now_s - self._ended_s, now_s
        if self._open:
            await self._switch(_ENDED, "on")
            self._open = False
        await self._pass_on(_NEWEST)

    async def error(self) -> None:
        """Raise if QEMU's queue was full and the operator's policy ends the protection then.

        Raises:
            HypervisorError: It was.
        """
        if self._full:
            raise HypervisorError(self._full)

    async def commit(self, epoch: int) -> None:
        """Let out what was sent up to the end of `epoch`.

        Raises:
            HypervisorError: QEMU or the kernel refuses. Nothing that is not acknowledged has left.

        Guarantees:
            Nothing of a later epoch leaves: if one has been put apart already, all waits for its commit. So it does
            when somebody else has removed the block.
        """
        if self._ended_epoch != epoch:
            return
        if not await self._block.open_for(_WINDOW_MS):
            self._block_lost()
            return
        try:
            # The next epoch may have been put apart while the block was being opened.
            if self._ended_epoch == epoch:
                # Cancelled or failed between its two halves, it would be open when the next epoch is put apart.
                self._open = True
                await self._pass_on(_ENDED)
                self._open = False
                self._released_epoch = epoch
        except BaseException:
            # If that fails, too, the kernel closes it in a moment.
            with suppress(HypervisorError):
                await self._block.close()
            raise
        self._judge(epoch, await self._block.close())
        async with self._apart:
            # The timer of an epoch that was put apart meanwhile has begun: what is fresh must not begin after it.
            if self._ended_epoch == epoch:
                await self._renew()

    async def stop(self, *, failover: bool) -> None:  # noqa: ARG002 - what is held waits for the verdict
        """Ask for no checkpoint any more; what is held stays held."""
        self._forget_early()

    async def teardown(self, verdict: Verdict) -> None:
        """Let out what is held and hold no more (KEEP), or leave it to die with its guest (DISCARD).

        Raises:
            HypervisorError: KEEP: something does not go away. DISCARD: the tap is up; the block stays.

        Guarantees:
            With DISCARD nothing is let out: the objects stay, closed, for as long as QEMU lives, and the block for as
            long as its tap is up.
        """
        self._forget_early()
        if verdict is Verdict.DISCARD:
            await self._block.remove_below_nothing()
            return
        failed: HypervisorError | None = None
        try:
            # Removed first of all: what the objects let out when they go must find its way.
            await self._block.remove()
        except HypervisorError as error:
            failed = error
        for which in (_NEWEST, _ENDED):
            # Not there: it was never made, as after a failure half-way.
            with suppress(HypervisorError):
                await self._monitor.execute("object-del", {"id": self._id(which)})
        if failed is not None:
            raise failed
        await self._see_gone()

    def counters(self) -> Mapping[str, int | float]:
        """Return what the last commit let out, and what went wrong since the session began."""
        return {
            "released_epoch": self._released_epoch,
            "released_packets": self._released.packets,
            "released_bytes": self._released.bytes,
            "refused_packets": self._refused_packets,
            "full_epoch_count": self._full_epoch_count,
            "early_checkpoint_count": self._early_count,
            "lost_block_count": self._lost_block_count,
        }

    # --- What was let out --------------------------------------------------------------------------------------------

    def _judge(self, epoch: int, counted: tuple[Count, Count]) -> None:
        passed, refused = (
            Count(now.packets - before.packets, now.bytes - before.bytes)
            for now, before in zip(counted, self._counted, strict=True)
        )
        self._counted = counted
        self._released = passed
        if refused.packets:
            self._refused_packets += refused.packets
            _log.warning(
                "%s: QEMU let out %d packets outside the release of an epoch: dropped, as on a busy network",
                self._name,
                refused.packets,
            )
        if passed.packets + refused.packets >= QUEUE_PACKETS:
            self._full_epoch_count += 1
            problem = (
                f"{self._name}: QEMU's queue of {QUEUE_PACKETS} packets was full in epoch {epoch}, and packets may be "
                "lost"
            )
            if self._options.when_full == "unprotect":
                self._full = f'{problem}, and when_full is "unprotect": the protection ends'
            else:
                _log.warning("%s", problem)
        self._reckon_early(passed.packets)

    async def _renew(self) -> None:
        began_s = time.monotonic()
        if not await self._block.renew(_FRESH_MS):
            self._block_lost()
        self._fresh_s = began_s

    def _block_lost(self) -> None:
        self._lost_block_count += 1
        self._fresh_s = -math.inf
        self._counted = (Count(0, 0), Count(0, 0))

    def _reckon_early(self, packets: int) -> None:
        # At the rate of the epoch before, the queue that began to fill at the last stop is this full then.
        if self._pace is None or not packets:
            return
        fills_s = self._options.early_share * QUEUE_PACKETS / packets * self._length_s
        delay_s = max(0.0, self._ended_s + fills_s - time.monotonic())
        self._forget_early()
        self._early = asyncio.get_running_loop().call_later(delay_s, self._hurry, self._pace)

    def _hurry(self, pace: Pace) -> None:
        self._early = None
        self._early_count += 1
        pace.hurry()

    def _forget_early(self) -> None:
        if self._early is not None:
            self._early.cancel()
            self._early = None

    # --- QEMU's objects ----------------------------------------------------------------------------------------------

    async def _pass_on(self, which: str) -> None:
        # Sent in this order, and QEMU takes one after the other: the second need not wait for the first one's answer.
        await asyncio.gather(*(self._switch(which, status) for status in ("off", "on")))

    async def _switch(self, which: str, status: str) -> None:
        arguments = {"path": f"/objects/{self._id(which)}", "property": "status", "value": status}
        await self._monitor.execute("qom-set", arguments)

    async def _see_gone(self) -> None:
        left = {item["name"] for item in await self._monitor.execute("qom-list", {"path": "/objects"})}
        held = sorted(left & {self._id(_NEWEST), self._id(_ENDED)})
        if held:
            raise HypervisorError(
                f"{self._name}: QEMU did not remove {', '.join(held)}; output is still held"
            )

    def _id(self, which: str) -> str:
        return f"{self._name}-{which}"
