"""A conversation with xenstored: what is said, recorded at a real one, and played back where there is none.

The same `converse` runs in both places. In the Xen bed a `Proxy` stands between the client and the real xenstored and
notes every message; what it notes must be what is stored here. Without Xen, `Playback` answers from what is stored, and
accepts nothing but the requests that were recorded.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Self

from understudy_xen.xenstore import (
    Access,
    Permission,
    Transaction,
    XenStore,
    XenStoreConflict,
    XenStoreMissing,
    XenStoreRefused,
)
from understudy_xen.xenstore.wire import Decoder, Message, Op

RECORDED: Final = Path(__file__).parent / "xenstore-4.17.json"
BASE: Final = "/understudy-exchange"
NAMES: Final = tuple(f"{number:02}-{'x' * 60}" for number in range(80))  # more than one answer holds

Said = tuple[str, Message]  # "out" or "in"


async def converse(store: XenStore) -> None:  # noqa: C901, PLR0915 - a conversation has its length
    assert await store.read("/local/domain/0/name") == "Domain-0"
    assert await store.get("/local/domain/0/no-such") is None
    assert await store.get_domain_path(7) == "/local/domain/7"
    assert await store.is_domain_introduced(0)
    assert not await store.is_domain_introduced(4711)

    await store.write(f"{BASE}/a/b", "1")
    assert await store.read(f"{BASE}/a/b") == "1"
    assert not await store.read(f"{BASE}/a")
    await store.mkdir(f"{BASE}/a/b")
    assert await store.read(f"{BASE}/a/b") == "1"
    await store.mkdir(f"{BASE}/a/c")
    assert sorted(await store.directory(f"{BASE}/a")) == ["b", "c"]
    assert await store.directory(f"{BASE}/a/c") == []
    assert await store.children(f"{BASE}/nothing") == []
    assert await store.get_perms(f"{BASE}/a") == [Permission(0, Access.NONE)]
    permissions = [Permission(0, Access.READ), Permission(5, Access.BOTH)]
    await store.set_perms(f"{BASE}/a", permissions)
    assert await store.get_perms(f"{BASE}/a") == permissions

    async with store.watch(f"{BASE}/a") as watch:
        assert await watch.next(5) == f"{BASE}/a"
        await store.write(f"{BASE}/a/b", "2")
        assert await watch.next(5) == f"{BASE}/a/b"
        await store.rm(f"{BASE}/a")
        assert await watch.next(5) == f"{BASE}/a"
    await store.rm(f"{BASE}/a")  # it is not there, and that is what was asked for
    await store.rm(f"{BASE}/no/such")

    async with store.transaction() as transaction:
        await transaction.write(f"{BASE}/t", "1")
        assert await transaction.read(f"{BASE}/t") == "1"
        assert await store.get(f"{BASE}/t") is None
    assert await store.read(f"{BASE}/t") == "1"
    tries = 0

    async def raise_by_one(transaction: Transaction) -> None:
        nonlocal tries
        tries += 1
        value = int(await transaction.read(f"{BASE}/t"))
        if tries == 1:
            await store.write(f"{BASE}/t", "10")  # somebody else is quicker
        await transaction.write(f"{BASE}/t", str(value + 1))

    await store.atomically(raise_by_one)
    assert (tries, await store.read(f"{BASE}/t")) == (2, "11")
    try:
        async with store.transaction() as transaction:
            await transaction.read(f"{BASE}/t")
            await store.write(f"{BASE}/t", "20")
            await transaction.write(f"{BASE}/t", "12")
    except XenStoreConflict as error:
        assert error.code == "EAGAIN"  # noqa: PT017 - the conversation runs without pytest, too
    else:
        raise AssertionError("the transaction was committed")
    try:
        async with store.transaction() as transaction:
            await transaction.write(f"{BASE}/t", "never")
            raise LookupError
    except LookupError:
        pass
    assert await store.read(f"{BASE}/t") == "20"

    for name in NAMES:
        await store.mkdir(f"{BASE}/many/{name}")
    assert sorted(await store.directory(f"{BASE}/many")) == list(NAMES)
    for wrong in (store.read("/no/such"), store.directory("/no/such"), store.get_perms("/no/such")):
        try:
            await wrong
        except XenStoreMissing:
            continue
        raise AssertionError("what is not there was read")
    try:
        await store.resume(4711)
    except XenStoreRefused as error:
        assert error.code in {"ENOENT", "EINVAL"}  # noqa: PT017 - as above
    else:
        raise AssertionError("a domain that is not there was resumed")
    await store.rm(BASE)


class _Between:
    # A socket on which one client is taken.

    def __init__(self, place: Path) -> None:
        self.place = place
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._take, self.place)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server
        self._server.close()
        await asyncio.gather(*self._serving)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._serving.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._serving.discard(task)
            writer.close()
            await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class Proxy(_Between):
    """Notes what goes on between a client and a real xenstored.

    Args:
        place: where the client connects.
        real: the socket of xenstored.
    """

    def __init__(self, place: Path, real: Path) -> None:
        super().__init__(place)
        self.said: list[Said] = []
        self._real = real

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_unix_connection(self._real)
        await asyncio.gather(self._pass("out", reader, outer), self._pass("in", inner, writer))

    async def _pass(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = Decoder()
        while data := await reader.read(65536):
            self.said += ((way, message) for message in decoder.feed(data))
            writer.write(data)
            await writer.drain()
        writer.close()


class Playback(_Between):
    """Answers as a real xenstored did, and takes nothing but what that one was asked.

    Args:
        place: where the client connects.
        said: what was recorded.
    """

    def __init__(self, place: Path, said: Iterable[Said]) -> None:
        super().__init__(place)
        self.rest = list(said)
        self.unexpected: list[Message] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = Decoder()
        while data := await reader.read(65536):
            for message in decoder.feed(data):
                if not self.rest or self.rest[0] != ("out", message):
                    self.unexpected.append(message)
                    return
                self.rest.pop(0)
                while self.rest and self.rest[0][0] == "in":
                    writer.write(as_bytes(self.rest.pop(0)[1]))
            await writer.drain()


def as_bytes(message: Message) -> bytes:
    header = (message.op, message.req_id, message.tx_id, len(message.payload))
    return b"".join(number.to_bytes(4, "little") for number in header) + message.payload


def dump(said: Iterable[Said]) -> str:
    """Return a recording as text, one message a line."""
    lines = [json.dumps([way, m.op, m.req_id, m.tx_id, m.payload.decode("latin-1")]) for way, m in said]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def load(path: Path = RECORDED) -> list[Said]:
    """Return a recording."""
    return [
        (way, Message(op, req_id, tx_id, payload.encode("latin-1")))
        for way, op, req_id, tx_id, payload in json.loads(path.read_text())
    ]


def comparable(said: Iterable[Said]) -> dict[str, list[tuple[object, ...]]]:
    """Return a recording without what differs each time: numbers of transactions, generations of nodes.

    Answers and events are apart, because xenstored may send an event before or after the answer to what caused it.
    """
    numbers: dict[int, int] = {0: 0}
    kept: dict[str, list[tuple[object, ...]]] = {"out": [], "in": [], "events": []}
    for way, message in said:
        payload = message.payload
        if way == "in" and message.op == Op.TRANSACTION_START:
            numbers[int(payload.rstrip(b"\0"))] = len(numbers)
            payload = b""
        if way == "in" and message.op == Op.DIRECTORY_PART:
            payload = payload.partition(b"\0")[2]
        tx_id = numbers.get(message.tx_id, -1)
        kept["events" if message.op == Op.WATCH_EVENT else way].append(
            (message.op, message.req_id, tx_id, payload)
        )
    return kept


def differences(
    mine: Mapping[str, list[tuple[object, ...]]], theirs: Mapping[str, list[tuple[object, ...]]]
) -> list[str]:
    """Return where two comparable recordings part, the first place of each kind."""
    found = []
    for kind in mine:
        for number, (a, b) in enumerate(zip(mine[kind], theirs[kind], strict=False)):
            if a != b:
                found.append(f"{kind} {number}: {a} is not {b}")
                break
        if len(mine[kind]) != len(theirs[kind]):
            found.append(f"{kind}: {len(mine[kind])} messages are not {len(theirs[kind])}")
    return found
