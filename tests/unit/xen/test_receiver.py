"""The secondary's end: nothing but whole acknowledged checkpoints for libxl, wherever the stream is cut."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from tests.testbeds.rounds import rounds
from tests.unit.xen.link import (
    CONFIG,
    Listener,
    Reader,
    Stream,
    descriptors,
    pieces,
    said,
    stream,
    tcp_pair,
)
from understudy.errors import HypervisorError, PeerError, StateError, UnderstudyError
from understudy_xen import receiver as module
from understudy_xen.receiver import Receiver
from understudy_xen.streams.errors import StreamError
from understudy_xen.wire import HELLO_BYTES, Ack, Coding, Refusal

LIMIT_BYTES = 1 << 20
SMALL = stream(3)


@dataclass
class Secondary:
    """A receiver, the primary's end of its connection, and what the receiver told."""

    receiver: Receiver
    sock: socket.socket
    listener: Listener
    reader: Reader
    loaded: list[int] = field(default_factory=list)
    lost: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    async def copy(self) -> None:
        assert await self.receiver.config(10) == CONFIG
        await self.receiver.copied(self.reader.target, 10)

    async def why_lost(self) -> str:
        return await asyncio.wait_for(self.lost.get(), 10)

    async def promote(self) -> bytes:
        self.receiver.cut()
        await self.receiver.hand_over(10)
        return await asyncio.to_thread(self.reader.result)

    async def send(self, data: bytes) -> None:
        await asyncio.to_thread(self.sock.sendall, data)

    async def answers(self, count: int) -> list[Ack | Refusal]:
        return await asyncio.to_thread(self.listener.next, count)

    async def rest(self) -> list[Ack | Refusal]:
        return await asyncio.to_thread(self.listener.rest)


@asynccontextmanager
async def secondary(*, limit_bytes: int = LIMIT_BYTES, reads: bool = True) -> AsyncIterator[Secondary]:
    sock, other = tcp_pair()
    reader = Reader(reads=reads)
    loaded: list[int] = []
    lost: asyncio.Queue[str] = asyncio.Queue()
    made = Receiver(other, hold_limit_bytes=limit_bytes, acknowledged=loaded.append, lost=lost.put_nowait)
    try:
        yield Secondary(made, sock, Listener(sock), reader, loaded, lost)
    finally:
        sock.close()
        if made._pipe is None:
            os.close(reader.target)
        await made.close()
        await asyncio.to_thread(reader.close)
        for thread in (made._taker, made._giver):
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert not {each for each in descriptors() - before if "eventpoll" not in each and "socket" not in each}


@pytest.mark.parametrize("coding", list(Coding))
@pytest.mark.parametrize("seed", range(3))
async def test_the_first_copy_passes_checkpoints_are_held(coding: Coding, seed: int) -> None:
    async with secondary() as side:
        for piece in pieces(said(SMALL.whole[: SMALL.ends[0]], coding, seed), seed):
            await side.send(piece)
        await side.copy()
        first = len(SMALL.head) + len(SMALL.parts[0])
        assert await side.answers(1) == [Ack(1, first, 0)]
        assert side.receiver.loaded == 0
    async with secondary() as side:
        for piece in pieces(said(SMALL.whole, coding, seed), seed):
            await side.send(piece)
        await side.copy()
        heard = await side.answers(4)
        assert heard[1:] == [Ack(count, len(SMALL.parts[count - 1]), 0) for count in (2, 3, 4)]
        assert await side.promote() == SMALL.whole[len(SMALL.head) :]
        assert side.receiver.loaded == 3
        await asyncio.sleep(0)
        assert side.loaded == [1, 2, 3]
        assert side.lost.empty()


async def test_nothing_of_a_checkpoint_is_handed_over_before_it_is_whole() -> None:
    async with secondary() as side:
        await side.send(said(SMALL.whole[: SMALL.ends[1] - 1], Coding.PLAIN))
        await side.copy()
        await side.answers(1)
        async with asyncio.timeout(10):
            while (  # noqa: ASYNC110
                side.receiver.held.partial_bytes < len(SMALL.parts[1]) - 1
                or len(side.reader.got) < len(SMALL.parts[0])
            ):
                await asyncio.sleep(0.001)
        assert bytes(side.reader.got) == SMALL.parts[0]
        assert side.receiver.held.whole_bytes == 0
        await side.send(SMALL.whole[SMALL.ends[1] - 1 : SMALL.ends[1]])
        await side.answers(1)
        assert await side.promote() == SMALL.parts[0] + SMALL.parts[1]
        assert side.receiver.held == module.Held(0, 0, len(SMALL.parts[1]))


