"""QEMU's monitor: commands with deadlines, events without loss, and out-of-band ``yank`` on a socket of its own.

Two sockets, because a monitor can be mute while its QEMU still can be helped: a copy that waits for memory holds
QEMU's big lock in a blocking read. `OutOfBand` talks to the second socket, whose commands QEMU runs in the
monitor's own thread; ``yank`` cuts the connections that QEMU waits for, and the first monitor answers again.

A monitor that was silent once is dead: the answer to a command that was given up may still be under way, and what
the command did is unknown. Every later call raises at once, so that nobody waits twice.

Source: QEMU docs/interop/qmp-spec.rst (out-of-band execution), qapi/yank.json.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, cast

from qemu.qmp import ConnectError, QMPClient, QMPError
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message
from qemu.qmp.qmp_client import ExecuteError, NegotiationError

from understudy.errors import HypervisorError, MonitorSilent
from understudy.services import MonitorEvent
from understudy_qemu.features import Schema

__all__ = ["CommandRefused", "OutOfBand", "QemuMonitor"]

DEADLINE_S = 10.0  #: for a command, unless its caller knows better
CONNECT_S = 10.0  #: for the greeting and the capabilities
EVENTS_KEPT = 10_000  #: how many events a subscriber may lag behind; a checkpoint makes two
_RETRY_S = 0.01
_DROP_S = 1.0
_SOCKET_PATH_MAX = 107

# The library logs each attempt to connect, each error that it raises too, and a cancelled attempt as its own bug.
_quiet = logging.getLogger(f"{__name__}.qmp")
_quiet.setLevel(logging.CRITICAL + 1)


def _alive() -> str:
    return ""


class CommandRefused(HypervisorError):
    """QEMU answered a command with an error.

    Args:
        text: The whole sentence.
        command: The command.
        error_class: QMP's class of the error, e.g. ``"DeviceNotFound"``.
        description: QEMU's words.
    """

    def __init__(self, text: str, command: str, error_class: str, description: str) -> None:
        super().__init__(text)
        self.command = command
        self.error_class = error_class
        self.description = description


class _Connection:
    # What both sockets share: connect within a deadline, execute within a deadline, die once.

    def __init__(self, name: str, deadline_s: float, describe: Callable[[], str]) -> None:
        self.name = name
        self._deadline_s = deadline_s
        self._describe = describe
        self._cause: HypervisorError | None = None
        self._closed = False
        self._dropping: asyncio.Future[None] | None = None
        self._client = QMPClient()
        self._client.logger = _quiet
        # The client's own listener keeps every event for ever.
        standard, self._client.events = self._client.events, EventListener()
        self._client.remove_listener(standard)

    @property
    def dead(self) -> HypervisorError | None:
        """Why no call can succeed any more, ``None`` while the monitor is alive."""
        return self._cause

    async def _connect(self, path: Path, timeout_s: float) -> None:
        if len(str(path)) > _SOCKET_PATH_MAX:
            raise HypervisorError(
                f"{self.name}: the path of a Unix socket may not be longer than 107: {path}"
            )
        try:
            async with asyncio.timeout(timeout_s):
                # A socket's file tells nobody that it appeared.
                while not await self._try_connect(path):  # noqa: ASYNC110
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            await self._drop()
            raise MonitorSilent(
                f"{self.name}: the monitor at {path} did not greet within {timeout_s:g} s{self._tail()}"
            ) from None
        except BaseException:
            await self._drop()
            raise

    async def _try_connect(self, path: Path) -> bool:
        try:
            await self._client.connect(str(path))
        except ConnectError as error:
            # Not there yet, or not listening yet: QEMU is still starting. Anything else will not mend itself.
            if isinstance(error.exc, FileNotFoundError | ConnectionRefusedError) and not self._describe():
                return False
            if isinstance(error.exc, NegotiationError):
                # QEMU sent us the answer to a command that the previous client did not wait for.
                return False
            if isinstance(error.exc, asyncio.CancelledError):
                raise error.exc from None
            raise HypervisorError(
                f"{self.name}: no monitor at {path}: {error.exc!r}{self._tail()}"
            ) from error
        return True

    async def _run(
        self, command: str, arguments: Mapping[str, Any] | None, timeout_s: float | None, *, oob: bool = False
    ) -> Any:
        if self._cause is not None:
            raise type(self._cause)(f"{command} not sent: {self._cause}")
        limit = self._deadline_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit):
                return await self._client.execute(command, arguments, oob=oob)
        except ExecuteError as error:
            text = f"{self.name}: {command}: {error.error.error.desc}"
            raise CommandRefused(text, command, error.error_class, error.error.error.desc) from error
        except TimeoutError:
            silent = MonitorSilent(f"{self.name}: no answer to {command} within {limit:g} s{self._tail()}")
            self._die(silent)
            raise silent from None
        except (QMPError, OSError, EOFError) as error:
            await self._lost(error, f" while it ran {command}")

    async def _lost(self, error: BaseException, when: str) -> NoReturn:
        await self._settle()
        if self._cause is None:
            self._die(HypervisorError(f"{self.name}: the monitor's connection is lost{when}{self._tail()}"))
        assert self._cause is not None  # noqa: S101 - _die has just set it
        raise self._cause from error

    async def _settle(self) -> None:
        # A dying process closes its sockets a moment before its exit status can be read.
        for _ in range(20):
            if self._describe is _alive or self._describe():
                return
            await asyncio.sleep(0.005)

    def _tail(self) -> str:
        words = self._describe()
        return f" ({words})" if words else ""

    def _die(self, cause: HypervisorError) -> None:
        if self._cause is None:
            self._cause = cause

    async def _drop(self) -> None:
        # Once, in a task of its own: the client leaves behind an error that nobody looks at when a call of its
        # disconnect() is cancelled, as that of the watcher is by `close`.
        if self._dropping is None:
            self._dropping = asyncio.ensure_future(self._disconnect())
        await asyncio.wait({self._dropping}, timeout=_DROP_S)

    async def _disconnect(self) -> None:
        # It raises what ended the connection, which is known by now.
        with suppress(Exception):
            await self._client.disconnect()


class _Subscription:
    # One subscriber's events. Filled by the reader task before it reads the next message, so that events and the
    # answers to commands keep their order.

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._events: deque[MonitorEvent] = deque()
        self._wake = asyncio.Event()
        self._end: HypervisorError | None = None

    def put(self, event: MonitorEvent) -> None:
        if self._end is not None or (self._names and event.name not in self._names):
            return
        if len(self._events) >= EVENTS_KEPT:
            self.end(
                HypervisorError(f"more than {EVENTS_KEPT} events of the monitor were not read; some are lost")
            )
            return
        self._events.append(event)
        self._wake.set()

    def end(self, cause: HypervisorError) -> None:
        if self._end is None:
            self._end = cause
        self._wake.set()

    async def read(self) -> AsyncIterator[MonitorEvent]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._end is not None:
                raise self._end
            self._wake.clear()
            await self._wake.wait()


class _Fan(EventListener):
    # Hands every event to all subscribers at once, in the reader task.

    def __init__(self) -> None:
        super().__init__()
        self.subscriptions: list[_Subscription] = []

    async def put(self, event: Message) -> None:
        stamp = cast("Mapping[str, int]", event["timestamp"])
        made = MonitorEvent(
            name=cast("str", event["event"]),
            data=cast("Mapping[str, Any]", event.get("data", {})),
            host_ns=stamp["seconds"] * 1_000_000_000 + stamp["microseconds"] * 1000,
        )
        for subscription in self.subscriptions:
            subscription.put(made)


class QemuMonitor(_Connection):
    """A QMP monitor of one QEMU process; `understudy.services.Monitor` for device subkinds.

    Make one with `connect`.

    Args:
        name: Who it is in error messages, e.g. ``"web on alpha"``.
        deadline_s: Deadline of a command in seconds where the caller gives none.
        describe: Returns what happened to the process (exit status, last words), ``""`` while it lives.
    """

    def __init__(
        self, name: str, deadline_s: float = DEADLINE_S, describe: Callable[[], str] = _alive
    ) -> None:
        super().__init__(name, deadline_s, describe)
        self._fan = _Fan()
        self._client.register_listener(self._fan)
        self._schema: Schema | None = None
        self._passing_fd = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        path: Path,
        *,
        name: str,
        deadline_s: float = DEADLINE_S,
        timeout_s: float = CONNECT_S,
        describe: Callable[[], str] = _alive,
    ) -> QemuMonitor:
        """Connect to the QMP socket at `path`, waiting for it to appear.

        Args:
            path: The Unix socket.
            name: Who it is in error messages.
            deadline_s: Deadline of a command in seconds where the caller gives none.
            timeout_s: How long to wait for socket and greeting, seconds.
            describe: Returns what happened to the process, ``""`` while it lives.

        Raises:
            MonitorSilent: Nobody greeted in time, for instance because the socket accepts and stays silent.
            HypervisorError: The process died, or what answers is no QMP monitor.

        Guarantees:
            After a failure no connection is left open.
        """
        monitor = cls(name, deadline_s, describe)
        await monitor._connect(path, timeout_s)
        monitor._watcher = asyncio.create_task(monitor._watch(), name=f"monitor of {name}")
        return monitor

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """Run one QMP command and return its result.

        Args:
            command: QMP name, e.g. ``"object-add"``.
            arguments: Its arguments; keys with ``-`` as in QMP.
            timeout_s: Deadline in seconds, ``None`` for the monitor's default.

        Raises:
            CommandRefused: QEMU refused; its words are in the text.
            MonitorSilent: No answer before the deadline. The monitor is dead from now on.
            HypervisorError: The connection is lost; exit status and last words are in the text if QEMU died.
        """
        return await self._run(command, arguments, timeout_s)

    async def supports(self, command: str, *members: str) -> bool:
        """Tell by ``query-qmp-schema`` whether `command` exists and takes all of `members`.

        Args:
            command: QMP name, e.g. ``"chardev-add"``.
            members: Dotted paths of members or enumeration values below its arguments, e.g.
                ``"backend.data.reconnect-ms"``.
        """
        return (await self.schema()).supports(command, *members)

    async def schema(self) -> Schema:
        """Return what this QEMU's monitor can do; asked once."""
        if self._schema is None:
            self._schema = Schema.parse(await self.execute("query-qmp-schema", timeout_s=30.0))
        return self._schema

    async def give_fd(self, name: str, fd: int) -> None:
        """Hand the file descriptor `fd` to QEMU under `name` (``getfd``); the caller keeps its own copy."""
        # The descriptor belongs to the next command on the socket, so nothing may come between. SCM_RIGHTS goes
        # past the client's queue: whatever waits there must have been sent.
        async with self._passing_fd:
            await self.execute("query-status")
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError) as error:
                await self._lost(error, f" while it was given the descriptor {name}")
            await self.execute("getfd", {"fdname": name})

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[AsyncIterator[MonitorEvent]]:
        """Subscribe to the events `names` (all if none) from the moment the context is entered.

        Raises:
            HypervisorError: While iterating: the monitor is dead, or the reader lagged so far behind that events
                are lost. Events that came before are delivered first.
        """
        subscription = _Subscription(frozenset(names))
        if self._cause is not None:
            subscription.end(self._cause)
        self._fan.subscriptions.append(subscription)
        try:
            yield subscription.read()
        finally:
            self._fan.subscriptions.remove(subscription)

    async def close(self) -> None:
        """Disconnect; QEMU goes on. Idempotent.

        Guarantees:
            Afterwards every call raises `HypervisorError`, and subscriptions have ended with it.
        """
        self._closed = True
        self._die(HypervisorError(f"{self.name}: the monitor was closed"))
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        await self._drop()

    def _die(self, cause: HypervisorError) -> None:
        super()._die(cause)
        for subscription in self._fan.subscriptions:
            subscription.end(cause)

    async def _watch(self) -> None:
        # Nobody may be calling when QEMU dies; subscribers must hear of it nevertheless.
        while self._client.runstate.name == "RUNNING":
            await self._client.runstate_changed()
        if not self._closed:
            await self._drop()
            await self._settle()
            self._die(HypervisorError(f"{self.name}: the monitor's connection is lost{self._tail()}"))


