"""The primary's half of a DRBD disk: nothing is cut, and nothing acknowledged, unless both hosts have every write.

Why it is enough to look right before the cut: the guest stands still. Under protocol C a write ends when the other host
has it, or when DRBD has given the other host up and noted the block as out of sync. So a DRBD that is Connected and
UpToDate on both hosts at that moment has all that has ended there, whatever the connection went through before, and
until the guest runs again it asks for no more.

QEMU stops a guest when all its writes have ended. Xen does not wait for them: one that is under way may be in the cut,
or in part, or not. The guest's memory has it among those that have not ended, and its driver asks the new backend for
it again, before anything else can depend on it.

Source: Linux drivers/block/drbd/drbd_req.c, drivers/block/xen-blkfront.c (blkfront_resume, blkif_recover); libxl's
libxl_remus_disk_drbd.c for the place in the cycle.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from understudy.device import OpenContext, Peer, ProtectedDevice, ReplicationMode, Verdict
from understudy.errors import UnderstudyError
from understudy_drbd.control import MAPPER_S, Control, threads
from understudy_drbd.copydevice import remove_left

__all__ = ["PrimaryDisk", "rejoin"]

_log = logging.getLogger(__name__)

_PEER_S = 10.0


class PrimaryDisk(ProtectedDevice):
    """One disk of the guest on the primary's host.

    Args:
        control: Its DRBD resource.
        peer: The other half.

    Make one with `open`.
    """

    __slots__ = ("_control", "_cut_ns", "_leaving", "_peer")

    def __init__(self, control: Control, peer: Peer) -> None:
        self._control = control
        self._peer = peer
        self._cut_ns = 0
        self._leaving: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, context: OpenContext, control: Control) -> PrimaryDisk:
        """Make sure that the two halves are two ends of one mirror.

        Raises:
            UnderstudyError: They are not, or the mirror is not whole.
        """
        await control.demand_mirrored()
        theirs = await context.peer.request("generation", {}, timeout_s=_PEER_S)
        ours = await control.generation()
        if theirs.get("generation") != ours:
            raise UnderstudyError(
                f"{context.device.name} is DRBD resource {control.resource.name} here and "
                f"{theirs.get('resource')} on the other host, and their data differ: they are not one mirror"
            )
        return cls(control, context.peer)

    async def start(self, side: ReplicationMode) -> None:  # noqa: ARG002 - the contract's
        """Let the other half be ready for the guest's memory; the guest is stopped.

        Raises:
            UnderstudyError: The other host does not have all writes that have ended, or is not ready.
        """
        await self._control.demand_mirrored()
        await self._peer.request("begin", {}, timeout_s=_PEER_S)

    async def postsuspend(self, epoch: int) -> None:
        """Have the other half cut `epoch`; the guest is stopped.

        Raises:
            UnderstudyError: The other host does not have all writes that have ended, or did not cut.
        """
        await self._control.demand_mirrored()
        began_ns = time.perf_counter_ns()
        await self._peer.request("cut", {"epoch": epoch}, timeout_s=_PEER_S)
        self._cut_ns = time.perf_counter_ns() - began_ns

    async def error(self) -> None:
        """Raise if the mirror is not whole.

        Raises:
            UnderstudyError: How it is.
        """
        await self._control.demand_mirrored()

    def sever(self) -> None:
        """Begin to leave DRBD's connection.

        A write that waits for a host that hangs ends then. And two DRBDs that are both primary do not meet before one
        of them has given way: both would give the connection up for good.
        """
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_task(
                self._leave(), name=f"DRBD resource {self._control.resource.name} leaves its peer"
            )

    async def _leave(self) -> None:
        try:
            await self._control.disconnect()
        except (UnderstudyError, TimeoutError) as error:
            _log.warning("DRBD resource %s: %s", self._control.resource.name, error)

    async def stop(self, *, failover: bool) -> None:
        """Let DRBD go on mirroring; without the other host, leave it.

        Raises:
            UnderstudyError: DRBD refuses.
        """
        if failover:
            self.sever()
            await self._left()
            await self._control.disconnect()

    async def teardown(self, verdict: Verdict) -> None:
        """Look for the other host again; with a disk whose guest goes on there, become the mirror of that.

        Raises:
            UnderstudyError: DRBD refuses, for instance because the device is still open.
        """
        left = await self._left()
        if verdict is Verdict.DISCARD:
            await rejoin(self._control)
        elif left:
            await self._control.connect()
        self._leaving = None

    async def _left(self) -> bool:
        if self._leaving is None:
            return False
        await asyncio.wait({self._leaving})
        return True

    def counters(self) -> Mapping[str, int | float]:
        """Return how long the other half took to cut."""
        return {"cut_ns": self._cut_ns}


async def rejoin(control: Control) -> bool:
    """Give up what this host has written, for the disk of the other host, where the guest goes on.

    What a host wrote that did not crash is in no log of DRBD's once the other host had acknowledged it; after the other
    one went back to an earlier checkpoint nobody knows any more which blocks differ. So all of them are copied. The
    decision is written down before anything else is: whoever connects the two hosts next, and whenever, cannot miss it.

    A host that did crash comes back as DRBD's secondary. DRBD applies the log of its last writes by itself, and the
    other host has seen to the case that the log is too short (`SecondaryDisk`): nothing is to be done.

    Returns:
        Whether anything was to be done.

    Raises:
        UnderstudyError: DRBD refuses.
    """
    state = await control.state()
    if state.role != "Primary":
        return False
    if state.connection == "Connected" and state.peer_role == "Secondary":
        return False  # the other host has not left this mirror, so it did not go on
    # Of a guest that took over here once, and whose agent died before it had DRBD itself.
    await threads.run(remove_left, control.resource.minor, timeout_s=MAPPER_S)
    await control.disconnect()
    await control.distrust_peer()
    await control.demote()
    await control.connect(discard_mine=True)
    _log.info("DRBD resource %s: becomes the mirror of the other host", control.resource.name)
    return True
