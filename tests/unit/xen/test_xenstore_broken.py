"""A peer that is no good: silent, gone, garbage, late. What a real xenstored answers is in tests/xen."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from understudy_xen.xenstore import (
    BlockingStore,
    XenStore,
    XenStoreGarbage,
    XenStoreLimit,
    XenStoreLost,
    XenStoreSilent,
    connection,
)
from understudy_xen.xenstore.errors import XenStoreBusy
from understudy_xen.xenstore.wire import Op

HEADER = struct.Struct("=IIII")


class Peer:
    """The other end, which says what a test wants."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(place))
        self.listening.listen(1)  # as xenstored's own
        self.listening.setblocking(False)
        self.end: socket.socket | None = None

    async def taken(self) -> None:
        self.end, _ = await asyncio.get_running_loop().sock_accept(self.listening)

    async def request(self) -> tuple[int, int, int, bytes]:
        assert self.end
        loop = asyncio.get_running_loop()
        data = b""
        while len(data) < 16:
            data += await loop.sock_recv(self.end, 16 - len(data))
        op, req_id, tx_id, length = HEADER.unpack(data)
        payload = await loop.sock_recv(self.end, length) if length else b""
        return op, req_id, tx_id, payload

    async def say(self, op: int, req_id: int, payload: bytes, tx_id: int = 0) -> None:
        assert self.end
        await asyncio.get_running_loop().sock_sendall(
            self.end, HEADER.pack(op, req_id, tx_id, len(payload)) + payload
        )

    def close(self) -> None:
        self.listening.close()
        if self.end:
            self.end.close()


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    peer = Peer(tmp_path / "socket")
    yield peer
    peer.close()


@pytest.fixture
async def store(peer: Peer) -> AsyncIterator[XenStore]:
    async with await XenStore.open(peer.place, deadline_s=5) as store:
        await peer.taken()
        yield store


@pytest.fixture
def crowd(peer: Peer) -> Iterator[list[socket.socket]]:
    """As many connections as a xenstored that stands still has room for."""
    waiting: list[socket.socket] = []
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        waiting.append(sock)
        try:
            sock.connect(str(peer.place))
        except BlockingIOError:
            break
    yield waiting
    for sock in waiting:
        sock.close()


async def test_a_xenstored_that_stands_still_holds_nobody_up(peer: Peer, crowd: list[socket.socket]) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    counting = asyncio.create_task(count())
    with pytest.raises(XenStoreBusy, match="does not take a connection at"):
        await XenStore.open(peer.place, deadline_s=0.3)
    counting.cancel()
    assert turns > 5
    with pytest.raises(XenStoreBusy):
        await asyncio.to_thread(BlockingStore, peer.place, deadline_s=0.1)
    assert crowd


@pytest.mark.parametrize("blocking", [False, True])
async def test_it_is_asked_again_for_a_connection(
    peer: Peer, crowd: list[socket.socket], blocking: bool
) -> None:
    opening: asyncio.Future[BlockingStore | XenStore] = asyncio.ensure_future(
        asyncio.to_thread(BlockingStore, peer.place) if blocking else XenStore.open(peer.place)
    )
    await asyncio.sleep(0.05)
    assert not opening.done()
    while crowd:
        peer.listening.accept()[0].close()
        crowd.pop().close()
        if opening.done():
            break
        await asyncio.sleep(0.05)
    store = await asyncio.wait_for(opening, 5)
    if isinstance(store, XenStore):
        await store.close()
    else:
        assert isinstance(store, BlockingStore)
        store.close()


async def test_the_kernel_is_not_asked_in_place_of_a_xenstored_that_has_ended(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind(str(left))
    monkeypatch.setattr(connection, "PLACES", (tmp_path / "none", left, peer.place))
    with pytest.raises(XenStoreLost, match=r"none: No such file or directory; .*left: Connection refused"):
        await XenStore.open()
    left.unlink()
    async with await XenStore.open():
        await peer.taken()


async def test_nobody_there_is_told_with_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(XenStoreLost, match=r"no-such-socket: No such file or directory.*dom0"):
        await XenStore.open(tmp_path / "no-such-socket")


async def test_answers_find_their_requests_in_any_order(store: XenStore, peer: Peer) -> None:
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(store.read(f"/{name}")) for name in "abc"]
        requests = [await peer.request() for _ in asked]
        for op, req_id, _, payload in reversed(requests):
            await peer.say(op, req_id, b"value of " + payload[:-1])
    assert [task.result() for task in asked] == ["value of /a", "value of /b", "value of /c"]


