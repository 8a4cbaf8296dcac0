"""The device mapper by its ioctls: tables, suspension and messages, without a child process.

``dmsetup`` costs an exec for each step; these calls cost a fraction of a millisecond, so that a snapshot can be cut
while a guest is stopped. They block and belong into a thread. A device is named by its dm name or by its number
(``st_rdev``). Every refusal of the kernel is a `MapperRefused` with the ioctl, the device and the errno.

The buffer has 1024 bytes for a reason: up to that size `fcntl.ioctl` releases the interpreter's lock for the call. With
a larger one a suspension that waits for the disk would stop every other thread of the agent too.

Source: Linux include/uapi/linux/dm-ioctl.h, drivers/md/dm-ioctl.c; CPython Modules/fcntlmodule.c (IOCTL_BUFSZ).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from understudy.errors import UnderstudyError

__all__ = ["CONTROL", "SECTOR_BYTES", "Device", "Mapped", "Mapper", "MapperRefused", "Target"]

CONTROL: Final = Path("/dev/mapper/control")
SECTOR_BYTES: Final = 512  #: the device mapper counts in sectors, whatever the disk's own are

#: A device by its dm name, or by its number as in ``st_rdev``.
Device = str | int

_BUFFER_BYTES: Final = 1024
_VERSION: Final = (4, 0, 0)  # of the interface; the kernel takes every minor version up to its own

# struct dm_ioctl: version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name,
# uuid
_HEADER: Final = struct.Struct("=3I3Ii3IQ128s129s7x")
# struct dm_target_spec: sector_start, length, status, next, target_type
_TARGET: Final = struct.Struct("=QQiI16s")
_SECTOR: Final = struct.Struct("=Q")  # struct dm_target_msg, before its text

_NAMES: Final = {
    0: "DM_VERSION",
    3: "DM_DEV_CREATE",
    4: "DM_DEV_REMOVE",
    6: "DM_DEV_SUSPEND",
    7: "DM_DEV_STATUS",
    9: "DM_TABLE_LOAD",
    10: "DM_TABLE_CLEAR",
    12: "DM_TABLE_STATUS",
    14: "DM_TARGET_MSG",
}
_VERSION_CMD, _CREATE, _REMOVE, _SUSPEND, _STATUS, _LOAD, _CLEAR, _TABLE, _MESSAGE = _NAMES

_READONLY_FLAG: Final = 1 << 0
_SUSPEND_FLAG: Final = 1 << 1
_STATUS_TABLE_FLAG: Final = 1 << 4
_ACTIVE_FLAG: Final = 1 << 5
_INACTIVE_FLAG: Final = 1 << 6
_BUFFER_FULL_FLAG: Final = 1 << 8
_SKIP_LOCKFS_FLAG: Final = 1 << 10

# What libdevmapper tells udev's rules in the upper half of a cookie, for a device that is nobody else's business: no
# rules of subsystems, of disks or others, and this is what counts from now on. No semaphore is behind the cookie.
# Source: LVM2 libdm/libdevmapper.h, DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG and following.
_PRIVATE_COOKIE: Final = (0x02 | 0x04 | 0x08 | 0x40) << 16


class MapperRefused(UnderstudyError):
    """The device mapper refused a request; what the request was to change is as before.

    Args:
        ioctl: Name of the request, as in the kernel's header.
        device: The device it was about.
        number: The errno.
        detail: What else is known, such as the table that was to be loaded.
    """

    def __init__(self, ioctl: str, device: str, number: int, detail: str = "") -> None:
        about = f" ({detail})" if detail else ""
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"device mapper: {ioctl} of {device}{about}: {os.strerror(number)} [{name}]")
        self.ioctl = ioctl
        self.device = device
        self.errno = number


@dataclass(frozen=True, slots=True)
class Mapped:
    """What the device mapper tells of one device."""

    name: str
    uuid: str
    number: int  #: device number, as in ``st_rdev``
    open_count: int  #: how many hold it open
    suspended: bool
    read_only: bool
    has_table: bool  #: a table is active
    has_inactive_table: bool  #: one is loaded and takes effect at the next resume


@dataclass(frozen=True, slots=True)
class Target:
    """One line of a table, or of its status."""

    first_sector: int
    sectors: int  #: length in sectors of 512 bytes
    kind: str  #: name of the target, e.g. ``"thin"``
    parameters: str = ""

    def __str__(self) -> str:
        return f"{self.first_sector} {self.sectors} {self.kind} {self.parameters}".rstrip()


class Mapper:
    """The device mapper of this host. A context manager; its calls block.

    Args:
        control: Its control device.

    Raises:
        MapperRefused: There is none, it may not be opened, or it speaks another version of the interface.
    """

    def __init__(self, control: Path = CONTROL) -> None:
        try:
            self._fd = os.open(control, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MapperRefused("open", str(control), error.errno or 0) from error
        try:
            self.version = self._version()  #: of the kernel's interface: major, minor, patch level
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the control device. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _version(self) -> tuple[int, int, int]:
        answer = self._ioctl(_VERSION_CMD, "the control device")
        major, minor, patch = struct.unpack_from("=3I", answer)
        return major, minor, patch

    # --- Devices -----------------------------------------------------------------------------------------------------

    def create(self, name: str, uuid: str = "") -> Mapped:
        """Make a device without a table.

        Raises:
            MapperRefused: EBUSY when the name or the uuid is taken.
        """
        return _mapped(self._ioctl(_CREATE, name, uuid=uuid))

    def remove(self, device: Device) -> None:
        """Remove a device with its tables.

        Raises:
            MapperRefused: ENXIO when it does not exist, EBUSY while somebody holds it open.
        """
        self._ioctl(_REMOVE, device)

    def status(self, device: Device) -> Mapped:
        """Tell what there is of a device.

        Raises:
            MapperRefused: ENXIO when it is no device of the device mapper.
        """
        return _mapped(self._ioctl(_STATUS, device))

    def suspend(self, device: Device, *, freeze: bool = False) -> None:
        """Hold what comes from now on, and wait for what is under way; it blocks as long as the disk below.

        Args:
            device: Which.
            freeze: Whether a file system directly on it is asked to make itself whole first.

        Guarantees:
            Harmless when it is suspended already.
        """
        self._ioctl(_SUSPEND, device, flags=_SUSPEND_FLAG | (0 if freeze else _SKIP_LOCKFS_FLAG))

    def resume(self, device: Device, *, private: bool = False) -> None:
        """Make the table that was loaded the active one, if there is one, and let go what was held.

        Args:
            device: Which.
            private: Whether udev is told to leave the device alone: it would look for file systems, and LVM for
                volumes, whenever the device has become something else.
        """
        self._ioctl(_SUSPEND, device, cookie=_PRIVATE_COOKIE if private else 0)

    # --- Tables ------------------------------------------------------------------------------------------------------

    def load(self, device: Device, *targets: Target) -> None:
        """Load a table; it takes effect at the next `resume`.

        Raises:
            MapperRefused: EINVAL or what the target says of its parameters; no table is loaded then.
        """
        payload = bytearray()
        for target in targets:
            text = target.parameters.encode() + b"\0"
            text += bytes(-len(text) % 8)
            following = _TARGET.size + len(text)
            payload += _TARGET.pack(
                target.first_sector, target.sectors, 0, following, target.kind.encode("ascii")
            )
            payload += text
        told = "; ".join(map(str, targets))
        self._ioctl(_LOAD, device, payload=bytes(payload), count=len(targets), detail=told)

    def clear(self, device: Device) -> None:
        """Forget a table that was loaded and is not active."""
        self._ioctl(_CLEAR, device)

    def swap(self, device: Device, *targets: Target, private: bool = False) -> None:
        """Put another table in the place of the active one, under whoever holds the device open.

        What the device's users have under way is waited for; the loaded table is forgotten if that fails.

        Args:
            device: Which.
            targets: The table.
            private: As for `resume`.
        """
        self.load(device, *targets)
        try:
            self.resume(device, private=private)
        except MapperRefused:
            self.clear(device)
            raise

    def table(self, device: Device) -> tuple[Target, ...]:
        """Return the active table, empty if there is none."""
        return self._targets(device, _STATUS_TABLE_FLAG)

    def target_status(self, device: Device) -> tuple[Target, ...]:
        """Return what each target of the active table says of itself."""
        return self._targets(device, 0)

    def message(self, device: Device, text: str, *, sector: int = 0) -> None:
        """Tell the target at `sector` something, such as ``create_snap 7 0`` to a thin pool.

        Raises:
            MapperRefused: With the target's errno.
        """
        payload = _SECTOR.pack(sector) + text.encode("ascii") + b"\0"
        self._ioctl(_MESSAGE, device, payload=payload, detail=text)

    # --- Private -----------------------------------------------------------------------------------------------------

    def _targets(self, device: Device, flags: int) -> tuple[Target, ...]:
        answer = self._ioctl(_TABLE, device, flags=flags)
        header = _HEADER.unpack_from(answer)
        start, count = header[4], header[5]
        targets = []
        at = start
        for _ in range(count):
            first, sectors, _status, following, kind = _TARGET.unpack_from(answer, at)
            text = answer[at + _TARGET.size : start + following]
            targets.append(Target(first, sectors, _text(kind), _text(text)))
            at = start + following  # it counts from the first one here, unlike in a table that is loaded
        return tuple(targets)

    def _ioctl(
        self,
        command: int,
        device: Device,
        *,
        uuid: str = "",
        flags: int = 0,
        cookie: int = 0,
        payload: bytes = b"",
        count: int = 0,
        detail: str = "",
    ) -> bytes:
        if self._fd < 0:
            raise MapperRefused(_NAMES[command], _told(device), errno.EBADF, detail)
        if _HEADER.size + len(payload) > _BUFFER_BYTES:
            raise MapperRefused(_NAMES[command], _told(device), errno.E2BIG, detail)
        name = "" if command == _VERSION_CMD or isinstance(device, int) else device
        number = _kernel_number(device) if isinstance(device, int) else 0
        buffer = bytearray(_BUFFER_BYTES)
        _HEADER.pack_into(
            buffer,
            0,
            *_VERSION,
            _BUFFER_BYTES,
            _HEADER.size,
            count,
            0,
            flags,
            cookie,  # in the field of the event number
            0,
            number,
            name.encode(),
            uuid.encode(),
        )
        buffer[_HEADER.size : _HEADER.size + len(payload)] = payload
        try:
            # _IOWR(0xfd, command, struct dm_ioctl)
            fcntl.ioctl(self._fd, 0xC000_FD00 | _HEADER.size << 16 | command, buffer)
        except OSError as error:
            raise MapperRefused(_NAMES[command], _told(device), error.errno or 0, detail) from error
        if _HEADER.unpack_from(buffer)[7] & _BUFFER_FULL_FLAG:
            raise MapperRefused(_NAMES[command], _told(device), errno.ENOBUFS, detail)
        return bytes(buffer)


def _mapped(answer: bytes) -> Mapped:
    *_, opened, flags, _event, _padding, number, name, uuid = _HEADER.unpack_from(answer)
    return Mapped(
        name=_text(name),
        uuid=_text(uuid),
        number=_own_number(number),
        open_count=opened,
        suspended=bool(flags & _SUSPEND_FLAG),
        read_only=bool(flags & _READONLY_FLAG),
        has_table=bool(flags & _ACTIVE_FLAG),
        has_inactive_table=bool(flags & _INACTIVE_FLAG),
    )


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="replace")


def _told(device: Device) -> str:
    return f"{os.major(device)}:{os.minor(device)}" if isinstance(device, int) else device


# Source: Linux include/linux/kdev_t.h (new_encode_dev): not the C library's way.
def _kernel_number(number: int) -> int:
    major, minor = os.major(number), os.minor(number)
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def _own_number(number: int) -> int:
    return os.makedev(number >> 8 & 0xFFF, (number & 0xFF) | (number >> 12 & 0xFFF00))
