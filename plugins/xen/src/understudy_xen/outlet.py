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
import struct
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from understudy.errors import HypervisorError, PeerError
from understudy_xen.coding import LARGEST_PIECE_BYTES, CodingFigures, Encoder
from understudy_xen.wire import Ack, Answers, Coding, Hello, Refusal

__all__ = ["Blackhole", "LinkOutlet", "Outlet", "ProgramOutlet"]

_PIPE_BYTES: Final = 1 << 20  # the most that an ordinary user may ask for
_RECEIVE_BYTES: Final = 4096
_END_S: Final = 2.0
# tcpi_delivery_rate in struct tcp_info, include/uapi/linux/tcp.h; since Linux 4.9
_DELIVERY_RATE_AT: Final = 160
_DELIVERY_RATE: Final = struct.Struct("=Q")


class Outlet(ABC):
    """One way for a checkpoint stream.

    One thread writes and waits, `fd` included; `cut` and `figures` may be called from any. Whoever made it closes it
    when that thread has come back.

    Attributes:
        acknowledges: Whether `acknowledged` means that the other side holds the checkpoint.
    """

    acknowledges: bool = False

    def __init__(self) -> None:
        self.reason = ""  #: why it was cut, ``""``: it is not
        self._cutting = threading.Lock()

    @property
    @abstractmethod
    def fd(self) -> int:
        """The descriptor to write to, blocking; -1 when closed."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`.

        Raises:
            HypervisorError: The stream is broken or cut. Any part of `data` may have been written.
        """
        view = memoryview(data)
        try:
            while view:
                if self.reason:
                    raise self.broken("")
                view = view[os.write(self.fd, view) :]
        except OSError as broken:
            raise self.broken(broken) from broken

    @abstractmethod
    def acknowledged(self, count: int, timeout_s: float) -> Ack:
        """Wait until checkpoint `count`, written before, is acknowledged.

        Raises:
            HypervisorError: It was not: the stream is broken or cut, the receiver refused, or the time is over.
        """

    def cut(self, reason: str) -> None:
        """End the stream in the middle, whatever is under way. Idempotent; the first reason stays.

        Guarantees:
            A write or wait that is under way ends at once, every later one fails; none of them waits for the peer.
        """
        with self._cutting:
            self.reason = self.reason or reason

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Idempotent; waits for threads and programs of its own, bounded."""

    def figures(self) -> CodingFigures | None:
        """Return what compression does, ``None`` where there is none."""
        return None

    def broken(self, cause: object) -> HypervisorError:
        """Return the error for a write that failed: with the first cause that is known, not the last consequence.

        Whoever wrote to `fd` by other ways than `write` asks here why it failed.

        Args:
            cause: What the writer saw, told if nothing is known that came before it.
        """
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
            raise self.broken("")
        return Ack(count, 0, 0)

    def close(self) -> None:
        """Close the descriptor."""
        self.cut("closed")
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ProgramOutlet(Outlet):
    """A program that reads the stream, such as ``ssh beta xl migrate-receive -r -e``.

    It acknowledges nothing; a checkpoint counts as soon as it is written into the program's pipe, as with libxl.

    Args:
        command: Started in a process group of its own, which ends with the outlet.

    Raises:
        HypervisorError: It cannot be started.
    """

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__()
        self.command = command
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
            )
        except OSError as failed:
            raise HypervisorError(f"{command[0]!r} could not be started: {failed}") from failed
        assert self._process.stdin is not None  # noqa: S101 - asked for above
        assert self._process.stdout is not None  # noqa: S101 - likewise
        self._input, self._output = self._process.stdin, self._process.stdout

    @property
    def fd(self) -> int:
        """The program's standard input."""
        return -1 if self._input.closed else self._input.fileno()

    @property
    def pid(self) -> int:
        """Of the program, and of its process group."""
        return self._process.pid

    def read_exactly(self, size: int, timeout_s: float) -> bytes:
        """Return the next `size` bytes of the program's output.

        Raises:
            HypervisorError: It ended, or did not say so much in time, or the stream was cut.
        """
        data, deadline = b"", time.monotonic() + timeout_s
        while len(data) < size:
            if self.reason:
                raise self.broken("")
            poll = select.poll()
            poll.register(self._output, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise HypervisorError(f"{self.command[0]!r} said only {data!r} within {timeout_s:g} s")
            more = os.read(self._output.fileno(), size - len(data))
            if not more:
                raise self.broken(f"{self.command[0]!r} ended after it said {data!r}")
            data += more
        return data

    def acknowledged(self, count: int, timeout_s: float) -> Ack:  # noqa: ARG002 - the contract's signature
        """Return at once if the program still runs."""
        if self.reason or self._ended():
            raise self.broken("it has ended")
        return Ack(count, 0, 0)

    def cut(self, reason: str) -> None:
        """Kill the program and what it started; the stream's writer sees a broken pipe."""
        super().cut(reason)
        with self._cutting:
            # Until `close` collects the dead program its number, which is the group's, is nobody else's.
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def finish(self, timeout_s: float) -> int | None:
        """End the stream as planned, and give the program time for what it does then.

        Args:
            timeout_s: How much, seconds.

        Returns:
            Its exit status, negative for the signal that ended it; ``None`` if it still runs.

        Raises:
            HypervisorError: The stream was cut or closed before.
        """
        if self.reason or self._process.returncode is not None:
            raise self.broken("it is closed")
        self._input.close()
        deadline = time.monotonic() + timeout_s
        ended = os.pidfd_open(self._process.pid)
        try:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            poll.register(self._output, select.POLLIN)
            while ready := {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}:
                if ended in ready:
                    break
                # Nobody wants what it says, but a full pipe would hold it up.
                if not os.read(self._output.fileno(), _RECEIVE_BYTES):
                    poll.unregister(self._output)
        finally:
            os.close(ended)
        found = self._found()
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def close(self) -> None:
        """Close the stream, and kill what has not ended by itself soon after."""
        self._input.close()
        self._output.close()
        if self._process.returncode is not None:
            return
        ended = os.pidfd_open(self._process.pid)
        try:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            poll.poll(_END_S * 1000)
            self.cut("closed")
            poll.poll(_END_S * 1000)
        finally:
            os.close(ended)
        with self._cutting:
            self._process.poll()

    def broken(self, cause: object) -> HypervisorError:
        """Return the error for a write that failed: that the program has ended, if it has."""
        ended = self._ended()
        return super().broken(f"{self.command[0]!r} {ended}" if ended and not self.reason else cause)

    def _found(self) -> os.waitid_result | None:
        # Looks without collecting the dead, see `cut`.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def _ended(self) -> str:
        if self._process.returncode is not None:
            return "is closed"
        found = self._found()
        if found is None:
            return ""
        how = "with status" if found.si_code == os.CLD_EXITED else "by signal"
        return f"has ended {how} {found.si_status}"


class LinkOutlet(Outlet):
    """The other agent, which acknowledges every checkpoint that it holds whole.

    Args:
        sock: Connected to it; owned from now on, also when this fails.
        compress: Cut the stream into pieces and compress them where it pays. Else libxc writes to the socket itself.

    Raises:
        HypervisorError: The connection is broken.
    """

    acknowledges = True

    def __init__(self, sock: socket.socket, *, compress: bool) -> None:
        super().__init__()
        self._sock = sock
        self._reading = threading.Lock()
        self._answers = Answers()
        self._acked: Ack | None = None
        self._refusal: Refusal | None = None
        self._nonsense: PeerError | None = None
        self._pump_failure: Exception | None = None
        self._encoder = Encoder() if compress else None
        self._pump: threading.Thread | None = None
        self._fd = -1
        self._closed = False
        try:
            self._begin()
        except BaseException as failed:
            self.close()
            if isinstance(failed, OSError):
                raise HypervisorError(f"the checkpoint stream could not begin: {failed}") from failed
            raise

    def _begin(self) -> None:
        if self._sock.family in {socket.AF_INET, socket.AF_INET6}:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.setblocking(True)  # noqa: FBT003 - its only argument
        self._sock.sendall(Hello(Coding.PLAIN if self._encoder is None else Coding.ZSTD).encode())
        if self._encoder is None:
            self._fd = self._sock.fileno()
            return
        source, self._fd = os.pipe2(os.O_CLOEXEC)
        with suppress(OSError):  # a user's pipes have a limit together; a small one only takes more turns
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        pump = threading.Thread(
            target=self._send_pieces, args=(source, self._encoder), name="xen: stream", daemon=True
        )
        try:
            pump.start()
        except RuntimeError:
            os.close(source)
            raise
        self._pump = pump

    @property
    def fd(self) -> int:
        """The socket itself, or the pipe to the coder."""
        return self._fd

    def acknowledged(self, count: int, timeout_s: float) -> Ack:
        """Wait for the secondary's answer to checkpoint `count`."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self.reason:
                raise self.broken("")
            if self._acked is not None and self._acked.count >= count:
                if self._acked.count == count:
                    return self._acked
                raise self.broken(
                    f"the secondary acknowledges checkpoint {self._acked.count} before it was made"
                )
            if self._refusal is not None or self._nonsense is not None:
                raise self.broken(self._nonsense)
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0:
                raise HypervisorError(f"checkpoint {count} was not acknowledged within {timeout_s:g} s")
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            poll.poll(left_ms)
            try:
                if not self._read_answers():
                    raise self.broken("the secondary has closed it")
            except OSError as broken:
                raise self.broken(broken) from broken

    def cut(self, reason: str) -> None:
        """Shut the connection down in both directions."""
        super().cut(reason)
        with self._cutting, suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut the connection, end the coder and close all descriptors."""
        self.cut("closed")
        with self._cutting:
            if self._closed:
                return
            self._closed = True
        fd, self._fd = self._fd, -1
        if self._encoder is not None and fd >= 0:
            os.close(fd)
        if self._pump is not None:
            self._pump.join(_END_S)
        with self._cutting:
            self._sock.close()

    def figures(self) -> CodingFigures | None:
        """Return what compression does."""
        return self._encoder.figures if self._encoder is not None else None

    def broken(self, cause: object) -> HypervisorError:
        """Return the error for a write that failed: with the secondary's refusal, if it said one."""
        if not self.reason:
            # A refusal comes before the end of the connection: where a write failed because of it, it can be read.
            with suppress(OSError):
                self._read_answers()
        if self._refusal is not None:
            return HypervisorError(f"the secondary takes no further checkpoint: {self._refusal.reason}")
        return super().broken(self._nonsense or self._pump_failure or cause)

    def _read_answers(self) -> bool:
        # What is there, more than ever waits at a time; false at the end.
        with self._reading:
            try:
                data = self._sock.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            try:
                for answer in self._answers.feed(data):
                    if isinstance(answer, Ack):
                        self._acked = answer
                    else:
                        self._refusal = answer
            except PeerError as nonsense:
                self._nonsense = self._nonsense or nonsense
            return bool(data)

    def _send_pieces(self, source: int, encoder: Encoder) -> None:
        # Ends when nobody can write any more, or with the connection; the writer then sees a broken pipe.
        buffer = memoryview(bytearray(LARGEST_PIECE_BYTES))
        try:
            while (length := os.readv(source, [buffer])) > 0:
                header, body = encoder.encode(buffer[:length])
                size = len(header) + len(body)
                began_ns = time.perf_counter_ns()
                self._sock.sendall(header, socket.MSG_MORE)
                self._sock.sendall(body)
                took_ns = time.perf_counter_ns() - began_ns
                rate = _delivery_rate(self._sock)
                encoder.sent(size, size * 1_000_000_000 // rate if rate else took_ns)
        except Exception as failure:  # noqa: BLE001 - told to the writer, whatever it is
            self._pump_failure = failure
        finally:
            with self._cutting, suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes a wait; what has arrived can still be read
            os.close(source)


def _delivery_rate(sock: socket.socket) -> int:
    # Bytes a second as TCP sees them arrive, 0 if it does not know. How long a write takes says little: a checkpoint
    # that fits into the connection's buffer is written at once, however slow the link.
    if sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return 0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _DELIVERY_RATE_AT + _DELIVERY_RATE.size)
    if len(info) < _DELIVERY_RATE_AT + _DELIVERY_RATE.size:
        return 0  # an older kernel
    (rate,) = _DELIVERY_RATE.unpack_from(info, _DELIVERY_RATE_AT)
    return int(rate)
