"""Notice a QEMU that hangs although its process lives and its connections stand.

A copy whose process is stopped tells nobody: its sockets stay open, the agent beside it is well, and the primary
waits for a checkpoint that never ends, its guest's writes with it. So the copy is asked, on its second monitor, which
answers out of band also while a checkpoint holds the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from understudy.errors import HypervisorError
from understudy_qemu.monitor import OutOfBand

__all__ = ["Pulse"]

_PERIOD_S = 0.5


class Pulse:
    """Asks a QEMU over and over whether it lives, until `end`.

    Args:
        oob: Its second monitor; the deadline of its commands is how long QEMU may be silent.
        silent: Called once, with the reason, when it is.
    """

    def __init__(self, oob: OutOfBand, silent: Callable[[str], None]) -> None:
        self._oob = oob
        self._silent = silent
        self._ended = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="pulse")

    def end(self) -> None:
        """Ask no more. A question that is on its way is not withdrawn: its answer would be nobody's. Idempotent."""
        self._ended.set()

    async def _run(self) -> None:
        while not self._ended.is_set():
            try:
                await self._oob.yankable()
            except HypervisorError as error:
                if not self._ended.is_set():
                    self._silent(str(error))
                return
            try:
                async with asyncio.timeout(_PERIOD_S):
                    await self._ended.wait()
            except TimeoutError:
                continue
