"""A laboratory on one machine: two hosts, a cable between them, a switch, and a client.

::

              client            eth0 10.77.0.1/24, eth1 10.78.0.1/24, ...
                |
        net0 --(switch)-- net0
         |                  |
        br0                br0        br0, br1, ... in each host: bridges for guests
       alpha              beta
       cable0 ---(cable)--- cable0    10.99.0.1/24 and 10.99.0.2/24

Each machine is a set of unnamed namespaces (network, mount, process ids, host name) and its first
process, so machines of several laboratories cannot collide, killing the first process is a host
crash, and all of it goes away with the process that made it, however that one ends.

The hosts share the cable, the switch and the arbiter's directory. Inside a host ``/run`` is its own
and empty at first, ``/var/lib/understudy`` is ``ROOT/NAME/lib`` outside, ``/srv/host`` is
``ROOT/NAME``, ``/srv/arbiter`` is ``ROOT/arbiter``; the rest of ``ROOT`` cannot be seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from understudy.errors import UnderstudyError

_ENTRY = str(Path(__file__).with_name("namespaces.py"))
_READY_S = 20.0
_COMMAND_S = 20.0
_NO_IPV6 = (
    "for f in all default; do f=/proc/sys/net/ipv6/conf/$f/disable_ipv6; [ ! -e $f ] || echo 1 > $f; done"
)
HOSTS = ("alpha", "beta")


class LabError(UnderstudyError):
    """Say in one sentence why the laboratory cannot be made or what failed in it."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that has ended."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(slots=True)
