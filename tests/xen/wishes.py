"""The agent of a Xen host with the places and the fault of `tests.kernel.wishes`.

Run as ``python -m tests.xen.wishes COMMON HOST ARGUMENT…`` for ``understudy ARGUMENT…``.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, Final

from tests.kernel.wishes import AFTER_CUT, AFTER_LOAD, NO_WAY_BACK, WatchedPhases, Wishes
from understudy.cli import main as understudy
from understudy_drbd.thin import ThinVolume
from understudy_xen.primary import XenPrimary

_EPOCH_S: Final = 1.0


def _put_in(wishes: Wishes) -> None:
    take, back = XenPrimary.checkpoint, ThinVolume.roll_back

    async def checkpoint(self: XenPrimary, epoch: int, phases: Any) -> Any:
        place = next((word for word in (AFTER_CUT, AFTER_LOAD) if wishes.wished(word)), "")
        if place:
            await asyncio.sleep(_EPOCH_S)  # the guest is to do something in the epoch that is lost
        return await take(self, epoch, WatchedPhases(phases, wishes, place))

    def roll_back(self: ThinVolume, epoch: int) -> None:
        if not wishes.wished(NO_WAY_BACK):
            back(self, epoch)

    # In a process of its own, for as long as it lives; mypy is right that nothing else may.
    XenPrimary.checkpoint = checkpoint  # type: ignore[method-assign]
    ThinVolume.roll_back = roll_back  # type: ignore[method-assign]


if __name__ == "__main__":
    common, host = sys.argv[1:3]
    _put_in(Wishes(Path(common), host))
    sys.argv[1:3] = []
    understudy()