async def test_pages_are_counted() -> None:
    made = stream(2, [700, 3, 0])
    async with secondary() as side:
        await side.send(said(made.whole[: made.ends[0]], Coding.PLAIN))
        await side.copy()
        await side.send(made.whole[made.ends[0] :])
        assert [answer.pages for answer in await side.answers(3) if isinstance(answer, Ack)] == [700, 3, 0]


async def cut_at(made: Stream, offset: int, coding: Coding) -> tuple[list[Ack | Refusal], bytes | None, int]:
    """Return what was answered, what libxl got and what is loaded when the primary dies at an offset."""
    async with secondary() as side:
        await side.send(said(made.whole[:offset], coding, offset))
        side.sock.shutdown(socket.SHUT_WR)
        try:
            await side.copy()
        except UnderstudyError:
            assert offset < made.ends[0]
            side.receiver.cut()
            with pytest.raises(StateError, match="the first copy is not whole"):
                await side.receiver.hand_over(1)
            await side.receiver.close()
            got = await asyncio.to_thread(side.reader.result) if side.receiver._pipe is not None else b""
        else:
            why = await side.why_lost()
            assert ("has ended the stream" in why) == (offset in made.ends), why
            got = await side.promote()
        return await side.rest(), got, side.receiver.loaded


@pytest.mark.parametrize("coding", list(Coding))
async def test_i1_cut_at_every_byte(coding: Coding) -> None:
    for offset in range(0, len(SMALL.whole) + 1, rounds(3, 1) if coding is Coding.ZSTD else 1):
        heard, got, loaded = await cut_at(SMALL, offset, coding)
        whole = sum(end <= offset for end in SMALL.ends)
        assert [answer.count for answer in heard if isinstance(answer, Ack)] == list(range(1, whole + 1)), (
            offset
        )
        assert len(heard) == whole, offset
        assert loaded == max(0, whole - 1), offset
        assert got == SMALL.handed(offset), offset


@pytest.mark.parametrize("seed", range(rounds(60, 1000)))
async def test_i1_cut_against_acknowledgements(seed: int) -> None:
    # The primary writes as fast as it is answered; the cut comes at any moment of it. What it has read of answers,
    # before the cut or after, is never more than what is loaded, and exactly that is handed over.
    made, random_ = stream(40), random.Random(seed)

    def primary(side: Secondary) -> None:
        with suppress(OSError):
            for part in made.parts[1:]:
                side.sock.sendall(part)
                side.listener.next(1)

    async with secondary() as side:
        await side.send(said(made.head + made.parts[0], Coding.PLAIN))
        await side.copy()
        await side.answers(1)
        thread = threading.Thread(target=primary, args=(side,), daemon=True)
        thread.start()
        await asyncio.sleep(random_.random() * 0.01)
        before = len(side.listener.heard) - 1
        loaded = side.receiver.cut()
        assert loaded >= before
        got = await side.promote()
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
        assert side.receiver.loaded == loaded
        assert loaded >= len(side.listener.heard) - 1
        assert got == made.parts[0] + b"".join(made.parts[1 : loaded + 1])
        assert side.lost.empty()


async def test_i1_nothing_is_acknowledged_when_libxl_has_ended() -> None:
    async with secondary() as side:
        await side.send(said(SMALL.head + SMALL.parts[0], Coding.PLAIN))
        reading, target = os.pipe()
        await side.receiver.config(10)
        await asyncio.gather(
            side.receiver.copied(target, 10), asyncio.to_thread(os.read, reading, len(SMALL.parts[0]))
        )
        assert [answer.count for answer in await side.answers(1) if isinstance(answer, Ack)] == [1]
        os.close(reading)  # nothing is under way, and it is noticed all the same
        assert "libxl takes no more of the stream: it has closed its end" in await side.why_lost()
        (refusal,) = await side.answers(1)
        assert isinstance(refusal, Refusal)
        assert "libxl takes no more of the stream" in refusal.reason
        side.receiver.cut()
        with pytest.raises(HypervisorError, match="libxl did not take"):
            await side.receiver.hand_over(10)
        os.close(side.reader.target)


