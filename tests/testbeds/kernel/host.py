"""A kernel of the bed as a host that can be told what to do: commands run inside, from asyncio outside."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from tests.testbeds.kernel.machine import MEMORY_MIB, KernelDied, Machine, Wire
from tests.testbeds.kernel.post import LineClosed, outside

__all__ = ["CommandFailed", "Completed", "Kernel"]

ROOT: Final = Path(__file__).parents[3]
BOOT_S: Final = 60.0  # a deadline only; it takes 3 s
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


class Kernel:
    """A booted kernel with an agent inside. Made by `boot`; use it as an asynchronous context manager.

    Args:
        machine: runs the agent as its command.

    Guarantees:
        After `close`, or the end of the context, nothing is left of it outside.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.ended = asyncio.Event()  #: set when the kernel is gone, for whatever reason
        self._post = outside(machine.line.fileno(), machine.run)
        self._ready = asyncio.get_running_loop().create_future()
        self._answers: dict[int, asyncio.Future[Completed]] = {}
        self._orders = 0
        asyncio.get_running_loop().add_reader(machine.line.fileno(), self._readable)

    @classmethod
    async def boot(
        cls,
        *,
        hostname: str = "bed",
        memory_mib: int = MEMORY_MIB,
        shared: Iterable[Path] = (),
        disks: Sequence[Path] = (),
        wires: Sequence[Wire] = (),
        env: Mapping[str, str] | None = None,
        timeout_s: float = BOOT_S,
    ) -> Self:
        """Boot a kernel; the arguments are `Machine`'s.

        Args:
            hostname: of the guest.
            memory_mib: of the guest.
            shared: directories that it may write.
            disks: image files that are its block devices ``/dev/ubda`` and so on.
            wires: its interfaces ``vec0`` and so on.
            env: environment of all commands besides the bed's own.
            timeout_s: until the agent inside answers.

        Raises:
            KernelDied: it did not come up.
        """
        machine = Machine(
            [sys.executable, "-m", "tests.testbeds.kernel.agent"],
            cwd=ROOT,
            env=env,
            memory_mib=memory_mib,
            hostname=hostname,
            shared=shared,
            disks=disks,
            wires=wires,
        )
        try:
            kernel = cls(machine)
            try:
                async with asyncio.timeout(timeout_s):
                    await kernel._ready
            except TimeoutError:
                kernel.crash()
                raise machine.died(f"did not come up within {timeout_s:g} s") from None
            return kernel
        except BaseException:
            asyncio.get_running_loop().remove_reader(machine.line.fileno())
            machine.close()
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
            env: its environment besides the kernel's.
            timeout_s: of the command.

        Raises:
            CommandFailed: it failed, and `check` asked for this.
            TimeoutError: it did not end in time.
            KernelDied: the kernel died meanwhile, or was dead.

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
        """Kill the kernel's process group: nothing inside can do anything about it or after it."""
        self.machine.kill()
        self._gone()

    async def close(self) -> None:
        """End the kernel, in peace if it can be, and remove its run directory."""
        try:
            if not self.ended.is_set():
                self._send({"end": True})
                async with asyncio.timeout(END_S):
                    await self.ended.wait()
                await asyncio.to_thread(self.machine.wait, END_S)
        except (TimeoutError, KernelDied):
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
        if self._ready.done():
            self._ready.exception()  # nobody else may ask for it
        self._answers.clear()
