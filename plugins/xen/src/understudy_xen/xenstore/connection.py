"""One connection to xenstored: bytes out, messages in, and one end that everybody is told of.

Both ways to xenstored are file descriptors that can be waited for: its socket, and the kernel's device, where the
kernel speaks to xenstored on our behalf. The device takes one message at a time, so each one is written by itself.

Source: Xen tools/libs/store/xs.c (xs_open); Linux drivers/xen/xenbus/xenbus_dev_frontend.c (xenbus_file_write: a write
is cut at the end of one message; xenbus_file_poll).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from understudy_xen.xenstore.errors import XenStoreBusy, XenStoreGarbage, XenStoreLost
from understudy_xen.xenstore.wire import DEVICE_PAYLOAD_MAX, PAYLOAD_MAX, Decoder, Message

__all__ = ["BUSY_S", "DEVICE", "PLACES", "Connection", "Way", "open_way"]

DEVICE = Path("/dev/xen/xenbus")  #: the kernel's way, everywhere
PLACES = (Path("/run/xenstored/socket"), Path("/var/run/xenstored/socket"), DEVICE)  #: in the order tried

BUSY_S = 0.02  #: until it is worth trying again to be taken

_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Way:
    """An open way to xenstored."""

    fd: int  #: non-blocking, closed on exec
    place: Path  #: a socket, or the kernel's device
    payload_max: int  #: of a request, bytes


def open_way(place: Path | None) -> Way:
    """Open a way to xenstored.

    Args:
        place: A socket or the device; ``None`` takes the first of `PLACES` that exists.

    Raises:
        XenStoreBusy: Xenstored has no room for a connection now.
        XenStoreLost: There is none, or this process may not use it.

    Guarantees:
        It does not wait, also if xenstored stands still.
    """
    tried: list[str] = []
    for path in PLACES if place is None else (place,):
        try:
            return _open(path)
        except BlockingIOError:
            raise XenStoreBusy(f"xenstored does not take a connection at {path}") from None
        except OSError as error:
            tried.append(f"{path}: {error.strerror or error}")
            if not isinstance(error, FileNotFoundError):
                # A socket that nobody serves: xenstored has ended. The kernel, asked through its device for a watch,
                # would wait for it for ever, and so would whoever asks.
                break
    raise XenStoreLost(
        f"no xenstored can be reached ({'; '.join(tried)}): it runs in a Xen dom0 (systemctl status xenstored, "
        f"xenbits' oxenstored or xenstored) and is asked by root"
    )


def _open(path: Path) -> Way:
    if not stat.S_ISSOCK(path.stat().st_mode):
        return Way(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC), path, DEVICE_PAYLOAD_MAX)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        # Those that it has not taken yet are few: with a full backlog a blocking connect(2) waits for ever.
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
        sock.connect(str(path))
        return Way(sock.detach(), path, PAYLOAD_MAX)


class Connection:
    """A file descriptor to xenstored in the event loop.

    Args:
        fd: Non-blocking; belongs to this object from now on.
        on_message: Called with each message.
        on_lost: Called once with the reason when nothing can come any more, unless `close` was called before.

    Neither is called from within `send`.
    """

    def __init__(
        self, fd: int, on_message: Callable[[Message], None], on_lost: Callable[[XenStoreLost], None]
    ) -> None:
        self._fd = fd
        self._on_message = on_message
        self._on_lost = on_lost
        self._decoder = Decoder()
        self._unsent: deque[bytes] = deque()
        self._open = True
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._readable)

    def send(self, message: bytes) -> None:
        """Send a whole message; what does not go out at once follows as soon as xenstored takes it."""
        if not self._open:
            return
        self._unsent.append(message)
        if len(self._unsent) == 1:
            self._writable()

    def close(self) -> None:
        """Close the descriptor; nothing is called any more."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._unsent.clear()
        with suppress(OSError):
            os.close(self._fd)

    def _writable(self) -> None:
        while self._unsent:
            message = self._unsent[0]
            try:
                sent = os.write(self._fd, message)
            except BlockingIOError:
                self._loop.add_writer(self._fd, self._writable)
                return
            except OSError as error:
                self._unsent.clear()
                self._loop.call_soon(
                    self._lose, XenStoreLost(f"xenstored is gone: {error.strerror or error}")
                )
                break
            if sent < len(message):
                self._unsent[0] = message[sent:]
            else:
                self._unsent.popleft()
        if self._open:
            self._loop.remove_writer(self._fd)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.EINTR:
                return
            self._lose(XenStoreLost(f"xenstored is gone: {error.strerror or error}"))
            return
        if not data:
            self._lose(
                XenStoreLost("xenstored closed the connection: it ended, or took a request for a violation")
            )
            return
        try:
            messages = self._decoder.feed(data)
        except XenStoreGarbage as error:
            self._lose(error)
            return
        for message in messages:
            if self._open:
                self._on_message(message)

    def _lose(self, cause: XenStoreLost) -> None:
        if self._open:
            self.close()
            self._on_lost(cause)
