"""An arbiter that cannot be swapped for an empty one behind our back.

A shared directory that is not mounted after a reboot looks like an arbiter that knows no guest: every guest would be
new, and start on two hosts. So an agent remembers, in its own state directory, the highest generation that it has seen
of each guest, and takes an arbiter that shows less for one that gives no answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from understudy.arbiter import Arbiter, Record, RecordState, SwapResult
from understudy.errors import ArbiterUnavailable

__all__ = ["RememberingArbiter"]

log = logging.getLogger("understudy.agent")


class RememberingArbiter(Arbiter):
    """Asks another arbiter and remembers generations.

    Args:
        inner: The arbiter.
        directory: Where generations are remembered, one small file per guest.
    """

    def __init__(self, inner: Arbiter, directory: Path) -> None:
        self.inner = inner
        self._directory = directory
        self._deferred_s: dict[str, float] = {}  # guest → until when, by the loop's clock

    async def read(self, guest: str) -> Record | None:
        """Return the record that counts now; see `Arbiter.read`.

        Raises:
            ArbiterUnavailable: Also when it shows less than was seen before.
        """
        record = await self.inner.read(guest)
        self._check(guest, record)
        return record

    def defer(self, guest: str, seconds: float) -> None:
        """Let this host's claims to go on alone with a protected guest wait for so long from now.

        An operator forces the standby to take over: its first act cuts the stream, and the primary would answer with a
        claim of its own. To wait is always safe, the guest's output is held meanwhile.
        """
        self._deferred_s[guest] = asyncio.get_running_loop().time() + seconds

    async def _wait(self, expected: Record | None, desired: Record) -> None:
        until_s = self._deferred_s.get(desired.guest, 0.0)
        protected = expected is not None and expected.state is RecordState.PROTECTED
        if protected and desired.state is RecordState.ALONE and until_s:
            await asyncio.sleep(until_s - asyncio.get_running_loop().time())

    async def exchange(self, expected: Record | None, desired: Record) -> SwapResult:
        """Carry out a swap; see `Arbiter.exchange`."""
        await self._wait(expected, desired)
        if expected is None:
            # A first record can only be right where this host has seen none.
            self._check(desired.guest, await self.inner.read(desired.guest))
        result = await self.inner.exchange(expected, desired)
        self._check(desired.guest, result.record)
        return result

    async def history(self, guest: str) -> Sequence[Record]:
        """Return the records kept of a guest; see `Arbiter.history`."""
        return await self.inner.history(guest)

    async def guests(self) -> Sequence[str]:
        """Return the names of all guests that have a record."""
        return await self.inner.guests()

    async def close(self) -> None:
        """Let go of connections."""
        await self.inner.close()

    def _check(self, guest: str, record: Record | None) -> None:
        shown = record.generation if record is not None else 0
        seen = self._recall(guest)
        if shown < seen:
            raise ArbiterUnavailable(
                f"it shows generation {shown} of guest {guest}, but this host has seen generation {seen}: it is not "
                f"the arbiter that was asked before. Is its directory mounted? (If it was emptied on purpose and the "
                f"guest runs nowhere, remove {self._path(guest)})"
            )
        if shown > seen:
            self._write(guest, shown)

    def _path(self, guest: str) -> Path:
        return self._directory / quote(guest, safe="")

    def _recall(self, guest: str) -> int:
        # The file is read each time that it matters, so that an operator can remove it.
        try:
            return int(self._path(guest).read_text())
        except (OSError, ValueError):
            return 0

    def _write(self, guest: str, generation: int) -> None:
        # Whole or not at all; a file that a crash takes back costs the guard, not the guest.
        path = self._path(guest)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary.write_text(f"{generation}\n")
            temporary.replace(path)
        except OSError as error:
            log.error("the generation of guest %s cannot be remembered: %s", guest, error)  # noqa: TRY400
