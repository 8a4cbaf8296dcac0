"""One kernel of the bed: a process group outside, one command inside, and what is left of both afterwards."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.testbeds.kernel.xstate import COMPILER, built_library
from tests.testbeds.machine import INSIDE, BedMachine, MachineDied

__all__ = ["KernelDied", "Machine", "Wire", "missing_for_kernel"]

PROGRAM: Final = "linux.uml"
MODULES: Final = Path("/usr/lib/uml/modules")
INIT: Final = Path(__file__).with_name("init")
MEMORY_MIB: Final = 512
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


#: The kernels of this process, for `next_cpu`.
_machines: weakref.WeakSet[Machine] = weakref.WeakSet()


class KernelDied(MachineDied):
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


def next_cpu() -> int:
    """Return the CPU for the next kernel: of those that this process may use, one with the fewest of its kernels.

    A kernel and the processes of its guest take turns, never two at a time. On two CPUs every turn wakes up a sleeping
    one: measured, a system call of the guest takes 60 µs then and 15 µs on one, a page fault 190 and 50 µs. Workers of
    pytest-xdist begin at different CPUs.
    """
    allowed = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    first = int(worker.removeprefix("gw") or os.getpid()) % len(allowed)
    taken = Counter(machine.cpu for machine in _machines if not machine.buried)
    return min([*allowed[first:], *allowed[:first]], key=lambda cpu: taken[cpu])


class Machine(BedMachine):
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

    name = "the kernel of the bed"
    death = KernelDied

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
        super().__init__("understudy-bed-")
        serial = self._far
        self._life, lifeline = socket.socketpair()
        self.cpu = next_cpu()  #: the only one that it runs on
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
            _machines.add(self)
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
                ["taskset", "--cpu-list", str(self.cpu), PROGRAM, *arguments],
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

    def _forget(self, *, keep: bool = False) -> None:
        self._life.close()
        super()._forget(keep=keep)