async def test_i7_libxl_ends_in_the_middle_of_a_checkpoint() -> None:
    made = stream(2, [0, 600, 1])
    async with secondary(limit_bytes=8 << 20, reads=False) as side:
        await side.send(said(made.head + made.parts[0], Coding.PLAIN))
        await side.copy()
        await side.send(made.parts[1])
        assert len(await side.answers(2)) == 2
        assert side.receiver.held.whole_bytes == len(made.parts[1])  # its pipe is full, the rest waits
        reading, side.reader.fd = side.reader.fd, os.dup(0)
        os.close(reading)
        assert "libxl takes no more of the stream: it has closed its end" in await side.why_lost()
        await side.send(made.parts[2])
        assert [type(answer) for answer in await side.answers(1)] == [Refusal]
        assert side.receiver.cut() == 1
        with pytest.raises(HypervisorError, match="libxl did not take"):
            await side.receiver.hand_over(10)


async def test_the_primary_hears_why_also_from_a_secondary_that_cuts_at_once() -> None:
    made = stream(2, [0, 600])
    async with secondary(limit_bytes=1000) as side:
        post = side.receiver._post

        def cuts(_why: str) -> None:
            side.receiver.cut()

        def slowly(call: Callable[..., object], *arguments: object) -> None:
            post(call, *arguments)
            time.sleep(0.05)  # the event loop is quicker than the thread that tells it

        side.receiver._tell_lost = cuts
        side.receiver._post = slowly  # type: ignore[method-assign]
        await side.send(said(made.head + made.parts[0], Coding.PLAIN))
        await side.copy()
        with suppress(ConnectionError):
            await side.send(made.parts[1])
        (_, refusal) = await side.answers(2)
        assert isinstance(refusal, Refusal)
        assert "does not fit into hold_limit" in refusal.reason


async def test_i4_one_whole_checkpoint_and_one_incoming() -> None:
    # libxl stands still: the next checkpoint comes in whole, but is acknowledged only when there is room for it.
    made = stream(4, [0, 600, 600, 600, 600])
    size = len(made.parts[1])
    async with secondary(limit_bytes=3 * size, reads=False) as side:
        await side.send(said(made.head + made.parts[0], Coding.PLAIN))
        await side.copy()
        writer = asyncio.create_task(side.send(b"".join(made.parts[1:])))
        heard = await side.answers(2)
        async with asyncio.timeout(10):
            while side.receiver.held.partial_bytes < size:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert side.receiver.held.whole_bytes == size
        assert side.receiver.held.partial_bytes == size
        assert side.receiver.loaded == 1
        side.reader.may_read.set()
        heard += await side.answers(3)
        await writer
        assert [answer.count for answer in heard if isinstance(answer, Ack)] == [1, 2, 3, 4, 5]
        assert await side.promote() == b"".join(made.parts)


async def test_i4_less_room_than_two_checkpoints_slows_down_only() -> None:
    made = stream(3, [0, 600, 600, 600])
    async with secondary(limit_bytes=len(made.parts[1]) + 4096, reads=False) as side:
        await side.send(said(made.head + made.parts[0], Coding.PLAIN))
        await side.copy()
        writer = asyncio.create_task(side.send(b"".join(made.parts[1:])))
        assert len(await side.answers(2)) == 2
        await asyncio.sleep(0.05)
        held = side.receiver.held
        assert held.whole_bytes + held.partial_bytes <= len(made.parts[1]) + 4096
        side.reader.may_read.set()
        assert len(await side.answers(2)) == 2
        await writer
        assert await side.promote() == b"".join(made.parts)


