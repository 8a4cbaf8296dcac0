"""A network interface of the primary whose output is held until it is acknowledged.

The phases of a checkpoint, and a look at the gate's fill while the guest runs: a gate that is half full asks for the
next checkpoint, one that is nearly full does what the operator chose. A packet that is dropped all the same is counted
and told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

from understudy.device import OpenContext, ProtectedDevice, ReplicationMode, Verdict
from understudy.errors import HypervisorError, UnderstudyError
from understudy.services import GUEST_PAUSE, PACE, GuestPause, Pace
from understudy_netbuffer.gate import Gate
from understudy_netbuffer.installation import Claim
from understudy_netbuffer.options import NetbufferOptions
from understudy_netbuffer.rtnetlink import KernelRefused, Stats

__all__ = ["INTERFACE_KEYS", "BufferedNic", "interface_of"]

log = logging.getLogger(__name__)

#: Under which of these properties a hypervisor tells the host's side of an interface.
INTERFACE_KEYS: Final = ("interface", "tap", "vif", "veth")


def interface_of(properties: Mapping[str, object]) -> str:
    """Return the name of the host's side of a guest's interface, ``""`` if the hypervisor tells none."""
    return next((str(properties[key]) for key in INTERFACE_KEYS if properties.get(key)), "")


class BufferedNic(ProtectedDevice):
    """An interface whose output waits in a gate.

    Args:
        gate: Open, everything passes.
        options: What the operator chose.
        pace: Begins checkpoints before their time, if anybody does.
        pause: Stops the guest, where it runs before its output is acknowledged.

    Make one with `open`.
    """

    __slots__ = (
        "_dropped_told",
        "_early_count",
        "_gate",
        "_looking",
        "_options",
        "_pace",
        "_pause",
        "_runs",
        "_stall_count",
        "_stalled",
    )

    def __init__(
        self, gate: Gate, options: NetbufferOptions, pace: Pace | None, pause: GuestPause | None
    ) -> None:
        self._gate = gate
        self._options = options
        self._pace = pace
        self._pause = pause
        self._looking: asyncio.Task[None] | None = None
        self._runs = asyncio.Event()
        self._stalled = False
        self._early_count = 0
        self._stall_count = 0
        self._dropped_told = 0

    @classmethod
    async def open(cls, context: OpenContext) -> BufferedNic:
        """Make the gate of a guest's interface; everything passes until `start`.

        Raises:
            HypervisorError: It cannot be made; nothing of it is left.
        """
        options: NetbufferOptions = context.options or NetbufferOptions()
        services = context.services
        claim = Claim(
            context.guest, context.device.name, interface_of(context.device.properties), context.session
        )
        gate = await Gate.open(claim, options.limit_bytes)
        return cls(
            gate,
            options,
            services.get(PACE) if services.has(PACE) else None,
            services.get(GUEST_PAUSE) if services.has(GUEST_PAUSE) else None,
        )

    @property
    def gate(self) -> Gate:
        """The gate."""
        return self._gate

    # --- Phases ------------------------------------------------------------------------------------------------------

    async def start(self, side: ReplicationMode) -> None:  # noqa: ARG002 - made for the primary alone
        """Close the gate; the guest is stopped, its initial copy is done."""
        await self._gate.close()
        self._runs.set()
        self._looking = asyncio.get_running_loop().create_task(
            self._look(), name=f"{self._gate.claim.guest}: fill of {self._gate.installed.ifb}"
        )

    async def postsuspend(self, epoch: int) -> None:
        """Put a barrier behind what was sent in `epoch`; the guest is stopped."""
        self._runs.clear()
        await self._gate.end_epoch(epoch)

    async def postresume(self, epoch: int) -> None:  # noqa: ARG002 - the contract's signature
        """Look at the gate's fill again; the guest runs."""
        self._runs.set()

    async def error(self) -> None:
        """Raise if the gate is none any more, or if the operator's policy ends the protection.

        It does not wait for `_look`, which may be late: what was dropped by now is told now.

        Raises:
            HypervisorError: Why.
        """
        self._runs.set()
        await self._gate.count()
        self._tell_drops()
        self._gate.check()

    async def commit(self, epoch: int) -> None:
        """Let out what was sent in `epoch`."""
        await self._gate.release(epoch)
        if self._stalled:
            await self._proceed()

    async def stop(self, *, failover: bool) -> None:  # noqa: ARG002 - the gate stays closed until the verdict
        """End looking after the fill; the gate stays closed."""
        await self._end_looking()
        await self._proceed()

    async def teardown(self, verdict: Verdict) -> None:
        """Remove the gate; what it holds leaves first (KEEP), or never (DISCARD)."""
        try:
            await self._end_looking()
            await self._proceed()
        finally:
            await self._gate.remove(verdict)

    def counters(self) -> Mapping[str, int | float]:
        """Return what the last barrier held, and what went wrong since the gate was made."""
        gate = self._gate
        return {
            "held_packets": gate.held_packets,
            "held_bytes": gate.held_bytes,
            "dropped_packets": gate.dropped_packets,
            "lost_gate_count": gate.lost_count,
            "early_checkpoint_count": self._early_count,
            "stall_count": self._stall_count,
        }

    # --- The fill ----------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        while self._gate.failure is None:
            await asyncio.sleep(self._options.look_ms / 1000)
            # While the guest stands still nothing is added, and nothing of ours must be in its way.
            await self._runs.wait()
            try:
                stats = await self._gate.look()
            except (HypervisorError, KernelRefused):
                continue  # it is lost, and being made anew
            self._tell_drops()
            await self._judge(stats)

    async def _judge(self, stats: Stats) -> None:
        options = self._options
        share = stats.held_bytes / options.limit_bytes
        if share >= options.early_share and self._pace is not None:
            self._early_count += 1
            self._pace.hurry()
        if share < options.full_share:
            return
        if options.when_full == "unprotect":
            self._gate.fail(
                f"the gate of {self._gate.claim.interface} holds {stats.held_bytes} of {options.limit_bytes} bytes, "
                'and when_full is "unprotect": the protection ends'
            )
        elif self._pause is not None and not self._stalled:
            self._stalled = True
            self._stall_count += 1
            try:
                await self._pause.pause()
            except UnderstudyError as error:
                log.warning("guest %s cannot be stalled: %s", self._gate.claim.guest, error)

    async def _proceed(self) -> None:
        if self._stalled and self._pause is not None:
            self._stalled = False
            await self._pause.proceed()

    def _tell_drops(self) -> None:
        gate = self._gate
        more = gate.dropped_packets - self._dropped_told
        if not more:
            return
        self._dropped_told = gate.dropped_packets
        problem = (
            f"the gate of {gate.claim.interface} was full and dropped {more} packets of guest {gate.claim.guest} "
            f"(limit_bytes is {self._options.limit_bytes})"
        )
        if self._options.when_full == "unprotect":
            gate.fail(f'{problem}, and when_full is "unprotect": the protection ends')
        else:
            log.warning("%s", problem)

    async def _end_looking(self) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})