class OutOfBand(_Connection):
    """The second QMP socket, for commands that must work while QEMU's main loop hangs.

    Args:
        name: Who it is in error messages.
        deadline_s: Deadline of a command in seconds.
        describe: Returns what happened to the process, ``""`` while it lives.
    """

    def __init__(self, name: str, deadline_s: float = 2.0, describe: Callable[[], str] = _alive) -> None:
        super().__init__(name, deadline_s, describe)

    @classmethod
    async def connect(
        cls,
        path: Path,
        *,
        name: str,
        deadline_s: float = 2.0,
        timeout_s: float = CONNECT_S,
        describe: Callable[[], str] = _alive,
    ) -> OutOfBand:
        """Connect to the QMP socket at `path` and demand out-of-band execution; arguments as for `QemuMonitor`.

        Raises:
            MonitorSilent: Nobody greeted in time.
            HypervisorError: No monitor, or it has no out-of-band commands.
        """
        monitor = cls(name, deadline_s, describe)
        await monitor._connect(path, timeout_s)
        greeting = monitor._client.greeting
        if greeting is None or "oob" not in greeting.QMP.capabilities:
            await monitor.close()
            raise HypervisorError(f"{name}: the monitor at {path} cannot run commands out of band")
        return monitor

    async def yank(self, *instances: Mapping[str, str]) -> None:
        """Cut the connections `instances` of QEMU at once.

        Args:
            instances: As QMP's YankInstance, e.g. ``{"type": "migration"}`` or ``{"type": "block-node",
                "node-name": "disk0-nbd"}``. All of them must exist: if one does not, QEMU cuts none.

        Raises:
            CommandRefused: One does not exist; nothing was cut.
            MonitorSilent: No answer in time.
        """
        await self._run("yank", {"instances": [dict(instance) for instance in instances]}, None, oob=True)

    async def yankable(self) -> Sequence[Mapping[str, str]]:
        """Return all connections that `yank` could cut now, QEMU's monitors among them."""
        answer = await self._run("query-yank", None, None, oob=True)
        return cast("Sequence[Mapping[str, str]]", answer)

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        self._die(HypervisorError(f"{self.name}: the monitor was closed"))
        await self._drop()
