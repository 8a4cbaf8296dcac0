"""The simulated checkpoint stream: JSON messages on a socket that the agents' channels made."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Stream"]

Json = Mapping[str, Any]


class Stream(asyncio.Protocol):
    """One end of the stream.

    Args:
        take: Called with each message.
        lost: Called once when the stream ends and `cut` was not called, with the reason.
    """

    def __init__(self, take: Callable[[Json], None], lost: Callable[[str], None]) -> None:
        self._take = take
        self._lost = lost
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self.alive = False

    @classmethod
    async def on(
        cls, sock: socket.socket, take: Callable[[Json], None], lost: Callable[[str], None]
    ) -> Stream:
        """Return a stream on a connected socket, which it owns from now on."""
        stream = cls(take, lost)
        try:
            sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
            await asyncio.get_running_loop().create_connection(lambda: stream, sock=sock)
        except BaseException:
            stream.cut()
            sock.close()
            raise
        return stream

    def send(self, message: Json) -> None:
        """Send a message; silently nothing when the stream has ended."""
        if self.alive and self._transport is not None:
            self._transport.write(json.dumps(message).encode() + b"\n")

    def cut(self) -> None:
        """End the stream at once; nothing that arrives later is taken. Idempotent."""
        self.alive = False
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio's side ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a socket's transport is one
        self._transport = transport
        self.alive = True

    def data_received(self, data: bytes) -> None:
        """Take what is whole."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if self.alive:
                self._take(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that the other end is gone."""
        if self.alive:
            self.alive = False
            self._lost(f"the checkpoint stream ended: {exc}" if exc else "the checkpoint stream ended")