class Machine:
    """A host, the client or the switch.

    Args:
        name: also the host name inside.
        mounts: as ``namespaces.py init`` takes them.
    """

    name: str
    mounts: tuple[str, ...] = ()
    _launcher: Process | None = None
    _first: int = 0  # process id of the first process, seen from outside
    _namespaces: tuple[int, ...] = ()  # uts, net, mnt: kept open so that they outlive the processes
    _pid_namespace: int = -1
    _programs: list[Process] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether the machine's first process runs."""
        return self._first != 0

    async def start(self) -> None:
        """Bring the machine up; after :meth:`kill_all` with its network and files as they were left.

        Raises:
            LabError: it did not come up; nothing of it runs.
        """
        fds = self._namespaces
        launcher = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", _ENTRY, "init", self.name, str(os.getpid()), *map(str, fds)),
            *("--", *self.mounts),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            pass_fds=fds,
            start_new_session=True,
        )
        self._launcher = launcher
        assert launcher.stdout is not None  # noqa: S101 - PIPE was asked for
        try:
            async with asyncio.timeout(_READY_S):
                line = await launcher.stdout.readline()
        except TimeoutError:
            line = b""
        if not line:
            await self._end_launcher()
            raise LabError(f"machine {self.name} did not come up: {await _last_words(launcher)}")
        self._first = int(line)
        self._pid_namespace = os.open(f"/proc/{self._first}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        if not self._namespaces:
            self._namespaces = tuple(
                os.open(f"/proc/{self._first}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
                for kind in ("uts", "net", "mnt")
            )

    async def exec(
        self,
        argv: Sequence[str | Path],
        *,
        stdin: int | IO[bytes] | None = DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        limit_bytes: int = 1 << 20,
    ) -> Process:
        """Start a program inside.

        Signals sent to the returned process reach the program; its exit code is the program's.

        Args:
            argv: the program, found on PATH inside, and its arguments.
            stdin: as for :func:`asyncio.create_subprocess_exec`, and so the other two.
            stdout: by default the caller's.
            stderr: by default the caller's.
            env: the whole environment; the caller's by default.
            limit_bytes: longest line that a stream reader takes.

        Guarantees:
            The program is in a session of its own, dies with the caller, and with the machine.
        """
        if not self.alive:
            raise LabError(f"machine {self.name} is not running")
        fds = (self._pid_namespace, *self._namespaces)
        process = await _enter(
            fds, argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, limit=limit_bytes
        )
        self._programs = [p for p in self._programs if p.returncode is None] + [process]
        return process

    async def run(
        self, argv: Sequence[str | Path], *, check: bool = True, timeout_s: float = _COMMAND_S
    ) -> Finished:
        """Run a program inside to its end.

        Raises:
            LabError: it failed (unless ``check`` is off) or did not end within ``timeout_s``; it has
                been killed then.
        """
        process = await self.exec(argv, stdout=PIPE, stderr=PIPE)
        what = f"{' '.join(map(str, argv))!r} on {self.name}"
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate()
        except TimeoutError as error:
            raise LabError(f"{what} did not end within {timeout_s} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        done = Finished(process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace"))
        if check and done.returncode:
            raise LabError(
                f"{what} failed with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done

    async def ip(self, *lines: str) -> None:
        """Run commands of iproute2's ``ip``, given without the word ``ip``, in one batch.

        They run in the machine's network alone, not in its process ids, also while it is dead.
        """
        network = self._namespaces[1:2]
        process = await _enter(network, ["ip", "-batch", "-"], stdin=PIPE, stdout=DEVNULL, stderr=PIPE)
        async with asyncio.timeout(_COMMAND_S):
            _, err = await process.communicate("".join(f"{line}\n" for line in lines).encode())
        if process.returncode:
            raise LabError(f"ip on {self.name}: {err.decode(errors='replace').strip()}")

    def processes(self) -> dict[int, list[str]]:
        """Return the command line of every process inside, by the process id seen from outside.

        Signals may be sent to these process ids as long as the machine is not restarted.
        """
        if not self.alive:
            return {}
        mine = os.fstat(self._pid_namespace).st_ino
        found: dict[int, list[str]] = {}
        for entry in Path("/proc").iterdir():
            # A process may end at any moment while it is looked at.
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/pid").stat().st_ino == mine:
                    words = (entry / "cmdline").read_bytes().split(b"\0")[:-1]
                    found[int(entry.name)] = [word.decode(errors="replace") for word in words]
        return found

    async def kill_all(self) -> None:
        """Kill every process of the machine with SIGKILL, at once: a host crash.

        Its network and its files stay as they are. The kernel closes the sockets of the dead, and so
        sends what a dead host would not; cut the cable first where that matters.
        """
        if not self.alive:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first, signal.SIGKILL)
        await self._end_launcher()
        for program in self._programs:
            await program.wait()
        self._programs.clear()

    async def close(self) -> None:
        """Kill the machine and let go of its namespaces."""
        await self.kill_all()
        await self._end_launcher()
        for fd in self._namespaces:
            os.close(fd)
        self._namespaces = ()

    async def _end_launcher(self) -> None:
        # The launcher ends by itself when the first process has; else something is wrong with it.
        if self._launcher is not None:
            try:
                async with asyncio.timeout(_COMMAND_S if self._first else 0.1):
                    await self._launcher.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._launcher.kill()
                await self._launcher.wait()
        self._first = 0
        if self._pid_namespace >= 0:
            os.close(self._pid_namespace)
            self._pid_namespace = -1


class Host(Machine):
    """One of the two hosts."""

    __slots__ = ("_switch", "address", "directory")

    def __init__(self, name: str, directory: Path, arbiter: Path, address: str, switch: Machine) -> None:
        root = str(directory.parent)
        super().__init__(
            name,
            (
                "tmpfs:/srv",
                f"bind:{directory}:/srv/host",
                f"bind:{arbiter}:/srv/arbiter",
                "tmpfs:/var/lib",
                f"bind:{directory / 'lib'}:/var/lib/understudy",
                "tmpfs:/run",
                f"hide:{root}",
            ),
        )
        self.directory = directory  #: seen from outside; ``/srv/host`` inside
        self.address = address  #: on the cable
        self._switch = switch

    async def cut_cable(self) -> None:
        """Let the cable of this host drop everything in both directions, silently: no carrier is lost."""
        await self._port("cable", "disabled")

    async def mend_cable(self) -> None:
        """Undo :meth:`cut_cable`."""
        await self._port("cable", "forwarding")

    async def cut_network(self, number: int = 0) -> None:
        """Let the switch drop everything from and to this host's bridge ``br{number}``, silently."""
        await self._port(f"net{number}", "disabled")

    async def mend_network(self, number: int = 0) -> None:
        """Undo :meth:`cut_network`."""
        await self._port(f"net{number}", "forwarding")

    async def revive(self) -> None:
        """Bring a killed host back, cable mended, with its network and files as they were left."""
        await self.mend_cable()
        await self.start()

    async def _port(self, network: str, state: str) -> None:
        # The state of a bridge port, unlike a link that is down, cannot be noticed at the other end.
        await self._switch.run(["bridge", "link", "set", "dev", f"{network}-{self.name}", "state", state])


class Lab:
    """Two hosts and a client, as an asynchronous context manager.

    Args:
        root: directory for the hosts' files and the arbiter's; made when missing, and left behind.
        networks: networks of guests: bridges ``br0``, ``br1``, ... in each host and as many interfaces
            of the client.
        ipv6: whether the kernels of these machines speak IPv6.
    """

    def __init__(self, root: Path, *, networks: int = 1, ipv6: bool = False) -> None:
        self.root = root.resolve()
        self.networks = networks
        self._ipv6 = ipv6
        self._switch = Machine("switch")
        self.client = Machine("client")
        self.arbiter = self.root / "arbiter"
        self.hosts = {
            name: Host(name, self.root / name, self.arbiter, f"10.99.0.{number}", self._switch)
            for number, name in enumerate(HOSTS, start=1)
        }

    async def __aenter__(self) -> Self:
        """Build everything.

        Raises:
            LabError: not root, or something could not be made; nothing is left running.
        """
        if os.geteuid() != 0:
            raise LabError("the laboratory makes network namespaces: run this as root, for example with sudo")
        for directory in (self.arbiter, *(host.directory / "lib" for host in self.hosts.values())):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            await self._build()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill everything inside; the directories stay."""
        await self._close()

    @property
    def machines(self) -> tuple[Machine, ...]:
        """All machines, the switch last."""
        return (*self.hosts.values(), self.client, self._switch)

    async def _build(self) -> None:
        async with asyncio.TaskGroup() as group:
            for machine in self.machines:
                group.create_task(machine.start())
        networks = range(self.networks)
        lines = [
            f"link add {b} type bridge stp_state 0 forward_delay 0 mcast_snooping 0" for b in self._bridges()
        ]
        lines += [f"link set {bridge} up" for bridge in self._bridges()]
        for host in self.hosts.values():
            lines += self._veth(host, "cable", "cable0")
            for number in networks:
                lines += self._veth(host, f"net{number}", f"up{number}")
        for number in networks:
            lines += self._veth(self.client, f"net{number}", f"eth{number}")
        for machine in self.machines:
            await machine.ip("link set lo up")
            if not self._ipv6:
                await machine.run(["sh", "-c", _NO_IPV6])
        await self._switch.ip(*lines)
        for host in self.hosts.values():
            own = [f"address add {host.address}/24 dev cable0", "link set cable0 up"]
            for number in networks:
                own += [
                    f"link add br{number} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
                    f"link set br{number} up",
                    f"link set up{number} master br{number} up",
                ]
            await host.ip(*own)
        for number in networks:
            await self.client.ip(
                f"address add 10.{77 + number}.0.1/24 dev eth{number}", f"link set eth{number} up"
            )

    def _bridges(self) -> list[str]:
        return ["cable", *(f"net{number}" for number in range(self.networks))]

    @staticmethod
    def _veth(machine: Machine, bridge: str, inside: str) -> list[str]:
        port = f"{bridge}-{machine.name}"
        return [
            f"link add {port} type veth peer name {inside} netns {machine._first}",  # noqa: SLF001
            f"link set {port} master {bridge} up",
        ]

    async def _close(self) -> None:
        for machine in self.machines:
            with contextlib.suppress(OSError):
                await machine.close()


@contextlib.asynccontextmanager
async def running(
    machine: Machine, argv: Sequence[str | Path], *, stop_s: float = 10.0
) -> AsyncIterator[Process]:
    """Run a program inside for the length of a block, its output lines readable from ``stdout``.

    Guarantees:
        At the end it is asked to end with SIGTERM and killed ``stop_s`` later.
    """
    process = await machine.exec(argv, stdout=PIPE, stderr=PIPE)
    try:
        yield process
    finally:
        await stop(process, stop_s)


async def stop(process: Process, stop_s: float = 10.0) -> int:
    """End a program with SIGTERM, after ``stop_s`` with SIGKILL, and return its exit code."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(stop_s):
            return await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()


async def _enter(
    namespace_fds: Sequence[int],
    argv: Sequence[str | Path],
    *,
    stdin: int | IO[bytes] | None,
    stdout: int | IO[bytes] | None,
    stderr: int | IO[bytes] | None,
    env: Mapping[str, str] | None = None,
    limit: int = 1 << 16,
) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", _ENTRY, "enter", str(os.getpid()), *map(str, namespace_fds)),
        *("--", *map(str, argv)),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=env,
        limit=limit,
        pass_fds=namespace_fds,
        start_new_session=True,
    )


async def _last_words(process: Process) -> str:
    if process.stderr is None:
        return "no message"
    text = (await process.stderr.read()).decode(errors="replace").strip()
    return text.splitlines()[-1] if text else "no message"
