"""One TCP connection between two agents: opening, heartbeats, conversations, and how it ends.

A connection is opening, up, then down; it never comes back. Everything that waits on it then fails with the
first cause. Only short messages travel here (bulk data has channels of its own, understudy.link.channels), so a
heartbeat never waits behind a long transfer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

from understudy.errors import LinkLost, PeerError, UnderstudyError
from understudy.link.conversation import Conversation
from understudy.link.frame import PREAMBLE, Decoder, Frame, encode

__all__ = ["Connection"]

log = logging.getLogger("understudy.link")

OPENING_LIMIT_S = 3.0
# What may wait to be sent. Messages are small: this much means that the peer does not read.
BACKLOG_LIMIT_BYTES = 16 << 20

Opener = Callable[["Connection", Frame], None]
Ended = Callable[["Connection", LinkLost], None]


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        opener: Takes the first frame; answers by `activate` or `refuse`.
        ended: Called once when the connection is down, with the first cause.
        interval_s: Time between two heartbeats, seconds.
        limit_s: Silence longer than this is a loss, seconds.
    """

    def __init__(self, opener: Opener, ended: Ended, *, interval_s: float, limit_s: float) -> None:
        self._opener = opener
        self._ended = ended
        self._interval_s = interval_s
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._heard_s = self._loop.time()
        self._up = False
        self._conversations: dict[str, Conversation] = {}
        self._waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._served: dict[int, asyncio.Task[None]] = {}
        self._next_id = 1
        self._outgoing: list[bytes] = []
        self.lost: LinkLost | None = None  #: the first cause, once it is down
        self.address = "?"  #: the other end, for people

    # --- Opening -------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int | None:
        """The other side's protocol version, ``None`` before its preamble has come."""
        return self._decoder.version

    @property
    def local_address(self) -> str:
        """The numeric address of this end."""
        name = self._transport.get_extra_info("sockname") if self._transport else None
        return str(name[0]) if name else ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: asyncio has connected the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self.address = f"{peer[0]} port {peer[1]}" if peer else "?"
        _tune(transport.get_extra_info("socket"), self._limit_s)
        transport.write(PREAMBLE)
        self._timer = self._loop.call_later(
            OPENING_LIMIT_S, self.abort, f"{self.address} did not say who it is within {OPENING_LIMIT_S:g} s"
        )

    def send(self, header: Mapping[str, Any]) -> None:
        """Send one frame; nothing when the connection is down.

        Raises:
            ValueError: It is too large or no JSON.
            TypeError: It is no JSON.
        """
        data = encode(header)
        if self._transport is None or self.lost is not None:
            return
        # What is sent in one turn of the event loop leaves in one system call: with many guests that is most of what
        # the link costs.
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(data)

    def _flush(self) -> None:
        if not self._outgoing or self._transport is None:
            return
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > BACKLOG_LIMIT_BYTES:
            self.abort(f"{self.address} does not read what it is sent")

    def refuse(self, kind: str, reason: str) -> None:
        """Answer the other side's first frame with no, and close."""
        self.send({"t": "refuse", "kind": kind, "reason": reason})
        self.close(reason, goodbye=False)

    def activate(self, name: str) -> None:
        """Go up: heartbeats, and silence counts from now.

        Args:
            name: The other host, for people.
        """
        self._up = True
        self.address = f"{name} ({self.address})"
        self._heard_s = self._loop.time()
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._limit_s, self._listen)
        self._heartbeat()

    # --- Conversations -------------------------------------------------------------------------------------------

    def open(self, name: str) -> Conversation:
        """Open the conversation `name`; the other side opens the same name.

        Raises:
            ValueError: It is open.
        """
        if name in self._conversations:
            raise ValueError(f"the conversation {name!r} is open already")
        conversation = self._conversations[name] = Conversation(self, name)
        return conversation

    def forget(self, conversation: Conversation) -> None:
        """Drop a conversation that was closed."""
        self._conversations.pop(conversation.name, None)

    async def ask(
        self, name: str, method: str, params: Mapping[str, Any], timeout_s: float
    ) -> Mapping[str, Any]:
        """Carry out `PeerPort.request` for the conversation `name`."""
        if self.lost is not None:
            raise _again(self.lost)
        number = self._next_id
        self._next_id += 1
        answer: asyncio.Future[Mapping[str, Any]] = self._loop.create_future()
        self._waiting[number] = answer
        late = self._loop.call_later(timeout_s, self._give_up, number, method, timeout_s)
        try:
            self.send({"t": "request", "id": number, "to": name, "m": method, "p": params})
            return await answer
        finally:
            late.cancel()
            if self._waiting.pop(number, None) is not None and (answer.cancelled() or not answer.done()):
                self.send({"t": "cancel", "id": number})

    def _give_up(self, number: int, method: str, timeout_s: float) -> None:
        answer = self._waiting.pop(number)
        if not answer.done():
            text = f"{self.address} did not answer {method!r} within {timeout_s:g} s"
            answer.set_exception(LinkLost(text))
            self.send({"t": "cancel", "id": number})

    # --- What comes in -------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take bytes from the transport."""
        self._heard_s = self._loop.time()
        try:
            for frame in self._decoder.feed(data):
                if self.lost is not None:
                    return
                self._take(frame)
        except PeerError as error:
            self.abort(f"{self.address}: {error}")

    def _take(self, frame: Frame) -> None:
        header = frame.header
        kind = header["t"]
        if kind == "beat":
            return
        if not self._up:
            self._opener(self, frame)
            return
        try:
            self._dispatch(kind, header)
        except (KeyError, TypeError, AttributeError) as error:
            raise PeerError(f"a frame of type {kind!r} is malformed: {error!r}") from error

    def _dispatch(self, kind: str, header: Mapping[str, Any]) -> None:
        match kind:
            case "request":
                self._request(header["id"], header["to"], header["m"], header["p"])
            case "answer" | "error":
                answer = self._waiting.get(header["id"])
                if answer is None or answer.done():
                    return  # it was given up meanwhile
                if kind == "answer":
                    answer.set_result(header["p"])
                else:
                    answer.set_exception(PeerError(str(header["reason"]), str(header["kind"])))
            case "cancel":
                task = self._served.get(header["id"])
                if task:
                    task.cancel()
            case "note":
                conversation = self._conversations.get(header["to"])
                if conversation:
                    conversation.take_note(header["m"], header["p"])
            case "bye":
                self.abort(f"{self.address} closed the link: {header['reason']}")
            case _:
                raise PeerError(f"a frame of the unknown type {kind!r} came")

    def _request(self, number: int, name: str, method: str, params: Mapping[str, Any]) -> None:
        conversation = self._conversations.get(name)
        if conversation is None or conversation.requests is None:
            reason = f"there is no conversation {name!r} here (asked for {method!r})"
            self.send({"t": "error", "id": number, "kind": "StateError", "reason": reason})
            return
        work = conversation.requests(method, params)
        task = self._loop.create_task(self._answer(number, method, work), name=f"serve {name} {method}")
        self._served[number] = task
        conversation.serving.add(task)
        task.add_done_callback(conversation.serving.discard)
        task.add_done_callback(lambda _: self._served.pop(number, None))

    async def _answer(self, number: int, method: str, work: Any) -> None:
        try:
            answer: dict[str, Any] = {"t": "answer", "id": number, "p": await work}
            self.send(answer)
        except asyncio.CancelledError:
            self.send({"t": "error", "id": number, "kind": "StateError", "reason": f"{method} was cancelled"})
            raise
        except Exception as error:
            if not isinstance(error, UnderstudyError | ExceptionGroup):
                log.exception("serving %r for %s failed", method, self.address)
            reason = _reason(error)
            self.send({"t": "error", "id": number, "kind": type(error).__name__, "reason": reason})

    # --- Life and death ------------------------------------------------------------------------------------------

    def _heartbeat(self) -> None:
        self.send({"t": "beat"})
        self._beat = self._loop.call_later(self._interval_s, self._heartbeat)

    def _listen(self) -> None:
        # After a stall of this process the event loop delivers what is in the socket before it runs timers, so a
        # peer that did speak is heard before its silence is judged.
        silent_s = self._loop.time() - self._heard_s
        if silent_s < self._limit_s:
            self._timer = self._loop.call_later(self._limit_s - silent_s, self._listen)
        else:
            self.abort(f"{self.address} has been silent for {silent_s * 1000:.0f} ms")

    def eof_received(self) -> None:
        """Take the end of the stream: the other side is gone."""
        self.abort(f"{self.address} closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the transport's end."""
        self._down(
            f"the connection to {self.address} broke: {exc}"
            if exc
            else f"{self.address} closed the connection"
        )

    def close(self, reason: str, *, goodbye: bool = True) -> None:
        """Close on purpose, after what was sent has left; the other side is told why."""
        if goodbye and self._up:
            self.send({"t": "bye", "reason": reason})
        self._flush()
        self._down(reason)
        if self._transport:
            self._transport.close()
            # A peer that does not read must not keep the socket alive for ever.
            self._loop.call_later(OPENING_LIMIT_S, self._transport.abort)

    def abort(self, cause: str) -> None:
        """Close at once because of `cause`."""
        self._down(cause)
        if self._transport:
            self._transport.abort()

    def _down(self, cause: str) -> None:
        if self.lost is not None:
            return
        silent_ns = round((self._loop.time() - self._heard_s) * 1e9)
        self.lost = LinkLost(cause, silent_ns=silent_ns)
        for timer in (self._timer, self._beat):
            if timer:
                timer.cancel()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_again(self.lost))
        for conversation in list(self._conversations.values()):
            conversation.lose(self.lost)
        self._ended(self, self.lost)


def _again(lost: LinkLost) -> LinkLost:
    # One instance raised in many tasks would collect all their tracebacks.
    return LinkLost(str(lost), silent_ns=lost.silent_ns)


def _reason(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_reason(each) for each in error.exceptions)
    return str(error) or type(error).__name__


def _tune(sock: socket.socket, limit_s: float) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Unacknowledged data ends the connection also while this process cannot run its own timer.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limit_s * 1000))
