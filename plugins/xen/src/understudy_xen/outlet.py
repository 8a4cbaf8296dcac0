"""Where the primary's checkpoint stream goes: to the other agent, to a stock receiver, or nowhere.

libxc writes its records to a descriptor by itself, from a thread that it blocks; what libxl's layer adds is written to
the same descriptor in between. An outlet has that descriptor, and says when a checkpoint that was written is
acknowledged. `cut` may be called from any thread at any time and ends every write and every wait at once.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from understudy.errors import HypervisorError
from understudy_xen.coding import LARGEST_PIECE_BYTES, CodingFigures, Encoder
from understudy_xen.wire import Ack, Answers, Coding, Hello, Refusal

__all__ = ["Blackhole", "LinkOutlet", "Outlet", "ProgramOutlet"]

_PIPE_BYTES: Final = 1 << 20  # the most that an ordinary user may ask for
_RECEIVE_BYTES: Final = 4096
_END_S: Final = 2.0


class Outlet(ABC):
    """One way for a checkpoint stream.

    Args:
        acknowledges: Whether `acknowledged` means that the other side holds the checkpoint.
    """

    acknowledges: bool = False

    def __init__(self) -> None:
        self.reason = ""  #: why it was cut, ``""``: it is not

    @property
    @abstractmethod
    def fd(self) -> int:
        """The descriptor to write to, blocking."""

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`.

        Raises:
            HypervisorError: The stream is broken.
        """
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.fd, view) :]
        except OSError as broken:
            raise self._broken(broken) from broken

    @abstractmethod
    def acknowledged(self, count: int, timeout_s: float) -> Ack:
        """Wait until checkpoint `count`, written before, is acknowledged.

        Raises:
            HypervisorError: It was not: the stream is broken or cut, the receiver refused, or the time is over.
        """

    def cut(self, reason: str) -> None:
        """End the stream in the middle, whatever is under way. Idempotent."""
        self.reason = self.reason or reason

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Idempotent; waits for threads of its own, bounded."""

    def figures(self) -> CodingFigures | None:
        """Return what compression does, ``None`` where there is none."""
        return None

    def _broken(self, cause: object) -> HypervisorError:
        return HypervisorError(f"the checkpoint stream is broken: {self.reason or cause}")


class Blackhole(Outlet):
    """Nowhere: what ``xl remus -b`` does, to measure. Nothing is acknowledged by anybody."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)

    @property
    def fd(self) -> int:
        """``/dev/null``."""
        return self._fd

    def acknowledged(self, count: int, timeout_s: float) -> Ack:  # noqa: ARG002 - the contract's signature
        """Return at once, unless it is cut."""
        if self.reason:
            raise self._broken("")
        return Ack(count, 0, 0)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ProgramOutlet(Outlet):
    """A program that reads the stream, such as ``ssh beta xl migrate-receive -r -e``.

    It acknowledges nothing; a checkpoint counts as soon as it is written into the program's pipe, as with libxl.

    Args:
        command: Started in a process group of its own.

    Raises:
        HypervisorError: It cannot be started.
    """

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__()
        self.command = command
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
            )
        except OSError as failed:
            raise HypervisorError(f"{command[0]!r} could not be started: {failed}") from failed
        assert self.process.stdin is not None  # noqa: S101 - asked for above
        self._fd = self.process.stdin.fileno()

    @property
    def fd(self) -> int:
        """The program's standard input."""
        return self._fd

    def read_exactly(self, size: int, timeout_s: float) -> bytes:
        """Return the next `size` bytes of the program's output.

        Raises:
            HypervisorError: It ended, or did not say so much in time.
        """
        assert self.process.stdout is not None  # noqa: S101 - asked for
        fd, data, deadline = self.process.stdout.fileno(), b"", time.monotonic() + timeout_s
        while len(data) < size:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise HypervisorError(f"{self.command[0]!r} said only {data!r} within {timeout_s:g} s")
            more = os.read(fd, size - len(data))
            if not more:
                raise HypervisorError(f"{self.command[0]!r} ended after it said {data!r}")
            data += more
        return data

    def acknowledged(self, count: int, timeout_s: float) -> Ack:  # noqa: ARG002 - the contract's signature
        """Return at once if the program still runs."""
        if self.reason or self.process.poll() is not None:
            raise self._broken(f"{self.command[0]!r} has ended with status {self.process.returncode}")
        return Ack(count, 0, 0)

    def cut(self, reason: str) -> None:
        """Kill the program and what it started; the stream's writer sees a broken pipe."""
        super().cut(reason)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the stream, and kill the program if it does not end then."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.cut("closed")
            self.process.wait()


