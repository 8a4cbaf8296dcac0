"""Which processes begin to execute one program: told by the kernel at each exec, before the program's first step.

fanotify tells of each file in a directory that is opened to be executed; nothing is told of other programs, and nobody
is woken for them. The directory is watched, not the file, because a package that is upgraded puts another one in its
place.

Source: fanotify_init(2), fanotify_mark(2), fanotify(7); Linux 6.1 include/uapi/linux/fanotify.h and fs/exec.c
(do_open_execat), fs/notify/fanotify/fanotify_user.c (fanotify_read).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["Execs"]

# linux/fanotify.h
_CLOEXEC: Final = 0x01
_NONBLOCK: Final = 0x02
_UNLIMITED_QUEUE: Final = 0x10
_MARK_ADD: Final = 0x01
_OPEN_EXEC: Final = 0x1000
_ON_CHILD: Final = 0x08000000
_EVENT: Final = struct.Struct("=IBBHQii")  # event_len, vers, reserved, metadata_len, mask, fd, pid
_AT_FDCWD: Final = -100


class Execs:
    """Tells which processes begin to execute a program. Not for two threads at once.

    Args:
        program: Its file name.
        directories: Where it may be.

    Raises:
        OSError: The kernel does not tell this process; it needs CAP_SYS_ADMIN.
    """

    def __init__(self, program: str, directories: Iterable[Path]) -> None:
        self._program = program
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.fanotify_mark.argtypes = (
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint64,
            ctypes.c_int,
            ctypes.c_char_p,
        )
        flags = _CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE
        self._fd = self._call("fanotify_init", flags, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for directory in directories:
                what = _OPEN_EXEC | _ON_CHILD
                self._call("fanotify_mark", self._fd, _MARK_ADD, what, _AT_FDCWD, os.fsencode(directory))
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the file descriptor that is readable when there is something to tell."""
        return self._fd

    def begun(self) -> Iterator[int]:
        """Yield the processes that have begun to execute the program since the last call, without waiting.

        One may not have got as far as to look like it yet; or it may have ended already, or have failed to execute it.
        0 stands for one that this process cannot see.

        Raises:
            OSError: The kernel could not tell of one, e.g. because no more files may be open, and has forgotten it.
        """
        while True:
            # One at a time: behind another one, what the kernel cannot tell of is forgotten without a word.
            try:
                event = os.read(self._fd, _EVENT.size)
            except BlockingIOError:
                return
            *_, fd, pid = _EVENT.unpack(event)
            if fd < 0 or self._is_program(fd):
                yield pid

    def close(self) -> None:
        """Be told no more. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _is_program(self, fd: int) -> bool:
        try:
            # A file that was removed since has a remark behind its name.
            with suppress(OSError):
                return Path(f"/proc/self/fd/{fd}").readlink().name.split(" ")[0] == self._program
            return True
        finally:
            os.close(fd)

    def _call(self, function: str, *arguments: int | bytes) -> int:
        ctypes.set_errno(0)
        result = int(getattr(self._libc, function)(*arguments))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{function}: {os.strerror(code)}")
        return result
