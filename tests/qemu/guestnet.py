"""Two hosts whose guest has a network: the tiny guest on taps of this machine, and clients in a namespace of their own.

The hosts share the machine's network namespace, so a host's death is the death of its QEMU, with its taps taken off the
bridge as a fence would. Names are new for every bed; two runs at once do not meet.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import re
import subprocess
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.qemu.pair import GUEST, SIZE_BYTES, Host, Session
from understudy import interfaces
from understudy.device import Mode, Verdict
from understudy.group import GroupSetup
from understudy.hypervisor import Protection
from understudy_colo_proxy.subkind import COLO_PROXY
from understudy_qemu import network
from understudy_qemu.blockreplication import BLOCK_REPLICATION
from understudy_qemu.demo.tinyguest import TinyGuest
from understudy_qemu.guestfile import QemuConfig, parse_config
from understudy_qemu.machine import DriveProvider
from understudy_qemu.running import Launched, Qemu

# Opens connections at the moments it is told on standard input ("number time"), and talks over each until "end":
# one line of JSON for each connection. A word without an answer for 15 s is a lost connection.
_OPENER = Path(__file__).with_name("opener.py")


def run(*argv: str) -> str:
    """Run a program to its end and return what it says."""
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


class NetHost(Host):
    """A host of a guest with interfaces.

    Args:
        name: Of the host; the taps' names depend on it.
        root: Its directory.
        bed: Where it stands.
        nics: How many interfaces the guest has.
        draw: Every how many words the guest says something random.
    """

    def __init__(self, name: str, root: Path, bed: GuestNet, nics: int, draw: int) -> None:
        super().__init__(name, root, bed.accel, 1)
        self.draw = draw
        self.bed = bed
        self.nics = nics

    @functools.cached_property
    def config(self) -> QemuConfig:
        self.root.mkdir(exist_ok=True)
        ips = [f"10.{77 + number}.0.2/24" for number in range(self.nics)]
        table: dict[str, Any] = {
            "memory": "128MiB",
            "accel": self.accel.value,
            "kernel": str(self.bed.guest.kernel),
            "initrd": str(self.bed.guest.initrd),
            "cmdline": self.bed.guest.cmdline(ips, draw=self.draw),
            "disk": [{"path": "disk0.qcow2"}],
            "nic": [{"bridge": bridge} for bridge in self.bed.bridges[: self.nics]],
        }
        source, protection = self.root / "guest.toml", Protection(mode=Mode.COLO)
        return parse_config(table, name=GUEST, source=source, protection=protection, host=self.name)

    def make_images(self) -> None:
        for disk in self.config.disks:
            run("qemu-img", "create", "-q", "-f", "qcow2", str(disk.path), str(SIZE_BYTES))

    def count(self) -> int:
        try:
            found = re.findall(r"CTR (\d+)", self.paths.serial.read_text(errors="replace"))
        except FileNotFoundError:
            return 0
        return int(found[-1]) if found else 0

    async def start(self) -> Qemu:
        qemu = await super().start()
        await self.open_way_out()
        return qemu

    async def launch(self, drives: Mapping[str, DriveProvider], *, copy: bool) -> Qemu:
        for nic in self.config.nics:
            await network.create_tap(nic.tap, vnet_hdr=nic.vnet_hdr, mac=nic.mac)
        taps = {nic.name: nic.tap for nic in self.config.nics}
        launched = Launched(accel=self.accel.value, qemu=self.config.qemu, copy=copy, taps=taps)
        name = f"{GUEST} on {self.name}"
        preload = await self.preload()
        qemu = await Qemu.launch(self.config, self.paths, launched, drives, name=name, preload=preload)
        self.everything.append(qemu)
        return qemu

    async def open_way_out(self) -> None:
        """Put the guest's taps on their bridges."""
        for nic in self.config.nics:
            await interfaces.open_way_out(nic.tap, nic.bridge)

    async def fence(self) -> None:
        """Take the guest's taps off their bridges."""
        for nic in self.config.nics:
            await interfaces.close_way_out(nic.tap)

    async def kill(self) -> None:
        await super().kill()
        for nic in self.config.nics:
            await network.remove_tap(nic.tap)


class NetSession(Session):
    """A session whose copy is put on the bridges when it takes over."""

    beta: NetHost
    options: Mapping[str, Any] = {}  #: of colo-proxy

    def _setup(self, *arguments: Any) -> GroupSetup:
        return dataclasses.replace(super()._setup(*arguments), options={"colo-proxy": self.options})

    async def _connect(self) -> None:
        self.connected = True
        await self.beta.open_way_out()


