"""Inside a bed: run what the outside orders, several commands at a time.

Plain threads: importing asyncio alone takes such a machine half a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import suppress
from typing import Any

from tests.testbeds.post import LineClosed, Post

__all__ = ["Agent", "serve"]


class Agent:
    """Carries out orders: ``run`` starts a command, ``cancel`` kills one with its group, ``end`` ends the agent."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._lock = threading.Lock()  # of `_post.send` and of `_running`
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def serve(self) -> None:
        """Take orders until the last one, or until nobody gives any."""
        self._post.send({"ready": True})
        while "end" not in (order := self._post.receive()):
            if "cancel" in order:
                self._cancel(order["cancel"])
            else:
                self._start(order)

    def _start(self, order: dict[str, Any]) -> None:
        number = order["id"]
        try:
            process = subprocess.Popen(
                order["run"],
                cwd=order["cwd"],
                env={**os.environ, **order["env"]},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as problem:
            self._answer(number, 127, b"", str(problem).encode())
            return
        with self._lock:
            self._running[number] = process
        threading.Thread(target=self._attend, args=(number, process, order["input"]), daemon=True).start()

    def _attend(self, number: int, process: subprocess.Popen[bytes], text: str) -> None:
        output, errors = process.communicate(text.encode())
        with self._lock:
            del self._running[number]
        with suppress(LineClosed):
            self._answer(number, process.returncode, output, errors)

    def _answer(self, number: int, status: int, output: bytes, errors: bytes) -> None:
        with self._lock:
            answer = {"id": number, "status": status}
            self._post.send(
                answer
                | {"output": output.decode(errors="replace"), "errors": errors.decode(errors="replace")}
            )

    def _cancel(self, number: int) -> None:
        with self._lock:
            process = self._running.get(number)
            if process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def serve(post: Post) -> None:
    """Serve whoever is at the other end, until it is gone."""
    with suppress(LineClosed):
        Agent(post).serve()