@pytest.mark.parametrize("coding", list(Coding))
async def test_i4_a_checkpoint_beyond_the_limit_is_refused(coding: Coding) -> None:
    made = stream(2, [2, 1, 100])
    async with secondary(limit_bytes=100_000) as side:
        await side.send(said(made.whole, coding, 1))
        await side.copy()
        why = await side.why_lost()
        assert "does not fit into hold_limit" in why
        assert "100000 are allowed" in why
        heard = await side.answers(3)
        assert [type(answer) for answer in heard] == [Ack, Ack, Refusal]
        assert heard[-1] == Refusal(why)
        # What was acknowledged before is as good as ever.
        assert side.receiver.held.partial_bytes == 0
        assert await side.promote() == made.parts[0] + made.parts[1]


async def test_i4_libxl_that_stands_still_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIBXL_S", 0.05)
    made = stream(2, [0, 600, 1])
    async with secondary(limit_bytes=8 << 20, reads=False) as side:
        await side.send(said(made.whole, Coding.PLAIN))
        await side.copy()
        assert "libxl has not taken the checkpoint before" in await side.why_lost()
        assert [type(answer) for answer in await side.answers(3)] == [Ack, Ack, Refusal]
        side.receiver.cut()
        with pytest.raises(HypervisorError, match=r"has not taken .* within 0.05 s"):
            await side.receiver.hand_over(0.05)
        # It may still take it, and then gets all of it.
        side.reader.may_read.set()
        await side.receiver.hand_over(10)
        assert await asyncio.to_thread(side.reader.result) == made.parts[0] + made.parts[1]


async def test_garbage_after_a_checkpoint_is_refused_and_the_checkpoint_kept() -> None:
    async with secondary() as side:
        await side.send(said(SMALL.whole[: SMALL.ends[1]] + b"\xee" * 64, Coding.PLAIN))
        await side.copy()
        why = await side.why_lost()
        assert "libxc" in why
        assert [type(answer) for answer in await side.answers(3)] == [Ack, Ack, Refusal]
        assert await side.promote() == SMALL.handed(SMALL.ends[1])


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", "not with the greeting"),
        (said(b"", Coding.PLAIN) + bytes(64), "offset 0"),
        (said(b"", Coding.ZSTD) + bytes(64), "claims 0 bytes"),
        (said(SMALL.whole, Coding.PLAIN)[: HELLO_BYTES + 20], "the primary's end of the stream is closed"),
        (b"", "the primary's end of the stream is closed"),
    ],
)
async def test_what_is_no_stream_is_refused(data: bytes, wrong: str) -> None:
    async with secondary() as side:
        await side.send(data)
        side.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(UnderstudyError, match=wrong) as raised:
            await side.receiver.config(10)
        assert isinstance(raised.value, PeerError | HypervisorError | StreamError)
        await asyncio.sleep(0)
        assert side.lost.empty()  # whoever waits was told


async def test_i4_a_primary_that_says_nothing() -> None:
    async with secondary() as side:
        with pytest.raises(HypervisorError, match=r"configuration did not come within 0\.01 s"):
            await side.receiver.config(0.01)
        await side.send(said(SMALL.whole[: SMALL.ends[0] - 1], Coding.PLAIN))
        assert await side.receiver.config(10) == CONFIG
        with pytest.raises(HypervisorError, match=r"the first copy did not come within 0\.01 s"):
            await side.receiver.copied(side.reader.target, 0.01)


async def test_the_first_copy_goes_to_one_restore() -> None:
    async with secondary() as side:
        await side.send(said(SMALL.whole[: SMALL.ends[0]], Coding.PLAIN))
        await side.copy()
        reading, target = os.pipe()
        with pytest.raises(StateError, match="one restore"):
            await side.receiver.copied(target, 1)
        assert os.read(reading, 1) == b""  # it is closed
        os.close(reading)
        with pytest.raises(StateError, match="the stream still runs"):
            await side.receiver.hand_over(1)


async def test_the_restores_stream_is_taken_although_nobody_waits_for_it() -> None:
    async with secondary() as side:
        copying = asyncio.ensure_future(side.receiver.copied(side.reader.target, 10))
        copying.cancel()  # before its first step
        await asyncio.wait({copying})
        await side.receiver.close()
        assert await asyncio.to_thread(side.reader.result) == b""


