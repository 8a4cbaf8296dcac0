"""One kernel of the bed: a process group outside, one command inside, and what is left of both afterwards."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.testbeds.kernel.xstate import COMPILER, built_library

__all__ = ["INSIDE", "KernelDied", "Machine", "Wire", "missing_for_kernel", "running"]

PROGRAM: Final = "linux.uml"
MODULES: Final = Path("/usr/lib/uml/modules")
INIT: Final = Path(__file__).with_name("init")
INSIDE: Final = "UNDERSTUDY_BED"  #: environment variable that is ``kernel`` for everything that runs inside
MEMORY_MIB: Final = 512
TAIL_LINES: Final = 60
KILL_S: Final = 10.0  # what a loaded host may take to bury a killed process group
ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TMPDIR": "/run/tmp",
    INSIDE: "kernel",
    # The root is an overlay in memory: compiled modules would only fill it.
    "PYTHONDONTWRITEBYTECODE": "1",
    # Without udev dmsetup waits for ever for a cookie that nobody returns.
    "DM_DISABLE_UDEV": "1",
}


_turn = itertools.count(os.getpid())


class KernelDied(RuntimeError):
    """The kernel ended before its command did; the message ends with the tail of its console."""


@dataclass(frozen=True)
class Wire:
    """A network interface ``vec<N>`` of the guest.

    Args:
        end: one end of a datagram or seqpacket socket pair, a frame a packet; the caller's to close.
        mac: the interface's address.
        mtu: of the interface, bytes.
    """

    end: socket.socket
    mac: str
    mtu: int = 1500


def missing_for_kernel() -> list[str]:
    """Return what the kernel bed lacks here."""
    missing = []
    if shutil.which(PROGRAM) is None or not MODULES.is_dir():
        missing.append(f"the program {PROGRAM} and its modules (user-mode-linux)")
    if not Path("/bin/busybox").exists():
        missing.append("/bin/busybox (busybox-static)")
    return missing + [
        f"the program {name}"
        for name in ("modprobe", "ip", "taskset", COMPILER)
        if shutil.which(name) is None
    ]


def memory_directory(memory_mib: int) -> str:
    """Return where the guest's memory, one unlinked file, is best kept: a file system in memory with room for it."""
    for place in ("/dev/shm", "/run", "/tmp"):  # noqa: S108 - places to look at; the file has no name
        with suppress(OSError):
            found = os.statvfs(place)
            runs_code = not found.f_flag & os.ST_NOEXEC
            if runs_code and os.access(place, os.W_OK) and found.f_bavail * found.f_frsize > memory_mib << 20:
                return place
    return tempfile.gettempdir()


