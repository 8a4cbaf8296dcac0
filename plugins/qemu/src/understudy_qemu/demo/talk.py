"""The client of a laboratory as the owner of the laboratory sees it: replies as they come, and waiting for them."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from typing import Any

from understudy_qemu.demo.chain import Greeting
from understudy_qemu.demo.lab import Lab, LabError, stop
from understudy_qemu.demo.result import Reply

__all__ = ["Talk"]

_END_S = 30.0


class Talk:
    """One client process with one connection to the guest.

    Args:
        process: of :mod:`understudy_qemu.demo.client`, its standard output a pipe.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.greeting: Greeting | None = None
        self.replies: list[Reply] = []
        self.acknowledged: dict[int, str] = {}  #: hash by word, of every reply
        self.problems: list[str] = []
        self.lost_ns: int | None = None  #: when the connection was lost, CLOCK_MONOTONIC
        self.summary: dict[str, Any] = {}
        self._news = asyncio.Condition()
        self._reader = asyncio.create_task(self._read(), name="client's replies")

    @classmethod
    async def begin(
        cls, lab: Lab, address: str = "10.77.0.2", *, interval_ms: float = 20.0, timeout_s: float = 20.0
    ) -> Talk:
        """Start a client in the laboratory's client network and return when the guest has greeted it.

        Raises:
            LabError: no connection within 30 s.
        """
        argv = [sys.executable, "-m", "understudy_qemu.demo.client", "--json", "--host", address]
        argv += ["--interval-ms", f"{interval_ms}", "--timeout-s", f"{timeout_s}"]
        talk = cls(await lab.client.exec(argv, stdout=PIPE))
        try:
            await talk.until(lambda: talk.greeting is not None, 40.0)
        except TimeoutError as error:
            await talk.end()
            raise LabError(f"the client cannot reach the guest at {address}: {talk.problems}") from error
        return talk

    async def replies_after(self, t_ns: int, count: int, timeout_s: float) -> Reply:
        """Wait until ``count`` replies have come after ``t_ns`` and return the first of them.

        Raises:
            TimeoutError: they did not come.
        """
        await self.until(lambda: len(self.replies) >= count and self.replies[-count].t_ns > t_ns, timeout_s)
        return next(reply for reply in self.replies if reply.t_ns > t_ns)

    async def until(self, condition: Any, timeout_s: float) -> None:
        """Wait until ``condition()`` holds; it is looked at whenever the client says something.

        Raises:
            TimeoutError: it did not, or the client has ended without.
        """
        async with asyncio.timeout(timeout_s), self._news:
            await self._news.wait_for(lambda: condition() or self._reader.done() or bool(self.summary))
        if not condition():
            raise TimeoutError("the client has ended")

    async def end(self) -> dict[str, Any]:
        """End the client in order and return its summary."""
        await stop(self.process, _END_S)
        await self._reader
        return self.summary

    async def _read(self) -> None:
        stream = self.process.stdout
        assert stream is not None  # noqa: S101 - a pipe was asked for
        async for line in stream:
            self._take(json.loads(line))
            async with self._news:
                self._news.notify_all()

    def _take(self, row: dict[str, Any]) -> None:
        if "greeting" in row:
            self.greeting = Greeting(**row["greeting"])
        elif "n" in row:
            t_ns = row["t_reply_ns"]
            self.replies.append(Reply(t_ns, t_ns - row["t_send_ns"], row["n"], row["ok"]))
            if "hash" in row:
                self.acknowledged[row["n"]] = row["hash"]
            if not row["ok"]:
                self.problems.append(row["why"])
        elif "lost" in row:
            self.lost_ns = row["t_ns"]
            self.problems.append(row["lost"])
        elif "summary" in row:
            self.summary = row["summary"]
