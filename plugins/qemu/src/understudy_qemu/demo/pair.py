"""Two hosts with an agent each and a tiny guest for them: what the demo and the tests with real QEMU start from."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from understudy_qemu.demo.chain import DiskCheck, check_disk
from understudy_qemu.demo.lab import HOSTS, Host, Lab, LabError, stop
from understudy_qemu.demo.talk import Talk
from understudy_qemu.demo.tinyguest import TinyGuest
from understudy_qemu.demo.trace import TRACE_VARIABLE

__all__ = ["GUEST", "CommandFailed", "GuestPlan", "Pair"]

GUEST = "demo"
_CONFIG = "/srv/host/agent.toml"
_IMAGE_BYTES = 16 << 20
_READY_S = 30.0
_COMMAND_S = 90.0


class CommandFailed(LabError):
    """Say that a command of ``understudy`` failed; ``fault`` is its JSON error."""

    def __init__(self, message: str, fault: Mapping[str, Any], code: int) -> None:
        super().__init__(message)
        self.fault = fault
        self.code = code


@dataclass(frozen=True, slots=True)
class GuestPlan:
    """What the guest of a pair looks like.

    Args:
        disks: number of disks of 16 MiB.
        nics: number of interfaces, each on a bridge and network of its own.
        mode: ``remus`` or ``colo``.
        period_ms: between two checkpoints in mode remus.
        draw: every how many words a connection draws a random value, 0 for never; by default rarely in mode
            colo, where every draw makes the outputs differ and costs a checkpoint.
        memory: as in a guest file.
        extra: appended to the guest file.
    """

    disks: int = 1
    nics: int = 1
    mode: str = "colo"
    period_ms: float = 50.0
    draw: int | None = None
    memory: str = "128MiB"
    extra: str = ""

    def guest_file(self, guest: TinyGuest) -> str:
        """Return the guest file; ``guest``'s files are given by their places inside a host."""
        ips = [f"10.{77 + number}.0.2/24" for number in range(self.nics)]
        draw = (64 if self.mode == "remus" else 128) if self.draw is None else self.draw
        text = [
            f'name = "{GUEST}"',
            'hypervisor = "qemu"',
            'machine = "pc"',
            f'memory = "{self.memory}"',
            f'kernel = "{guest.kernel}"',
            f'initrd = "{guest.initrd}"',
            f'cmdline = "{guest.cmdline(ips, draw=draw)}"',
            self.extra,
        ]
        for number in range(self.disks):
            text += ["[[disk]]", f'path = "/srv/host/disk{number}.qcow2"']
        for number in range(self.nics):
            text += ["[[nic]]", f'bridge = "br{number}"', f'mac = "52:54:00:77:00:{number + 2:02x}"']
        text += ["[protection]", f'mode = "{self.mode}"']
        if self.mode == "remus":
            text += ['interval = "fixed"', "[protection.interval_options]", f"period_ms = {self.period_ms}"]
        return "\n".join(text) + "\n"


