"""One running QEMU with both its monitors: launched, adopted after a restart of the agent, killed.

A QMP socket serves one client at a time, so the hypervisor keeps one `Qemu` per guest and everybody shares it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from understudy.errors import HypervisorError
from understudy_qemu.accel import Accel
from understudy_qemu.guestfile import QemuConfig
from understudy_qemu.inventory import Inventory
from understudy_qemu.machine import DriveProvider, GuestPaths, command_line, environment
from understudy_qemu.monitor import OutOfBand, QemuMonitor
from understudy_qemu.process import QemuProcess

__all__ = ["Launched", "Qemu"]

_CONNECT_S = 20.0  # of a QEMU that was just started
_FOUND_S = 10.0  # of one that was found: as long as it may take for a command
RECONNECT_S = 5.0
# Source: QEMU qapi/net.json, AnnounceParameters; milliseconds.
_ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
STATUS_S = 5.0


@dataclass(frozen=True, slots=True)
class Launched:
    """What a QEMU process was launched with, kept beside its sockets for the next agent."""

    accel: str
    qemu: str
    copy: bool  #: whether it was launched as a copy that waits for its memory
    taps: Mapping[str, str]  #: tap of each interface, by the interface's name
    born: Mapping[str, list[str]] = field(default_factory=dict)  #: its `Inventory` when it was launched

    def write(self, path: Path) -> None:
        """Write it to `path`, whole or not at all."""
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self)), encoding="utf-8")
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Launched | None:
        """Read it back; ``None`` if there is none that can be read."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(**data)
        except (OSError, ValueError, TypeError):
            return None


class Qemu:
    """A running QEMU process of ours.

    Args:
        name: Who it is in error messages, e.g. ``"web on alpha"``.
        paths: Where its files lie.
        process: The process.
        launched: What it was launched with.
        monitor: The connected monitor.
        oob: The connected second monitor.
    """

    def __init__(
        self,
        name: str,
        paths: GuestPaths,
        process: QemuProcess,
        launched: Launched,
        monitor: QemuMonitor,
        oob: OutOfBand,
    ) -> None:
        self.name = name
        self.paths = paths
        self.process = process
        self.launched = launched
        self.monitor = monitor
        self.oob = oob

    @classmethod
    async def launch(
        cls,
        config: QemuConfig,
        paths: GuestPaths,
        launched: Launched,
        drives: Mapping[str, DriveProvider],
        *,
        name: str,
        preload: Path | None,
    ) -> Qemu:
        """Start QEMU, stopped, and connect to both monitors.

        Args:
            config: The guest.
            paths: Where its files lie; made if missing.
            launched: What it is launched with.
            drives: What each disk is made of.
            name: Who it is in error messages.
            preload: The library that QEMU needs under TCG, ``None`` under KVM.

        Raises:
            HypervisorError: QEMU ended at once; its words are in the text.
            MonitorSilent: It did not greet in time.

        Guarantees:
            After a failure or cancellation the process is dead and its sockets are gone.
        """
        cls._clean(paths)
        for directory in (paths.runtime, paths.state):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        line = command_line(
            config,
            paths,
            accel=Accel(launched.accel),
            drives=drives,
            taps=launched.taps,
            incoming=launched.copy,
        )
        launched.write(paths.launched)
        process: QemuProcess | None = None
        try:
            process = QemuProcess.start(line, stderr=paths.stderr, environment=environment(preload))
            monitor, oob = await cls._connect(name, paths, process)
            launched = replace(launched, born=(await Inventory.take(monitor)).to_json())
            launched.write(paths.launched)
        except BaseException:
            if process is not None:
                await asyncio.shield(process.kill())
                process.close()
            cls._clean(paths)
            raise
        return cls(name, paths, process, launched, monitor, oob)

    @classmethod
    async def adopt(cls, paths: GuestPaths, *, name: str, timeout_s: float = _FOUND_S) -> Qemu | None:
        """Connect to a QEMU that runs already, ``None`` if none does.

        Args:
            paths: Where its files lie.
            name: Who it is in error messages.
            timeout_s: How long each of its monitors may take to greet, seconds.

        Raises:
            MonitorSilent: It runs but does not greet.
            HypervisorError: It is not clear what it was launched with.
        """
        process = QemuProcess.adopt(paths.pidfile, stderr=paths.stderr)
        if process is None:
            return None
        try:
            launched = Launched.read(paths.launched)
            if launched is None:
                raise HypervisorError(
                    f"{name}: QEMU runs (process {process.pid}) but {paths.launched} is unreadable"
                )
            monitor, oob = await cls._connect(name, paths, process, timeout_s)
        except BaseException:
            process.close()
            raise
        return cls(name, paths, process, launched, monitor, oob)

    @staticmethod
    async def _connect(
        name: str, paths: GuestPaths, process: QemuProcess, timeout_s: float = _CONNECT_S
    ) -> tuple[QemuMonitor, OutOfBand]:
        monitor = await QemuMonitor.connect(
            paths.qmp, name=name, timeout_s=timeout_s, describe=process.describe
        )
        try:
            oob = await OutOfBand.connect(
                paths.oob, name=name, timeout_s=timeout_s, describe=process.describe
            )
        except BaseException:
            await monitor.close()
            raise
        return monitor, oob

    async def reconnect(self) -> None:
        """Connect the first monitor anew after it was silent (it answers again, for instance after ``yank``).

        Raises:
            MonitorSilent: It is still silent.
            HypervisorError: The process is dead.
        """
        await self.monitor.close()
        self.monitor = await QemuMonitor.connect(
            self.paths.qmp, name=self.name, timeout_s=RECONNECT_S, describe=self.process.describe
        )

    async def status(self) -> str:
        """Return QEMU's run state, e.g. ``"running"``, ``"paused"``, ``"shutdown"``, ``"colo"``."""
        answer: Mapping[str, Any] = await self.monitor.execute("query-status", timeout_s=STATUS_S)
        return str(answer["status"])

    async def announce(self) -> None:
        """Tell switches where the guest's addresses are: five times within a second, the first at once."""
        await self.monitor.execute("announce-self", _ANNOUNCE)

    def become_guest(self) -> None:
        """Write down that this is no copy any more, also for an agent that finds it after a restart."""
        self.launched = replace(self.launched, copy=False)
        self.launched.write(self.paths.launched)

    def adopt_node(self, node: str) -> None:
        """Write down that a block node is the guest's from now on, as if it had been born with it."""
        born = {name: list(found) for name, found in self.launched.born.items()}
        born["nodes"] = sorted({*born.get("nodes", ()), node})
        self.launched = replace(self.launched, born=born)
        self.launched.write(self.paths.launched)

    async def kill(self) -> None:
        """Kill QEMU, see it dead and remove its sockets. Taps and overlays are not touched."""
        await self.process.kill()
        await self.close()
        self._clean(self.paths)

    async def close(self) -> None:
        """Let go of monitors and process; QEMU goes on. Idempotent."""
        await self.monitor.close()
        await self.oob.close()
        self.process.close()

    @staticmethod
    def _clean(paths: GuestPaths) -> None:
        for path in (paths.qmp, paths.oob, paths.pidfile, paths.launched):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            paths.runtime.rmdir()
