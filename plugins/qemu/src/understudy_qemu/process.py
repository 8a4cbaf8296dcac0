"""A QEMU process: started so that it outlives the agent, found again, and killed without ever hitting another one.

A process is known by its ``-pidfile`` argument, which lies in the guest's runtime directory, together with what QEMU
has written into that file: the argument alone may be that of a container which has the same path, the number alone
may have been recycled. A process found so is held by a pidfd while it is looked at and killed, so that no other one
is ever hit.

QEMU gets its own session: neither a signal to the agent's group nor the end of the agent reaches it. (A service
manager must be told the same; for systemd that is ``KillMode=process``.)
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from understudy.errors import HypervisorError

__all__ = ["QemuProcess", "find_processes", "written_pid"]

_TAIL_BYTES = 2000
_POLL_S = 0.01


class QemuProcess:
    """A process that was started here (`start`) or found running (`adopt`).

    Args:
        pid: Its number.
        pidfd: A pidfd of it, owned by this object.
        stderr: The file with its standard error.
        child: The Popen object if this very program started it.
    """

    def __init__(
        self, pid: int, pidfd: int, stderr: Path, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._stderr = stderr
        self._child = child
        self._ran_at_close = False

    @classmethod
    def start(cls, argv: Sequence[str], *, stderr: Path, environment: Mapping[str, str]) -> QemuProcess:
        """Start QEMU in its own session, detached from this program's files.

        Args:
            argv: The command line; must contain ``-pidfile`` with a path in the guest's runtime directory.
            stderr: Where standard output and error go; emptied first.
            environment: The whole environment.

        Raises:
            HypervisorError: The program cannot be run at all.
        """
        _left_running[:] = [child for child in _left_running if child.poll() is None]
        stderr.parent.mkdir(parents=True, exist_ok=True)
        with stderr.open("wb") as sink:
            try:
                child = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    start_new_session=True,
                    cwd="/",
                    env=dict(environment),
                )
            except OSError as error:
                raise HypervisorError(f"{argv[0]} cannot be started: {error.strerror}") from error
        return cls(child.pid, os.pidfd_open(child.pid), stderr, child)

    @classmethod
    def adopt(cls, pidfile: Path, *, stderr: Path) -> QemuProcess | None:
        """Return the running process that was started with ``-pidfile`` `pidfile`, ``None`` if there is none."""
        pid = written_pid(pidfile)
        if pid is None:
            return None
        try:
            found = cls(pid, os.pidfd_open(pid), stderr)
        except OSError:
            return None
        # Read after the pidfd was opened: if it is this process's now, the pidfd is, too.
        if ("-pidfile", str(pidfile)) in pairwise(_arguments(pid)) and found.alive:
            return found
        found.close()
        return None

    @property
    def alive(self) -> bool:
        """Whether the process still runs (a zombie does not), or did when this handle was closed."""
        if self._pidfd < 0:
            return self._ran_at_close
        return not select.select([self._pidfd], [], [], 0)[0]

    @property
    def exit_status(self) -> int | None:
        """Exit status, minus the signal if one killed it; ``None`` while it lives or if it was not our child."""
        return self._child.poll() if self._child is not None else None

    def describe(self) -> str:
        """Return how the process ended and its last words, ``""`` while it lives."""
        if self.alive:
            return ""
        status = self.exit_status
        if status is None:
            ended = f"QEMU (process {self.pid}) is gone"
        elif status < 0:
            ended = f"QEMU was killed by {signal.Signals(-status).name}"
        else:
            ended = f"QEMU ended with status {status}"
        words = self.last_words()
        return f"{ended}; it said: {words}" if words else f"{ended} and said nothing"

    def last_words(self) -> str:
        """Return the end of its standard error in one line."""
        try:
            text = self._stderr.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return ""
        return " | ".join(line.strip() for line in text.splitlines() if line.strip())

    async def wait(self, timeout_s: float) -> bool:
        """Wait for its end.

        Returns:
            Whether it ended within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_POLL_S)
        if self._child is not None:
            self._child.poll()
        return True

    def suspend(self) -> None:
        """Stop it by SIGSTOP: none of its threads runs from here on; right also when it is dead."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again after `suspend`; right also when it was never stopped, or is dead."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    async def kill(self, timeout_s: float = 10.0) -> None:
        """Kill it and see it dead.

        Raises:
            HypervisorError: It is still there after `timeout_s` seconds (it hangs in the kernel), or this handle was
                closed while it ran.

        Guarantees:
            After a return it is dead, and no other process was touched. Idempotent.
        """
        if self._pidfd < 0:
            if self._ran_at_close:
                raise HypervisorError(f"QEMU (process {self.pid}) was let go and cannot be killed any more")
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if not await self.wait(timeout_s):
            raise HypervisorError(
                f"QEMU (process {self.pid}) was killed but is not dead after {timeout_s:g} s"
            )

    def close(self) -> None:
        """Let go of the handle; the process goes on. Idempotent."""
        if self._pidfd >= 0:
            self._ran_at_close = self.alive
            os.close(self._pidfd)
            self._pidfd = -1
        self._reap()

    def _reap(self) -> None:
        if self._child is not None and self._child.poll() is None:
            # It is still ours to reap when it ends, and Python complains about a child that nobody holds.
            _left_running.append(self._child)


# Children whose handle was closed while they ran.
_left_running: list[subprocess.Popen[bytes]] = []


def find_processes() -> Iterator[tuple[int, list[str]]]:
    """Yield number and arguments of every process that this one can see, kernel threads left out."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (arguments := _arguments(int(entry.name))):
            yield int(entry.name), arguments


def _arguments(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return raw.decode(errors="surrogateescape").split("\0")[:-1]


def written_pid(pidfile: Path) -> int | None:
    """Return the number in `pidfile`, ``None`` if there is none."""
    try:
        return int(pidfile.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
