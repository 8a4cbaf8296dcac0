"""Other toolstacks that begin to save a domain which is being protected: seen before they can do harm, and ended.

libxc finds the pages that a guest writes by one list in the hypervisor, which knows no owner: each reading empties it.
A second save of the same domain (`xl save`, `xl migrate`, `xl remus`, libvirt's) finds the mode on, turns it off and on
again, and reads what the checkpoints were to read. Neither side gets an error, and both copies lack pages. So a
checkpoint must not become whole once such a save has begun, and the save must not go on: it has lost pages, too.

All of them have libxl run ``libxl-save-helper --save-domain``, a program of its own. The kernel tells of every exec, at
once and in order: whoever asks after a checkpoint's pages were read is told of every helper that can have read them.

Source: tools/libs/guest/xg_sr_save.c (enable_logdirty, cleanup), tools/libs/light/libxl_save_callout.c of Xen 4.17;
Linux include/uapi/linux/cn_proc.h, drivers/connector/cn_proc.c.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["Savers", "saved_by", "saves"]

_log = logging.getLogger(__name__)

_HELPER: Final = b"libxl-save-helper"
_SAVE: Final = b"--save-domain"
_PROC: Final = Path("/proc")

# linux/netlink.h, linux/connector.h, linux/cn_proc.h
_NETLINK_CONNECTOR: Final = 11
_CN_IDX_PROC: Final = 1
_CN_VAL_PROC: Final = 1
_LISTEN: Final = 1  # PROC_CN_MCAST_LISTEN
_EXEC: Final = 2  # PROC_EVENT_EXEC
_NLMSG_DONE: Final = 3
_HEAD: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_CONNECTOR: Final = struct.Struct("=IIIIHH")  # struct cn_msg
_EVENT: Final = struct.Struct(
    "=IIQII"
)  # struct proc_event: what, cpu, timestamp_ns; exec: process_pid, process_tgid
_RECEIVE_BYTES: Final = 1 << 20
_MESSAGE_BYTES: Final = 4096


def saves(command: bytes, domid: int) -> bool:
    """Tell whether a command line, as ``/proc/PID/cmdline`` has it, is that of a helper which saves a domain.

    Args:
        command: The words, a NUL behind each.
        domid: The domain.

    Source: tools/libs/light/libxl_save_callout.c (libxl__xc_domain_save): ``--save-domain FD FD DOMID …``.
    """
    match command.split(b"\0"):
        case [program, what, _, _, number, *_]:
            is_helper = program.rpartition(b"/")[2] == _HELPER and what == _SAVE
            return is_helper and number == str(domid).encode()
    return False


def saved_by(domid: int, *, proc: Path = _PROC) -> int:
    """Return the number of a helper that saves a domain now, 0 if there is none."""
    for entry in os.scandir(proc):
        if entry.name.isdecimal():
            with suppress(OSError):
                if saves((proc / entry.name / "cmdline").read_bytes(), domid):
                    return int(entry.name)
    return 0


class Savers:
    """Looks out for helpers that save one domain. May be asked from any thread.

    Args:
        domid: The domain.
        seen: Called once, in the thread that finds the first one, before the helper is ended.
        proc: Where the kernel tells of processes.

    Without the kernel's connector (it needs CAP_NET_ADMIN in the first network namespace) all processes are looked at
    each time.
    """

    def __init__(self, domid: int, seen: Callable[[str], None], *, proc: Path = _PROC) -> None:
        self._domid = domid
        self._seen = seen
        self._proc = proc
        self._lock = threading.Lock()
        self._told = _listen()
        self._all = True  # some may have begun before anybody told of them
        self.found = ""  #: who saves the domain, a sentence; ``""``: nobody has been seen

    def fileno(self) -> int:
        """Return the file descriptor that is readable when a process has begun, -1 where the kernel does not tell."""
        return -1 if self._told is None else self._told.fileno()

    def look(self) -> str:
        """Look for helpers, and end those that are found.

        Returns:
            Who saves the domain or has begun to, one clause; ``""`` if nobody has since this object was made.
        """
        with self._lock:
            for pid in self._candidates():
                self._judge(pid)
            return self.found

    def close(self) -> None:
        """Look no more. Idempotent."""
        with self._lock:
            told, self._told = self._told, None
            if told is not None:
                told.close()

    def _judge(self, pid: int) -> None:
        place = self._proc / str(pid)
        try:
            # The same process is judged and ended, whatever happens to its number.
            process = os.pidfd_open(pid)
        except OSError:
            return
        try:
            if place.stat().st_uid == os.getuid() and saves((place / "cmdline").read_bytes(), self._domid):
                self._end(pid, process)
        except OSError:
            return
        finally:
            os.close(process)

    def _end(self, pid: int, process: int) -> None:
        if not self.found:
            self.found = (
                f"another toolstack has begun to save domain {self._domid} (libxl-save-helper, pid {pid}): it takes "
                "pages that the checkpoints need"
            )
            self._seen(self.found)
        _log.error("%s; the helper is ended", self.found)
        signal.pidfd_send_signal(process, signal.SIGKILL)

    def _candidates(self) -> Iterator[int]:
        if self._told is not None:
            begun, whole = _drain(self._told)
            yield from begun
            if whole and not self._all:
                return
        self._all = self._told is None
        for entry in os.scandir(self._proc):
            if entry.name.isdecimal():
                yield int(entry.name)


def _listen() -> socket.socket | None:
    try:
        told = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _NETLINK_CONNECTOR)
    except OSError:
        return None
    try:
        with suppress(OSError):
            told.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        told.bind((0, _CN_IDX_PROC))
        word = struct.pack("=I", _LISTEN)
        connector = _CONNECTOR.pack(_CN_IDX_PROC, _CN_VAL_PROC, 0, 0, len(word), 0) + word
        told.send(_HEAD.pack(_HEAD.size + len(connector), _NLMSG_DONE, 0, 0, 0) + connector)
    except OSError as error:
        told.close()
        _log.info("the kernel does not tell of new processes (%s): all are looked at", error)
        return None
    return told


def _drain(told: socket.socket) -> tuple[list[int], bool]:
    # The processes that have begun, and whether that is all of them.
    begun: list[int] = []
    whole = True
    while True:
        try:
            message = told.recv(_MESSAGE_BYTES)
        except BlockingIOError:
            return begun, whole
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                return begun, False
            whole = False  # some were dropped
            continue
        at = _HEAD.size + _CONNECTOR.size
        if len(message) >= at + _EVENT.size:
            what, _, _, _, tgid = _EVENT.unpack_from(message, at)
            if what == _EXEC:
                begun.append(tgid)
