"""The secondary's half of a DRBD disk under a copy that runs from each checkpoint on, as QEMU's does.

::

    copy ── copy device                      DRBD (secondary)
              │  at a cut, the copy parked    └── thin volume
              └── cut of epoch n  <────────────────┘

The copy has the cut of its checkpoint for a disk, writable, and never DRBD itself, which lets nobody open a secondary.
At a takeover the device lets go of the cut, the volume below DRBD becomes that cut as it always does, and the device
passes through to DRBD, now primary. Later on the guest has DRBD itself, and the device goes.

Which checkpoint the memory holds is decided by the copy alone: whether it has loaded one since the last cut. Neither
the checkpoint that the primary has heard of nor the newest cut tells: the primary may die between any two of these.

A copy that ran has perhaps written. That is in the cut, so it becomes part of the disk, as it is part of the memory;
but DRBD has not seen it, and its bitmaps do not have it: everything is copied back then.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from understudy.device import OpenContext, Verdict
from understudy.errors import StateError, UnderstudyError
from understudy.services import SPECULATION, Speculation
from understudy_drbd.control import MAJOR, MAPPER_S, Control, threads
from understudy_drbd.copydevice import CopyDevice, usable_sectors
from understudy_drbd.dm import Mapper
from understudy_drbd.secondary import SecondaryDisk, patiently
from understudy_drbd.thin import ThinVolume

__all__ = ["SpeculatingDisk"]

_log = logging.getLogger(__name__)

_FIRST: Final = -1  # what the copy has for a disk before the guest has been stopped for its memory
_START: Final = 0  # the disk of the memory that the copy begins with


@dataclass(frozen=True, slots=True)
class _Shown:
    # A cut that was put under the copy, and what the copy had done by then.
    epoch: int
    loaded: int
    writes: int | None  # ``None``: it could not be told


class SpeculatingDisk(SecondaryDisk):
    """One disk of a copy that runs ahead.

    Args:
        context: What `Subkind.open` got.
        control: Its DRBD resource.
        mapper: The device mapper; closed by `teardown`.
        volume: What is below DRBD.

    Make one with `open`.
    """

    __slots__ = ("_device", "_path", "_shown", "_speculation")

    def __init__(self, context: OpenContext, control: Control, mapper: Mapper, volume: ThinVolume) -> None:
        super().__init__(context, control, mapper, volume)
        self._speculation: Speculation = context.services.get(SPECULATION)
        self._device = CopyDevice(mapper, control.resource.minor)
        self._path: Path | None = None
        self._shown: list[_Shown] = []

    async def prepare(self) -> None:
        """Make the device that the copy is launched with.

        Raises:
            UnderstudyError: The device mapper refuses.

        Guarantees:
            After a failure or cancellation nothing is left.
        """
        try:
            sectors = await threads.run(usable_sectors, self._drbd, timeout_s=MAPPER_S)
            await self._make_cut(_FIRST)
            first = self._volume.target(_FIRST)
            self._path = await threads.run(self._device.make, first, sectors, timeout_s=MAPPER_S)
        except BaseException:
            # Each waits for what may still be under way in a thread.
            await asyncio.shield(self._clean_up())
            raise

    async def _clean_up(self) -> None:
        await patiently(self._device.remove)
        await threads.run(self._volume.close, timeout_s=MAPPER_S)

    @property
    def copy_path(self) -> Path | None:
        """The device that the copy has for a disk."""
        return self._path

    @property
    def _drbd(self) -> int:
        return os.makedev(MAJOR, self._control.resource.minor)

    # --- The cycle ---------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        await self._cut(_START)
        await self.commit(_START)

    async def _take(self, epoch: int) -> None:
        # The primary's guest is stopped and nothing is on its way. So this also fixes what the copy holds before it.
        await self._speculation.park()
        loaded, writes = self._speculation.loaded, await self._writes()
        await self._make_cut(epoch)
        self._shown.append(_Shown(epoch, loaded, writes))
        await threads.run(self._device.show, self._volume.target(epoch), timeout_s=MAPPER_S)

    async def _writes(self) -> int | None:
        try:
            return await self._speculation.writes(self._name)
        except (UnderstudyError, TimeoutError) as error:
            _log.warning("%s: how much the copy writes is not known: %s", self._name, error)
            return None

    async def commit(self, epoch: int) -> None:
        """Forget the cuts before `epoch`: nobody can go back there any more."""
        await super().commit(epoch)
        self._shown = [shown for shown in self._shown if shown.epoch >= epoch]

    # --- The takeover ------------------------------------------------------------------------------------------------

    async def _memory_epoch(self) -> int:
        await self._speculation.park()
        # The copy loads a checkpoint only after its cut; it has loaded the last one if it has loaded one since.
        loaded, epoch = self._speculation.loaded, 0
        for shown in reversed(self._shown):
            if loaded == shown.loaded + 1:
                epoch = shown.epoch
                break
            if loaded != shown.loaded:
                raise StateError(
                    f"{self._name}: the copy has loaded {loaded - shown.loaded} checkpoints since the cut of epoch "
                    f"{shown.epoch}: there is no disk of the last one"
                )
        if epoch < self._held:
            raise StateError(
                f"{self._name}: checkpoint {self._held} is held, but the copy has loaded only {loaded}: which disk it "
                "needs is not known"
            )
        return epoch

    async def _let_go(self) -> None:
        await threads.run(self._device.fail, timeout_s=MAPPER_S)

    async def _strayed(self) -> bool:
        # Has the copy written to the cut that becomes the disk?
        at = next(n for n, shown in enumerate(self._shown) if shown.epoch == self._held)
        first = self._shown[at].writes
        later = self._shown[at + 1].writes if at + 1 < len(self._shown) else await self._writes()
        if first is None or later is None or first != later:
            told = (
                "an unknown number of times" if first is None or later is None else f"{later - first} times"
            )
            _log.info("%s: the copy has written %s before it took over", self._name, told)
            return True
        return False

    async def _hand_over(self) -> None:
        await threads.run(self._device.pass_through, self._drbd, timeout_s=MAPPER_S)

    # --- The end -----------------------------------------------------------------------------------------------------

    async def teardown(self, verdict: Verdict) -> None:
        """Remove the cuts and the copy's device; a guest that took over has DRBD itself from then on.

        Raises:
            InUse: The copy still runs.
            UnderstudyError: DRBD refuses, or a cut cannot be removed.
        """
        if not self._mapper.closed:
            if verdict is Verdict.KEEP and self._left:
                await self._settle()
            else:
                await patiently(self._device.remove)
        await super().teardown(verdict)

    async def _settle(self) -> None:
        # The guest runs, from the right disk: a device too many below it is no reason to fail.
        try:
            await self._speculation.settle(self._name)
        except (UnderstudyError, TimeoutError) as error:
            _log.warning("%s: the guest keeps the device %s: %s", self._name, self._path, error)
            return
        try:
            await patiently(self._device.remove)
        except (UnderstudyError, TimeoutError) as error:
            _log.warning("%s: the device %s is left: %s", self._name, self._path, error)
