"""Byte streams on a simulated cable: real sockets at both ends, with the cable's script in between."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from understudy.errors import LinkLost
from understudy.testing.link import Lane, SimulatedCable

__all__ = ["SimulatedChannels", "Trench"]


class Trench:
    """The channels of one session, both hosts' ends of them.

    Args:
        cable: Where they run.
        first: One host.
        second: The other.
    """

    def __init__(self, cable: SimulatedCable, first: str, second: str) -> None:
        self.cable = cable
        self.peers = {first: second, second: first}
        self._accepting: dict[tuple[str, str], asyncio.Future[socket.socket]] = {}
        self._relays: list[tuple[str, _Relay]] = []

    def of(self, host: str) -> SimulatedChannels:
        """Return one host's channels."""
        return SimulatedChannels(self, host)

    def accepting(self, host: str, name: str) -> asyncio.Future[socket.socket]:
        """Return the meeting place of `accept` on a host and `connect` on the other."""
        key = (host, name)
        if key not in self._accepting:
            self._accepting[key] = asyncio.get_running_loop().create_future()
        return self._accepting[key]

    def done(self, host: str, name: str) -> None:
        """Close a meeting place."""
        self._accepting.pop((host, name), None)

    async def join(self, connecting: str) -> tuple[socket.socket, socket.socket]:
        """Make a channel and return its ends: that of the connecting host first."""
        accepting = self.peers[connecting]
        loop = asyncio.get_running_loop()
        ends: list[socket.socket] = []
        relays: list[_Relay] = []
        try:
            for host in (connecting, accepting):
                outer, inner = socket.socketpair()
                ends += [outer, inner]
                inner.setblocking(False)  # noqa: FBT003 - the standard library's signature
                relay = _Relay(self.cable.lane(host))
                relays.append(relay)
                self._relays.append((host, relay))
                await loop.create_connection(lambda relay=relay: relay, sock=inner)  # type: ignore[misc]
        except BaseException:
            for relay in relays:
                relay.abort()
            for end in ends:
                end.close()
            raise
        relays[0].other, relays[1].other = relays[1], relays[0]
        return ends[0], ends[2]

    def die(self, host: str, *, silent: bool) -> None:
        """End the host's channels; as `SimulatedCable.die`."""
        for owner, relay in self._relays:
            if owner == host:
                relay.die(silent=silent)

    def close(self) -> None:
        """Close every socket that is left."""
        for _, relay in self._relays:
            relay.die(silent=True)
            relay.abort()
        for future in self._accepting.values():
            _refuse(future)


class SimulatedChannels:
    """One host's channels (`understudy.services.Channels`).

    Args:
        trench: Both hosts' ends.
        host: Whose they are.
    """

    def __init__(self, trench: Trench, host: str) -> None:
        self._trench = trench
        self._host = host

    async def connect(self, name: str, *, timeout_s: float) -> socket.socket:
        """Return a socket to the other host's `accept` of the same name."""
        trench, cable = self._trench, self._trench.cable
        meeting = trench.accepting(trench.peers[self._host], name)
        try:
            async with asyncio.timeout(timeout_s):
                # There and back again, as a handshake goes.
                await _crossing(cable, self._host)
                await _crossing(cable, trench.peers[self._host])
                ours, theirs = await trench.join(self._host)
        except TimeoutError:
            raise LinkLost(f"channel {name!r} was not connected within {timeout_s:g} s") from None
        if meeting.done():
            ours.close()
            theirs.close()
            raise LinkLost(f"channel {name!r} was refused")
        meeting.set_result(theirs)
        return ours

    async def accept(self, name: str, *, timeout_s: float) -> socket.socket:
        """Return the socket of the other host's `connect` of the same name."""
        meeting = self._trench.accepting(self._host, name)
        try:
            async with asyncio.timeout(timeout_s):
                return await meeting
        except asyncio.CancelledError:
            _refuse(meeting)
            raise
        except TimeoutError:
            raise LinkLost(f"nobody connected to channel {name!r} within {timeout_s:g} s") from None
        finally:
            self._trench.done(self._host, name)


class _Relay(asyncio.Protocol):
    # The cable's end of one host's socket: what comes out of it goes into its lane, and what arrives into the other's.

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.other: _Relay | None = None
        self._transport: asyncio.Transport | None = None
        self._gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a socket's transport is one
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        other = self.other
        if other is not None:
            self.lane.send(lambda: other.write(data))

    def connection_lost(self, exc: Exception | None) -> None:
        # The host's program, or the program with the host's kernel still alive, closed its end.
        del exc
        other = self.other
        if not self._gone and other is not None:
            self._gone = True
            self.lane.send(other.abort)

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def die(self, *, silent: bool) -> None:
        # The program behind the host's end is gone; silently, if its kernel is gone, too.
        if silent:
            self._gone = True
            self.lane.cable.forget(self.lane)
        self.abort()


def _refuse(meeting: asyncio.Future[socket.socket]) -> None:
    # Nobody takes the socket any more that may already be there.
    if not meeting.cancel() and not meeting.cancelled():
        meeting.result().close()


async def _crossing(cable: SimulatedCable, sender: str) -> None:
    arrived = asyncio.get_running_loop().create_future()
    lane = cable.lane(sender)
    settle: Callable[[], None] = lambda: None if arrived.done() else arrived.set_result(None)  # noqa: E731
    lane.send(settle)
    try:
        await arrived
    finally:
        cable.forget(lane)
