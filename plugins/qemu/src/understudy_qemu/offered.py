"""The monitor as it is offered to device subkinds: one object for the whole session, whatever is behind it.

On the secondary it exists before the copy does; on the primary it outlives a connection that was made anew because
the old one was silent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from understudy.errors import HypervisorError
from understudy.services import Monitor, MonitorEvent

__all__ = ["OfferedMonitor"]


class OfferedMonitor:
    """A `Monitor` that hands every call to the one that counts now.

    Args:
        current: Returns it, ``None`` as long as there is none.
    """

    def __init__(self, current: Callable[[], Monitor | None]) -> None:
        self._current = current

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """Run one QMP command and return its result; as `Monitor.execute`."""
        return await self._monitor.execute(command, arguments, timeout_s=timeout_s)

    async def supports(self, command: str, *members: str) -> bool:
        """Tell whether `command` exists and takes all of `members`; as `Monitor.supports`."""
        return await self._monitor.supports(command, *members)

    async def give_fd(self, name: str, fd: int) -> None:
        """Hand the file descriptor `fd` to QEMU under `name`; as `Monitor.give_fd`."""
        await self._monitor.give_fd(name, fd)

    def events(self, *names: str) -> AbstractAsyncContextManager[AsyncIterator[MonitorEvent]]:
        """Subscribe to the events `names`; as `Monitor.events`."""
        return self._monitor.events(*names)

    @property
    def _monitor(self) -> Monitor:
        monitor = self._current()
        if monitor is None:
            raise HypervisorError("the guest's QEMU has not been started yet")
        return monitor
