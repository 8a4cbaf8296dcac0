"""Who works on a domain: one process of this host at a time saves it, or resumes it.

The hypervisor's list of dirty pages has no owner: of two that read it each gets a part, without an error. And of two
that take turns with a suspended guest one would let it run while the other still reads it. So there is a lock for each
domain, a byte of one file in a directory of root's; the kernel takes it back with its owner, however that ends.

Source: fcntl(2), open file description locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from understudy.errors import HypervisorError

__all__ = ["RUN_DIRECTORY", "ClaimTaken", "claimed"]

RUN_DIRECTORY: Final = Path("/run/xen")  #: XEN_RUN_DIR of Debian's packages, and of upstream's default
_CLAIMS: Final = "understudy-claims"
_FLOCK: Final = struct.Struct("hhqqi0q")  # struct flock: type, whence, start, len, pid


class ClaimTaken(HypervisorError):
    """Another process, or another part of this one, works on the domain."""


@contextmanager
def claimed(domid: int, *, directory: Path | None = None) -> Iterator[None]:
    """Enter as the only one who saves or resumes a domain.

    Args:
        domid: The domain.
        directory: Where the locks are, ``None`` for Xen's; nobody but root may write there.

    Raises:
        ClaimTaken: There is one already.
        HypervisorError: The lock cannot be used.
    """
    directory = RUN_DIRECTORY if directory is None else directory
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(directory / _CLAIMS, flags, 0o600)
    except OSError as failed:
        raise HypervisorError(
            f"domain {domid} cannot be claimed in {directory}, which root may write: {failed}; it is not touched"
        ) from failed
    try:
        try:
            _lock(fd, domid, fcntl.F_WRLCK)
        except (BlockingIOError, PermissionError):
            raise ClaimTaken(
                f"domain {domid} is being saved or protected by understudy already, which serves one at a time; "
                "it is not touched"
            ) from None
        except OSError as failed:
            raise HypervisorError(
                f"domain {domid} cannot be claimed in {directory}: {failed}; it is not touched"
            ) from failed
        try:
            yield
        finally:
            _lock(fd, domid, fcntl.F_UNLCK)  # a child that is just being started may still have the file
    finally:
        os.close(fd)


def _lock(fd: int, domid: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, domid, 1, 0))
