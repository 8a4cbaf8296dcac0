"""The sockets of one chain: two TCP connections between the hosts, and local pairs inside one QEMU.

All of them are made here and handed to QEMU as descriptors, so no port is fixed, nobody else can be on the other end,
and nothing listens once a session has begun. What we keep is a duplicate: it tells how much QEMU has not read yet,
whether the connection still stands, and to shut it down cuts QEMU's end, whatever QEMU is doing.

QEMU's filter-mirror writes from the main loop and waits while the socket is full, so a secondary that hangs would
hang the primary's QEMU with it. Two things bound that: a send buffer that takes what a client sends in the time that
it takes to notice, and TCP_USER_TIMEOUT, which ends the connection when the other side takes nothing.

Source: Linux tcp(7), unix(7), ioctl SIOCINQ and SIOCOUTQ; QEMU net/filter-mirror.c (filter_send).
"""

from __future__ import annotations

import asyncio
import fcntl
import hmac
import secrets
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

__all__ = ["Listener", "connect", "drained", "established", "local_pair", "shut", "unread", "unsent"]

_BUFFER_BYTES: Final = 8 << 20
_USER_TIMEOUT_MS: Final = 5000  # how long the other side may take nothing before the connection is given up
_TOKEN_BYTES: Final = 16
_POLL_S: Final = 0.0005
_ESTABLISHED: Final = 1  # TCP_ESTABLISHED of Linux' net/tcp_states.h
_INT: Final = struct.Struct("=i")
_SO_SNDBUFFORCE: Final = 32  # not limited by net.core.wmem_max; asm-generic/socket.h


class Listener:
    """Waits on one address, on a port that the kernel chooses, for the connections of one chain.

    Args:
        address: Numeric address to listen on, and nowhere else.
    """

    def __init__(self, address: str) -> None:
        self._sock = socket.create_server((address, 0), family=_family(address), backlog=4)
        self._sock.settimeout(0.0)
        self.port: int = self._sock.getsockname()[1]
        self.token = secrets.token_hex(_TOKEN_BYTES)  #: what the other half must say first

    async def accept(self, count: int) -> list[socket.socket]:
        """Return `count` connections in the order of their numbers; strangers are turned away.

        Guarantees:
            After a failure or cancellation none is left open.
        """
        found: dict[int, socket.socket] = {}
        try:
            while len(found) < count:
                # Not sock_accept(): cancelled in the wrong moment it loses a connection that it has accepted.
                await _readable(self._sock)
                try:
                    sock, _ = self._sock.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                sock.settimeout(0.0)
                try:
                    number = await self._greeted(sock)
                except BaseException:
                    sock.close()
                    raise
                if number is None or number >= count or number in found:
                    sock.close()
                else:
                    found[number] = _tuned(sock)
        except BaseException:
            shut(*found.values())
            raise
        return [found[number] for number in range(count)]

    async def _greeted(self, sock: socket.socket) -> int | None:
        # A stranger may connect and stay silent; it must not hold up the rest for long.
        wanted = self.token.encode()
        loop = asyncio.get_running_loop()
        said = b""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(2.0):
                while len(said) <= len(wanted):
                    more = await loop.sock_recv(sock, len(wanted) + 1 - len(said))
                    if not more:
                        return None
                    said += more
        if len(said) == len(wanted) + 1 and hmac.compare_digest(said[:-1], wanted):
            return said[-1]
        return None

    def close(self) -> None:
        """Listen no longer. Idempotent."""
        self._sock.close()


async def connect(address: str, port: int, token: str, count: int) -> list[socket.socket]:
    """Return `count` connections to the `Listener` at `address`, `port` that has this `token`.

    Guarantees:
        After a failure or cancellation none is left open.
    """
    loop = asyncio.get_running_loop()
    made: list[socket.socket] = []
    try:
        for number in range(count):
            sock = socket.socket(_family(address), socket.SOCK_STREAM)
            made.append(sock)
            sock.settimeout(0.0)
            await loop.sock_connect(sock, (address, port))
            await loop.sock_sendall(sock, token.encode() + bytes([number]))
            _tuned(sock)
    except BaseException:
        shut(*made)
        raise
    return made


def local_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected local sockets with room for what colo-compare may let go at once.

    colo-compare is removed in the thread that also reads what it lets go: a full socket would be a deadlock.
    """
    pair = socket.socketpair()
    for sock in pair:
        _room(sock)
        sock.settimeout(0.0)
    return pair


def shut(*socks: socket.socket) -> None:
    """Cut and close connections, for whoever else holds them too. Idempotent."""
    for sock in socks:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


def unread(sock: socket.socket) -> int:
    """Return how many bytes have arrived that nobody has read; 0 for a closed socket."""
    return _ioctl(sock, termios.FIONREAD)


def unsent(sock: socket.socket) -> int:
    """Return how many bytes the other host has not confirmed yet; 0 for a closed socket."""
    return _ioctl(sock, termios.TIOCOUTQ)


async def drained(left: Callable[[], int], timeout_s: float) -> bool:
    """Wait until `left` returns 0.

    Returns:
        Whether it did so in time.
    """
    if not left():
        return True
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while left():  # noqa: ASYNC110 - the kernel tells nobody when a buffer has been read empty
                await asyncio.sleep(_POLL_S)
            return True
    return False


def established(socks: Sequence[socket.socket]) -> bool:
    """Tell whether all of these TCP connections stand."""
    for sock in socks:
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        except OSError:
            return False
        if info[0] != _ESTABLISHED:
            return False
    return True


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def _tuned(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    _room(sock)
    return sock


def _room(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)


def _ioctl(sock: socket.socket, request: int) -> int:
    try:
        answer = fcntl.ioctl(sock.fileno(), request, _INT.pack(0))
    except (OSError, ValueError):
        return 0
    return int(_INT.unpack(answer)[0])


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
