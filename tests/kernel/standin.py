"""A character device that answers the ioctls of DRBD's Remus fork: a stand-in, made with CUSE.

It follows what the fork's source does, not what was seen of it: the fork runs on no kernel of today. The ioctls are
real ones of the kernel's, from the system call to the answer, which may be late or never come.

Source: Linux fs/fuse/cuse.c, include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import time
from pathlib import Path

from tests.kernel.thinpool import run

NAME = "drbd-stand-in"
_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_IOCTL = struct.Struct("=QIIQII")
_INIT, _OPEN, _RELEASE, _INTERRUPT, _DO_IOCTL = 4096, 14, 18, 36, 39


class StandIn:
    """The device's state, changed by tests, and its server; it is there until the process ends."""

    def __init__(self) -> None:
        self.path = Path("/dev") / NAME
        self._late: list[int] = []
        self.waiting = threading.Event()  #: somebody waits for an acknowledgement
        self.renew()
        run("modprobe", "cuse")
        self._fd = os.open("/dev/cuse", os.O_RDWR)
        threading.Thread(target=self._serve, daemon=True).start()
        number = Path(f"/sys/class/cuse/{NAME}/dev")
        until = time.monotonic() + 10
        while not number.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        if not self.path.exists():
            major, minor = map(int, number.read_text().split(":"))
            os.mknod(self.path, 0o600 | stat.S_IFCHR, os.makedev(major, minor))

    def renew(self) -> None:
        """Be as at the beginning; who still waits is answered."""
        self.protocol = "D"
        self.connected = True
        self.written = True  #: whether there were writes since the last barrier
        self.answers = True  #: whether the secondary acknowledges at once
        self.calls: list[int] = []
        self.acknowledge()
        self.waiting.clear()

    def acknowledge(self, error: int = 0) -> None:
        """Answer everybody who waits."""
        for unique in self._late:
            self._answer(unique, error, struct.pack("=iIII", 0, 0, 0, 0))
        self._late.clear()

    def _serve(self) -> None:
        while True:
            request = os.read(self._fd, 1 << 17)
            _, opcode, unique, *_ = _IN.unpack_from(request)
            if opcode == _INIT:
                reply = struct.pack("=8I40x", 7, 31, 0, 0, 4096, 4096, 0, 0)
                self._answer(unique, 0, reply + f"DEVNAME={NAME}\0".encode())
            elif opcode == _OPEN:
                self._answer(unique, 0, struct.pack("=QII", 0, 0, 0))
            elif opcode == _DO_IOCTL:
                self._ioctl(unique, _IOCTL.unpack_from(request, _IN.size)[2])
            elif opcode != _INTERRUPT:
                self._answer(unique, 0, b"")

    def _ioctl(self, unique: int, command: int) -> None:
        self.calls.append(command)
        error, result = 0, 0
        if self.protocol != "D":
            error = errno.EINVAL
        elif not self.connected:
            error = errno.EPROTO
        elif command == 20:
            result, self.written = 0 if self.written else 1, False
        elif command == 30 and not self.answers:
            self._late.append(unique)
            self.waiting.set()
            return
        self._answer(unique, error, struct.pack("=iIII", result, 0, 0, 0))

    def _answer(self, unique: int, error: int, data: bytes) -> None:
        data = b"" if error else data
        os.write(self._fd, _OUT.pack(_OUT.size + len(data), -error, unique) + data)
