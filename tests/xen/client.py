"""A client of the guest's counter: one TCP connection, words sent without waiting for the replies of those before.

The guest answers word K of a connection with ``N K TOTAL UPTIME``: N counts the words of the connection, TOTAL all
words that the guest has ever taken, in its memory alone. With one client each reply's TOTAL is one more than the one
before: whatever a client has seen counted stays counted, and nothing is counted twice.
"""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

from tests.testbeds.xen.guests import COUNTER_PORT, GUEST
from tests.testbeds.xen.pair import XenPair

__all__ = ["CounterClient", "Reply"]

_CONNECT_S: Final = 60.0
_EVERY_S: Final = 0.04
_AHEAD: Final = (
    400  # words that may wait for their reply; more would only fill the socket while the guest is away
)


@dataclass(frozen=True, slots=True)
class Reply:
    """One line of the guest's."""

    number: int
    word: int
    total: int
    uptime_s: float
    seen_s: float  #: when it was read, monotonic clock


class CounterClient:
    """Talks to the counter until it is closed. An asynchronous context manager.

    Args:
        pair: The network.
        address: Of the guest.
        connect_s: How long it may take to boot.
    """

    def __init__(self, pair: XenPair, *, address: str = GUEST, connect_s: float = _CONNECT_S) -> None:
        self._connect_s = connect_s
        self._pair = pair
        self._address = address
        self.sent = 0
        self.replies: list[Reply] = []
        self.ended = ""  #: why the connection is no more, ``""``: it is
        self._came = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        reader, self._writer = await asyncio.open_connection(sock=await self._connected())
        self._tasks = [
            asyncio.create_task(self._talk(self._writer)),
            asyncio.create_task(self._listen(reader)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._writer is not None:
            self._writer.transport.abort()

    async def _connected(self) -> socket.socket:
        deadline = time.monotonic() + self._connect_s
        while True:
            try:
                return await asyncio.to_thread(self._pair.client.connect, self._address, COUNTER_PORT, 3.0)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.3)

    async def more(self, count: int, *, timeout_s: float) -> list[Reply]:
        """Wait for `count` further replies and return them.

        Raises:
            TimeoutError: They did not come in time.
            ConnectionError: The connection is no more.
        """
        begin = len(self.replies)
        async with asyncio.timeout(timeout_s), self._came:
            await self._came.wait_for(lambda: self.ended or len(self.replies) >= begin + count)
        if self.ended:
            raise ConnectionError(self.ended)
        return self.replies[begin : begin + count]

    def verify(self) -> None:
        """Check every reply so far against the one before it."""
        for at, reply in enumerate(self.replies, 1):
            assert (reply.number, reply.word) == (at, at), f"reply {at} is {reply}"
        for before, after in zip(self.replies, self.replies[1:], strict=False):
            assert after.total == before.total + 1, f"{before} was followed by {after}"
            assert after.uptime_s >= before.uptime_s, f"{before} was followed by {after}"

    def longest_gap_s(self) -> float:
        """Return the longest time between two replies, seconds."""
        return max(
            (b.seen_s - a.seen_s for a, b in zip(self.replies, self.replies[1:], strict=False)), default=0.0
        )

    async def _talk(self, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                if self.sent - len(self.replies) < _AHEAD:
                    self.sent += 1
                    writer.write(f"{self.sent}\n".encode())
                    await writer.drain()
                await asyncio.sleep(_EVERY_S)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        ended = "the guest closed the connection"
        try:
            while line := await reader.readline():
                number, word, total, uptime = line.split()
                reply = Reply(int(number), int(word), int(total), float(uptime), time.monotonic())
                async with self._came:
                    self.replies.append(reply)
                    self._came.notify_all()
        except OSError as error:
            ended = str(error)
        async with self._came:
            self.ended = ended
            self._came.notify_all()
