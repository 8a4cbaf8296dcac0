"""The secondary's end of a checkpoint stream: each checkpoint held until it is whole, acknowledged, then handed on.

libxl's own receiver spins for ever when its stream ends between CHECKPOINT and CHECKPOINT_END, and may crash on a
short header. Here nothing reaches it but whole checkpoints: what came of the last one when the stream was cut is
dropped. The first copy, from which nobody can be promoted, is passed through as it comes.

Two threads, because both the link and libxl block: one takes the stream, holds and acknowledges, the other hands
acknowledged checkpoints to libxl. At most one whole checkpoint waits for libxl while the next one is coming in: that
one is acknowledged only when the one before it has been handed over. What both may hold has a limit, beyond which the
receiver refuses, and the primary goes on unprotected.

Source: tools/libs/light/libxl_stream_read.c and tools/libs/guest/xg_sr_restore.c of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from understudy.errors import HypervisorError, StateError, UnderstudyError
from understudy_xen.coding import Decoder
from understudy_xen.descriptors import ConnectionGone, Interrupted, PrimaryConnection, RestorePipe
from understudy_xen.streams.errors import StreamError
from understudy_xen.streams.formats import Form, Layer, LibxcType
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.frames import Frame
from understudy_xen.wire import HELLO_BYTES, Ack, Coding, Hello, Refusal

__all__ = ["Held", "Receiver"]

_log = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 1 << 20
_PAGE_AND_PFN_BYTES: Final = 4096 + 8
_PAGE_DATA_HEAD_BYTES: Final = 8
_LIBXL_S: Final = 20.0  # for a whole checkpoint; less than the primary waits for the next acknowledgement
_DRAIN_S: Final = 2.0
_END_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Held:
    """What a receiver holds now."""

    whole_bytes: int  #: of the acknowledged checkpoint that libxl has not taken yet
    partial_bytes: int  #: of the one that is coming in
    largest_bytes: int  #: of the checkpoints so far, without the first copy


class Receiver:
    """Takes one checkpoint stream.

    Args:
        sock: Connected to the primary's agent; owned from now on, also when this fails.
        hold_limit_bytes: How much may be held.
        acknowledged: Told in the event loop how many whole checkpoints are held since the stream began, the first copy
            not counted, after each acknowledgement; a call may still come after `cut`, for one before it.
        lost: Told in the event loop, once, why the stream has ended after the first copy if nobody cut it.

    Guarantees:
        An acknowledgement is sent only for what is held whole, with libxl there to take it, and no other one counts:
        how many were sent, how many are handed over, and `loaded` plus the first copy are the same number.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        hold_limit_bytes: int,
        acknowledged: Callable[[int], None],
        lost: Callable[[str], None],
    ) -> None:
        self._limit_bytes = hold_limit_bytes
        self._tell_acknowledged = acknowledged
        self._tell_lost = lost
        self._loop = asyncio.get_running_loop()
        self._config: asyncio.Future[bytes] = self._loop.create_future()
        self._copied: asyncio.Future[None] = self._loop.create_future()
        self._framer = Framer(Form.XL)
        # Between the two threads and the event loop; nobody waits for the outside while it is held.
        self._changed = threading.Condition()
        self._cut = False
        self._ending = False  # nothing more will be handed over
        self._acked = 0  # the first copy included
        self._pipe: RestorePipe | None = None
        self._begun = False  # the preamble is behind us
        self._offset = 0  # of the next chunk in the stream
        self._last_end = 0  # offset of the end of the last checkpoint
        self._pages = 0  # with content, since then
        self._incoming = bytearray()  # the checkpoint that is coming in
        self._whole: bytearray | None = None  # the one that is acknowledged, but not handed over yet
        self._largest_bytes = 0
        self._handed = asyncio.Event()
        self._finishing: asyncio.Future[None] | None = None
        self._taker = threading.Thread(target=self._take, name="xen: receive", daemon=True)
        self._giver = threading.Thread(target=self._give, name="xen: restore", daemon=True)
        # Readable from the cut on, and from `close` on: what ends the threads' waits.
        self._cut_fd = self._abort_fd = -1
        try:
            self._cut_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._abort_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._primary = PrimaryConnection(sock, self._cut_fd)
            self._giver.start()
            self._taker.start()
        except BaseException:
            with self._changed:
                self._ending = True
                self._changed.notify_all()
            self._close_eventfds()
            sock.close()
            raise

    # --- The event loop's side ---------------------------------------------------------------------------------------

    @property
    def loaded(self) -> int:
        """How many checkpoints after the first copy are acknowledged; final after `cut`."""
        with self._changed:
            return max(0, self._acked - 1)

    @property
    def held(self) -> Held:
        """What is held now."""
        with self._changed:
            return Held(len(self._whole or b""), len(self._incoming), self._largest_bytes)

    async def config(self, timeout_s: float) -> bytes:
        """Return the guest's configuration, with which the stream begins: libxl's JSON.

        Raises:
            UnderstudyError: It did not come; or what came is no stream.
        """
        return await self._first(self._config, timeout_s, "the guest's configuration")

    def copied(self, target: int, timeout_s: float) -> Coroutine[Any, Any, None]:
        """Pass the first copy through to `target`; the result is awaited until it is whole and acknowledged.

        Args:
            target: Writing end of the pipe that libxl reads; owned from this call on, also if the result is never
                awaited. When libxl ends, no reading end may be left, so that it is noticed.
            timeout_s: How long it may take.

        Raises:
            UnderstudyError: The stream ended before, or was wrong, or libxl did not take it.
        """
        if self._pipe is not None or self._finishing is not None:
            os.close(target)
            raise StateError("the first copy goes to one restore, once")
        pipe = RestorePipe(target)
        with self._changed:
            self._pipe = pipe
            self._changed.notify_all()
        return self._first_copy(timeout_s)

    async def _first_copy(self, timeout_s: float) -> None:
        await self._first(self._copied, timeout_s, "the first copy")

    def cut(self) -> int:
        """End the stream; from now on nothing is acknowledged. Idempotent.

        Returns:
            `loaded`, final: no less than what the primary has heard.
        """
        with self._changed:
            if not self._cut:
                self._cut = True
                os.eventfd_write(self._cut_fd, 1)
                self._primary.shut()
                self._changed.notify_all()
            return self.loaded

    async def hand_over(self, timeout_s: float) -> None:
        """After `cut`: see everything acknowledged handed to libxl, then end its stream.

        Raises:
            HypervisorError: libxl did not take all of it; the copy cannot be used.
            StateError: The stream is not cut, or there is no whole first copy.
        """
        with self._changed:
            if not self._cut or not self._acked:
                raise StateError(
                    "nothing can be handed over: "
                    + ("the stream still runs" if not self._cut else "the first copy is not whole")
                )
            self._ending = True
            self._changed.notify_all()
        try:
            async with asyncio.timeout(timeout_s):
                await self._handed.wait()
        except TimeoutError:
            raise HypervisorError(
                f"libxl has not taken the acknowledged checkpoints within {timeout_s:g} s"
            ) from None
        if self._pipe is not None and self._pipe.failure:
            raise HypervisorError(f"libxl did not take all that was acknowledged: {self._pipe.failure}")

    async def close(self) -> None:
        """End the stream, what is being handed over, and both threads. Idempotent.

        Guarantees:
            The socket and the restore's stream are closed, also when this is cancelled.
        """
        self.cut()
        if self._finishing is None:
            os.eventfd_write(self._abort_fd, 1)
            with self._changed:
                self._ending = True
                self._changed.notify_all()
            self._finishing = asyncio.ensure_future(asyncio.to_thread(self._finish))
        await asyncio.shield(self._finishing)

    def _finish(self) -> None:
        threads = (self._taker, self._giver)
        for thread in threads:
            thread.join(_END_S)
        if not any(thread.is_alive() for thread in threads):
            self._close_eventfds()

    def _close_eventfds(self) -> None:
        for fd in (self._cut_fd, self._abort_fd):
            if fd >= 0:
                os.close(fd)

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
        error: Exception
        refuses = False
        try:
            self._take_all()
        except Interrupted:
            error = HypervisorError("the stream was cut")
        except ConnectionGone as gone:
            error = HypervisorError(str(gone))
        except Exception as failed:  # noqa: BLE001 - told to the primary and to whoever waits, whatever it is
            refuses = True
            error = failed if isinstance(failed, UnderstudyError) else HypervisorError(f"no room: {failed!r}")
        self._incoming = bytearray()
        # The primary first: who is told of it here may cut the stream at once, and nobody would hear why.
        said = refuses and self._refuse(str(error))
        self._post(self._ended, error)
        if said:
            # The primary may be in the middle of writing, and reads no answer before it is done. What it writes is
            # thrown away for so long; else the end of the connection would be the first thing that it hears.
            self._primary.drain(_DRAIN_S)
        with self._changed:  # `cut` uses it
            self._primary.close()

    def _take_all(self) -> NoReturn:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        hello = b""
        while len(hello) < HELLO_BYTES:
            hello += self._receive(buffer[: HELLO_BYTES - len(hello)])
        decoder = Decoder() if Hello.decode(hello).coding is Coding.ZSTD else None
        while True:
            data = self._receive(buffer)
            for chunk in (data,) if decoder is None else decoder.feed(data):
                self._accept(memoryview(chunk))

    def _receive(self, into: memoryview) -> memoryview:
        got = self._primary.receive(into, self._pipe)
        if self._cut:
            raise Interrupted
        if not got:
            raise ConnectionGone(self._how_it_ended())
        return got

    def _how_it_ended(self) -> str:
        try:
            self._framer.finish()
        except StreamError as cut:
            return f"the primary's end of the stream is closed: {cut}"
        return f"the primary has ended the stream after checkpoint {self._framer.checkpoints}"

    def _accept(self, chunk: memoryview) -> None:
        wrong: StreamError | None = None
        frames: Sequence[Frame]
        try:
            frames = self._framer.feed(chunk)
        except StreamError as error:
            # What was whole before it counts, however the bytes were cut on their way.
            frames, wrong = error.frames, error
        base, at = self._offset, 0
        self._offset += len(chunk)
        for frame in frames:
            if frame.layer is Layer.XL:
                self._begin()
                at = frame.end - base
            elif frame.layer is Layer.LIBXC and frame.type == LibxcType.PAGE_DATA:
                self._pages += (frame.length - _PAGE_DATA_HEAD_BYTES) // _PAGE_AND_PFN_BYTES
            elif frame.ends_checkpoint:
                self._hold(chunk[at : frame.end - base])
                at = frame.end - base
                self._acknowledge(frame.end)
        if wrong is not None:
            raise wrong
        if self._framer.ended:
            raise ConnectionGone("the primary has ended the stream")
        if self._begun:
            self._hold(chunk[at:])

    def _begin(self) -> None:
        preamble = self._framer.preamble
        if preamble is None or not preamble.is_json:
            raise HypervisorError("the stream's configuration is not libxl's JSON; it is of Xen 4.5 or older")
        self._post(_settle, self._config, bytes(preamble.config).rstrip(b"\0"))
        with self._changed:
            self._changed.wait_for(lambda: self._pipe is not None or self._cut)
        if self._cut:
            raise Interrupted
        self._begun = True

    def _hold(self, piece: memoryview) -> None:
        if not self._acked:
            self._libxl.write(piece, self._cut_fd)
            return
        size = len(self._incoming) + len(piece)
        if size > self._limit_bytes:
            raise HypervisorError(
                f"a checkpoint does not fit into hold_limit: {size} bytes of it have come, "
                f"{self._limit_bytes} are allowed"
            )
        with self._changed:
            self._until(lambda: self._whole is None or len(self._whole) + size <= self._limit_bytes)
        self._incoming += piece

    def _acknowledge(self, end: int) -> None:
        size, pages, self._pages = end - self._last_end, self._pages, 0
        self._last_end = end
        # The cut takes the same lock: what was answered is held, and what is not held is never answered.
        with self._changed:
            self._until(lambda: self._whole is None)
            self._libxl.check()
            self._primary.send(Ack(self._acked + 1, size, pages).encode())
            self._acked += 1
            loaded = self.loaded
            if loaded:
                self._largest_bytes = max(self._largest_bytes, size)
                self._whole, self._incoming = self._incoming, bytearray()
                self._changed.notify_all()
        if loaded:
            self._post(self._tell_acknowledged, loaded)
        else:
            self._post(_settle, self._copied, None)

    def _until(self, done: Callable[[], bool]) -> None:
        # With the lock, which is free while this waits for the other thread.
        libxl = self._libxl
        self._changed.wait_for(lambda: bool(done() or self._cut or libxl.failure), _LIBXL_S)
        if self._cut:
            raise Interrupted
        if libxl.failure:
            raise libxl.fail(libxl.failure)
        if not done():
            raise HypervisorError(f"libxl has not taken the checkpoint before within {_LIBXL_S:g} s")

    def _refuse(self, reason: str) -> bool:
        _log.warning("the stream is refused: %s", reason)
        with suppress(ConnectionGone), self._changed:
            if not self._cut:
                self._primary.send(Refusal(reason).encode())
                return True
        return False

    # --- The thread that gives ---------------------------------------------------------------------------------------

    def _give(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._pipe is not None or self._ending)
        if self._pipe is None:
            return
        libxl = self._pipe
        try:
            while (whole := self._next()) is not None:
                libxl.write(whole, self._abort_fd)
                with self._changed:
                    self._whole = None
                    self._changed.notify_all()
            libxl.check()
        except Exception as failed:  # noqa: BLE001 - the other thread is told, and `hand_over`
            with self._changed:
                libxl.fail(str(failed))
                self._changed.notify_all()
        finally:
            self._taker.join()  # it looks at the pipe, too; a failure, the cut and `close` end it
            libxl.close()
            self._post(self._handed.set)

    def _next(self) -> bytearray | None:
        with self._changed:
            self._changed.wait_for(lambda: self._whole is not None or self._ending)
            return self._whole

    # --- Both --------------------------------------------------------------------------------------------------------

    @property
    def _libxl(self) -> RestorePipe:
        assert self._pipe is not None  # noqa: S101 - both use it only when it is there
        return self._pipe


def _settle(answer: asyncio.Future[bytes | None], value: bytes | None) -> None:
    if not answer.done():
        answer.set_result(value)
