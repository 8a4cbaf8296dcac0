"""The Unix socket on which the agent answers the command line of its host.

One request per connection, all lines are JSON objects:

* the client sends ``{"method": …, "params": {…}}``;
* the agent sends any number of ``{"progress": {…}}`` and ``{"note": "…"}``, then one ``{"result": …}`` or
  ``{"error": {"kind", "message", …}}``, and closes;
* a client that closes its sending side, or goes away, cancels the request; the agent undoes what it had begun and then
  still answers. (Ctrl-C during ``protect`` leaves the guest unprotected.)

Only root and the user that the agent runs as may connect; the kernel tells who it is (SO_PEERCRED).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from understudy.agent.faults import describe
from understudy.errors import StateError, UnderstudyError

__all__ = ["Call", "ControlServer", "Handler"]

log = logging.getLogger("understudy.agent")

REQUEST_LIMIT_BYTES = 1 << 20
REQUEST_LIMIT_S = 10.0
_UCRED = struct.Struct("3i")

Handler = Callable[["Call"], Awaitable[Any]]


class Call:
    """One request of the command line.

    Args:
        method: What is asked for.
        params: Its arguments.
        tell: Sends one line to the client.
        user: Who asks, for the history.
    """

    def __init__(
        self,
        method: str,
        params: Mapping[str, Any],
        tell: Callable[[Mapping[str, Any]], None],
        user: str = "",
    ) -> None:
        self.method = method
        self.params = params
        self.user = user
        self._tell = tell

    def progress(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Tell the client how far a copy is; may be called often."""
        self._tell({"progress": {"what": what, "done_bytes": done_bytes, "total_bytes": total_bytes}})

    def note(self, text: str) -> None:
        """Tell the client one sentence."""
        self._tell({"note": text})

    def str(self, key: str, default: str | None = None) -> str:
        """Return a text argument.

        Raises:
            StateError: Missing, or no text.
        """
        value = self.params.get(key, default)
        if not isinstance(value, str):
            raise StateError(f"{self.method} needs the text {key!r}")
        return value


class ControlServer:
    """The agent's end of the Unix socket.

    Args:
        path: Where the socket is.
        handler: Answers each request; what it raises is told to the client.
    """

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._visits: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen.

        Raises:
            StateError: Another agent answers there already, or the place cannot be used.
        """
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if await _answers(self.path):
                raise StateError(f"another agent is running: it answers on {self.path}")
            with suppress(FileNotFoundError):
                self.path.unlink()
            before = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(
                    self._connected, self.path, limit=REQUEST_LIMIT_BYTES
                )
            finally:
                os.umask(before)
        except OSError as error:
            raise StateError(f"cannot listen on {self.path}: {error.strerror or error}") from error

    async def close(self) -> None:
        """Stop listening and cancel what is being answered. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        with suppress(FileNotFoundError):
            self.path.unlink()
        for visit in self._visits:
            visit.cancel()
        if self._visits:
            await asyncio.wait(self._visits)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._visit(reader, writer), name="control")
        self._visits.add(task)
        task.add_done_callback(self._visits.discard)

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def tell(line: Mapping[str, Any]) -> None:
            # A client that was stopped (Ctrl-Z) must not fill our memory with progress.
            full = writer.transport.get_write_buffer_size() > REQUEST_LIMIT_BYTES and "progress" in line
            if not writer.is_closing() and not full:
                writer.write(json.dumps(line, separators=(",", ":"), default=str).encode() + b"\n")

        try:
            user = _permitted(writer.get_extra_info("socket"))
            async with asyncio.timeout(REQUEST_LIMIT_S):
                call = _parse(await reader.readline(), tell, user)
            tell(await self._answer(call, reader))
        except asyncio.CancelledError:
            tell({"error": {"kind": "StateError", "message": "the agent is shutting down"}})
        except (UnderstudyError, ValueError, TimeoutError) as error:
            tell({"error": describe(error)})
        finally:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.drain()
                writer.close()
                async with asyncio.timeout(1):
                    await writer.wait_closed()

    async def _answer(self, call: Call, reader: asyncio.StreamReader) -> Mapping[str, Any]:
        work = asyncio.ensure_future(self._handler(call))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                log.info("%s was called off by its client", call.method)
                work.cancel()
            # Cancelled work undoes what it did; how long that may take is the work's own business.
            await asyncio.wait({work})
        finally:
            gone.cancel()
            work.cancel()
        if work.cancelled():
            return {"error": {"kind": "Cancelled", "message": f"{call.method} was called off"}}
        error = work.exception()
        if error is None:
            return {"result": work.result()}
        if not _expected(error):
            log.error("%s failed unexpectedly", call.method, exc_info=error)
        return {"error": describe(error)}


def _expected(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_expected(each) for each in error.exceptions)
    return isinstance(error, UnderstudyError)


def _permitted(sock: socket.socket) -> str:
    _pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid not in {0, os.geteuid()}:
        raise StateError(f"user {uid} may not talk to this agent: only root and user {os.geteuid()} may")
    return f"uid {uid}"


def _parse(line: bytes, tell: Callable[[Mapping[str, Any]], None], user: str) -> Call:
    try:
        request = json.loads(line)
        method, params = request["method"], request.get("params", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError("that was no request: one line of JSON with method and params") from error
    if not isinstance(method, str) or not isinstance(params, dict):
        raise StateError("that was no request: method is a text and params an object")
    return Call(method, params, tell, user)


async def _answers(path: Path) -> bool:
    try:
        async with asyncio.timeout(1):
            _, writer = await asyncio.open_unix_connection(path)
    except TimeoutError:
        return True  # it is there, and busy
    except OSError:
        return False
    writer.close()
    return True
