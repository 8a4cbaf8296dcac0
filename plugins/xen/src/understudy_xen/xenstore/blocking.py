"""Ask xenstored from a thread that may block: for the callbacks that run while the guest stands still.

A request through the event loop would first wait for the loop's turn, and then for this thread's; at a checkpoint
that is time in which the guest does nothing. So the thread that saves a domain has a connection of its own.

Source: Xen docs/misc/xenstore.txt (4.22.0).
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Self, TypeVar

from understudy_xen.xenstore import asking
from understudy_xen.xenstore.asking import Request
from understudy_xen.xenstore.connection import BUSY_S, Way, open_way
from understudy_xen.xenstore.errors import (
    XenStoreBusy,
    XenStoreLost,
    XenStoreMissing,
    XenStoreSilent,
    refusal,
)
from understudy_xen.xenstore.wire import Decoder, Message, Op, encode, text_of

__all__ = ["BlockingStore"]

T = TypeVar("T")
_READ_BYTES = 1 << 16


class BlockingStore:
    """A client of xenstored for one thread; one request at a time.

    Args:
        place: Its socket, or the kernel's device; ``None`` for whichever is there.
        deadline_s: For the connection and for each request, seconds.

    Raises:
        XenStoreBusy: Xenstored takes no connection.
        XenStoreLost: None can be reached.

    Guarantees:
        After an error other than a refusal it is closed, and each later request raises `XenStoreLost`.
    """

    def __init__(self, place: Path | None = None, *, deadline_s: float = 5.0) -> None:
        self.deadline_s = deadline_s
        way = self._way(place)
        self._fd, self.place, self._payload_max = way.fd, way.place, way.payload_max
        self._incoming = select.poll()
        self._incoming.register(self._fd, select.POLLIN)
        self._decoder = Decoder()
        self._req_id = 0
        self._told = False

    def _way(self, place: Path | None) -> Way:
        until = time.monotonic() + self.deadline_s
        while True:
            try:
                return open_way(place)
            except XenStoreBusy:
                if time.monotonic() >= until:
                    raise
                time.sleep(BUSY_S)

    def close(self) -> None:
        """Close the connection."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read(self, path: str) -> str:
        """Return the value at a path.

        Raises:
            XenStoreMissing: There is no such path.
        """
        return self.ask(asking.read(path))

    def get(self, path: str) -> str | None:
        """Return the value at a path, ``None`` if there is no such path."""
        try:
            return self.ask(asking.read(path))
        except XenStoreMissing:
            return None

    def write(self, path: str, value: str) -> None:
        """Store a value; missing parents are made."""
        self.ask(asking.write(path, value))

    def resume(self, domid: int) -> None:
        """Have ``@releaseDomain`` told again when the domain shuts down."""
        self.ask(asking.resume(domid))

    def watch(self, path: str, token: str) -> None:
        """Watch a path; `wait` tells that something happened there, first of all right now."""
        self.ask(asking.watch(path, token))

    def wait(self, timeout_s: float) -> bool:
        """Wait until something is told, and tell whether it was; what had come before counts, and is taken.

        Args:
            timeout_s: How long, seconds.
        """
        until = time.monotonic() + timeout_s
        while not self._told:
            if self._fd < 0:
                raise XenStoreLost("the connection to xenstored is closed")
            if not self._come(max(0.0, until - time.monotonic())):
                return False
            try:
                messages = self._receive("watch events")
            except BaseException:
                self.close()
                raise
            for message in messages:
                self._keep(message)
        self._told = False
        return True

    def post(self, request: Request[object]) -> None:
        """Send a request and do not wait for its answer, whatever that will be.

        Raises:
            XenStoreSilent: Xenstored does not take it.
            XenStoreLost: The connection is gone.
        """
        if self._fd < 0:
            raise XenStoreLost(f"{request.what}: the connection to xenstored is closed")
        self._req_id = self._req_id % 0xFFFFFFFF + 1
        try:
            self._send(encode(request.op, self._req_id, 0, request.payload, self._payload_max), request.what)
        except BaseException:
            self.close()
            raise

    def write_if(self, path: str, expected: str, value: str) -> bool:
        """Store a value if the present one is `expected`, and tell whether that was so; all in one transaction.

        Raises:
            XenStoreConflict: Somebody changes it at the same time.
        """
        tx_id = self.ask(asking.transaction_start())
        commit = False
        try:
            commit = self.ask(asking.read(path), tx_id) == expected
            if commit:
                self.ask(asking.write(path, value), tx_id)
        finally:
            if self._fd >= 0:
                self.ask(asking.transaction_end(commit=commit), tx_id)
        return commit

    def ask(self, request: Request[T], tx_id: int = 0) -> T:
        """Send a request and return what its answer says.

        Raises:
            XenStoreRefused: Xenstored refuses.
            XenStoreSilent: No answer before the deadline.
            XenStoreLost: The connection is gone.
        """
        if self._fd < 0:
            raise XenStoreLost(f"{request.what}: the connection to xenstored is closed")
        self._req_id = self._req_id % 0xFFFFFFFF + 1
        message = encode(request.op, self._req_id, tx_id, request.payload, self._payload_max)
        try:
            self._send(message, request.what)
            answer = self._answer(request.what)
        except BaseException:
            self.close()
            raise
        if answer.op == Op.ERROR:
            raise refusal(request.what, text_of(answer.payload.rstrip(b"\0")))
        return request.parse(answer.payload)

    def _send(self, message: bytes, what: str) -> None:
        until = time.monotonic() + self.deadline_s
        while message:
            try:
                message = message[os.write(self._fd, message) :]
            except BlockingIOError:
                left = until - time.monotonic()
                outgoing = select.poll()
                outgoing.register(self._fd, select.POLLOUT)
                if left <= 0 or not outgoing.poll(left * 1000):
                    raise XenStoreSilent(f"xenstored does not take {what}") from None
            except OSError as error:
                raise XenStoreLost(f"{what}: xenstored is gone: {error.strerror or error}") from error

    def _answer(self, what: str) -> Message:
        until = time.monotonic() + self.deadline_s
        found: Message | None = None
        while found is None:
            left = until - time.monotonic()
            if left <= 0 or not self._come(left):
                raise XenStoreSilent(f"xenstored did not answer {what} within {self.deadline_s:g} s")
            for message in self._receive(what):
                if message.op != Op.WATCH_EVENT and message.req_id == self._req_id:
                    found = message
                else:
                    self._keep(message)
        return found

    def _come(self, timeout_s: float) -> bool:
        return bool(self._incoming.poll(timeout_s * 1000))

    def _receive(self, what: str) -> list[Message]:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise XenStoreLost(f"{what}: xenstored is gone: {error.strerror or error}") from error
        if not data:
            raise XenStoreLost(f"{what}: xenstored closed the connection")
        return self._decoder.feed(data)

    def _keep(self, message: Message) -> None:
        # An answer to what was posted is nobody's.
        self._told = self._told or message.op == Op.WATCH_EVENT