class LinkOutlet(Outlet):
    """The other agent, which acknowledges every checkpoint that it holds whole.

    Args:
        sock: Connected to it, blocking; owned from now on.
        compress: Cut the stream into pieces and compress them where it pays. Else libxc writes to the socket itself.
    """

    acknowledges = True

    def __init__(self, sock: socket.socket, *, compress: bool) -> None:
        super().__init__()
        self._sock = sock
        self._answers = Answers()
        self._seen: Ack | Refusal | None = None
        self._closed = False
        if sock.family in {socket.AF_INET, socket.AF_INET6}:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(True)  # noqa: FBT003 - its only argument
        self._encoder = Encoder() if compress else None
        self._pump: threading.Thread | None = None
        self._fd = sock.fileno()
        try:
            sock.sendall(Hello(Coding.ZSTD if compress else Coding.PLAIN).encode())
        except OSError as broken:
            sock.close()
            raise self._broken(broken) from broken
        if self._encoder is not None:
            source, self._fd = os.pipe2(os.O_CLOEXEC)
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            self._pump = threading.Thread(
                target=self._send_pieces, args=(source, self._encoder), name="xen: stream", daemon=True
            )
            self._pump.start()

    @property
    def fd(self) -> int:
        """The socket itself, or the pipe to the coder."""
        return self._fd

    def acknowledged(self, count: int, timeout_s: float) -> Ack:
        """Wait for the secondary's answer to checkpoint `count`."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while True:
            seen = self._seen
            if isinstance(seen, Refusal):
                raise HypervisorError(f"the secondary takes no further checkpoint: {seen.reason}")
            if seen is not None and seen.count >= count:
                return seen
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0 or not poll.poll(left_ms):
                raise HypervisorError(f"checkpoint {count} was not acknowledged within {timeout_s:g} s")
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except OSError as broken:
                raise self._broken(broken) from broken
            if not data or self.reason:
                raise self._broken("the secondary ended it")
            for answer in self._answers.feed(data):
                self._seen = answer

    def cut(self, reason: str) -> None:
        """Shut the connection down in both directions."""
        super().cut(reason)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut the connection, end the coder and close all descriptors."""
        if self._closed:
            return
        self._closed = True
        self.cut("closed")
        if self._pump is not None:
            os.close(self._fd)
            self._pump.join(_END_S)
        self._sock.close()

    def figures(self) -> CodingFigures | None:
        """Return what compression does."""
        return self._encoder.figures if self._encoder is not None else None

    def _send_pieces(self, source: int, encoder: Encoder) -> None:
        # Ends when nobody can write any more, or with the connection; the writer then sees a broken pipe.
        buffer = memoryview(bytearray(LARGEST_PIECE_BYTES))
        try:
            with suppress(OSError):
                while (length := os.readv(source, [buffer])) > 0:
                    header, body = encoder.encode(buffer[:length])
                    began_ns = time.perf_counter_ns()
                    self._sock.sendall(header, socket.MSG_MORE)
                    self._sock.sendall(body)
                    encoder.sent(len(header) + len(body), time.perf_counter_ns() - began_ns)
        finally:
            os.close(source)
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