class GuestNet:
    """The bridges, the clients' namespace, and the hosts on them.

    Args:
        root: A directory.
        guest: The tiny guest.
        accel: How QEMU runs it.
    """

    def __init__(self, root: Path, guest: TinyGuest, accel: Any) -> None:
        self.root, self.guest, self.accel = root, guest, accel
        self.id = uuid.uuid4().hex[:6]
        self.namespace = f"usc{self.id}"
        self.bridges = [f"usb{self.id}{number}" for number in range(2)]
        self.hosts: list[NetHost] = []
        self.sessions: list[NetSession] = []
        self.clients: list[Process] = []

    def make(self) -> None:
        """Make bridges and namespace."""
        run("ip", "netns", "add", self.namespace)
        for number, bridge in enumerate(self.bridges):
            port, inner = f"usv{self.id}{number}", f"eth{number}"
            run("ip", "link", "add", bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0")
            run("ip", "link", "set", bridge, "up")
            run("ip", "link", "add", port, "type", "veth", "peer", "name", inner, "netns", self.namespace)
            run("ip", "link", "set", port, "master", bridge, "up")
            address = f"10.{77 + number}.0.1/24"
            run("ip", "-n", self.namespace, "addr", "add", address, "dev", inner)
            run("ip", "-n", self.namespace, "link", "set", inner, "up")

    async def close(self) -> None:
        """End everything that was started, and remove what was made."""
        for client in self.clients:
            if client.returncode is None:
                client.kill()
            await client.wait()
        groups = [
            g for s in self.sessions for g in (s.__dict__.get("p_group"), s.__dict__.get("s_group")) if g
        ]
        for group in groups:
            group.sever_all()
        for session in self.sessions:
            await session.close()
        for host in self.hosts:
            await host.kill()
        for group in groups:
            # A session that a test left in the middle: the guest is dead.
            with suppress(Exception):
                await group.teardown(Verdict.DISCARD)
        self.remove()

    def remove(self) -> None:
        """Remove bridges, ports and namespace, as far as they are there."""
        # A namespace lives on for minutes with what a client has left unacknowledged, and would keep its ports.
        ports = [f"usv{self.id}{number}" for number in range(len(self.bridges))]
        for link in (*self.bridges, *ports):
            subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self.namespace], check=False, capture_output=True)

    def host(self, name: str, nics: int = 1, draw: int = 0) -> NetHost:
        """Return a new host."""
        self.hosts.append(NetHost(f"{name}-{self.id}", self.root / name, self, nics, draw))
        return self.hosts[-1]

    def session(self, alpha: NetHost, beta: NetHost, name: str = "s1", delay_ms: int = 5000) -> NetSession:
        """Return a new session in mode colo."""
        subkinds = (BLOCK_REPLICATION, COLO_PROXY)
        self.sessions.append(NetSession(alpha, beta, name=name, delay_ms=delay_ms, subkinds=subkinds))
        return self.sessions[-1]

    async def client(self, interval_ms: int = 30, host: str = "10.77.0.2", timeout_s: int = 20) -> Client:
        """Start a client that verifies every reply, and wait for its first."""
        arguments = ("--interval-ms", str(interval_ms), "--timeout-s", str(timeout_s), "--host", host)
        process = await self._inside(sys.executable, "-m", "understudy_qemu.demo.client", *arguments)
        client = Client(process)
        await client.replies(2)
        return client

    async def opener(self) -> Opener:
        """Start a client that opens connections when it is told."""
        return Opener(await self._inside(sys.executable, str(_OPENER)))

    async def flood(self, seconds: float) -> None:
        """Send the guest as much as a busy client does."""
        await self._inside(sys.executable, str(_OPENER.with_name("flood.py")), str(seconds))

    async def _inside(self, *argv: str) -> Process:
        command = ("ip", "netns", "exec", self.namespace, *argv)
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        self.clients.append(process)
        return process


class Client:
    """A client that talks over one connection and verifies the guest's hash chain.

    Args:
        process: The demo's client.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self.lines: list[dict[str, Any]] = []
        self._more = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.lines.append(json.loads(line))
            self._more.set()

    @property
    def answered(self) -> int:
        """How many replies have come."""
        return sum("n" in line for line in self.lines)

    async def replies(self, more: int, timeout_s: float = 20.0) -> None:
        """Wait for `more` replies from now on."""
        wanted = self.answered + more
        async with asyncio.timeout(timeout_s):
            while self.answered < wanted:
                self._more.clear()
                await self._more.wait()

    async def end(self) -> dict[str, Any]:
        """Let it finish; return its summary."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        await self._reading
        await self._process.wait()
        summary: dict[str, Any] = self.lines[-1]["summary"]
        return summary

    async def kept(self) -> None:
        """Assert that its connection lasted and every reply was right."""
        summary = await self.end()
        assert summary["connection_kept"], summary
        assert not summary["bad"], summary
        assert not summary["unanswered"], summary


class Opener:
    """Opens connections at given moments.

    Args:
        process: opener.py.
    """

    def __init__(self, process: Process) -> None:
        self._process = process

    def at(self, moments: Sequence[float]) -> None:
        """Open one connection at each of these moments, seconds of the realtime clock."""
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{moment:.6f}\n" for moment in moments).encode())

    async def end(self) -> list[dict[str, Any]]:
        """Let every connection finish its word; return what became of each."""
        out, _ = await self._process.communicate(b"end\n")
        found: list[dict[str, Any]] = json.loads(out)
        return found
