"""Ask xenstored from asyncio: many requests at once on one connection, each with a deadline.

::

    async with await XenStore.open() as store:
        name = await store.read("/local/domain/3/name")
        async with store.watch("/local/domain/3/device/vif") as changes:
            async for path in changes: ...
        await store.atomically(lambda t: move(t))      # again from the start when somebody else was quicker

Source: Xen docs/misc/xenstore.txt (4.22.0).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from understudy_xen.xenstore import asking
from understudy_xen.xenstore.asking import Permission, Request
from understudy_xen.xenstore.connection import BUSY_S, Connection, Way, open_way
from understudy_xen.xenstore.errors import (
    XenStoreBusy,
    XenStoreConflict,
    XenStoreError,
    XenStoreLost,
    XenStoreMissing,
    XenStoreRefused,
    XenStoreSilent,
    refusal,
)
from understudy_xen.xenstore.watching import PATHS_KEPT, Watch
from understudy_xen.xenstore.wire import Message, Op, encode, strings, text_of

__all__ = ["DEADLINE_S", "Transaction", "XenStore"]

T = TypeVar("T")

DEADLINE_S: Final = 5.0  #: for a request, unless its caller knows better
TRIES: Final = 50  #: of a transaction that others keep breaking
_PARTS: Final = 100  #: times that a list of names may change while it is read in parts
_REQ_IDS: Final = 1 << 32


@dataclass(slots=True)
class _Pending:
    request: Request[Any]
    answer: asyncio.Future[Any] | None  # ``None``: nobody waits any more


class _Database:
    # What can be asked in a transaction and outside of one.

    def __init__(self, store: XenStore, tx_id: int) -> None:
        self._store = store
        self._tx_id = tx_id

    async def _ask(self, request: Request[T]) -> T:
        return await self._store.ask(request, tx_id=self._tx_id)

    async def read(self, path: str) -> str:
        """Return the value at a path.

        Raises:
            XenStoreMissing: There is no such path.
        """
        return await self._ask(asking.read(path))

    async def get(self, path: str) -> str | None:
        """Return the value at a path, ``None`` if there is no such path."""
        try:
            return await self._ask(asking.read(path))
        except XenStoreMissing:
            return None

    async def write(self, path: str, value: str) -> None:
        """Store a value; missing parents are made."""
        await self._ask(asking.write(path, value))

    async def mkdir(self, path: str) -> None:
        """Make sure that a path exists; its value stays."""
        await self._ask(asking.mkdir(path))

    async def rm(self, path: str) -> None:
        """Make sure that a path does not exist, nor anything below."""
        with suppress(XenStoreMissing):  # its parent does not exist either
            await self._ask(asking.rm(path))

    async def directory(self, path: str) -> list[str]:
        """Return the names below a path, however many.

        Raises:
            XenStoreMissing: There is no such path.
            XenStoreConflict: It is long, and changes all the time.
        """
        try:
            return await self._ask(asking.directory(path))
        except XenStoreRefused as error:
            if error.code != "E2BIG":
                raise
        for _ in range(_PARTS):
            names = await self._parts(path)
            if names is not None:
                return names
        raise XenStoreConflict(f"DIRECTORY_PART {path}", "EAGAIN")

    async def children(self, path: str) -> list[str]:
        """Return the names below a path, none if there is no such path."""
        try:
            return await self.directory(path)
        except XenStoreMissing:
            return []

    async def get_perms(self, path: str) -> list[Permission]:
        """Return a node's permissions; the first one names its owner."""
        return await self._ask(asking.get_perms(path))

    async def set_perms(self, path: str, permissions: Iterable[Permission]) -> None:
        """Replace a node's permissions; the first one names its owner."""
        await self._ask(asking.set_perms(path, permissions))

    async def _parts(self, path: str) -> list[str] | None:
        # The whole list, or None if the node changed on the way. An empty name ends the list.
        whole = b""
        first: str | None = None
        while True:
            generation, part = await self._ask(asking.directory_part(path, len(whole)))
            if first is None:
                first = generation
            elif generation != first:
                return None
            whole += part
            if whole == b"\0" or whole.endswith(b"\0\0"):
                return [text_of(name) for name in strings(whole[:-1])]
            if not part:
                raise XenStoreRefused(f"DIRECTORY_PART {path}", "an answer without names or end")


