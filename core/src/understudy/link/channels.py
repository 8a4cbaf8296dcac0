"""Plain byte streams between two hosts for bulk data: a TCP connection each, beside the link.

The accepting side listens on a port that the kernel picks, at its own link address, and tells port and a random
one-time token over the link; the connecting side sends the token first and gets one byte back. Whoever connects
without the token is dropped, and the wait goes on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from contextlib import suppress
from typing import Any

from understudy.errors import LinkError, LinkLost, StateError
from understudy.link.port import Json, PeerPort

__all__ = ["PeerChannels"]

log = logging.getLogger("understudy.link")

TOKEN_BYTES = 32
WELCOME = b"\x06"
# How long somebody who connected may take to send the token.
TOKEN_LIMIT_S = 2.0


class PeerChannels:
    """The channels of one session (`understudy.services.Channels`).

    Args:
        port: A conversation for the channels' own use.
        local_address: Numeric address to listen on.
        peer_address: Numeric address of the other host.
    """

    def __init__(self, port: PeerPort, local_address: str, peer_address: str) -> None:
        self._port = port
        self._local_address = local_address
        self._peer_address = peer_address
        self._offers: dict[str, asyncio.Future[tuple[int, str]]] = {}
        port.serve(self._serve)

    async def connect(self, name: str, *, timeout_s: float) -> socket.socket:
        """Return a connected, blocking-mode socket to the other host's `accept` of the same `name`.

        Raises:
            LinkError: It could not be made, or not in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._port.request("open", {"name": name}, timeout_s=timeout_s)
                return await self._connect(int(answer["port"]), bytes.fromhex(answer["token"]))
        except TimeoutError:
            raise LinkLost(f"channel {name!r} was not connected within {timeout_s:g} s") from None
        except OSError as error:
            where = f"{self._peer_address} ({error.strerror or error})"
            raise LinkError(f"channel {name!r} could not be connected to {where}") from error

    async def accept(self, name: str, *, timeout_s: float) -> socket.socket:
        """Return the socket of the other host's `connect` of the same `name`, in blocking mode.

        Raises:
            LinkError: It did not come in time, or this host cannot listen.
            StateError: The same channel is being accepted already.
        """
        offer = self._offer(name)
        if offer.done():
            raise StateError(f"channel {name!r} is being accepted already")
        try:
            family = socket.AF_INET6 if ":" in self._local_address else socket.AF_INET
            with socket.socket(family, socket.SOCK_STREAM) as listener:
                listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
                listener.bind((self._local_address, 0))
                listener.listen(4)
                token = secrets.token_bytes(TOKEN_BYTES)
                offer.set_result((listener.getsockname()[1], token.hex()))
                async with asyncio.timeout(timeout_s):
                    return await self._accept(listener, token)
        except TimeoutError:
            raise LinkLost(f"nobody connected to channel {name!r} within {timeout_s:g} s") from None
        except OSError as error:
            where = f"{self._local_address} ({error.strerror or error})"
            raise LinkError(f"channel {name!r} cannot be offered at {where}") from error
        finally:
            self._offers.pop(name, None)

    def close(self) -> None:
        """Take no more requests. Channels that were made live on. Idempotent."""
        self._port.close()
        for offer in self._offers.values():
            offer.cancel()
        self._offers.clear()

    # --- Inside --------------------------------------------------------------------------------------------------

    def _offer(self, name: str) -> asyncio.Future[tuple[int, str]]:
        # Made by whoever comes first: our accept or the other side's request.
        return self._offers.setdefault(name, asyncio.get_running_loop().create_future())

    async def _serve(self, method: str, params: Json) -> Json:
        if method != "open":
            raise StateError(f"channels know no {method!r}")
        port, token = await asyncio.shield(self._offer(str(params["name"])))
        return {"port": port, "token": token}

    async def _connect(self, port: int, token: bytes) -> socket.socket:
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in self._peer_address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)  # noqa: FBT003
            await loop.sock_connect(sock, (self._peer_address, port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_sendall(sock, token)
            if await loop.sock_recv(sock, 1) != WELCOME:
                raise LinkError(f"the other host closed the channel at port {port} instead of taking it")
            sock.setblocking(True)  # noqa: FBT003
        except BaseException:
            sock.close()
            raise
        return sock

    async def _accept(self, listener: socket.socket, token: bytes) -> socket.socket:
        # Everybody who connects is heard at the same time: a silent stranger must not hold up the other host.
        loop = asyncio.get_running_loop()
        taken: asyncio.Future[socket.socket] = loop.create_future()
        visitors: set[asyncio.Task[None]] = set()

        async def listen() -> None:
            while True:
                visitor, address = await loop.sock_accept(listener)
                task = loop.create_task(self._visit(visitor, str(address[0]), token, taken))
                visitors.add(task)
                task.add_done_callback(visitors.discard)

        listening = loop.create_task(listen())
        try:
            waiting: set[asyncio.Future[Any]] = {listening, taken}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not taken.done():
                listening.result()  # raises what ended it
            return taken.result()
        except BaseException:
            if taken.done() and not taken.cancelled():
                taken.result().close()
            raise
        finally:
            for task in (listening, *visitors):
                task.cancel()
            await asyncio.wait({listening, *visitors})
            if not taken.done():
                taken.cancel()

    async def _visit(
        self, visitor: socket.socket, address: str, token: bytes, taken: asyncio.Future[socket.socket]
    ) -> None:
        loop = asyncio.get_running_loop()
        given = b""
        try:
            visitor.setblocking(False)  # noqa: FBT003
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(TOKEN_LIMIT_S):
                    while len(given) < TOKEN_BYTES:
                        if not (data := await loop.sock_recv(visitor, TOKEN_BYTES - len(given))):
                            break
                        given += data
            if taken.done() or not secrets.compare_digest(given, token):
                log.warning(
                    "somebody at %s connected to a channel without its token and was dropped", address
                )
                visitor.close()
                return
            visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_sendall(visitor, WELCOME)
            visitor.setblocking(True)  # noqa: FBT003
        except BaseException:
            visitor.close()
            raise
        taken.set_result(visitor)
