"""The two descriptors between which a receiver stands: reads and writes that a third one ends.

Both never block by themselves. Where they have to wait, they wait for an eventfd, too: it becomes readable once, when
the stream is cut or the receiver is closed, and ends every wait from then on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import time
from contextlib import suppress
from typing import Final

from understudy.errors import HypervisorError

__all__ = ["ConnectionGone", "Interrupted", "PrimaryConnection", "RestorePipe"]

_PIPE_BYTES: Final = 1 << 20
_CLOSED: Final = "it has closed its end"
_DRAIN_BYTES: Final = 1 << 16


class Interrupted(Exception):
    """The wait was ended from outside."""


class ConnectionGone(Exception):
    """The connection is gone: nobody is left who could be told more."""


class RestorePipe:
    """The writing end of the pipe that libxl reads.

    Args:
        fd: Owned from now on, also when this fails.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.failure = ""  #: why libxl can have no more of the stream, ``""``: it can
        try:
            os.set_blocking(fd, False)
        except OSError:
            os.close(fd)
            raise
        with suppress(OSError):  # no pipe, or more than a user may have: it only takes more turns
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def write(self, data: memoryview | bytearray, wake_fd: int) -> None:
        """Write all of `data`.

        Args:
            data: Any number of bytes.
            wake_fd: Ends the wait for libxl when it is readable.

        Raises:
            Interrupted: By `wake_fd`. A part of `data` may have been written.
            HypervisorError: libxl does not read any more. Likewise.
        """
        poll = select.poll()
        poll.register(wake_fd, select.POLLIN)
        poll.register(self._fd, select.POLLOUT)
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                if any(fd == wake_fd for fd, _ in poll.poll()):
                    raise Interrupted("the receiver was closed") from None
            except OSError as broken:
                raise self.fail(_CLOSED if broken.errno == errno.EPIPE else str(broken)) from broken

    def check(self) -> None:
        """See that somebody has the reading end.

        Raises:
            HypervisorError: libxl has closed it.
        """
        poll = select.poll()
        poll.register(self._fd, 0)  # an error is told unasked
        if poll.poll(0):
            raise self.fail(_CLOSED)

    def fail(self, why: str) -> HypervisorError:
        """Note why libxl can have no more, if that is the first reason, and return the error that says so."""
        self.failure = self.failure or why
        return HypervisorError(f"libxl takes no more of the stream: {self.failure}")

    def close(self) -> None:
        """End libxl's stream."""
        os.close(self._fd)


class PrimaryConnection:
    """The connection to the primary's agent.

    Args:
        sock: Connected; owned from now on.
        wake_fd: Ends every wait when it is readable.
    """

    def __init__(self, sock: socket.socket, wake_fd: int) -> None:
        self._sock = sock
        self._wake_fd = wake_fd
        sock.setblocking(False)  # noqa: FBT003 - its only argument

    def receive(self, into: memoryview, pipe: RestorePipe | None) -> memoryview:
        """Return the part of `into` that was filled with the next bytes, none at the end of the stream.

        Args:
            into: Where to.
            pipe: Watched meanwhile.

        Raises:
            Interrupted: The wait was ended.
            ConnectionGone: The connection is broken.
            HypervisorError: libxl has ended.
        """
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        if pipe is not None:
            poll.register(pipe, 0)
        while True:
            try:
                return into[: self._sock.recv_into(into)]
            except BlockingIOError:
                ready = {fd for fd, _ in poll.poll()}
            except OSError as broken:
                raise ConnectionGone(f"the connection to the primary is broken: {broken}") from broken
            if self._wake_fd in ready:
                raise Interrupted
            if pipe is not None and pipe.fileno() in ready:
                pipe.check()

    def send(self, answer: bytes) -> None:
        """Send an answer, at once or not at all.

        Raises:
            ConnectionGone: It did not go out whole. One that would have to wait is one of very many that the primary
                has not read.
        """
        try:
            sent = self._sock.send(answer)
        except BlockingIOError:
            sent = 0
        except OSError as broken:
            raise ConnectionGone(f"the connection to the primary is broken: {broken}") from broken
        if sent < len(answer):
            raise ConnectionGone("the primary does not read what is answered")

    def drain(self, timeout_s: float) -> None:
        """Throw away what the primary still sends, until it ends, the time is over or the wait is ended."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        with suppress(OSError):
            while (left_s := deadline - time.monotonic()) > 0:
                if any(fd == self._wake_fd for fd, _ in poll.poll(left_s * 1000)):
                    return
                with suppress(BlockingIOError):
                    if not self._sock.recv(_DRAIN_BYTES):
                        return

    def shut(self) -> None:
        """End it in both directions; the descriptor stays."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        self._sock.close()