async def test_cut_before_anything_and_twice() -> None:
    async with secondary() as side:
        waiting = asyncio.create_task(side.receiver.config(10))
        await asyncio.sleep(0)
        assert side.receiver.cut() == 0
        assert side.receiver.cut() == 0
        with pytest.raises(HypervisorError, match="the stream was cut"):
            await waiting
        assert await side.rest() == []
        assert side.lost.empty()


async def test_cut_while_the_first_copy_is_blocked() -> None:
    made = stream(0, [1000])
    async with secondary(reads=False) as side:
        writer = asyncio.create_task(side.send(said(made.whole, Coding.PLAIN)))
        await side.receiver.config(10)
        copying = asyncio.create_task(side.receiver.copied(side.reader.target, 10))
        await asyncio.sleep(0.05)
        assert not copying.done()
        assert side.receiver.cut() == 0
        with pytest.raises(HypervisorError, match="the stream was cut"):
            await copying
        await asyncio.gather(writer, return_exceptions=True)


async def test_i4_close_while_everything_is_blocked() -> None:
    made = stream(2, [0, 600, 600])
    async with secondary(limit_bytes=8 << 20, reads=False) as side:
        await side.send(said(made.head + made.parts[0], Coding.PLAIN))
        await side.copy()
        writer = asyncio.create_task(side.send(made.parts[1] + made.parts[2]))
        await side.answers(2)
        side.receiver.cut()
        handing = asyncio.create_task(side.receiver.hand_over(10))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(4):
            await asyncio.gather(side.receiver.close(), side.receiver.close())
        with pytest.raises(HypervisorError, match="closed"):
            await handing
        await asyncio.gather(writer, return_exceptions=True)
        await side.receiver.close()


async def test_close_survives_its_cancellation() -> None:
    async with secondary(reads=False) as side:
        await side.send(said(SMALL.whole, Coding.PLAIN))
        await side.copy()
        closing = asyncio.create_task(side.receiver.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await side.receiver.close()
        assert side.receiver._primary._sock.fileno() == -1
        side.reader.may_read.set()
        await asyncio.to_thread(side.reader.result)


async def test_hand_over_survives_its_cancellation() -> None:
    made = stream(1, [0, 600])
    async with secondary(limit_bytes=8 << 20, reads=False) as side:
        await side.send(said(made.whole, Coding.PLAIN))
        await side.copy()
        await side.answers(2)
        side.receiver.cut()
        handing = asyncio.create_task(side.receiver.hand_over(10))
        await asyncio.sleep(0.01)
        handing.cancel()
        await asyncio.gather(handing, return_exceptions=True)
        side.reader.may_read.set()
        assert await side.promote() == b"".join(made.parts)


async def test_a_primary_that_reads_no_answers_is_gone() -> None:
    # Its answers fill the connection; the cut still comes through, and counts what was sent alone.
    made = stream(1)
    sock, other = socket.socketpair()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    reader, lost = Reader(), asyncio.Queue[str]()
    taken: list[int] = []
    side = Receiver(other, hold_limit_bytes=LIMIT_BYTES, acknowledged=taken.append, lost=lost.put_nowait)
    await asyncio.to_thread(sock.sendall, said(made.head + made.parts[0], Coding.PLAIN))
    await side.config(10)
    await side.copied(reader.target, 10)
    sent = asyncio.create_task(asyncio.to_thread(sock.sendall, made.parts[1] * 100))
    assert "does not read what is answered" in await asyncio.wait_for(lost.get(), 10)
    loaded = side.cut()
    await side.hand_over(10)
    heard = await asyncio.to_thread(Listener(sock).rest)
    assert [answer.count for answer in heard if isinstance(answer, Ack)] == list(range(1, loaded + 2))
    assert await asyncio.to_thread(reader.result) == made.parts[0] + made.parts[1] * loaded
    await asyncio.gather(sent, return_exceptions=True)
    await side.close()
    sock.close()
    await asyncio.to_thread(reader.close)


async def test_no_json_configuration_is_refused() -> None:
    old = bytearray(SMALL.whole)
    old[36] &= ~1  # the flag that says JSON
    async with secondary() as side:
        await side.send(said(bytes(old), Coding.PLAIN))
        with pytest.raises(HypervisorError, match="not libxl's JSON"):
            await side.receiver.config(10)
        (refusal,) = await side.answers(1)
        assert isinstance(refusal, Refusal)
