"""The checkpoints of the Remus fork of DRBD ("protocol D"), by its two ioctls.

The fork holds the primary's writes back in the secondary's memory. ``DRBD_SEND_CHECKPOINT`` puts a barrier behind what
was written so far; at the barrier the secondary acknowledges and then writes all of it to its disk.
``DRBD_WAIT_CHECKPOINT_ACK`` waits for that acknowledgement.

libxl takes an error of the first one for "sent", ignores the result of the second one, and waits in a forked child
while the guest is paused. Here an error is an error, and the wait is one in a thread, which nobody has to wait for.

Source: the fork of DRBD 8.3.11 (drivers/block/drbd/drbd_main.c there); libxl's libxl_remus_disk_drbd.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from understudy.errors import UnderstudyError
from understudy_drbd.control import threads

__all__ = ["CheckpointRefused", "Checkpoints"]

_SEND: Final = 20
_WAIT: Final = 30
_NAMES: Final = {_SEND: "DRBD_SEND_CHECKPOINT", _WAIT: "DRBD_WAIT_CHECKPOINT_ACK"}

_WHY: Final = {
    errno.ENOTTY: "this DRBD has no checkpoints",
    errno.EINVAL: "the resource does not use protocol D",
    errno.EPROTO: "the other host is not connected",
}


class CheckpointRefused(UnderstudyError):
    """DRBD refused a checkpoint's ioctl, or gave the wait up.

    Args:
        ioctl: Its name.
        device: The DRBD device.
        number: The errno.
    """

    def __init__(self, ioctl: str, device: Path, number: int) -> None:
        why = _WHY.get(number, os.strerror(number))
        super().__init__(f"{ioctl} of {device}: {why} [{errno.errorcode.get(number, number)}]")
        self.ioctl = ioctl
        self.device = device
        self.errno = number


class Checkpoints:
    """The checkpoints of one DRBD device, on the primary's host.

    Args:
        device: The DRBD device.

    Raises:
        UnderstudyError: It cannot be opened.
    """

    def __init__(self, device: Path) -> None:
        self.device = device
        try:
            self._fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnderstudyError(f"{device} cannot be opened: {error.strerror}") from error

    def close(self) -> None:
        """Close the device. Idempotent; a wait that is under way ends when DRBD ends it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    async def send(self, *, timeout_s: float) -> bool:
        """Put a barrier behind what was written so far.

        Args:
            timeout_s: How long DRBD may take, seconds.

        Returns:
            Whether there is an acknowledgement to wait for; there is none where nothing was written.

        Raises:
            CheckpointRefused: There is no barrier.
            TimeoutError: DRBD does not answer; there may be one.
        """
        return await threads.run(self._call, _SEND, timeout_s=timeout_s) == 0

    async def wait(self, *, timeout_s: float) -> None:
        """Wait until the secondary has all that was written before the last barrier.

        Args:
            timeout_s: How long, seconds.

        Raises:
            CheckpointRefused: It has not, for instance because the connection was lost.
            TimeoutError: It did not say so in time.

        Guarantees:
            Ends at the deadline or the caller's cancellation at the latest.
        """
        await threads.run(self._call, _WAIT, timeout_s=timeout_s)

    def _call(self, number: int) -> int:
        try:
            return fcntl.ioctl(self._fd, number, 0)
        except (OSError, ValueError) as error:
            found = getattr(error, "errno", None) or errno.EBADF
            raise CheckpointRefused(_NAMES[number], self.device, found) from error