def running(group: int) -> list[int]:
    """Return the processes of a group that are not dead; what only waits for its parent is dead."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def next_cpu() -> int:
    """Return the CPU for the next kernel: each in turn, of those that this process may use.

    A kernel and the processes of its guest take turns, never two at a time. On two CPUs every turn wakes up a sleeping
    one: measured, a system call of the guest takes 60 µs then and 15 µs on one, a page fault 190 and 50 µs.
    """
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[next(_turn) % len(allowed)]


class Machine:
    """A booted kernel that runs one command as root and powers off.

    Args:
        command: what to run inside, found there on PATH.
        cwd: where inside; a directory of the host.
        env: environment of the command besides the bed's own.
        memory_mib: of the guest; taken from a tmpfs as it is used.
        hostname: of the guest.
        shared: directories of the host that the guest may write besides its run directory.
        disks: image files of the host that are its block devices ``/dev/ubda``, ``/dev/ubdb`` and so on. What was
            written to one survives a crash of the guest, as on a disk with a cache that needs no power.
        wires: its network interfaces.
        terminal: file descriptors that the command reads and writes as a terminal, -1 for nothing to read; by default
            its output goes to the console.

    Guarantees:
        After `close` no process and no file of it is left. When this process dies the guest powers off by itself.

    Source:
        Documentation/virt/uml/user_mode_linux_howto_v2.rst, arch/um/drivers/chan_user.c, arch/um/drivers/vector_user.c.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        memory_mib: int = MEMORY_MIB,
        hostname: str = "bed",
        shared: Iterable[Path] = (),
        disks: Sequence[Path] = (),
        wires: Sequence[Wire] = (),
        terminal: tuple[int, int] | None = None,
    ) -> None:
        self.run = Path(tempfile.mkdtemp(prefix="understudy-bed-"))
        self._console = self.run / "console"
        self._buried = False
        self.line, serial = socket.socketpair()
        self._life, lifeline = socket.socketpair()
        try:
            self._write_command(command, cwd or Path.cwd(), env or {}, terminal)
            self._write_settings(hostname, shared)
            devices = [f"ssl0=fd:{serial.fileno()}", f"ssl1=fd:{lifeline.fileno()}"]
            devices += [f"ubd{number}={disk}" for number, disk in enumerate(disks)]
            for number, wire in enumerate(wires):
                cable = f"transport=fd,fd={wire.end.fileno()},depth=64"
                devices.append(f"vec{number}:{cable},mtu={wire.mtu},mac={wire.mac}")
            passed = [serial, lifeline, *(wire.end for wire in wires)]
            self._process = self._start(memory_mib, devices, [each.fileno() for each in passed], terminal)
        except BaseException:
            self._forget()
            raise
        finally:
            serial.close()
            lifeline.close()

    def _write_command(
        self, command: Sequence[str], cwd: Path, env: Mapping[str, str], terminal: tuple[int, int] | None
    ) -> None:
        environment = {**ENVIRONMENT, "BED_RUN": str(self.run), **env}
        words = ["exec", "env", "-i", *(f"{key}={value}" for key, value in environment.items()), *command]
        script = f"cd {shlex.quote(str(cwd))}\n{shlex.join(words)}\n"
        if terminal is not None:
            # A session of its own makes it the controlling terminal: job control and Ctrl-C work.
            mode = "raw"
            if os.isatty(terminal[1]):
                size = os.get_terminal_size(terminal[1])
                mode = f"sane rows {size.lines} cols {size.columns}"
            (self.run / "in-terminal").write_text(f"/bin/busybox stty {mode}\n{script}")
            script = 'exec /bin/busybox setsid -c /bin/sh "$BED_RUN/in-terminal" <>/dev/tty1 >&0 2>&1\n'
        (self.run / "command").write_text(script)

    def _write_settings(self, hostname: str, shared: Iterable[Path]) -> None:
        places = shlex.join([str(self.run), *(str(place) for place in shared)])
        (self.run / "settings").write_text(f"hostname={shlex.quote(hostname)}\nset -- {places}\n")

    def _start(
        self, memory_mib: int, devices: Sequence[str], passed: Sequence[int], terminal: tuple[int, int] | None
    ) -> subprocess.Popen[bytes]:
        arguments = [
            f"mem={memory_mib}M",
            *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"),
            f"init={INIT}",
            f"BED_RUN={self.run}",
            *("umid=bed", f"uml_dir={self.run}"),
            *("con=null", "con0=null,fd:1", "ssl=null"),
            *("quiet", "loglevel=4"),
            *devices,
        ]
        with ExitStack() as stack:
            console = stack.enter_context(self._console.open("wb"))
            copies = []
            if terminal is not None:
                # Copies, because 0 and 1 of the kernel are its console.
                copies = [os.dup(each) for each in terminal if each >= 0]
                for copy in copies:
                    stack.callback(os.close, copy)
                readable = "null" if terminal[0] < 0 else f"fd:{copies[0]}"
                arguments.append(f"con1={readable},fd:{copies[-1]}")
            return subprocess.Popen(
                ["taskset", "--cpu-list", str(next_cpu()), PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={
                    "PATH": os.environ.get("PATH", os.defpath),
                    # The memory file is made there; a disk would be written to all the time.
                    "TMPDIR": memory_directory(memory_mib),
                    "LD_PRELOAD": str(built_library()),
                },
                pass_fds=[*passed, *copies],
                # One group for the kernel and what it starts: killed alone it leaves two processes behind.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the kernel, and id of its process group."""
        return self._process.pid

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until the kernel has powered off and return the command's exit status.

        Args:
            timeout_s: seconds to wait; afterwards the kernel is killed.

        Raises:
            KernelDied: it ended without its command, or was killed because the time was over.
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

    def died(self, what: str) -> KernelDied:
        """Return the error that says what became of the kernel, with the tail of its console."""
        return KernelDied(f"the kernel of the bed {what}; the end of its console:\n{self.console_tail()}")

    def console(self) -> str:
        """Return what the kernel and everything on its console said."""
        text = self._console.read_text(errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text.replace("\r\n", "\n"))

    def console_tail(self, lines: int = TAIL_LINES) -> str:
        """Return the last lines of the console."""
        return "\n".join(self.console().splitlines()[-lines:]) or "(nothing)"

    def kill(self) -> None:
        """Kill the process group: to the guest and its peers, the crash of a host.

        Raises:
            RuntimeError: a process of it is stuck in the host's kernel.

        Guarantees:
            When this returns no process of the group runs any more.
        """
        if self._buried:  # the number may be somebody else's by now
            return
        # Also when the kernel is gone by itself: a crashed one may have left members of its group.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # The others are no children of ours, nobody tells us when they are dead.
        deadline = time.monotonic() + KILL_S
        while left := running(self.pid):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {left} of a kernel's group survive SIGKILL")
            time.sleep(0.002)
        self._buried = True

    def close(self, *, keep: bool = False) -> None:
        """Kill the kernel if it runs, and remove its run directory unless it shall be kept for a look at it."""
        try:
            self.kill()
        finally:
            self._forget(keep=keep)

    def _forget(self, *, keep: bool = False) -> None:
        self.line.close()
        self._life.close()
        if not keep:
            shutil.rmtree(self.run, ignore_errors=True)