class Transaction(_Database):
    """Reads and writes that happen all at once or not at all; made by `XenStore.transaction`."""


class XenStore(_Database):
    """A client of xenstored.

    Make one with `open`; it is an asynchronous context manager.

    Args:
        way: To xenstored; belongs to this object from now on.
        deadline_s: For each request, seconds.

    Guarantees:
        A lost connection ends every request and every watch at once, and each later one; what a request that got no
        answer did is not known. Closing it ends all watches and discards all transactions.
    """

    def __init__(self, way: Way, *, deadline_s: float = DEADLINE_S) -> None:
        super().__init__(self, 0)
        self.place = way.place
        self._payload_max = way.payload_max
        self.deadline_s = deadline_s
        self._pending: dict[int, _Pending] = {}
        self._watches: dict[str, Watch] = {}
        self._last_id = 0
        self._last_token = 0
        self._lost: XenStoreLost | None = None
        self._connection = Connection(way.fd, self._take, self._lose)

    @classmethod
    async def open(cls, place: Path | None = None, *, deadline_s: float = DEADLINE_S) -> Self:
        """Connect to xenstored.

        Args:
            place: Its socket, or the kernel's device; ``None`` for whichever is there.
            deadline_s: For the connection and for each request, seconds.

        Raises:
            XenStoreBusy: It takes no connection.
            XenStoreLost: None can be reached; with what was tried.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + deadline_s
        while True:
            try:
                way = open_way(place)
            except XenStoreBusy:
                if loop.time() >= until:
                    raise
                await asyncio.sleep(BUSY_S)
            else:
                return cls(way, deadline_s=deadline_s)

    @property
    def lost(self) -> XenStoreLost | None:
        """Why nothing can be asked any more, ``None`` while it can."""
        return self._lost

    async def close(self) -> None:
        """Close the connection; who waits is told that it is gone."""
        self._connection.close()
        self._lose(XenStoreLost("this connection to xenstored was closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def ask(self, request: Request[T], *, tx_id: int = 0) -> T:
        """Send a request and return what its answer says.

        Args:
            request: One of `understudy_xen.xenstore.asking`.
            tx_id: Of a transaction, 0 outside of one.

        Raises:
            XenStoreRefused: Xenstored refuses.
            XenStoreSilent: No answer before the deadline.
            XenStoreLost: The connection is gone.
        """
        if self._lost is not None:
            raise XenStoreLost(f"{request.what}: {self._lost}") from self._lost
        req_id = self._next_id()
        message = encode(request.op, req_id, tx_id, request.payload, self._payload_max)
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._pending[req_id] = pending = _Pending(request, answer)
        self._connection.send(message)
        try:
            async with asyncio.timeout(self.deadline_s):
                return await answer
        except TimeoutError:
            raise XenStoreSilent(
                f"xenstored did not answer {request.what} within {self.deadline_s:g} s"
            ) from None
        finally:
            # An answer that comes later is recognized, and nobody's.
            pending.answer = None

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Enter a transaction; it is committed at the end of the block, and discarded if the block raises.

        Raises:
            XenStoreConflict: At the end: somebody else changed what it touched. Nothing of it happened.
        """
        tx_id = await self.ask(asking.transaction_start())
        try:
            yield Transaction(self, tx_id)
        except BaseException:
            self._discard(tx_id)
            raise
        await self.ask(asking.transaction_end(commit=True), tx_id=tx_id)

    async def atomically(self, body: Callable[[Transaction], Awaitable[T]], *, tries: int = TRIES) -> T:
        """Run a body in a transaction until it can be committed, and return what it returned.

        Args:
            body: Is called afresh for each attempt; must do nothing but ask the transaction.
            tries: How often at most.

        Raises:
            XenStoreConflict: Others broke every attempt. Nothing happened.
        """
        for attempt in range(1, tries + 1):
            try:
                async with self.transaction() as transaction:
                    return await body(transaction)
            except XenStoreConflict:
                if attempt == tries:
                    raise
                # Two that broke each other are not in step again.
                await asyncio.sleep(0)
        raise ValueError("a transaction is tried at least once")

    @asynccontextmanager
    async def watch(self, path: str, *, kept: int = PATHS_KEPT) -> AsyncIterator[Watch]:
        """Watch a path, and what is below, until the end of the block.

        Args:
            path: Or ``@introduceDomain``, ``@releaseDomain``.
            kept: How many different changed paths may wait to be looked at before they become one.
        """
        self._last_token += 1
        token = f"understudy-{self._last_token}"
        watch = self._watches[token] = Watch(path, kept=kept)
        try:
            await self.ask(asking.watch(path, token))
            yield watch
        finally:
            del self._watches[token]
            # Also after a deadline, since xenstored may have set it up. What still comes is nobody's.
            self._send(asking.unwatch(path, token))

    async def is_domain_introduced(self, domid: int) -> bool:
        """Tell whether xenstored talks to a domain: from its start on until it is destroyed."""
        return await self.ask(asking.is_domain_introduced(domid))

    async def get_domain_path(self, domid: int) -> str:
        """Return where a domain's own part begins, e.g. ``"/local/domain/3"``."""
        return await self.ask(asking.get_domain_path(domid))

    async def resume(self, domid: int) -> None:
        """Have ``@releaseDomain`` told again when a domain shuts down that was shut down and resumed."""
        await self.ask(asking.resume(domid))

    def _next_id(self) -> int:
        for _ in range(len(self._pending) + 2):
            self._last_id = (self._last_id + 1) % _REQ_IDS
            if self._last_id and self._last_id not in self._pending:
                return self._last_id
        raise XenStoreError("no number is left for a request")  # 2**32 of them wait

    def _send(self, request: Request[Any], tx_id: int = 0) -> None:
        # Without waiting for the answer.
        if self._lost is None:
            req_id = self._next_id()
            self._pending[req_id] = _Pending(request, None)
            self._connection.send(encode(request.op, req_id, tx_id, request.payload, self._payload_max))

    def _discard(self, tx_id: int) -> None:
        self._send(asking.transaction_end(commit=False), tx_id)

    def _take(self, message: Message) -> None:
        if message.op == Op.WATCH_EVENT:
            self._tell(message.payload)
            return
        pending = self._pending.pop(message.req_id, None)
        if pending is None:
            return
        request, answer = pending.request, pending.answer
        try:
            if message.op == Op.ERROR:
                raise refusal(request.what, text_of(message.payload.rstrip(b"\0")))
            result = request.parse(message.payload)
        except XenStoreError as error:
            if answer is not None and not answer.done():
                answer.set_exception(error)
            return
        if answer is not None and not answer.done():
            answer.set_result(result)
        elif request.op == Op.TRANSACTION_START:
            self._discard(result)  # whoever asked has gone: it would stay open as long as the connection

    def _tell(self, payload: bytes) -> None:
        path, token, *_ = [*strings(payload), b"", b""]
        watch = self._watches.get(text_of(token))
        if watch is not None:
            watch.tell(text_of(path))

    def _lose(self, cause: XenStoreLost) -> None:
        if self._lost is not None:
            return
        self._lost = cause
        for pending in self._pending.values():
            if pending.answer is not None and not pending.answer.done():
                pending.answer.set_exception(XenStoreLost(f"{pending.request.what}: {cause}"))
        self._pending.clear()
        for watch in self._watches.values():
            watch.lose(cause)
