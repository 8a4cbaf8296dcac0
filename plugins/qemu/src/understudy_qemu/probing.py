"""Ask a QEMU binary what it can do, without a guest: a process that lives for a moment, with no machine in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from understudy.errors import HypervisorError, StateError
from understudy.services import Monitor, MonitorEvent
from understudy_qemu.features import Features
from understudy_qemu.machine import environment
from understudy_qemu.monitor import QemuMonitor
from understudy_qemu.process import QemuProcess

__all__ = ["ProbeMonitor", "probe_binary"]

# Features by program and its file's identity: an upgrade of QEMU is noticed.
_known: dict[tuple[str, int, int], Features] = {}


async def probe_binary(binary: str) -> Features:
    """Return what the QEMU `binary` can do; asked once for each version of the file.

    Raises:
        HypervisorError: It is not installed, or does not run; its words are in the text.
    """
    key = _identity(binary)
    if key not in _known:
        _known[key] = await _ask(key[0])
    return _known[key]


class ProbeMonitor:
    """The monitor that subkinds get while they probe: it tells what QEMU can do and changes nothing.

    Args:
        binary: The QEMU that the guest runs or would run.
        running: Returns the running guest's monitor, ``None`` if it does not run.
    """

    def __init__(self, binary: str, running: Callable[[], Coroutine[Any, Any, Monitor | None]]) -> None:
        self._binary = binary
        self._running = running

    async def supports(self, command: str, *members: str) -> bool:
        """Tell whether the binary knows `command` with `members`; see `QemuMonitor.supports`."""
        return (await probe_binary(self._binary)).schema.supports(command, *members)

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """Ask the running guest's QEMU; only ``query-`` commands.

        Raises:
            StateError: Another command, or the guest does not run here.
        """
        if not command.startswith("query-"):
            raise StateError(f"{command} may change something, and a probe must not")
        monitor = await self._running()
        if monitor is None:
            raise StateError(f"{command}: the guest does not run on this host")
        return await monitor.execute(command, arguments, timeout_s=timeout_s)

    async def give_fd(self, name: str, fd: int) -> None:
        """Refuse: it would change something."""
        raise StateError(f"a probe must not hand {name} (descriptor {fd}) to QEMU")

    def events(self, *names: str) -> AbstractAsyncContextManager[AsyncIterator[MonitorEvent]]:
        """Refuse: a probe waits for nothing."""
        raise StateError(f"a probe must not wait for events ({', '.join(names) or 'all'})")


def _identity(binary: str) -> tuple[str, int, int]:
    found = shutil.which(binary)
    if found is None:
        raise HypervisorError(f"{binary} is not installed or not executable")
    facts = Path(found).resolve().stat()
    return found, facts.st_mtime_ns, facts.st_size


async def _ask(binary: str) -> Features:
    with tempfile.TemporaryDirectory(prefix="understudy-probe-") as place:
        socket = Path(place, "qmp")
        line = [binary, "-no-user-config", "-nodefaults", "-display", "none", "-machine", "none", "-S"]
        line += ["-pidfile", str(Path(place, "pid")), "-qmp", f"unix:{socket},server=on,wait=off"]
        process = QemuProcess.start(line, stderr=Path(place, "stderr"), environment=environment(None))
        try:
            monitor = await QemuMonitor.connect(socket, name=binary, describe=process.describe)
            try:
                version = await monitor.execute("query-version")
                return Features(_words(version), await monitor.schema())
            finally:
                await monitor.close()
        finally:
            await process.kill()
            process.close()


def _words(version: Mapping[str, Any]) -> str:
    number = ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))
    package = str(version.get("package", "")).strip()
    return f"{number} {package}" if package else number
