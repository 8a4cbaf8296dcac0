"""The network that joins the hosts of the Xen bed and a client: two network namespaces without a name.

A namespace lives as long as a file descriptor of it is open, here or in a process that was started in it: when this
process dies, by whatever signal, nothing of it is left, and no interface is ever seen in the machine's own namespace.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Self, TypeVar

__all__ = ["CLIENT", "Namespace", "Network"]

T = TypeVar("T")

CLONE_NEWNET: Final = 0x40000000  # <linux/sched.h>
CLIENT: Final = "10.9.0.100"  #: the client's address
COMMAND_S: Final = 20.0
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace without a name, its loopback up."""

    def __init__(self) -> None:
        self._fd = _in_thread(_unshare)
        self.run("ip", "link", "set", "lo", "up")

    def fileno(self) -> int:
        """Return a file descriptor of it, as setns(2) takes it."""
        return self._fd

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """Return the command that runs another in it; `fileno` must be among the files that the process inherits."""
        return ["nsenter", f"--net=/proc/self/fd/{self._fd}", *(str(word) for word in argv)]

    def run(self, *argv: str | Path, timeout_s: float = COMMAND_S) -> str:
        """Run a command in it and return what it wrote.

        Raises:
            OSError: it failed; the message is the command's.
            subprocess.TimeoutExpired: it did not end in time, and was killed.
        """
        done = subprocess.run(
            self.command(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            pass_fds=[self._fd],
        )
        if done.returncode:
            raise OSError(f"{' '.join(map(str, argv))!r} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def popen(self, *argv: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command in it; `options` are those of Popen."""
        return subprocess.Popen(self.command(argv), pass_fds=[self._fd], **options)

    def new_socket(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Return a new IPv4 socket in it, for this process."""

        def make() -> socket.socket:
            _enter(self._fd)
            return socket.socket(socket.AF_INET, kind)

        return _in_thread(make)

    def connect(self, host: str, port: int, timeout_s: float = COMMAND_S) -> socket.socket:
        """Return a TCP connection from it.

        Raises:
            OSError: there is no answer, or none in time.
        """
        connection = self.new_socket()
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(timeout_s)
            connection.connect((host, port))
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Let go of it; it is gone with the last process in it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Network:
    """A learning bridge with a port for each host, and a client behind one more port.

    Args:
        hosts: how many hosts.

    Guarantees:
        Nothing of it outlives `close` and the processes started in it.
    """

    def __init__(self, hosts: int) -> None:
        self.switch = Namespace()
        self.client = Namespace()
        try:
            self._join(hosts)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tap(self, number: int) -> str:
        """Return the name of a host's tap in the switch; hosts are numbered from 1."""
        return f"host{number}"

    def _join(self, hosts: int) -> None:
        ip = self.switch.run
        ip("ip", "link", "add", "switch", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        ip("ip", "link", "set", "switch", "up")
        for number in range(1, hosts + 1):
            ip("ip", "tuntap", "add", self.tap(number), "mode", "tap")
            ip("ip", "link", "set", self.tap(number), "master", "switch", "up")
        # The peer is made where the client is: by the file descriptor, for there is no name.
        fd = self.client.fileno()
        words = ["ip", "link", "add", "client", "type", "veth", "peer", "name", "eth0", "netns"]
        holder = self.client.popen(
            "sh", "-c", "echo; exec sleep 60", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        try:
            assert holder.stdout is not None
            holder.stdout.readline()  # it is there now: before that its namespace is still this process's
            ip(*words, str(holder.pid))
        finally:
            holder.kill()
            holder.communicate()
        assert fd >= 0
        ip("ip", "link", "set", "client", "master", "switch", "up")
        self.client.run("ip", "address", "add", f"{CLIENT}/24", "dev", "eth0")
        self.client.run("ip", "link", "set", "eth0", "up")

    def close(self) -> None:
        """Let go of both namespaces."""
        self.switch.close()
        self.client.close()


def _in_thread(work: Callable[[], T]) -> T:
    # A namespace belongs to a thread: one that enters another ends with its work.
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as problem:  # noqa: BLE001 - it is raised in the caller's thread
            result.set_exception(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result.result()


def _unshare() -> int:
    if _libc.unshare(CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
