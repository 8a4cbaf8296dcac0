"""What lies between the two hosts of pair.py: streams over the loopback interface, and a cable that can be cut."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from understudy.group import DeviceGroup


class Relay:
    """A stretch of cable between two sockets that can be cut silently: nothing passes, nobody is told."""

    def __init__(self) -> None:
        self.silent_after_bytes: int | None = None  #: towards the far end, counted from when it was set
        self._through = asyncio.Event()
        self._through.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: list[socket.socket] = []
        self._server: socket.socket | None = None

    @property
    def passes(self) -> bool:
        """Whether anything passes."""
        return self._through.is_set()

    def hang_up(self) -> None:
        """Close both ends, as a host does that died."""
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Let nothing pass any more, in either direction."""
        self._through.clear()

    def between(self, near: socket.socket) -> socket.socket:
        """Put the relay between `near` and a new socket, which is returned."""
        far, inner = socket.socketpair()
        self._join(inner, near)
        return far

    def listen(self, host: str, port: int) -> int:
        """Relay every connection to a new port, which is returned, to `host` and `port`."""
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.setblocking(False)
        self._tasks.append(asyncio.create_task(self._accept(host, port)))
        found: int = self._server.getsockname()[1]
        return found

    async def _accept(self, host: str, port: int) -> None:
        assert self._server is not None
        while True:
            near, _ = await asyncio.get_running_loop().sock_accept(self._server)
            self._join(near, socket.create_connection((host, port)))

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        for sock in (near, far):
            sock.setblocking(False)
            self._sockets.append(sock)
        self._tasks.append(asyncio.create_task(self._pump(near, far, forward=True)))
        self._tasks.append(asyncio.create_task(self._pump(far, near, forward=False)))

    async def _pump(self, source: socket.socket, sink: socket.socket, *, forward: bool) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while data := await loop.sock_recv(source, 65536):
                await self._through.wait()
                if forward and self.silent_after_bytes is not None:
                    if len(data) >= self.silent_after_bytes:
                        await loop.sock_sendall(sink, data[: self.silent_after_bytes])
                        self.drop()
                        await self._through.wait()
                    self.silent_after_bytes -= len(data)
                await loop.sock_sendall(sink, data)
        await self._through.wait()
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for sock in (*self._sockets, *([self._server] if self._server else [])):
            sock.close()


class LoopChannels:
    """Channels between the two hosts over the loopback interface, or over a relay."""

    def __init__(self, relay: Relay | None = None) -> None:
        self._relay = relay
        self._ends: dict[str, tuple[asyncio.Future[socket.socket], asyncio.Future[socket.socket]]] = {}

    def _pair(self, name: str) -> tuple[asyncio.Future[socket.socket], asyncio.Future[socket.socket]]:
        if name not in self._ends:
            loop = asyncio.get_running_loop()
            self._ends[name] = (loop.create_future(), loop.create_future())
            with socket.create_server(("127.0.0.1", 0)) as listener:
                near = socket.create_connection(listener.getsockname())
                far, _ = listener.accept()
            if self._relay is not None:
                near = self._relay.between(near)
            for end, sock in zip(self._ends[name], (near, far), strict=True):
                end.set_result(sock)
        return self._ends[name]

    async def connect(self, name: str, *, timeout_s: float) -> socket.socket:
        return await asyncio.wait_for(self._pair(name)[0], timeout_s)

    async def accept(self, name: str, *, timeout_s: float) -> socket.socket:
        return await asyncio.wait_for(self._pair(name)[1], timeout_s)

    def close(self) -> None:
        for ends in self._ends.values():
            for end in ends:
                end.result().close()


@dataclass
class LoopPeer:
    """The other half of a device, in the same process; everything goes through JSON."""

    device: str
    other: Callable[[], DeviceGroup]
    relay: Callable[[], Relay] | None = None

    async def request(self, method: str, params: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        asked = self.other().serve(self.device, method, json.loads(json.dumps(params)))
        answer: dict[str, Any] = json.loads(json.dumps(await asyncio.wait_for(asked, timeout_s)))
        if method == "export" and self.relay is not None:
            answer["port"] = self.relay().listen(answer["host"], answer["port"])
        return answer
