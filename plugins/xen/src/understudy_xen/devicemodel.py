"""The device model of an HVM guest: its QEMU, asked through the QMP socket that libxl made.

The socket serves one client at a time, and libxl uses it, too (``xl`` commands on disks and CD drives, its own resume).
So it is held only for the time of a checkpoint: connected while the guest still runs, let go when it runs again.

The device model is stopped with the guest, because it writes to the guest's memory; its state is taken while both
stand still, and written into the stream after they run again.

Source: tools/libs/light/libxl_dom_suspend.c, libxl_dom_save.c and libxl_qmp.c of Xen 4.17; QEMU migration/savevm.c
(qmp_xen_save_devices_state), qapi/migration.json.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from qemu.qmp import ConnectError, QMPClient, QMPError
from qemu.qmp.events import EventListener
from qemu.qmp.qmp_client import ExecuteError

from understudy.errors import HypervisorError, MonitorSilent

__all__ = ["RUN_DIRECTORY", "DeviceModel"]

_log = logging.getLogger(__name__)
_quiet = logging.getLogger(f"{__name__}.qmp")
_quiet.setLevel(logging.CRITICAL + 1)  # the library logs what it raises, too

RUN_DIRECTORY: Final = Path("/run/xen")  #: XEN_RUN_DIR of Debian's packages, and of upstream's default
_CONNECT_S: Final = 10.0
_COMMAND_S: Final = 10.0


class DeviceModel:
    """One guest's QEMU.

    Args:
        domid: The guest's domain.
        directory: Where libxl puts its sockets, and where the state is put for a moment.
    """

    def __init__(self, domid: int, directory: Path = RUN_DIRECTORY) -> None:
        self.domid = domid
        self._socket = directory / f"qmp-libxl-{domid}"
        self._state = directory / f"understudy-devices-{domid}"
        self._client: QMPClient | None = None

    @property
    def exists(self) -> bool:
        """Whether the guest has one that can be asked."""
        return self._socket.is_socket()

    async def connect(self) -> None:
        """Take the socket. Idempotent.

        Raises:
            MonitorSilent: It does not answer, or somebody else holds it, for longer than `_CONNECT_S`.
        """
        if self._client is not None:
            return
        client = QMPClient(f"understudy-{self.domid}")
        client.logger = _quiet
        client.events = (
            EventListener()
        )  # nobody reads them: the client's own listener would keep them for ever
        try:
            async with asyncio.timeout(_CONNECT_S):
                await client.connect(str(self._socket))
        except (TimeoutError, ConnectError, OSError) as silent:
            raise MonitorSilent(
                f"the device model of domain {self.domid} does not answer on {self._socket} "
                f"(one client at a time; an xl command may hold it): {silent}"
            ) from silent
        self._client = client

    async def release(self) -> None:
        """Let the socket go. Idempotent; never fails."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(QMPError, OSError, TimeoutError):
                async with asyncio.timeout(_COMMAND_S):
                    await client.disconnect()

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run one QMP command on the connection that is held, or on one for it alone.

        Raises:
            HypervisorError: QEMU refused.
            MonitorSilent: It did not answer in time.
        """
        held = self._client is not None
        if not held:
            await self.connect()
        client = self._client
        assert client is not None  # noqa: S101 - connected above
        try:
            async with asyncio.timeout(_COMMAND_S):
                return await client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as refused:
            raise HypervisorError(
                f"the device model of domain {self.domid} refused {command}: {refused}"
            ) from refused
        except (TimeoutError, QMPError, OSError) as silent:
            await self.release()
            raise MonitorSilent(
                f"the device model of domain {self.domid} did not answer {command}: {silent}"
            ) from silent
        finally:
            if not held:
                await self.release()

    async def stop(self) -> None:
        """Stop its timers and its disks, so that it writes nothing more to the guest's memory."""
        await self.execute("stop")

    async def proceed(self) -> None:
        """Let it run again."""
        await self.execute("cont")

    async def state(self) -> bytes:
        """Return the state of all devices, as the stream carries it; the device model must be stopped."""
        try:
            await self.execute("xen-save-devices-state", {"filename": str(self._state), "live": True})
            return self._state.read_bytes()
        finally:
            self._state.unlink(missing_ok=True)

    async def log_dirty(self, *, enable: bool) -> None:
        """Have it mark the pages that it writes, for as long as the guest is being copied."""
        await self.execute("xen-set-global-dirty-log", {"enable": enable})
