"""The agent's side of the process that makes a domain from a stream.

::

    restorer = await Restorer.start(stream_fd=read_end)
    domid = await restorer.restore(config_json, checkpointed=True)      # as long as the stream lasts
    await restorer.unpause(domid)                                      # the same process: nothing is started now
    await restorer.close()

Source: Xen tools/include/libxl.h; the process is `understudy_xen.restorer.__main__`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Self

from understudy_xen.libs.errors import LibxlFailed, RestorerLost, XenUnavailable

__all__ = ["CALL_S", "Restorer", "once"]

_log = logging.getLogger("understudy_xen.libxl")
START_S: Final = 60.0  #: for the process to be ready: a fraction of a second on an idle host
CALL_S: Final = 60.0  #: for an operation of libxl; a hotplug script alone may take 40 s of it
KILL_S: Final = 10.0  #: for the kernel to end a process
_LINE_BYTES: Final = 1 << 22
_TAIL_LINES: Final = 20
_WORDS_S: Final = 0.2  # for the last words of one that has ended to be read

Progress = Callable[[str, int, int], None]


class Restorer:
    """A process in which libxl works for the agent, in a process group of its own.

    Make one with `start`; it is an asynchronous context manager that kills what is left of it.

    Guarantees:
        Whatever libxl does, the agent goes on: a call ends at its deadline, and `kill` ends the process with its
        children. The device model of a domain that was made is no child of it, and lives on.
    """

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket, said_fd: int) -> None:
        self._process = process
        self._control = control
        # Not asyncio's own pipe: with that one the process has not ended for it before all have who hold the other end,
        # such as a daemon that libxl has started.
        self._said_file = open(said_fd, "rb", buffering=0)  # noqa: SIM115 - closed by `kill`
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._tasks: list[asyncio.Task[None]] = []
        self._group_ended = False
        self.on_progress: Progress | None = None  #: told what libxl is doing, done, total

    @classmethod
    async def start(cls, *, stream_fd: int = -1, timeout_s: float = START_S) -> Self:
        """Start the process, and return when libxl is ready in it.

        Args:
            stream_fd: Where the stream will come, for `restore`. It belongs to the process from now on: this one's
                copy is closed, also on failure, so that whoever writes the stream notices the end of the process.
            timeout_s: How long the start may take, seconds.

        Raises:
            XenUnavailable: libxl cannot be used on this host; with the remedy.
            RestorerLost: The process ended, or is not ready in time; it was killed.
        """
        ours, its = socket.socketpair()
        said_fd, error_fd = os.pipe2(os.O_CLOEXEC)
        passed = [its.fileno()] + ([stream_fd] if stream_fd >= 0 else [])
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "understudy_xen.restorer",
                *map(str, passed),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=error_fd,
                pass_fds=passed,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(said_fd)
            raise
        finally:
            its.close()
            os.close(error_fd)
            if stream_fd >= 0:
                os.close(stream_fd)
        self = cls(process, ours, said_fd)
        try:
            async with asyncio.timeout(timeout_s):
                reader, self._writer = await asyncio.open_connection(sock=ours, limit=_LINE_BYTES)
                collecting = asyncio.create_task(self._collect(), name="restorer-stderr")
                listening = asyncio.create_task(self._listen(reader, collecting), name="restorer-events")
                self._tasks = [collecting, listening]
                await asyncio.shield(self._ready)
        except TimeoutError:
            await self.kill()
            raise RestorerLost(f"the restorer was not ready within {timeout_s:g} s{self._said()}") from None
        except BaseException:
            await self.kill()
            raise
        return self

    @property
    def pid(self) -> int:
        """Number of the process, and of its group."""
        return self._process.pid

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.kill()

    async def restore(
        self, config: str, *, checkpointed: bool, name: str | None = None, timeout_s: float | None = None
    ) -> int:
        """Make a domain from the stream, and return its number when the stream is at its end; it is paused.

        Args:
            config: JSON of its configuration, as in the stream's preamble.
            checkpointed: Whether it is a stream of checkpoints, of which the last whole one counts.
            name: Of the domain, instead of the configuration's.
            timeout_s: Seconds until the stream must be at its end; ``None`` where that is the caller's matter.

        Raises:
            LibxlFailed: It could not be made, and libxl has destroyed what it had made.
            RestorerLost: The process has ended, or did not answer in time. What it had made is found by the UUID of
                the configuration, and is still there.
        """
        if name is not None:
            parsed = json.loads(config)
            parsed["c_info"]["name"] = name
            config = json.dumps(parsed)
        return int(await self._call("restore", timeout_s, config=config, checkpointed=int(checkpointed)))

    async def create(self, config: str, *, timeout_s: float = CALL_S) -> int:
        """Make a new domain from a JSON configuration, and return its number; it is paused."""
        return int(await self._call("create", timeout_s, config=config))

    async def config(self, domid: int, *, timeout_s: float = CALL_S) -> str:
        """Return the JSON configuration of a domain, with what was changed since it was made."""
        return str(await self._call("config", timeout_s, domid=domid))

    async def unpause(self, domid: int, *, timeout_s: float = CALL_S) -> None:
        """Let a domain run, and its device model."""
        await self._call("unpause", timeout_s, domid=domid)

    async def rename(self, domid: int, old: str, new: str, *, timeout_s: float = CALL_S) -> None:
        """Give a domain another name.

        Args:
            domid: Of the domain.
            old: The name it must have.
            new: The name it gets; no other domain may have it.
            timeout_s: Seconds.
        """
        await self._call("rename", timeout_s, domid=domid, old=old, new=new)

    async def destroy(self, domid: int, *, timeout_s: float = CALL_S) -> None:
        """End a domain with its devices, its device model and its part of xenstore."""
        await self._call("destroy", timeout_s, domid=domid)

    async def close(self, *, timeout_s: float = CALL_S) -> None:
        """End the process when it has done what was asked; kill it if that takes too long."""
        if self._writer is not None:
            self._writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        await self.kill()

    async def kill(self) -> None:
        """Kill the process and its children; it may have ended already.

        Raises:
            RestorerLost: It is still there: the kernel does not let it go. It may do something yet.

        Guarantees:
            Afterwards every call on it has failed, and it does nothing any more. A domain that it was making is still
            there, paused, with its part of xenstore.
        """
        self._end_group()
        try:
            async with asyncio.timeout(KILL_S):
                await self._process.wait()
        except TimeoutError:
            raise RestorerLost(f"the restorer {self._process.pid} does not die within {KILL_S:g} s") from None
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._said_file.close()
            self._lose("it was ended")
            if self._writer is not None:
                self._writer.close()
            else:
                self._control.close()

    def _end_group(self) -> None:
        # Once the process is collected its number, which is the group's, may soon be somebody else's.
        if not self._group_ended:
            self._group_ended = self._process.returncode is not None
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _call(self, do: str, timeout_s: float | None, **arguments: Any) -> Any:
        if self._writer is None or self._writer.is_closing() or self._process.returncode is not None:
            raise RestorerLost(f"the restorer cannot {do}: it has ended{self._said()}")
        self._last_id += 1
        number = self._last_id
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        line = json.dumps({"id": number, "do": do, **arguments}) + "\n"
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(line.encode())
                await self._writer.drain()
                return await answer
        except TimeoutError:
            raise RestorerLost(f"libxl did not {do} within {timeout_s:g} s{self._said()}") from None
        except ConnectionError as error:
            raise RestorerLost(f"the restorer cannot {do}: it has ended{self._said()}") from error
        finally:
            self._waiting.pop(number, None)

    async def _listen(self, reader: asyncio.StreamReader, collecting: asyncio.Task[None]) -> None:
        try:
            while line := await reader.readline():
                self._take(json.loads(line))
        except (OSError, ValueError) as error:
            self._lose(str(error))
        # With its exit status: a stream that libxl does not stand ends with a signal.
        with suppress(TimeoutError):
            async with asyncio.timeout(KILL_S):
                await self._process.wait()
                self._end_group()
        await asyncio.wait({collecting}, timeout=_WORDS_S)
        self._lose("it has ended")

    def _take(self, said: dict[str, Any]) -> None:
        match said:
            case {"event": "ready"}:
                if not self._ready.done():
                    self._ready.set_result(None)
            case {"event": "refused", "problem": problem, "remedy": remedy}:
                if not self._ready.done():
                    self._ready.set_exception(XenUnavailable(problem, remedy))
            case {"event": "log", "level": level, "context": context, "text": text}:
                _log.log(level, "%s: %s", context, text)
                if level >= logging.ERROR:
                    self._tail.append(text)  # what it says before it ends by a fault
            case {"event": "progress", "doing": doing, "done": done, "total": total}:
                if self.on_progress is not None:
                    self.on_progress(doing, done, total)
            case {"id": number, **outcome}:
                self._answer(number, outcome)

    def _answer(self, number: int, outcome: dict[str, Any]) -> None:
        answer = self._waiting.get(number)
        if answer is None or answer.done():
            return
        if "failed" not in outcome:
            answer.set_result(outcome["result"])
            return
        failed = outcome["failed"]
        answer.set_exception(
            LibxlFailed(
                failed["operation"], failed["code"], failed["name"], failed["domid"], tuple(failed["said"])
            )
        )

    def _lose(self, why: str) -> None:
        error = RestorerLost(f"the restorer is gone: {why}{self._said()}")
        for answer in (self._ready, *self._waiting.values()):
            if not answer.done():
                answer.set_exception(error)
        if self._ready.done() and not self._ready.cancelled():
            self._ready.exception()  # nobody may have waited for it

    async def _collect(self) -> None:
        said = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(said), self._said_file
        )
        try:
            with suppress(ValueError):
                while line := await said.readline():
                    self._tail.append(line.decode("utf-8", "replace").rstrip())
        finally:
            transport.close()

    def _said(self) -> str:
        status = self._process.returncode
        ended = "" if status is None else f"; exit status {status}" if status >= 0 else f"; signal {-status}"
        return ended + (f"; its last words: {' | '.join(self._tail)}" if self._tail else "")


@asynccontextmanager
async def once() -> AsyncIterator[Restorer]:
    """Enter a process for a few calls of libxl, and end it afterwards."""
    restorer = await Restorer.start()
    try:
        yield restorer
        await restorer.close()
    finally:
        await restorer.kill()
