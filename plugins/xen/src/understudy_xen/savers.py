"""Other toolstacks that begin to save a domain which is being protected: seen before they can do harm, and ended.

libxc finds the pages that a guest writes by one list in the hypervisor, which knows no owner: each reading empties it.
A second save of the same domain (`xl save`, `xl migrate`, `xl remus`, libvirt's) finds the mode on, turns it off and on
again, and reads what the checkpoints were to read. Neither side gets an error, and both copies lack pages. So a
checkpoint must not become whole once such a save has begun, and the save must not go on: it has lost pages, too.

All of them have libxl run ``libxl-save-helper --save-domain``, a program of its own. The kernel tells of every exec of
that program before its first step (execs.py): whoever asks after a checkpoint's pages were read is told of every helper
that can have read them. One that has ended before it was seen for which domain it worked is taken for one that has.

Source: tools/libs/guest/xg_sr_save.c (enable_logdirty, cleanup), tools/libs/light/libxl_save_callout.c of Xen 4.17.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from understudy_xen.execs import Execs

__all__ = ["Savers", "helper_directories", "restored_by", "saved_by", "saves"]

_log = logging.getLogger(__name__)

_HELPER: Final = b"libxl-save-helper"
_SAVE: Final = b"--save-domain"
_RESTORE: Final = b"--restore-domain"
_PROC: Final = Path("/proc")

#: Xen's private programs. Source: config/Paths.mk.in (LIBEXEC_BIN); Debian has a directory for each version of Xen.
_PLACES: Final = ("usr/lib*/xen*/bin", "usr/local/lib*/xen*/bin")
_COMM_BYTES: Final = 15  # of a program's name, TASK_COMM_LEN without the NUL


def saves(command: bytes, domid: int) -> bool:
    """Tell whether a command line, as ``/proc/PID/cmdline`` has it, is that of a helper which saves a domain.

    Args:
        command: The words, a NUL behind each.
        domid: The domain.

    Source: tools/libs/light/libxl_save_callout.c (libxl__xc_domain_save): ``--save-domain FD FD DOMID …``.
    """
    return _does(command, _SAVE, domid)


def saved_by(domid: int, *, proc: Path = _PROC) -> int:
    """Return the number of a helper that saves a domain now, 0 if there is none."""
    return _at_work(_SAVE, domid, proc)


def restored_by(domid: int, *, proc: Path = _PROC) -> int:
    """Return the number of a helper that fills a domain from a stream now, 0 if there is none.

    Source: tools/libs/light/libxl_save_callout.c (libxl__xc_domain_restore): ``--restore-domain FD FD DOMID …``.
    """
    return _at_work(_RESTORE, domid, proc)


def _at_work(what: bytes, domid: int, proc: Path) -> int:
    for pid in _processes(proc):
        with suppress(OSError):
            if _does((proc / str(pid) / "cmdline").read_bytes(), what, domid):
                return pid
    return 0


def _does(command: bytes, what: bytes, domid: int) -> bool:
    match command.split(b"\0"):
        case [program, asked, _, _, number, *_]:
            is_helper = program.rpartition(b"/")[2] == _HELPER and asked == what
            return is_helper and number == str(domid).encode()
    return False


def helper_directories(root: Path = Path("/")) -> list[Path]:
    """Return where this host has the helper."""
    return [
        place for pattern in _PLACES for place in root.glob(pattern) if (place / _HELPER.decode()).exists()
    ]


@dataclass(frozen=True, slots=True)
class _Begun:
    # A process that has begun to execute the helper, but does not look like it yet.
    pid: int
    process: int  # its pidfd: whatever happens to the number
    uid: int


class Savers:
    """Looks out for helpers that save one domain. May be asked from any thread.

    Args:
        domid: The domain.
        seen: Called once, in the thread that finds the first one, before the helper is ended.
        proc: Where the kernel tells of processes.
        directories: Where the helper is, ``None`` for `helper_directories`.

    Where the kernel does not tell (it needs CAP_SYS_ADMIN), or where the helper is, is not known, all processes are
    looked at each time, and one that came and went between two looks is missed.
    """

    def __init__(
        self,
        domid: int,
        seen: Callable[[str], None],
        *,
        proc: Path = _PROC,
        directories: Iterable[Path] | None = None,
    ) -> None:
        self._domid = domid
        self._seen = seen
        self._proc = proc
        self._lock = threading.Lock()
        self._execs = _execs([*(helper_directories() if directories is None else directories)])
        self._closed = False
        self._first = True  # some may have begun before anybody told of them
        self._begun: list[_Begun] = []
        self.found = ""  #: who saves the domain, a sentence; ``""``: nobody has been seen

    def fileno(self) -> int:
        """Return the file descriptor that is readable when a helper begins, -1 where the kernel does not tell."""
        return -1 if self._execs is None else self._execs.fileno()

    @property
    def waiting(self) -> bool:
        """Whether one has begun of which the next look may say more."""
        return bool(self._begun)

    def look(self) -> str:
        """Look for helpers, and end those that are found; closed, only tell what was found before.

        Returns:
            Who saves the domain or has begun to, one clause; ``""`` if nobody has since this object was made.
        """
        with self._lock:
            if self._closed:
                return self.found
            if self._execs is not None:
                try:
                    for pid in self._execs.begun():
                        self._take(pid)
                except OSError as error:
                    self._tell(
                        f"another toolstack may have begun to save domain {self._domid}: the kernel could not tell of "
                        f"a libxl-save-helper ({error})"
                    )
            if self._first or self._execs is None:
                self._scan()
            if self._begun:
                self._begun = [begun for begun in self._begun if not self._is_told(begun)]
            return self.found

    def close(self) -> None:
        """Look no more. Idempotent.

        Guarantees:
            Whoever saves the domain from now on is left alone, also if somebody still asks.
        """
        with self._lock:
            self._closed = True
            execs, self._execs = self._execs, None
            if execs is not None:
                execs.close()
            for begun in self._begun:
                os.close(begun.process)
            self._begun = []

    def _take(self, pid: int) -> None:
        try:
            process = os.pidfd_open(pid)
        except OSError:
            self._missed(pid)
            return
        try:
            uid = (self._proc / str(pid)).stat().st_uid
        except OSError:
            uid = os.getuid()
        self._begun.append(_Begun(pid, process, uid))

    def _is_told(self, begun: _Begun) -> bool:
        # Whether nothing more can be learnt of it. It is closed then.
        done = begun.uid != os.getuid()  # it may not use the hypervisor
        if not done:
            command = b""
            with suppress(OSError):
                command = (self._proc / str(begun.pid) / "cmdline").read_bytes()
            done = _is_helper(command)
            if done and saves(command, self._domid):
                self._end(begun.pid, begun.process)
            elif not done and _has_ended(begun.process):
                self._missed(begun.pid)
                done = True
        if done:
            os.close(begun.process)
        return done

    def _scan(self) -> None:
        for pid in _processes(self._proc):
            place = self._proc / str(pid)
            with suppress(OSError):
                command = (place / "cmdline").read_bytes()
                if saves(command, self._domid):
                    self._judge(pid, place)
                elif not command and not self._first and self._is_dead_helper(place):
                    self._missed(pid)
        self._first = False

    def _judge(self, pid: int, place: Path) -> None:
        process = os.pidfd_open(pid)
        try:
            # Again: the same process is judged and ended, whatever happened to its number.
            if place.stat().st_uid == os.getuid() and saves((place / "cmdline").read_bytes(), self._domid):
                self._end(pid, process)
        finally:
            os.close(process)

    @staticmethod
    def _is_dead_helper(place: Path) -> bool:
        comm = (place / "comm").read_bytes().rstrip(b"\n")
        return comm == _HELPER[:_COMM_BYTES] and place.stat().st_uid == os.getuid()

    def _end(self, pid: int, process: int) -> None:
        self._tell(
            f"another toolstack has begun to save domain {self._domid} (libxl-save-helper, pid {pid}): it takes pages "
            "that the checkpoints need"
        )
        _log.error("the libxl-save-helper %d is ended", pid)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)

    def _missed(self, pid: int) -> None:
        self._tell(
            f"another toolstack may have begun to save domain {self._domid}: a libxl-save-helper (pid {pid}) came and "
            "went before it was seen for which domain, and may have taken pages that the checkpoints need"
        )

    def _tell(self, found: str) -> None:
        _log.error("%s", found)
        if not self.found:
            self.found = found
            self._seen(found)


def _execs(directories: list[Path]) -> Execs | None:
    if directories:
        try:
            return Execs(_HELPER.decode(), directories)
        except OSError as error:
            _log.info("the kernel does not tell of new processes (%s): all are looked at", error)
    return None


def _processes(proc: Path) -> list[int]:
    return [int(place.name) for place in proc.iterdir() if place.name.isdecimal()]


def _has_ended(process: int) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(0))


def _is_helper(command: bytes) -> bool:
    return command.partition(b"\0")[0].rpartition(b"/")[2] == _HELPER
