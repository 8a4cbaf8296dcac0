"""The copy of a guest on the secondary's host: launched, fed with checkpoints, and promoted or killed.

A copy that receives memory may hold QEMU's big lock in a blocking read, and then its first monitor is mute. So the
stream is always cut first, by shutting our end of the socket down; then QEMU leaves COLO, and from that event on it
is final which checkpoint the copy holds: the number of RESUME events before it. The disks' connections are cut at
the same time, because QEMU also waits for the rest of a disk write (cutting.py).

Source: QEMU migration/colo.c, colo_process_incoming_thread; migration/colo-failover.c.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, cast

from understudy.arbiter import Record
from understudy.device import ReplicationMode
from understudy.errors import HypervisorError, StateError
from understudy.group import DeviceGroup
from understudy.hypervisor import DomainEvent, DomainEventKind, SecondaryDomain
from understudy.services import MONITOR, SPECULATION, Channels, Services
from understudy_qemu.disksession import DISKS, DiskSession
from understudy_qemu.events import Stage, Timeline
from understudy_qemu.guestfile import QemuConfig
from understudy_qemu.machine import DriveProvider
from understudy_qemu.migration import CHANNEL, URI, Cable, Switches
from understudy_qemu.monitor import CommandRefused
from understudy_qemu.offered import OfferedMonitor
from understudy_qemu.pulse import Pulse
from understudy_qemu.running import Qemu
from understudy_qemu.speculating import CopyDrive, QemuSpeculation

__all__ = ["QemuSecondary"]

_log = logging.getLogger(__name__)

# The primary first copies its disks, which may take days; the engine cancels the wait when the session ends.
_COPY_S = 7 * 86_400.0
_END_S = 10.0  # for QEMU to leave COLO after the stream was cut, all attempts together
_TAKEOVER_S = 10.0  # for QEMU to run after it was told to take over
_POLL_S = 0.003
_AGAIN_S = 0.001

# The copy only speculates: whether it shuts down or reboots is the primary's decision.
_SPECULATION = frozenset({DomainEventKind.SHUTDOWN, DomainEventKind.RESET, DomainEventKind.PANIC})


class QemuSecondary(SecondaryDomain):
    """A copy of a guest under QEMU.

    Args:
        start: Launches the copy from what its disks are made of, its taps on no bridge.
        connect: Puts its taps on their bridges.
        discard: Takes them off and removes them, kills the copy and sees it dead; also what is there of it only in
            part.
        disks: What its disks share in this session.
        config: The guest, as this host's guest file has it.
    """

    def __init__(
        self,
        *,
        start: Callable[[Mapping[str, DriveProvider]], Awaitable[Qemu]],
        connect: Callable[[], Coroutine[Any, Any, None]],
        discard: Callable[[], Awaitable[None]],
        disks: DiskSession,
        config: QemuConfig,
    ) -> None:
        self._start = start
        self._connect = connect
        self._discard = discard
        self._disks = disks
        self._config = config
        self._qemu: Qemu | None = None
        self._cable: Cable | None = None
        self._switches: Switches | None = None
        self._pulse: Pulse | None = None
        self._is_guest = False
        self._timeline = Timeline(ignored=_SPECULATION, count_checkpoints=True, gone=self._cut)
        offered = OfferedMonitor(lambda: self._qemu.monitor if self._qemu is not None else None)
        self._speculation = QemuSpeculation(config, self._timeline)
        self._services = Services((MONITOR, offered), (DISKS, disks), (SPECULATION, self._speculation))

    @property
    def services(self) -> Services:
        """The monitor and the copy, which answer only after `launch`, and what the disks share."""
        return self._services

    @property
    def qemu(self) -> Qemu:
        """The copy's QEMU.

        Raises:
            StateError: It is not launched.
        """
        if self._qemu is None:
            raise StateError("the copy has not been launched")
        return self._qemu

    # --- Becoming a copy ---------------------------------------------------------------------------------------------

    async def launch(self, group: DeviceGroup) -> None:
        """Start QEMU from what the opened disks prepared.

        Raises:
            HypervisorError: A disk is protected by something that QEMU cannot be made of, or QEMU did not start.
        """
        try:
            self._qemu = self._speculation.qemu = await self._start(_drives(group, self._config))
            await self._timeline.open(self._qemu.monitor)
            await self._disks.attach(self._qemu.monitor)
            self._pulse = Pulse(self._qemu.oob, self._timeline.lose)
        except BaseException:
            await asyncio.shield(self.discard())
            raise

    async def receive(self, channels: Channels, group: DeviceGroup) -> None:
        """Accept the stream; return when the initial copy is loaded and checkpoints may follow.

        Raises:
            HypervisorError: The stream broke before that, or QEMU refused it.
        """
        self._cable = Cable(await channels.accept(CHANNEL, timeout_s=_COPY_S))
        self._switches = await Switches.set(self.qemu.monitor)
        await self._cable.give(self.qemu.monitor)
        await self._command("migrate-incoming", {"uri": URI})
        self._cable.used()
        await group.start_all(ReplicationMode.SECONDARY)
        await self._timeline.until(self._loaded, timeout_s=_COPY_S, what="the guest's memory")

    def _loaded(self) -> bool | None:
        follower = self._timeline.follower
        if follower.stage is Stage.ENDED:
            raise HypervisorError(f"the guest's memory did not arrive: {follower.reason}")
        return follower.stage is Stage.CHECKPOINTS or None

    # --- The end of being a copy -------------------------------------------------------------------------------------

    async def sever(self, reason: str) -> int:
        """Cut the stream and wait until QEMU has left COLO.

        Returns:
            How many whole checkpoints the copy has loaded.

        Raises:
            HypervisorError: QEMU does not leave COLO, or is dead; the copy must not be promoted.
        """
        self._timeline.severed = True
        self._cut()
        if self._qemu is None:
            return 0
        self._disks.cut_server(self._qemu.process.pid)
        if self._timeline.follower.stage is Stage.COPYING:
            return 0
        try:
            await self._timeline.until(self._left, timeout_s=_END_S / 4, what="COLO_EXIT")
        except HypervisorError:
            if self._timeline.follower.left or not self._qemu.process.alive:
                raise
            # The shutdown did not reach QEMU's end: cut it from within.
            with suppress(CommandRefused):
                await self._qemu.oob.yank({"type": "migration"})
            await self._timeline.until(self._left, timeout_s=_END_S / 2, what="COLO_EXIT")
        _log.info(
            "%s: severed (%s), %d checkpoints loaded", self._qemu.name, reason, self._timeline.follower.loaded
        )
        self._disks.begin_stop()  # the swap that comes next takes about as long
        return self._timeline.follower.loaded

    def _left(self) -> bool | None:
        return self._timeline.follower.left or None

    async def promote(self, group: DeviceGroup, won: Record) -> None:
        """Turn the copy into the guest, as it was at the checkpoint it loaded last.

        Raises:
            StateError: It has loaded no checkpoint, or its stream is not severed.
            ExceptionGroup: A device of the primary may still reach this side's images; nothing was promoted.
            HypervisorError: QEMU did not take over.
        """
        follower = self._timeline.follower
        if not follower.left or not follower.loaded:
            raise StateError(f"this copy holds no whole checkpoint that is final; record: {won}")
        await group.stop_all(failover=True)
        deadline = time.monotonic() + _TAKEOVER_S
        while True:
            # Asked again if QEMU was still loading and put it off; it says so if it is at it already.
            with suppress(CommandRefused):
                await self._command("x-colo-lost-heartbeat")
            # It stops once more before it runs as the guest, and says `completed` in between.
            with suppress(HypervisorError):
                await self._timeline.until(self._completed, timeout_s=_POLL_S, what="the takeover")
            status = await self.qemu.status()
            if status == "running":
                break
            if time.monotonic() > deadline:
                raise HypervisorError(f"{self.qemu.name}: told to take over, it does not run but is {status}")
            await asyncio.sleep(_AGAIN_S)

    def _completed(self) -> bool | None:
        return self._timeline.follower.status == "completed" or None

    async def open_outlet(self, won: Record) -> None:
        """Put the guest's taps on their bridges and announce its addresses."""
        _log.info("%s: takes over by %s", self.qemu.name, won)
        # A client waits for the network: what else has to be done is done beside it, or in `close`.
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(self._disks.own_images, won.generation))
            group.create_task(self._appear())
            group.create_task(self._run())
        self.qemu.become_guest()
        self._is_guest = True

    async def _appear(self) -> None:
        await self._connect()
        await self.qemu.announce()

    async def _run(self) -> None:
        if await self.qemu.status() != "running":
            await self._command("cont")

    async def discard(self) -> None:
        """Kill the copy and see it dead. Idempotent; also right when `launch` failed half-way."""
        self._timeline.severed = True
        self._end_pulse()
        await self._close_cable()
        await self._discard()

    def watch(self) -> AsyncIterator[DomainEvent]:
        """Yield what happens unasked, until `close`."""
        return self._timeline.watch()

    async def close(self) -> None:
        """Let go of this session's handles; the domain stays as it is. Idempotent.

        Guarantees:
            A copy that became the guest has QEMU's migration switches as they were before the session, if QEMU answers.
        """
        self._end_pulse()
        await self._close_cable()
        switches, self._switches = self._switches, None
        if switches is not None and self._is_guest:
            with suppress(HypervisorError):
                await switches.restore()
        await self._disks.close()
        await self._timeline.close()

    # --- Private -----------------------------------------------------------------------------------------------------

    async def _command(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        return await self.qemu.monitor.execute(command, arguments)

    def _cut(self) -> None:
        # Also when QEMU is gone: our duplicate of the socket would keep the stream open for the other side.
        if self._cable is not None:
            self._cable.cut()

    def _end_pulse(self) -> None:
        if self._pulse is not None:
            self._pulse.end()

    async def _close_cable(self) -> None:
        cable, self._cable = self._cable, None
        if cable is not None:
            await cable.close()


def _drives(group: DeviceGroup, config: QemuConfig) -> dict[str, DriveProvider]:
    drives: dict[str, DriveProvider] = {}
    for name, device in group.devices.items():
        if device.copy_path is not None:
            drives[name] = CopyDrive(config.disk(name), device.copy_path)
        elif hasattr(device, "blockdevs"):
            drives[name] = cast("DriveProvider", device)
        elif name.startswith("disk"):
            raise HypervisorError(
                f"{name} is protected by {group.subkinds[name]}, which QEMU cannot be made of"
            )
    return drives
