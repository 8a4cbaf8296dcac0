"""What every machine of a bed is to the outside: a process group, a console, a line, and what is left of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final

__all__ = ["INSIDE", "BedMachine", "MachineDied", "running"]

INSIDE: Final = (
    "UNDERSTUDY_BED"  #: environment variable that holds the bed's name for everything that runs in it
)
TAIL_LINES: Final = 60
KILL_S: Final = 10.0  # what a loaded host may take to bury a killed process group


class MachineDied(RuntimeError):
    """The machine ended before its command did; the message ends with the tail of its console."""


def running(group: int) -> list[int]:
    """Return the processes of a group that are not dead; what only waits for its parent is dead."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


class BedMachine:
    """A machine that runs one command as root and powers off. A subclass starts its process.

    Args:
        prefix: of the name of its run directory, which is shared with the machine at the same path.

    Guarantees:
        After `close` no process and no file of it is left.
    """

    name: ClassVar[str]  #: what the messages call it
    death: ClassVar[type[MachineDied]]  #: what is raised when it died
    _process: subprocess.Popen[bytes]

    def __init__(self, prefix: str) -> None:
        self.run = Path(tempfile.mkdtemp(prefix=prefix))
        self._console = self.run / "console"
        self.buried = False  #: whether none of its processes runs any more
        self.line, self._far = (
            socket.socketpair()
        )  #: the line's end outside; the subclass hands out and closes the far end

    @property
    def pid(self) -> int:
        """Process id of the machine, and id of its process group."""
        return self._process.pid

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until the machine has powered off and return the command's exit status.

        Args:
            timeout_s: seconds to wait; afterwards the machine is killed.

        Raises:
            MachineDied: it ended without its command, or was killed because the time was over.
        """
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise self.died(f"was killed: its command did not end within {timeout_s:g} s") from None
        try:
            return int((self.run / "rc").read_text())
        except FileNotFoundError:
            raise self.died("died before its command ended") from None

    def died(self, what: str) -> MachineDied:
        """Return the error that says what became of the machine, with the tail of its console."""
        return self.death(f"{self.name} {what}; the end of its console:\n{self.console_tail()}")

    def console(self) -> str:
        """Return what the machine's kernel and everything on its console said."""
        text = self._console.read_text(errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text.replace("\r\n", "\n"))

    def console_tail(self, lines: int = TAIL_LINES) -> str:
        """Return the last lines of the console."""
        return "\n".join(self.console().splitlines()[-lines:]) or "(nothing)"

    def kill(self) -> None:
        """Kill the process group: to the machine and its peers, the crash of a host.

        Raises:
            RuntimeError: a process of it is stuck in the host's kernel.

        Guarantees:
            When this returns no process of the group runs any more.
        """
        if self.buried:  # the number may be somebody else's by now
            return
        # Also when the machine is gone by itself: a crashed one may have left members of its group.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # The others are no children of ours, nobody tells us when they are dead.
        deadline = time.monotonic() + KILL_S
        while left := running(self.pid):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {left} of a machine's group survive SIGKILL")
            time.sleep(0.002)
        self.buried = True

    def close(self, *, keep: bool = False) -> None:
        """Kill the machine if it runs, and remove its run directory unless it shall be kept for a look at it."""
        try:
            self.kill()
        finally:
            self._forget(keep=keep)

    def _forget(self, *, keep: bool = False) -> None:
        self.line.close()
        if not keep:
            shutil.rmtree(self.run, ignore_errors=True)