async def test_a_silent_xenstored_is_noticed_and_its_late_answer_is_nobodys(
    store: XenStore, peer: Peer
) -> None:
    store.deadline_s = 0.05
    with pytest.raises(XenStoreSilent, match=r"READ /a within 0\.05 s"):
        await store.read("/a")
    store.deadline_s = 5
    _, late, *_ = await peer.request()
    reading = asyncio.create_task(store.read("/b"))
    op, req_id, *_ = await peer.request()
    assert req_id != late
    await peer.say(op, late, b"of a")
    await peer.say(op, req_id, b"of b")
    assert await reading == "of b"


async def test_a_transaction_that_begins_too_late_is_discarded(store: XenStore, peer: Peer) -> None:
    store.deadline_s = 0.05
    with pytest.raises(XenStoreSilent):
        async with store.transaction():
            pytest.fail("it did not begin")
    op, req_id, *_ = await peer.request()
    await peer.say(op, req_id, b"77\0")
    assert await peer.request() == (Op.TRANSACTION_END, req_id + 1, 77, b"F\0")


async def test_a_cancelled_block_discards_its_transaction(store: XenStore, peer: Peer) -> None:
    entered = asyncio.Event()

    async def block() -> None:
        async with store.transaction():
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    op, req_id, *_ = await peer.request()
    await peer.say(op, req_id, b"5\0")
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await peer.request())[2:] == (5, b"F\0")


async def test_the_end_of_xenstored_reaches_everybody_at_once(store: XenStore, peer: Peer) -> None:
    answering = asyncio.create_task(_answer_watch(peer))
    async with store.watch("/w") as watch:
        await answering
        assert await anext(watch) == "/w"
        asked = [asyncio.create_task(store.read("/a")) for _ in range(3)]
        changes = asyncio.create_task(anext(watch))
        for _ in asked:
            await peer.request()
        peer.close()
        for task in asked:
            with pytest.raises(XenStoreLost, match="READ /a: xenstored closed the connection"):
                await task
        with pytest.raises(XenStoreLost):
            await changes
    assert store.lost is not None
    with pytest.raises(XenStoreLost):
        await store.write("/a", "b")


async def test_garbage_ends_the_connection(store: XenStore, peer: Peer) -> None:
    reading = asyncio.create_task(store.read("/a"))
    await peer.request()
    assert peer.end
    peer.end.sendall(os.urandom(12) + b"\xff\xff\xff\xff")
    with pytest.raises(XenStoreLost, match="claims 4294967295 bytes"):
        await reading
    assert isinstance(store.lost, XenStoreGarbage)


async def test_what_is_too_long_is_not_sent_and_harms_nobody(store: XenStore, peer: Peer) -> None:
    with pytest.raises(XenStoreLimit):
        await store.write("/a", "x" * 4096)
    reading = asyncio.create_task(store.read("/b"))
    op, req_id, _, payload = await peer.request()
    assert payload == b"/b\0"
    await peer.say(op, req_id, b"")
    assert not await reading


async def test_a_peer_that_takes_nothing_gets_the_requests_later(store: XenStore, peer: Peer) -> None:
    # More than the socket's buffer holds: the rest waits, and goes out in order.
    value = "x" * 4000
    async with asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(store.write(f"/{number}", value))
        await asyncio.sleep(0)
        for number in range(200):
            op, req_id, _, payload = await peer.request()
            assert payload.startswith(b"/%d\0" % number)
            await peer.say(op, req_id, b"OK\0")


async def _answer_watch(peer: Peer) -> None:
    op, req_id, _, payload = await peer.request()
    path, token, _ = payload.split(b"\0")
    await peer.say(op, req_id, b"OK\0")
    await peer.say(Op.WATCH_EVENT, 0, path + b"\0" + token + b"\0")


class TestBlocking:
    def test_nobody_there(self, tmp_path: Path) -> None:
        with pytest.raises(XenStoreLost, match="no-such-socket"):
            BlockingStore(tmp_path / "no-such-socket")

    def test_a_silent_xenstored_closes_it(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "s"))
            listening.listen()
            store = BlockingStore(tmp_path / "s", deadline_s=0.05)
            with pytest.raises(XenStoreSilent, match="READ /a"):
                store.read("/a")
            with pytest.raises(XenStoreLost, match="closed"):
                store.read("/a")

    def test_xenstored_gone(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "s"))
            listening.listen()
            store = BlockingStore(tmp_path / "s")
            end, _ = listening.accept()
            end.close()
            with pytest.raises(XenStoreLost):
                store.write("/a", "b")
            store.close()
