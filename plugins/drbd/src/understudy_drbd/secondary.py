"""The secondary's half of a DRBD disk: a cut of the thin volume below DRBD for every checkpoint, and the takeover.

::

    DRBD (secondary) -- the primary's writes, as they come
     +-- thin volume          = later than any checkpoint
          +-- cut of n        memory is on its way, or held
          +-- cut of n-1      committed; kept until n is

At a takeover DRBD lets go of the volume, the volume becomes the cut that belongs to the memory, DRBD takes it again,
with the metadata of that moment, and becomes primary.

What the old primary wrote since that cut is in no bitmap of this host. If the old primary crashed, its own activity
log names the blocks, as long as the log covers the disk; where it does not, all blocks are marked here before anybody
can connect. If it did not crash it does the same itself (`understudy_drbd.primary.rejoin`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Self, TypeVar

from understudy.device import OpenContext, ProtectedDevice, Verdict
from understudy.errors import StateError, UnderstudyError
from understudy_drbd.control import MAPPER_S, Control, threads
from understudy_drbd.copydevice import CopyDevice
from understudy_drbd.dm import Mapper
from understudy_drbd.thin import InUse, ThinVolume

__all__ = ["SecondaryDisk", "patiently"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_CUT_S: Final = 5.0  # a cut waits for the writes that the disk below is at
_RELEASE_S: Final = (
    5.0  # how long somebody who looks at a device that changed, such as udev, may hold it open
)
_POLL_S: Final = 0.01


class SecondaryDisk(ProtectedDevice):
    """One disk of the copy on the secondary's host.

    Args:
        context: What `Subkind.open` got.
        control: Its DRBD resource.
        mapper: The device mapper; closed by `teardown`.
        volume: What is below DRBD.

    Make one with `open`.
    """

    __slots__ = (
        "_control",
        "_cut_ns",
        "_cuts",
        "_held",
        "_is_back",
        "_left",
        "_mapper",
        "_name",
        "_severed",
        "_volume",
    )

    def __init__(self, context: OpenContext, control: Control, mapper: Mapper, volume: ThinVolume) -> None:
        self._name = context.device.name
        self._control = control
        self._mapper = mapper
        self._volume = volume
        self._cuts: list[int] = []
        self._held = 0  # the checkpoint that this side holds whole, 0 for none
        self._cut_ns = 0
        self._severed = False
        self._left = False  # this side has begun to leave the mirror
        self._is_back = False  # DRBD has the disk of the checkpoint that this side holds

    @classmethod
    async def open(cls, context: OpenContext, control: Control) -> Self:
        """Find the volume and remove what a dead agent left of its cuts.

        Raises:
            UnderstudyError: There is no thin volume below DRBD, or this host is not DRBD's secondary.
        """
        state = await control.demand_mirrored()
        if state.role != "Secondary":
            raise UnderstudyError(
                f"DRBD resource {control.resource.name} is {state.role} here, not Secondary"
            )
        mapper = Mapper()  # no disk is waited for
        try:
            volume = await threads.run(ThinVolume.find, mapper, control.resource.disk, timeout_s=MAPPER_S)
            await patiently(CopyDevice(mapper, control.resource.minor).remove)
            await threads.run(volume.clear, timeout_s=MAPPER_S)
            await control.prepare()
            made = cls(context, control, mapper, volume)
            await made.prepare()
        except BaseException:
            mapper.close()
            raise
        return made

    async def prepare(self) -> None:
        """Make what the copy is to be launched with; nothing, as long as it does not run."""

    # --- The cycle ---------------------------------------------------------------------------------------------------

    async def serve(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Cut an epoch, be ready for the copy's first memory, or tell which data this is.

        Raises:
            StateError: The session has ended here, or the epoch is no later one.
        """
        if method == "generation":
            resource = self._control.resource.name
            return {"generation": await self._control.generation(), "resource": resource}
        if method == "begin":
            await self._begin()
            return {}
        if method == "cut":
            await self._cut(int(params["epoch"]))
            return {"took_ns": self._cut_ns}
        return await super().serve(method, params)

    async def _begin(self) -> None:
        # The primary's guest stands still for the copy of its memory. A copy that does not run needs no disk yet.
        return

    async def _cut(self, epoch: int) -> None:
        if self._severed:
            raise StateError(f"{self._name}: the primary has been given up; no epoch is cut for it any more")
        if self._cuts and epoch <= self._cuts[-1]:
            raise StateError(f"{self._name}: epoch {epoch} is to be cut after epoch {self._cuts[-1]}")
        await self._take(epoch)

    async def _take(self, epoch: int) -> None:
        await self._make_cut(epoch)

    async def _make_cut(self, epoch: int) -> None:
        # Noted first: a cut whose caller went away is made all the same.
        self._cuts.append(epoch)
        began_ns = time.perf_counter_ns()
        await threads.run(self._volume.cut, epoch, timeout_s=_CUT_S)
        self._cut_ns = time.perf_counter_ns() - began_ns

    async def checkpoint(self, epoch: int) -> None:
        """Hold `epoch`: a takeover goes back to its cut from now on.

        Raises:
            StateError: It was not cut.
        """
        if epoch not in self._cuts:
            raise StateError(f"{self._name}: epoch {epoch} is held, but its disk was not cut")
        self._held = epoch

    async def error(self) -> None:
        """Raise if the mirror is not whole, or the pool could not take the next cut.

        Raises:
            UnderstudyError: Why.
        """
        await self._control.demand_mirrored()
        state = await threads.run(self._volume.pool_state, timeout_s=MAPPER_S)
        if state.trouble:
            raise UnderstudyError(
                f"the thin pool below DRBD resource {self._control.resource.name}: {state.trouble}"
            )

    async def commit(self, epoch: int) -> None:
        """Forget the cuts before `epoch`: nobody can go back there any more."""
        for older in [each for each in self._cuts if each < epoch]:
            await threads.run(self._volume.drop, older, timeout_s=MAPPER_S)
            self._cuts.remove(older)

    def sever(self) -> None:
        """Cut nothing for the primary any more."""
        self._severed = True

    # --- The end -----------------------------------------------------------------------------------------------------

    async def stop(self, *, failover: bool) -> None:
        """Take over: make the disk what it was at the checkpoint that this side holds, and DRBD primary.

        Raises:
            StateError: This side holds no checkpoint; nothing was changed.
            UnderstudyError: A step failed. The cut is kept, and this may be called again.

        Guarantees:
            When it has ended well, no write of the old primary reaches this disk any more, and what that one wrote
            since will be copied over when it connects.
        """
        self._severed = True
        if not failover:
            return
        self._held = await self._memory_epoch()
        if not self._held:
            raise StateError(f"{self._name}: this side holds no checkpoint of the disk")
        self._left = True
        control = self._control
        if not self._is_back or (await control.state()).role != "Primary":
            await self._go_back()
        if await self._strayed() or not control.resource.log_covers(self._volume.sectors * 512):
            await control.distrust_peer()
        await self._hand_over()
        _log.info(
            "%s: DRBD resource %s is primary at checkpoint %d", self._name, control.resource.name, self._held
        )

    async def _go_back(self) -> None:
        control = self._control
        await self._let_go()
        await control.disconnect()
        await control.detach()
        await patiently(self._volume.roll_back, self._held)
        await control.attach()
        # A primary without its peer cannot let go of its disk: from here on another attempt goes on, not back.
        self._is_back = True
        await control.promote()

    # What a copy that runs needs beyond that (`understudy_drbd.speculating`).

    async def _memory_epoch(self) -> int:
        return self._held  # 0: none

    async def _let_go(self) -> None:
        # Nobody uses a cut any more.
        return

    async def _strayed(self) -> bool:
        # Is something in the cut that DRBD has not seen?
        return False

    async def _hand_over(self) -> None:
        # DRBD is primary, its disk is the copy's.
        return

    async def teardown(self, verdict: Verdict) -> None:
        """Remove the cuts. A disk that took over looks for its peer again; one that did not in the end, copies it.

        Raises:
            UnderstudyError: DRBD refuses, or a cut cannot be removed.
        """
        self._severed = True
        if self._mapper.closed:
            return
        if self._left:
            if verdict is Verdict.DISCARD:
                await self._come_back()
            await self._control.connect(discard_mine=verdict is Verdict.DISCARD)
            self._left = False
        await threads.run(self._volume.close, timeout_s=MAPPER_S)
        self._mapper.close()

    async def _come_back(self) -> None:
        # The disk may have been set back, and the primary's DRBD does not know of that: all of it must be copied.
        control = self._control
        state = await control.state()
        if state.disk == "Diskless":
            await control.attach()
        if state.role == "Primary":
            await control.demote()
        await control.distrust_own()

    def counters(self) -> Mapping[str, int | float]:
        """Return how long the last cut took and how many are kept."""
        return {"cut_ns": self._cut_ns, "kept_cuts": len(self._cuts)}


async def patiently(call: Callable[..., T], *arguments: object) -> T:
    """Do something of the device mapper's that must wait until nobody has a device open any more.

    Args:
        call: Blocks; raises `InUse` as long as somebody has it open.
        arguments: Passed to it.

    Raises:
        InUse: Somebody still has it open after some seconds.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + _RELEASE_S
    while True:
        try:
            return await threads.run(call, *arguments, timeout_s=MAPPER_S)
        except InUse:
            if loop.time() > until:
                raise
            await asyncio.sleep(_POLL_S)