class Pair:
    """A laboratory with an agent on each host, as an asynchronous context manager.

    Args:
        root: for the files of both hosts; left behind.
        guest: the built guest.
        plan: what it looks like.
        heartbeat_limit_ms: silence between the agents that is taken for a loss.
    """

    def __init__(
        self, root: Path, guest: TinyGuest, plan: GuestPlan = GuestPlan(), *, heartbeat_limit_ms: int = 1000
    ) -> None:
        self.lab = Lab(root, networks=plan.nics)
        self.plan = plan
        self._guest = guest
        self._limit_ms = heartbeat_limit_ms
        self._agents: dict[str, Process] = {}

    async def __aenter__(self) -> Self:
        """Build the laboratory, write both hosts' files, start both agents and see them linked.

        Raises:
            LabError: something did not come up; nothing is left running.
        """
        await self.lab.__aenter__()
        try:
            for name in HOSTS:
                await asyncio.to_thread(self._write_files, name)
            await self._create_images(self.lab.hosts[HOSTS[0]])
            for name in HOSTS:
                await self.start_agent(name)
            for name in HOSTS:
                await self.linked(name)
        except BaseException:
            await self.lab.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the agents, then everything else."""
        try:
            await asyncio.gather(*(stop(agent) for agent in self._agents.values()))
        finally:
            await self.lab.__aexit__(None, None, None)

    # --- Files ------------------------------------------------------------------------------------

    def _write_files(self, name: str) -> None:
        host = self.lab.hosts[name]
        for source, place in ((self._guest.kernel, "vmlinuz"), (self._guest.initrd, "initrd")):
            # The cache may lie where a host cannot see it.
            shutil.copyfile(source, host.directory / place)
        inside = TinyGuest(Path("/srv/host/vmlinuz"), Path("/srv/host/initrd"))
        (host.directory / "guests").mkdir(exist_ok=True)
        text = self.plan.guest_file(inside)
        (host.directory / "guests" / f"{GUEST}.toml").write_text(text, encoding="utf-8")
        (host.directory / "agent.toml").write_text(self.agent_file(name), encoding="utf-8")

    def agent_file(self, name: str) -> str:
        """Return the configuration of a host's agent."""
        peers = [
            f'[peers.{other}]\naddress = "{self.lab.hosts[other].address}"'
            for other in HOSTS
            if other != name
        ]
        return "\n".join(
            [
                f'host = "{name}"',
                "insecure = true",
                f'[listen]\naddress = "{self.lab.hosts[name].address}"',
                *peers,
                '[directories]\nguests = "/srv/host/guests"',
                '[arbiter]\nkind = "directory"\npath = "/srv/arbiter"',
                f"[limits]\nheartbeat_limit_ms = {self._limit_ms}",
                "",
            ]
        )

    async def _create_images(self, host: Host) -> None:
        for number in range(self.plan.disks):
            image = f"/srv/host/disk{number}.qcow2"
            await host.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(_IMAGE_BYTES)])

    # --- Agents -----------------------------------------------------------------------------------

    async def start_agent(self, name: str) -> Process:
        """Start the agent of a host; its log is appended to ``agent.log`` in the host's directory."""
        host = self.lab.hosts[name]
        with (host.directory / "agent.log").open("ab") as log:
            agent = await host.exec(
                [sys.executable, "-m", "understudy", "agent", "run", "--config", _CONFIG],
                stdout=log,
                stderr=log,
                env={**os.environ, TRACE_VARIABLE: "/srv/host/trace.jsonl"},
            )
        self._agents[name] = agent
        return agent

    async def linked(self, name: str) -> None:
        """Wait until the agent of a host answers and has its peer.

        Raises:
            LabError: it ended, or did not become ready within 30 s.
        """
        limit = time.monotonic() + _READY_S
        while True:
            if self._agents[name].returncode is not None:
                raise LabError(f"the agent of {name} has ended: {self.last_words(name)}")
            seen: Any = None
            try:
                seen = await self.command(name, "status", timeout_s=_READY_S)
                if all(peer["up"] for peer in seen["peers"]):
                    return
            except CommandFailed as error:
                seen = error
            if time.monotonic() > limit:
                raise LabError(f"the agents did not link: {seen}; {self.last_words(name)}")
            await asyncio.sleep(0.1)

    def last_words(self, name: str) -> str:
        """Return the end of an agent's log."""
        path = self.lab.hosts[name].directory / "agent.log"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        return " | ".join(lines[-3:]) or "it said nothing"

    async def command(self, name: str, verb: str, *arguments: str, timeout_s: float = _COMMAND_S) -> Any:
        """Run ``understudy VERB ...`` on a host and return what it printed, as JSON.

        Raises:
            CommandFailed: its exit code was not 0.
            LabError: it did not end in time.
        """
        argv = [*_understudy(verb, *arguments), "--format", "json"]
        done = await self.lab.hosts[name].run(argv, check=False, timeout_s=timeout_s)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = {}
        if done.returncode:
            fault = answer.get("error", {})
            words = fault.get("message") or done.stderr.strip() or f"exit code {done.returncode}"
            raise CommandFailed(f"understudy {verb} on {name}: {words}", fault, done.returncode)
        return answer

    async def protect(self, name: str, *, show: bool) -> None:
        """Protect the guest from the host where it runs.

        Args:
            name: the host.
            show: let the command draw its progress on the terminal.

        Raises:
            CommandFailed: its exit code was not 0.
        """
        if not show:
            await self.command(name, "protect", GUEST)
            return
        process = await self.lab.hosts[name].exec(_understudy("protect", GUEST))
        try:
            async with asyncio.timeout(_COMMAND_S):
                code = await process.wait()
        finally:
            if process.returncode is None:
                await stop(process)
        if code:
            raise CommandFailed(f"understudy protect on {name} failed with {code}", {}, code)

    # --- Losing a host and getting it back ---------------------------------------------------------

    async def lose(self, name: str) -> int:
        """Cut a host's cable, then kill everything on it; return when, CLOCK_MONOTONIC in ns."""
        host = self.lab.hosts[name]
        await host.cut_cable()
        lost_ns = time.monotonic_ns()
        await host.kill_all()
        return lost_ns

    async def bring_back(self, name: str) -> None:
        """Revive a lost host, start its agent (whose janitor cleans) and see it linked."""
        await self.lab.hosts[name].revive()
        await self.start_agent(name)
        await self.linked(name)

    # --- What can be seen from outside --------------------------------------------------------------

    def trace(self, name: str, start: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Return what a host's agent has traced since offset ``start``, and the offset to go on from."""
        path = self.lab.hosts[name].directory / "trace.jsonl"
        if not path.exists():
            return [], start
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        # The last line may still be on its way, or for ever cut by a kill.
        whole = data[: data.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], start + len(whole)

    async def check_disks(self, name: str, talk: Talk) -> list[DiskCheck]:
        """Check every disk image of a host against what the client was told until now."""
        if talk.greeting is None:
            raise LabError("the guest has not greeted the client")
        acknowledged = dict(talk.acknowledged)
        checks = []
        for number in range(self.plan.disks):
            raw = await self.raw_image(name, number)
            checks.append(await asyncio.to_thread(check_disk, raw, talk.greeting, acknowledged, number))
        return checks

    async def raw_image(self, name: str, number: int) -> bytes:
        """Return the contents of a disk, also while the guest runs on it."""
        directory = self.lab.hosts[name].directory
        source, target = directory / f"disk{number}.qcow2", directory / f"disk{number}.raw"
        await _run(["qemu-img", "convert", "-U", "-O", "raw", str(source), str(target)])
        try:
            return await asyncio.to_thread(target.read_bytes)
        finally:
            target.unlink(missing_ok=True)


def _understudy(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "understudy", verb, *arguments, "--config", _CONFIG]


async def _run(argv: Sequence[str]) -> None:
    process = await asyncio.create_subprocess_exec(*argv, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(_COMMAND_S):
            _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise LabError(f"{argv[0]} failed: {err.decode(errors='replace').strip()}")
