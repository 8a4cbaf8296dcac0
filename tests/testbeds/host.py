"""A machine of a bed as a host that can be told what to do: commands run inside, from asyncio outside."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from tests.testbeds.machine import BedMachine, MachineDied
from tests.testbeds.post import LineClosed, Post

__all__ = ["BedHost", "CommandFailed", "Completed"]

ROOT: Final = Path(__file__).parents[2]
END_S: Final = 15.0


@dataclass(frozen=True)
class Completed:
    """How a command ended; a negative status is the signal that killed it."""

    status: int
    output: str
    errors: str


class CommandFailed(RuntimeError):
    """A command inside ended with a status that is not 0."""

    def __init__(self, argv: Sequence[str], completed: Completed) -> None:
        self.completed = completed
        said = (completed.errors or completed.output).strip() or "(nothing)"
        super().__init__(f"{' '.join(argv)!r} ended with {completed.status} and said:\n{said}")


class BedHost:
    """A booted machine with an agent inside. Use it as an asynchronous context manager.

    Args:
        machine: runs the agent as its command.
        post: the outer end of its line.

    Guarantees:
        After `close`, or the end of the context, nothing is left of it outside.
    """

    def __init__(self, machine: BedMachine, post: Post) -> None:
        self.machine = machine
        self.ended = asyncio.Event()  #: set when the machine is gone, for whatever reason
        self._post = post
        self._ready = asyncio.get_running_loop().create_future()
        self._answers: dict[int, asyncio.Future[Completed]] = {}
        self._orders = 0
        asyncio.get_running_loop().add_reader(machine.line.fileno(), self._readable)

    async def up(self, timeout_s: float) -> Self:
        """Wait until the agent inside answers.

        Raises:
            MachineDied: it did not come up in time.

        Guarantees:
            When this raises, or is cancelled, nothing is left of the machine outside.
        """
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._ready
            except TimeoutError:
                self.crash()
                raise self.machine.died(f"did not come up within {timeout_s:g} s") from None
            return self
        except BaseException:
            self._gone()
            self.machine.close()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def run(
        self,
        *argv: str | Path,
        check: bool = True,
        text: str = "",
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> Completed:
        """Run a command inside and return how it ended. Several may run at once.

        Args:
            argv: the command, found inside on PATH.
            check: raise if its status is not 0.
            text: what it reads on its standard input.
            cwd: where it runs.
            env: its environment besides the machine's.
            timeout_s: of the command.

        Raises:
            CommandFailed: it failed, and `check` asked for this.
            TimeoutError: it did not end in time.
            MachineDied: the machine died meanwhile, or was dead.

        Guarantees:
            After a timeout, and when the caller is cancelled, the command has been told to die with its process group.
        """
        if self.ended.is_set():
            raise self.machine.died("is dead")
        words = [str(word) for word in argv]
        self._orders += 1
        number = self._orders
        answer: asyncio.Future[Completed] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        order = {"id": number, "run": words, "cwd": str(cwd), "env": dict(env or {}), "input": text}
        self._send(order)
        try:
            async with asyncio.timeout(timeout_s):
                completed = await answer
        except TimeoutError:
            raise TimeoutError(
                f"{' '.join(words)!r} inside the bed did not end within {timeout_s:g} s"
            ) from None
        finally:
            if self._answers.pop(number, None) is not None and not self.ended.is_set():
                self._send({"cancel": number})
        if check and completed.status:
            raise CommandFailed(words, completed)
        return completed

    def crash(self) -> None:
        """Kill the machine's process group: nothing inside can do anything about it or after it."""
        self.machine.kill()
        self._gone()

    async def close(self) -> None:
        """End the machine, in peace if it can be, and remove its run directory."""
        try:
            if not self.ended.is_set():
                self._send({"end": True})
                async with asyncio.timeout(END_S):
                    await self.ended.wait()
                await asyncio.to_thread(self.machine.wait, END_S)
        except (TimeoutError, MachineDied):
            pass  # whatever it was, it is over now
        finally:
            self._gone()
            self.machine.close()

    def _send(self, message: Any) -> None:
        try:
            self._post.send(message)
        except LineClosed:
            self._gone()

    def _readable(self) -> None:
        try:
            for message in self._post.ready():
                if "ready" in message:
                    self._ready.set_result(None)
                elif (answer := self._answers.pop(message["id"], None)) is not None and not answer.done():
                    answer.set_result(Completed(message["status"], message["output"], message["errors"]))
        except LineClosed:
            self._gone()

    def _gone(self) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        asyncio.get_running_loop().remove_reader(self.machine.line.fileno())
        for waiting in (self._ready, *self._answers.values()):
            if not waiting.done():
                waiting.set_exception(self.machine.died("died"))
        if not self._ready.cancelled():  # as it is when who waited for it was
            self._ready.exception()  # nobody else may ask for it
        self._answers.clear()
