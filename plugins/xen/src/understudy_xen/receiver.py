"""The secondary's end of a checkpoint stream: each checkpoint held until it is whole, acknowledged, then handed on.

libxl's own receiver spins for ever when its stream ends between CHECKPOINT and CHECKPOINT_END, and may crash on a
short header. Here nothing reaches it but whole checkpoints: what came of the last one when the stream was cut is
dropped. The first copy, from which nobody can be promoted, is passed through as it comes.

Two threads, because both the link and libxl block: one takes the stream, holds and acknowledges, the other hands
acknowledged checkpoints to libxl. So at most one whole checkpoint waits while the next one is coming in; what both may
hold has a limit, beyond which the receiver refuses, and the primary goes on unprotected.

Source: tools/libs/light/libxl_stream_read.c and tools/libs/guest/xg_sr_restore.c of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from understudy.errors import HypervisorError, UnderstudyError
from understudy_xen.coding import Decoder
from understudy_xen.streams.formats import Form, Layer, LibxcType
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.frames import Frame
from understudy_xen.wire import HELLO_BYTES, Ack, Coding, Hello, Refusal

__all__ = ["Held", "Receiver"]

_log = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 1 << 20
_PAGE_AND_PFN_BYTES: Final = 4096 + 8
_PAGE_DATA_HEAD_BYTES: Final = 8
_END_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Held:
    """What a receiver holds now."""

    whole_bytes: int  #: of acknowledged checkpoints that libxl has not taken yet
    partial_bytes: int  #: of the one that is coming in
    largest_bytes: int  #: of the checkpoints so far, without the first copy


class _Cut(Exception):
    # No error: the way out of the thread.
    pass


class Receiver:
    """Takes one checkpoint stream.

    Args:
        sock: Connected to the primary's agent, blocking; owned from now on.
        hold_limit_bytes: How much may be held.
        acknowledged: Told in the event loop how many whole checkpoints are held since the stream began, the first copy
            not counted, after each acknowledgement.
        lost: Told in the event loop, once, why the stream has ended if nobody cut it.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        hold_limit_bytes: int,
        acknowledged: Callable[[int], None],
        lost: Callable[[str], None],
    ) -> None:
        self._sock = sock
        self._limit_bytes = hold_limit_bytes
        self._tell_acknowledged = acknowledged
        self._tell_lost = lost
        self._loop = asyncio.get_running_loop()
        self._config: asyncio.Future[bytes] = self._loop.create_future()
        self._copied: asyncio.Future[None] = self._loop.create_future()
        self._framer = Framer(Form.XL)
        self._lock = threading.Lock()  # between an acknowledgement and the cut
        self._cut = False
        self._acked = 0  # the first copy included
        self._reason = ""
        self._target = -1  # the restore's stream
        self._has_target = threading.Event()
        self._pieces: SimpleQueue[list[bytes] | None] = SimpleQueue()
        self._pages = 0  # with content, of the checkpoint that is coming in
        self._whole_bytes = self._partial_bytes = self._largest_bytes = 0
        self._handed = asyncio.Event()
        self._failure: Exception | None = None
        self._taker = threading.Thread(target=self._take, name="xen: receive", daemon=True)
        self._giver = threading.Thread(target=self._give, name="xen: restore", daemon=True)
        self._taker.start()

    # --- The event loop's side ---------------------------------------------------------------------------------------

    @property
    def loaded(self) -> int:
        """How many checkpoints after the first copy are acknowledged; final after `cut`."""
        return max(0, self._acked - 1)

    @property
    def held(self) -> Held:
        """What is held now."""
        return Held(self._whole_bytes, self._partial_bytes, self._largest_bytes)

    async def config(self, timeout_s: float) -> bytes:
        """Return the guest's configuration, with which the stream begins: libxl's JSON.

        Raises:
            HypervisorError: It did not come; or what came is no stream.
        """
        return await self._first(self._config, timeout_s, "the guest's configuration")

    async def copied(self, target: int, timeout_s: float) -> None:
        """Pass the first copy through to `target`, and return when it is whole and acknowledged.

        Args:
            target: Writing end of the pipe that libxl reads; owned from now on.
            timeout_s: How long it may take.

        Raises:
            HypervisorError: The stream ended before, or libxl did not take it.
        """
        self._target = target
        self._has_target.set()
        self._giver.start()
        await self._first(self._copied, timeout_s, "the first copy")

    def cut(self) -> int:
        """End the stream; from now on nothing is acknowledged.

        Returns:
            `loaded`, final.
        """
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._cut = True
        self._has_target.set()
        return self.loaded

    async def hand_over(self, timeout_s: float) -> None:
        """After `cut`: see everything acknowledged handed to libxl, then end its stream.

        Raises:
            HypervisorError: libxl did not take all of it; the copy cannot be used.
        """
        self._pieces.put(None)
        try:
            async with asyncio.timeout(timeout_s):
                await self._handed.wait()
        except TimeoutError:
            raise HypervisorError(
                f"libxl has not taken the acknowledged checkpoints within {timeout_s:g} s"
            ) from None
        if self._failure is not None:
            raise HypervisorError(
                f"libxl did not take an acknowledged checkpoint: {self._failure}"
            ) from self._failure

    async def close(self) -> None:
        """End the stream and both threads. Idempotent. Whoever owns the restore kills it first, or a write may hang."""
        self.cut()
        self._pieces.put(None)
        for thread in (self._taker, self._giver):
            if thread.is_alive():
                await asyncio.to_thread(thread.join, _END_S)
        self._sock.close()

    async def _first(
        self, answer: asyncio.Future[bytes] | asyncio.Future[None], timeout_s: float, what: str
    ) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(answer) or b""
        except TimeoutError:
            raise HypervisorError(f"{what} did not come within {timeout_s:g} s") from None

    def _ended(self, error: Exception) -> None:
        # In the event loop. Whoever waits for the beginning hears it there; later it is an event.
        waiting = [answer for answer in (self._config, self._copied) if not answer.done()]
        for answer in waiting:
            answer.set_exception(error)
            answer.exception()  # it may be that nobody asks
        if not waiting and not self._cut:
            self._tell_lost(str(error))

    def _post(self, call: Callable[..., object], *arguments: object) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody listens
            self._loop.call_soon_threadsafe(call, *arguments)

    # --- The thread that takes ---------------------------------------------------------------------------------------

    def _take(self) -> None:
        try:
            self._take_all()
        except _Cut:
            self._post(self._ended, HypervisorError("the stream was cut"))
        except (OSError, UnderstudyError) as error:
            self._refuse(str(error)) if isinstance(error, UnderstudyError) else None
            self._post(
                self._ended, error if isinstance(error, UnderstudyError) else HypervisorError(str(error))
            )

    def _take_all(self) -> None:
        hello = Hello.decode(self._exactly(HELLO_BYTES))
        decoder = Decoder() if hello.coding is Coding.ZSTD else None
        head = bytearray()
        held: list[bytes] = []
        start = 0  # offset of the first byte of `held` in the stream
        while True:
            data = self._receive(_CHUNK_BYTES)
            for chunk in decoder.feed(data) if decoder is not None else (data,):
                frames = self._framer.feed(chunk)
                rest = chunk
                if not self._has_target.is_set():
                    head += chunk
                    end = next((frame.end for frame in frames if frame.layer is Layer.XL), None)
                    if end is None:
                        continue
                    self._begin()
                    rest, start = bytes(head[end:]), end
                    head.clear()
                if self._acked == 0:
                    rest, start = self._pass_through(rest, start, frames)
                    if self._acked == 0:
                        continue
                held.append(rest)
                held, start = self._whole(held, start, frames)

    def _begin(self) -> None:
        preamble = self._framer.preamble
        if preamble is None or not preamble.is_json:
            raise HypervisorError("the stream's configuration is not libxl's JSON; it is of Xen 4.5 or older")
        self._post(_settle, self._config, bytes(preamble.config).rstrip(b"\0"))
        self._has_target.wait()
        if self._cut:
            raise _Cut

    def _pass_through(self, chunk: bytes, start: int, frames: list[Frame]) -> tuple[bytes, int]:
        # Returns what is left of the chunk behind the first copy, and where that begins.
        end = next((frame.end for frame in frames if frame.ends_checkpoint), None)
        size = len(chunk) if end is None else end - start
        _write_all(self._target, chunk[:size])
        if end is not None:
            self._acknowledge([], end, 0)
            self._post(_settle, self._copied, None)
        return chunk[size:], start + size

    def _whole(self, held: list[bytes], start: int, frames: list[Frame]) -> tuple[list[bytes], int]:
        for frame in frames:
            if frame.layer is Layer.LIBXC and frame.type == LibxcType.PAGE_DATA:
                self._pages += (frame.length - _PAGE_DATA_HEAD_BYTES) // _PAGE_AND_PFN_BYTES
            if frame.ends_checkpoint and frame.end > start:
                whole, held = _split(held, frame.end - start)
                self._acknowledge(whole, frame.end - start, self._pages)
                start, self._pages = frame.end, 0
        self._partial_bytes = sum(map(len, held))
        if self._whole_bytes + self._partial_bytes > self._limit_bytes:
            raise HypervisorError(
                f"a checkpoint does not fit into hold_limit: {self._partial_bytes} bytes of it have come, "
                f"{self._whole_bytes} of the one before are still held, {self._limit_bytes} are allowed"
            )
        return held, start

    def _acknowledge(self, whole: list[bytes], size: int, pages: int) -> None:
        # The cut reads the number under the same lock: what was answered is held, what is not held is never answered.
        with self._lock:
            if self._cut:
                raise _Cut
            self._acked += 1
            if whole:
                self._whole_bytes += size
                self._largest_bytes = max(self._largest_bytes, size)
                self._pieces.put(whole)
            self._sock.sendall(Ack(self._acked, size, pages).encode())
        if self.loaded:
            self._post(self._tell_acknowledged, self.loaded)

    def _refuse(self, reason: str) -> None:
        _log.warning("the stream is refused: %s", reason)
        with suppress(OSError):
            self._sock.sendall(Refusal(reason).encode())

    def _receive(self, size: int) -> bytes:
        data = self._sock.recv(size)
        if self._cut:
            raise _Cut
        if not data:
            raise OSError("the primary's end of the stream is closed")
        return data

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._receive(size - len(data))
        return data

    # --- The thread that gives ---------------------------------------------------------------------------------------

    def _give(self) -> None:
        try:
            while (pieces := self._pieces.get()) is not None:
                size = sum(map(len, pieces))
                for piece in pieces:
                    _write_all(self._target, piece)
                with self._lock:
                    self._whole_bytes -= size
        except OSError as broken:
            self._failure = broken
        finally:
            os.close(self._target)
            self._post(self._handed.set)


def _settle(answer: asyncio.Future[bytes | None], value: bytes | None) -> None:
    if not answer.done():
        answer.set_result(value)


def _split(held: list[bytes], size: int) -> tuple[list[bytes], list[bytes]]:
    # The first `size` bytes, and the rest.
    before: list[bytes] = []
    for index, piece in enumerate(held):
        if len(piece) >= size:
            before.append(piece[:size])
            rest = piece[size:]
            return before, ([rest] if rest else []) + held[index + 1 :]
        before.append(piece)
        size -= len(piece)
    return before, []


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
