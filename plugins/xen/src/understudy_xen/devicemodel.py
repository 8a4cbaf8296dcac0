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
from qemu.qmp.qmp_client import ExecuteError, NegotiationError

from understudy.errors import HypervisorError, MonitorSilent
from understudy_xen import claim

__all__ = ["DeviceModel", "left_states", "remove_state"]

_log = logging.getLogger(__name__)
_quiet = logging.getLogger(f"{__name__}.qmp")
_quiet.setLevel(logging.CRITICAL + 1)  # the library logs what it raises, too

_STATE: Final = "understudy-devices-"
_CONNECT_S: Final = 10.0
_COMMAND_S: Final = 10.0
_DROP_S: Final = 1.0
_RETRY_S: Final = 0.01


class DeviceModel:
    """One guest's QEMU.

    Its methods may be called at the same time; they wait for each other.

    Args:
        domid: The guest's domain.
        directory: Where libxl puts its sockets, and where the state is put for a moment; ``None``: Xen's.
    """

    def __init__(self, domid: int, directory: Path | None = None) -> None:
        directory = claim.RUN_DIRECTORY if directory is None else directory
        self.domid = domid
        self._socket = directory / f"qmp-libxl-{domid}"
        self._state = directory / f"{_STATE}{domid}"
        self._client: QMPClient | None = None
        self._using = asyncio.Lock()

    @property
    def exists(self) -> bool:
        """Whether the guest has one that can be asked."""
        return self._socket.is_socket()

    async def connect(self) -> None:
        """Take the socket. Idempotent.

        Raises:
            MonitorSilent: It does not answer, or somebody else holds it, for longer than `_CONNECT_S`.
        """
        async with self._using:
            if self._client is None:
                self._client = await self._connected()

    async def release(self) -> None:
        """Let the socket go, after the command that is under way. Idempotent; never fails."""
        async with self._using:
            client, self._client = self._client, None
            if client is not None:
                await _drop(client)

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run one QMP command on the connection that is held, or on one for it alone.

        Raises:
            HypervisorError: QEMU refused.
            MonitorSilent: It did not answer in time, or the connection was lost; whether it ran the command is not
                known. The socket is held no more.
        """
        async with self._using:
            client = self._client or await self._connected()
            keeps = self._client is not None
            try:
                async with asyncio.timeout(_COMMAND_S):
                    return await client.execute(command, dict(arguments) if arguments else None)
            except ExecuteError as refused:
                raise HypervisorError(
                    f"the device model of domain {self.domid} refused {command}: {refused}"
                ) from refused
            except TimeoutError:
                keeps = False
                raise MonitorSilent(
                    f"the device model of domain {self.domid} did not answer {command} within {_COMMAND_S:g} s"
                ) from None
            except (QMPError, OSError, EOFError) as lost:
                keeps = False
                raise MonitorSilent(
                    f"the device model of domain {self.domid} closed its socket while it ran {command}"
                ) from lost
            except BaseException:
                keeps = False  # the answer to what was given up would be taken for the next one's
                raise
            finally:
                if not keeps:
                    self._client = None
                    await _drop(client)

    async def _connected(self) -> QMPClient:
        client = _client(self.domid)
        try:
            async with asyncio.timeout(_CONNECT_S):
                # Another client's late answer may be the first thing that QEMU says; the next try is greeted.
                while not await _greeted(client, self._socket):  # noqa: ASYNC110 - nobody tells when it can be tried
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            await _drop(client)
            raise MonitorSilent(
                f"the device model of domain {self.domid} does not answer on {self._socket} within "
                f"{_CONNECT_S:g} s (one client at a time; an xl command may hold it)"
            ) from None
        except (ConnectError, OSError) as silent:
            await _drop(client)
            raise MonitorSilent(
                f"the device model of domain {self.domid} cannot be reached on {self._socket}: {silent}"
            ) from silent
        except BaseException:
            await _drop(client)
            raise
        return client

    async def stop(self) -> None:
        """Stop its timers and its disks, so that it writes nothing more to the guest's memory."""
        await self.execute("stop")

    async def proceed(self) -> None:
        """Let it run again."""
        await self.execute("cont")

    async def state(self) -> bytes:
        """Return the state of all devices, as the stream carries it; the device model must be stopped.

        Raises:
            HypervisorError: QEMU refused, or left nothing.
            MonitorSilent: It did not answer.

        Guarantees:
            No file is left.
        """
        try:
            await self.execute("xen-save-devices-state", {"filename": str(self._state), "live": True})
            state = self._state.read_bytes()
        except OSError as unread:
            raise HypervisorError(
                f"the device model of domain {self.domid} left no state in {self._state}: {unread}"
            ) from unread
        finally:
            self._state.unlink(missing_ok=True)
        if not state:
            raise HypervisorError(f"the device model of domain {self.domid} has saved a state of no bytes")
        return state

    async def log_dirty(self, *, enable: bool) -> None:
        """Have it mark the pages that it writes, for as long as the guest is being copied."""
        await self.execute("xen-set-global-dirty-log", {"enable": enable})


def left_states() -> set[int]:
    """Return the domains of which a state lies about: its device model is just saving it, or whoever asked is dead."""
    numbers = (place.name.removeprefix(_STATE) for place in claim.RUN_DIRECTORY.glob(f"{_STATE}*"))
    return {int(number) for number in numbers if number.isdecimal()}


def remove_state(domid: int) -> None:
    """Remove what lies about of a domain's state. Idempotent."""
    (claim.RUN_DIRECTORY / f"{_STATE}{domid}").unlink(missing_ok=True)


def _client(domid: int) -> QMPClient:
    client = QMPClient(f"understudy-{domid}")
    client.logger = _quiet
    # Nobody reads events here, and the client's own listener keeps them for ever.
    standard, client.events = client.events, EventListener()
    client.remove_listener(standard)
    return client


async def _greeted(client: QMPClient, socket: Path) -> bool:
    try:
        await client.connect(str(socket))
    except ConnectError as error:
        if isinstance(error.exc, NegotiationError):
            return False
        if isinstance(
            error.exc, asyncio.CancelledError
        ):  # the library wraps it when it comes at a bad moment
            raise error.exc from None
        raise
    return True


async def _drop(client: QMPClient) -> None:
    # In a task of its own: the client leaves an error behind that nobody looks at when its disconnect is cancelled.
    await asyncio.wait({asyncio.ensure_future(_disconnected(client))}, timeout=_DROP_S)


async def _disconnected(client: QMPClient) -> None:
    with suppress(Exception):  # it raises what ended the connection, which is known by now
        await client.disconnect()
