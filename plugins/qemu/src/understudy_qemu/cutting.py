"""Cut connections that another process has accepted, without its help.

QEMU's NBD server waits for the rest of a request that it has read in part, and when it drains its disks for a
checkpoint it waits with its big lock held: no monitor answers, and ``yank`` knows no connections of a server. If the
other host died in the middle of a write, that would be for ever. So the connection is shut down from outside, through
a duplicate of QEMU's own descriptor.

Source: Linux pidfd_getfd(2); QEMU nbd/server.c, nbd_drained_poll.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import suppress

__all__ = ["cut_accepted"]

_PIDFD_GETFD = 438  # the same number on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def cut_accepted(pid: int, port: int) -> int:
    """Shut down all TCP connections that a process has on one of its own ports, its listening socket included.

    Args:
        pid: The process; a child of ours, or one that is known to be alive.
        port: The local port.

    Returns:
        How many sockets were shut down.

    Raises:
        OSError: The process is gone, or this program may not look into it (it needs CAP_SYS_PTRACE).
    """
    cut = 0
    for sock in _sockets(pid):
        with sock:
            if sock.family not in {socket.AF_INET, socket.AF_INET6} or sock.getsockname()[1] != port:
                continue
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            cut += 1
    return cut


def _sockets(pid: int) -> Iterator[socket.socket]:
    # Duplicates of the sockets of a process; one that is closed meanwhile is left out.
    pidfd = os.pidfd_open(pid)
    try:
        directory = f"/proc/{pid}/fd"
        # Plain calls: a takeover waits for this, and QEMU has many descriptors.
        for name in os.listdir(directory):  # noqa: PTH208
            with suppress(FileNotFoundError):
                if os.readlink(f"{directory}/{name}").startswith("socket:"):  # noqa: PTH115
                    duplicate = _duplicate(pidfd, int(name))
                    if duplicate >= 0:
                        yield socket.socket(fileno=duplicate)
    finally:
        os.close(pidfd)


def _duplicate(pidfd: int, number: int) -> int:
    duplicate: int = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if duplicate < 0 and ctypes.get_errno() == 1:
        raise PermissionError(1, os.strerror(1))
    return duplicate
