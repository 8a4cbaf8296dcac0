"""The device that a copy has for its disk as long as it is no more than a copy: another content at every checkpoint.

The device keeps its name, its number and its size; what it is made of is changed by a table, in a fraction of a
millisecond and unseen by whoever has it open. That one must stand still meanwhile, and must not have gone through the
page cache, which would keep the former content.

Its name follows from DRBD's minor number: who comes after a crash of the agent finds it. Its node in ``/dev`` is the
kernel's own (devtmpfs), made here where there is none; nothing waits for udev.

Source: Linux drivers/md/dm-ioctl.c, do_resume; drivers/base/devtmpfs.c.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Final

from understudy.errors import StateError
from understudy_drbd.dm import Mapper, MapperRefused, Target
from understudy_drbd.thin import InUse

__all__ = ["CopyDevice", "remove_left", "usable_sectors"]

_PREFIX: Final = "understudy-drbd"


class CopyDevice:
    """The device of one disk of a copy. Its calls block; they may be made from several threads, one after the other.

    Args:
        mapper: The device mapper; stays the caller's.
        minor: Of the DRBD device that the disk is once the copy is the guest.

    Nothing is made before `make`.
    """

    def __init__(self, mapper: Mapper, minor: int) -> None:
        self._mapper = mapper
        self._sectors = 0
        self._failed = False
        self.name = f"{_PREFIX}{minor}"
        # A call whose caller was cancelled goes on in its thread; what undoes it must come after it.
        self._lock = threading.Lock()

    def make(self, first: Target, sectors: int) -> Path:
        """Make the device.

        Args:
            first: What it begins as.
            sectors: Its size for good, in sectors of 512 bytes.

        Returns:
            Where it is.

        Raises:
            MapperRefused: EBUSY when there is one already.

        Guarantees:
            After a failure there is none, unless there was one before.
        """
        with self._lock:
            number = self._mapper.create(self.name).number
            self._sectors = sectors
            path = _node(number)
            try:
                self._be(first)
                if not path.exists():
                    os.mknod(path, 0o600 | stat.S_IFBLK, number)
            except BaseException:
                self._mapper.remove(self.name)
                raise
            return path

    def show(self, target: Target) -> None:
        """Be the beginning of `target` from now on, under whoever has the device open.

        Raises:
            StateError: It is after `fail`.
        """
        with self._lock:
            if self._failed:
                raise StateError(f"{self.name}: no cut is put there any more")
            self._be(target)

    def fail(self) -> None:
        """Answer every access with an error, and let go of what the device was made of."""
        with self._lock:
            self._failed = True
            self._be(Target(0, self._sectors, "error"))

    def pass_through(self, number: int) -> None:
        """Be the block device of this number from now on."""
        with self._lock:
            self._be(Target(0, self._sectors, "linear", f"{os.major(number)}:{os.minor(number)} 0"))

    def remove(self) -> bool:
        """Remove the device, and its node where that was made by us.

        Returns:
            Whether it was there.

        Raises:
            InUse: Somebody has it open; it is as before.
            MapperRefused: The device mapper refuses.
        """
        with self._lock:
            try:
                number = self._mapper.status(self.name).number
                self._mapper.remove(self.name)
            except MapperRefused as error:
                if error.errno == errno.ENXIO:
                    return False
                if error.errno == errno.EBUSY:
                    raise InUse(f"{self.name} is open and cannot be removed") from error
                raise
            node = _node(number)
            if node.exists() and node.stat().st_rdev == number:
                node.unlink()
            return True

    def _be(self, target: Target) -> None:
        whole = Target(0, self._sectors, target.kind, target.parameters)
        self._mapper.swap(self.name, whole, private=True)


def remove_left(minor: int) -> bool:
    """Remove the device that an agent which died left behind; blocks.

    Args:
        minor: Of the DRBD device.

    Returns:
        Whether there was one.

    Raises:
        InUse: A guest still has it open.
        MapperRefused: The device mapper refuses.
    """
    try:
        mapper = Mapper()
    except MapperRefused:
        return False  # no device mapper, so no device of it
    with mapper:
        return CopyDevice(mapper, minor).remove()


def usable_sectors(number: int) -> int:
    """Return the size of a block device in sectors of 512 bytes, without opening it.

    A DRBD device that is secondary cannot be opened. It is smaller than the disk below it by its metadata.

    Args:
        number: As in ``st_rdev``.

    Raises:
        OSError: There is no such device.
    """
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size")
    return int(place.read_text(encoding="ascii"))


def _node(number: int) -> Path:
    return Path(f"/dev/dm-{os.minor(number)}")
