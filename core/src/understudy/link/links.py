"""The links of one host: it listens, and keeps one connection per peer."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable

from understudy.errors import LinkError, LinkLost, PeerError
from understudy.link.connection import Connection
from understudy.link.frame import VERSION, Frame
from understudy.link.identity import Identity, Timing
from understudy.link.peerlink import PeerLink

__all__ = ["Links"]

log = logging.getLogger("understudy.link")

# Connections that have not said yet who they are; more are closed unheard.
STRANGERS_LIMIT = 32


class Links:
    """All links of this host.

    Args:
        host: This host's name.
        agent: Version of this agent.
        peers: Name, numeric address and port of every peer.
        timing: Heartbeats.
        changed: Called whenever a link has come up or gone down.
    """

    def __init__(
        self,
        host: str,
        agent: str,
        peers: Iterable[tuple[str, str, int]],
        *,
        timing: Timing | None = None,
        changed: Callable[[PeerLink], None] = lambda _: None,
        protocol: int = VERSION,
    ) -> None:
        self.me = Identity(host, agent, protocol, secrets.token_hex(8))
        self._timing = timing or Timing()
        self.peers = {
            name: PeerLink(self.me, name, address, port, self._timing, changed)
            for name, address, port in peers
        }
        self._server: asyncio.Server | None = None
        self._strangers: set[Connection] = set()
        self._runs: list[asyncio.Task[None]] = []

    async def start(self, address: str, port: int) -> int:
        """Listen and begin to dial.

        Args:
            address: Numeric address to listen on.
            port: Port to listen on, 0 for any.

        Returns:
            The port that it listens on.

        Raises:
            LinkError: The port is taken or the address is not this host's.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._stranger, address, port)
        except OSError as error:
            raise LinkError(f"cannot listen on {address} port {port}: {error.strerror or error}") from error
        for peer in self.peers.values():
            self._runs.append(loop.create_task(peer.run(), name=f"link to {peer.name}"))
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self, reason: str) -> None:
        """Stop listening and dialling, close every connection. Idempotent."""
        if self._server:
            self._server.close()
        runs, self._runs = self._runs, []
        for run in runs:
            run.cancel()
        for peer in self.peers.values():
            peer.close(reason)
        for connection in list(self._strangers):
            connection.abort(reason)
        if runs:
            await asyncio.wait(runs)

    # --- Connections that others make ----------------------------------------------------------------------------

    def _stranger(self) -> Connection:
        connection = Connection(
            self._introduce, self._ended, interval_s=self._timing.interval_s, limit_s=self._timing.limit_s
        )
        self._strangers.add(connection)
        if len(self._strangers) > STRANGERS_LIMIT:
            asyncio.get_running_loop().call_soon(connection.abort, "too many connections at once")
        return connection

    def _introduce(self, connection: Connection, frame: Frame) -> None:
        hello = frame.header
        if hello["t"] != "hello" or connection not in self._strangers:
            raise PeerError(f"it began with {hello['t']!r}")
        self._strangers.discard(connection)
        name = str(hello.get("host"))
        peer = self.peers.get(name)
        kind = reason = ""
        if misfit := self.me.misfit(connection.version, hello):
            kind, reason = "protocol", misfit
        elif hello.get("peer") != self.me.host:
            kind, reason = "host", f"this is {self.me.host}, not {hello.get('peer')}"
        elif peer is None:
            kind, reason = "unknown", f"{self.me.host} has no peer {name!r} in its agent.toml"
        if reason or peer is None:
            log.warning("a connection from %s was refused: %s", connection.address, reason)
            if peer and not peer.up:
                peer.problem = reason
            connection.refuse(kind, reason)
            return
        peer.offer(connection, hello)

    def _ended(self, connection: Connection, lost: LinkLost) -> None:
        if connection in self._strangers:
            self._strangers.discard(connection)
            log.warning("a connection that was no link was closed: %s", lost)
            return
        for peer in self.peers.values():
            peer.ended(connection, lost)
