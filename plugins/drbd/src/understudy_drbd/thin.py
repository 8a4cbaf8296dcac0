"""A thin volume, and snapshots of it as points to roll back to.

A *cut* is a snapshot of the volume as it is between two writes: suspended, snapshot, resumed, in one go and in one
thread, because a volume that stays suspended stops whoever writes to it. A *rollback* makes the volume what it was at
a cut, under its own thin id and its own name: whatever the site wrote into its configuration about it stays true, also
after a reboot.

::

    pool    id 7                  the volume             id 7 = content of the cut
             +-- id 0xE0001D      cut of epoch n-1  ==>
             +-- id 0xE0001E      cut of epoch n

The ids of a volume's cuts follow from its own: nobody else's are touched, none has to be remembered anywhere, and who
comes after a crash of the agent finds them all (`ThinVolume.clear`). A slot is used again only after its snapshot is
gone: the pool itself refuses to make it twice.

The pool writes its metadata out with every message, so a cut that was answered outlives the host.

Source: Linux Documentation/admin-guide/device-mapper/thin-provisioning.rst, drivers/md/dm-thin.c (pool_message).
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from understudy.errors import StateError, UnderstudyError
from understudy_drbd.dm import Mapper, MapperRefused, Target

__all__ = [
    "CUTS",
    "FIRST_CUT_ID",
    "MAX_VOLUME_ID",
    "InUse",
    "NotThin",
    "PoolState",
    "ThinVolume",
    "read_pool_status",
]

FIRST_CUT_ID: Final = 0xE0_0000  #: thin ids from here on (of 24 bits) are cuts; LVM counts upwards from 1
_SLOTS: Final = 4  # ids per volume; a power of two
CUTS: Final = 3  #: how many cuts there may be at a time: the committed one, the held one, the one being made
MAX_VOLUME_ID: Final = (0x100_0000 - FIRST_CUT_ID) // _SLOTS - 1  #: of a volume whose cuts have ids

_THIN_PARAMETERS: Final = 2  # pool, id; a third one is an external origin


class InUse(StateError):
    """Somebody has the volume open; nothing was changed."""


class NotThin(UnderstudyError):
    """A device cannot be rolled back as it stands.

    Args:
        path: The device.
        reason: Completes the sentence "it cannot be rolled back, because …".
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be rolled back: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a thin pool says of itself."""

    used_data_blocks: int
    total_data_blocks: int
    used_metadata_blocks: int
    total_metadata_blocks: int
    writable: bool  #: it takes writes and cuts
    trouble: str  #: what is wrong with it, in the kernel's words; empty if nothing is

    @property
    def fill_ratio(self) -> float:
        """How full it is, 0 to 1, of data or of metadata, whichever is fuller."""
        return max(
            self.used_data_blocks / self.total_data_blocks,
            self.used_metadata_blocks / self.total_metadata_blocks,
        )


class ThinVolume:
    """A thin volume and its cuts. Its calls block; they may be made from several threads, one after the other.

    Args:
        mapper: The device mapper; stays the caller's.
        name: The volume's dm name.
        number: Its device number.
        pool: Device number of its pool, as in a table, e.g. ``"254:0"``.
        identity: Its thin id.
        sectors: Its size in sectors of 512 bytes.

    Make one with `find`.
    """

    def __init__(
        self, mapper: Mapper, name: str, number: int, pool: str, identity: int, sectors: int
    ) -> None:
        self._mapper = mapper
        self.name = name
        self.number = number
        self.pool = pool
        self.identity = identity
        self.sectors = sectors
        self._pool_number = _number(pool)
        # A call whose caller was cancelled goes on in its thread; what undoes it must come after it.
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def find(cls, mapper: Mapper, path: Path) -> Self:
        """Return the thin volume that the block device at `path` is.

        Raises:
            NotThin: It is something else, and what.
            MapperRefused: The device mapper does not tell.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise NotThin(path, f"it cannot be looked at: {error.strerror}") from error
        if not stat.S_ISBLK(found.st_mode):
            raise NotThin(path, "it is no block device")
        try:
            table = mapper.table(found.st_rdev)
            name = mapper.status(found.st_rdev).name
        except MapperRefused as error:
            if error.errno != errno.ENXIO:
                raise
            raise NotThin(path, "it is no device of the device mapper") from None
        if len(table) != 1 or table[0].kind != "thin":
            kinds = ", ".join(dict.fromkeys(each.kind for each in table)) or "nothing"
            raise NotThin(path, f"the device mapper makes it of {kinds}, not of one thin volume")
        [target] = table
        parameters = target.parameters.split()
        if len(parameters) != _THIN_PARAMETERS:
            raise NotThin(path, f"it has an external origin ({parameters[-1]})")
        pool, identity = parameters[0], int(parameters[1])
        if identity > MAX_VOLUME_ID:
            raise NotThin(path, f"its thin id {identity} leaves none for cuts (at most {MAX_VOLUME_ID})")
        return cls(mapper, name, found.st_rdev, pool, identity, target.sectors)

    def cut_id(self, epoch: int) -> int:
        """Return the thin id of the cut of `epoch`."""
        return self._slot(epoch % CUTS)

    def _slot(self, number: int) -> int:
        return FIRST_CUT_ID + self.identity * _SLOTS + number

    # --- Cuts --------------------------------------------------------------------------------------------------------

    def cut(self, epoch: int) -> None:
        """Keep the volume as it is now; whoever writes to it is held up for the moment.

        Raises:
            StateError: The place of this cut is taken: the cut of three epochs before was not dropped;
                or this is after `close`.
            MapperRefused: The pool or the volume refused; there is no cut.

        Guarantees:
            Afterwards, also on failure, the volume takes writes again.
        """
        with self._lock:
            if self._closed:
                raise StateError(f"{self.name}: no more cuts are made in this session")
            self._mapper.suspend(self.number)
            try:
                self._mapper.message(self._pool_number, f"create_snap {self.cut_id(epoch)} {self.identity}")
            except MapperRefused as error:
                if error.errno == errno.EEXIST:
                    raise StateError(
                        f"{self.name}: no room for the cut of epoch {epoch}: {CUTS} older ones are kept"
                    ) from error
                raise
            finally:
                self._mapper.resume(self.number)

    def drop(self, epoch: int) -> None:
        """Forget the cut of `epoch`; harmless if there is none.

        Raises:
            MapperRefused: The pool refused; EBUSY while a device is made of it.
        """
        with self._lock:
            self._delete(self.cut_id(epoch))

    def target(self, epoch: int) -> Target:
        """Return a table's line for a writable device that is the cut of `epoch`."""
        return Target(0, self.sectors, "thin", f"{self.pool} {self.cut_id(epoch)}")

    def roll_back(self, epoch: int) -> None:
        """Make the volume what it was at the cut of `epoch`, with all that was written to the cut since.

        Nobody may have the volume open. The cut stays.

        Raises:
            InUse: Somebody has it open.
            StateError: There is no such cut; the volume is as before.
            MapperRefused: The pool refused half-way; the cut is still there.

        Guarantees:
            Its name, its number and its thin id are the same. If it did not come to an end the volume answers every
            access with an error, and this may be called again.
        """
        with self._lock:
            mine = Target(0, self.sectors, "thin", f"{self.pool} {self.identity}")
            if opened := self._mapper.status(self.number).open_count:
                raise InUse(f"{self.name} is open ({opened} times) and cannot be rolled back")
            cut = self.cut_id(epoch)
            self._demand(epoch)
            # An id that a device is made of cannot be deleted.
            self._mapper.swap(self.number, Target(0, self.sectors, "error"))
            self._delete(self.identity)
            self._mapper.message(self._pool_number, f"create_snap {self.identity} {cut}")
            self._mapper.swap(self.number, mine)

    def clear(self) -> bool:
        """Forget all cuts, and let the volume go if it was left suspended in the middle of one.

        Returns:
            Whether anything was there.

        Raises:
            MapperRefused: The pool refused; EBUSY while a device is made of one.
        """
        with self._lock:
            return self._clear()

    def close(self) -> None:
        """Forget all cuts as `clear` does, and make no more: also none whose caller has gone away meanwhile."""
        with self._lock:
            self._closed = True
            self._clear()

    def pool_state(self) -> PoolState:
        """Return what the pool says of itself.

        Raises:
            MapperRefused: It does not.
        """
        [target] = self._mapper.target_status(self._pool_number)
        return read_pool_status(target.parameters)

    # --- Private -----------------------------------------------------------------------------------------------------

    def _clear(self) -> bool:
        found = self._mapper.status(self.number).suspended
        if found:
            self._mapper.resume(self.number)
        for number in range(_SLOTS):
            found |= self._delete(self._slot(number))
        return found

    def _demand(self, epoch: int) -> None:
        # The pool lists no ids. A snapshot of one that does not exist is refused; one that is made goes at once.
        probe = self._slot(CUTS)
        self._delete(probe)
        try:
            self._mapper.message(self._pool_number, f"create_snap {probe} {self.cut_id(epoch)}")
        except MapperRefused as error:
            raise StateError(f"{self.name} has no cut of epoch {epoch}: {error}") from error
        with suppress(MapperRefused):
            self._delete(probe)

    def _delete(self, identity: int) -> bool:
        try:
            self._mapper.message(self._pool_number, f"delete {identity}")
        except MapperRefused as error:
            if error.errno != errno.ENODATA:
                raise
            return False
        return True


def read_pool_status(text: str) -> PoolState:
    """Read the status line of a thin pool's target.

    Source: Linux thin-provisioning.rst, "Status" of the thin-pool target.

    Raises:
        UnderstudyError: The line has another form.
    """
    words = text.split()
    if words[:1] in (["Fail"], ["Error"]):
        return PoolState(0, 1, 0, 1, writable=False, trouble="it has failed")
    try:
        used_metadata, total_metadata = map(int, words[1].split("/"))
        used_data, total_data = map(int, words[2].split("/"))
        flags = words[4:]
    except (IndexError, ValueError):
        raise UnderstudyError(f"the thin pool's status makes no sense: {text!r}") from None
    writable = "rw" in flags
    trouble = "" if writable else "it takes no writes" + (f" ({flags[0]})" if flags else "")
    if "out_of_data_space" in flags:
        trouble = "it is out of data space"
    elif "needs_check" in flags:
        trouble = "its metadata needs a check"
    return PoolState(used_data, total_data, used_metadata, total_metadata, writable=writable, trouble=trouble)


def _number(text: str) -> int:
    major, minor = map(int, text.split(":"))
    return os.makedev(major, minor)
