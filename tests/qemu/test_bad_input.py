"""What two agents with real guests do when they are given something wrong.

One laboratory serves all cases: a guest on alpha, which is to be protected, another one on beta, and a client that
talks to each of them. In every case the operator gets one sentence and an exit code; both guests go on as the same
processes and answer their clients; and both hosts are afterwards as they were: QEMU's nodes, chardevs, objects and
exports, files, interfaces, sockets.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.testbeds.bed import missing_for_qemu, need
from understudy_qemu.demo.lab import HOSTS, Host, stop
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair
from understudy_qemu.demo.talk import Talk
from understudy_qemu.demo.tinyguest import TinyGuest, build_guest
from understudy_qemu.guestfile import QEMU_VARIABLE
from understudy_qemu.inventory import Inventory
from understudy_qemu.monitor import QemuMonitor

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]

OTHER = "bystander"
PORT = 7464
CONFIG = "/srv/host/agent.toml"
UNDERSTUDY = (sys.executable, "-m", "understudy")
STRANGERS = (sys.executable, str(Path(__file__).with_name("strangers.py")))
LIMIT_S = 60.0

OK, FAILED, WRONG_STATE, NOT_PROTECTABLE, CONFIG_WRONG, CANCELLED = 0, 1, 4, 5, 9, 130

#: What a protection leaves on purpose: the replica with its identity, and what was said.
DATA = ("/srv/host/disk0.qcow2", "/srv/host/disk0.qcow2.understudy", "/var/lib/understudy/qemu/demo")
LOGS = ("/var/lib/understudy/history", "/var/lib/understudy/generations", "/var/lib/understudy/qemu/.cache")


@dataclass(frozen=True)
class Traces:
    """What a host has that a session may add to."""

    qemus: dict[int, str]
    inside: dict[str, Any]
    files: frozenset[str]
    links: frozenset[str]
    sockets: Counter[str]


@dataclass
class Refusal:
    """How a command failed."""

    code: int
    text: str
    fault: dict[str, Any] = field(default_factory=dict)

    def finding(self, subject: str) -> dict[str, str]:
        """Return the one error that the preflight found in a subject."""
        errors = [each for each in self.fault["findings"] if each["severity"] == "error"]
        found = [each for each in errors if each["subject"] == subject]
        assert len(found) == 1, self.fault
        return dict(found[0])


class Bed:
    """The laboratory of this module."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.alpha, self.beta = (pair.lab.hosts[name] for name in HOSTS)
        self.talks: dict[str, Talk] = {}

    # --- Commands ----------------------------------------------------------------------------------------------------

    async def run(self, host: Host, verb: str, *arguments: str, config: str = CONFIG) -> Refusal:
        """Run a command of ``understudy``; whatever it says, it says without a traceback."""
        argv = [*UNDERSTUDY, *verb.split(), *arguments, "--config", config, "--format", "json"]
        done = await host.run(argv, check=False, timeout_s=LIMIT_S)
        said = done.stdout + done.stderr
        assert "Traceback" not in said
        answer = json.loads(done.stdout) if done.stdout else {}
        return Refusal(done.returncode, said, answer.get("error", answer))

    async def refused(
        self, code: int, *words: str, host: Host | None = None, verb: str = "protect"
    ) -> Refusal:
        """Demand that a command about the guest fails with an exit code and a message that has `words`."""
        refusal = await self.run(host or self.alpha, verb, GUEST)
        self.says(refusal, code, *words)
        return refusal

    @staticmethod
    def says(refusal: Refusal, code: int, *words: str) -> None:
        """Demand an exit code and words of a message."""
        assert refusal.code == code, refusal
        message = refusal.fault["message"]
        for word in words:
            assert word in message, message

    async def row(self, host: Host, guest: str = GUEST) -> dict[str, Any]:
        """Return what an agent says of a guest on its own host."""
        answer = await self.run(host, "list")
        assert answer.code == OK, answer
        rows = [row for row in answer.fault["guests"] if row["host"] == host.name and row["guest"] == guest]
        return rows[0] if rows else {}

    async def becomes(self, host: Host, guest: str = GUEST, **wanted: Any) -> dict[str, Any]:
        """Wait until an agent says `wanted` of a guest."""
        limit = time.monotonic() + LIMIT_S
        while True:
            row = await self.row(host, guest)
            if all(row.get(key) == value for key, value in wanted.items()):
                return row
            assert time.monotonic() < limit, (row, wanted, self.log(host)[-2000:])
            await asyncio.sleep(0.1)

    def log(self, host: Host) -> str:
        """Return what a host's agent has logged."""
        return (host.directory / "agent.log").read_text(errors="replace")

    # --- Guest files -------------------------------------------------------------------------------------------------

    @contextmanager
    def guest_file(
        self, *, append: str = "", hosts: tuple[str, ...] = HOSTS, **replaced: str
    ) -> Iterator[None]:
        """Have another guest file on some hosts."""
        before = {}
        for name in hosts:
            path = self.pair.lab.hosts[name].directory / "guests" / f"{GUEST}.toml"
            before[path] = text = path.read_text()
            for old, new in replaced.items():
                assert old in text
                text = text.replace(old, new)
            path.write_text(text + append)
        try:
            yield
        finally:
            for path, text in before.items():
                path.write_text(text)

    # --- Nothing lost, nothing left ----------------------------------------------------------------------------------

    async def traces(self, host: Host) -> Traces:
        """Look at a host."""
        qemus = {
            pid: " ".join(words)
            for pid, words in host.processes().items()
            if words and Path(words[0]).name.startswith("qemu")
        }
        places = ["/run/understudy", "/var/lib/understudy", "/srv/host"]
        # Seen twice: the directory of what survives a reboot.
        find = ["find", *places, "-path", "/srv/host/lib", "-prune", "-o", "-print"]
        files = (await host.run(find)).stdout.splitlines()
        links = (await host.run(["ip", "-o", "link"])).stdout.splitlines()
        network = (await host.run(["cat", "/proc/net/tcp", "/proc/net/tcp6", "/proc/net/unix"])).stdout
        return Traces(
            qemus=qemus,
            inside={guest: await self._inside(host, guest) for guest in (GUEST, OTHER)},
            files=frozenset(each for each in files if _is_trace(each)),
            links=frozenset(line.split(": ")[1].split("@")[0] for line in links),
            sockets=Counter(_sockets(network)),
        )

    async def _inside(self, host: Host, guest: str) -> Any:
        socket = host.directory / f"inspect-{guest}"
        if not any(socket.name in " ".join(words) for words in host.processes().values()):
            return None
        monitor = await QemuMonitor.connect(socket, name=f"{guest} on {host.name}", timeout_s=LIMIT_S)
        try:
            nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
            drivers = Counter(node["drv"] for node in nodes)
            return (await Inventory.take(monitor)).to_json(), drivers, await monitor.execute("query-status")
        finally:
            await monitor.close()

    async def everybody_answers(self) -> None:
        """Demand new replies of both guests, and that there never was a wrong one."""
        now_ns = time.monotonic_ns()
        for talk in self.talks.values():
            await talk.replies_after(now_ns, 5, LIMIT_S)
            assert talk.problems == []
            assert talk.lost_ns is None


@asynccontextmanager
async def harmless(bed: Bed) -> AsyncIterator[None]:
    """Demand that whatever goes wrong in the block does no harm."""
    before = {host.name: await bed.traces(host) for host in (bed.alpha, bed.beta)}
    logged = {host.name: len(bed.log(host)) for host in (bed.alpha, bed.beta)}
    yield
    await bed.everybody_answers()
    for host in (bed.alpha, bed.beta):
        assert "Traceback" not in bed.log(host)[logged[host.name] :]
        limit = time.monotonic() + LIMIT_S
        # The kernel may take a moment to close what a dead process had open.
        while (after := await bed.traces(host)) != before[host.name]:
            assert time.monotonic() < limit, f"{host.name}: {_difference(before[host.name], after)}"
            await asyncio.sleep(0.2)
    assert (await bed.row(bed.alpha))["state"] in {"unprotected", "alone"}
    assert not (await bed.row(bed.beta)).get("role")


def _is_trace(path: str) -> bool:
    return not (path in DATA or path.startswith(LOGS) or path.endswith(".log") or "/inspect-" in path)


def _sockets(network: str) -> Iterator[str]:
    # Who listens, and who is connected but for the agents' own link.
    for line in network.splitlines():
        words = line.split()
        if len(words) > 10 and words[0].endswith(":"):
            ends = [int(word.rpartition(":")[2], 16) for word in words[1:3]]
            if words[3] == "0A":
                yield f"listens on {ends[0]}"
            elif words[3] == "01" and PORT not in ends:
                yield f"is connected from {ends[0]} to {ends[1]}"
        elif len(words) > 7 and words[3] == "00010000":
            yield f"listens on {words[7]}"


def _difference(before: Traces, after: Traces) -> str:
    told = []
    for name in ("qemus", "inside", "files", "links", "sockets"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            told.append(
                f"{name}: {old} became {new}" if isinstance(old, dict) else f"{name}: {set(old) ^ set(new)}"
            )
    return "; ".join(told)


# --- The laboratory --------------------------------------------------------------------------------------------------


def inspected(guest: str) -> str:
    """Return a line of a guest file that gives QEMU a monitor for the tests."""
    return f'arguments = ["-qmp", "unix:/srv/host/inspect-{guest},server=on,wait=off"]'


def other_guest(guest: TinyGuest) -> str:
    """Return the file of the guest that nobody wants anything of."""
    return "\n".join(
        [
            'hypervisor = "qemu"',
            'memory = "96MiB"',
            f'kernel = "/srv/host/{guest.kernel.name}"',
            f'initrd = "/srv/host/{guest.initrd.name}"',
            f'cmdline = "{guest.cmdline(["10.77.0.3/24"], draw=16)}"',
            inspected(OTHER),
            '[[disk]]\npath = "/srv/host/other.qcow2"',
            '[[nic]]\nbridge = "br0"\nmac = "52:54:00:77:00:42"',
            "",
        ]
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bed]:
    need("qemu", missing_for_qemu())
    guest = await build_guest()
    plan = GuestPlan(draw=16, extra=inspected(GUEST))
    async with AsyncExitStack() as stack:
        pair = await stack.enter_async_context(Pair(tmp_path_factory.mktemp("bad"), guest, plan))
        bed = Bed(pair)
        inside = TinyGuest(Path("vmlinuz"), Path("initrd"))
        (bed.beta.directory / "guests" / f"{OTHER}.toml").write_text(other_guest(inside))
        await bed.beta.run(["qemu-img", "create", "-q", "-f", "qcow2", "/srv/host/other.qcow2", "16M"])
        await pair.command("beta", "start", OTHER)
        await pair.command("alpha", "start", GUEST)
        for name, address in ((GUEST, "10.77.0.2"), (OTHER, "10.77.0.3")):
            bed.talks[name] = await Talk.begin(pair.lab, address, timeout_s=LIMIT_S)
            stack.push_async_callback(bed.talks[name].end)
        yield bed


@asynccontextmanager
async def stranger(host: Host, *argv: str | Path) -> AsyncIterator[Process]:
    """Run a program of strangers.py on a host until the block's end; its first line has come."""
    process = await host.exec([*STRANGERS, *argv], stdin=PIPE, stdout=PIPE)
    try:
        async with asyncio.timeout(LIMIT_S):
            assert process.stdout is not None
            assert await process.stdout.readline()
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


# --- Files -----------------------------------------------------------------------------------------------------------


async def test_malformed_guest_files(bed: Bed) -> None:
    async with harmless(bed):
        broken = bed.alpha.directory / "guests" / "broken.toml"
        broken.write_text('hypervisor = "qemu\n')
        try:
            refusal = await bed.run(bed.alpha, "start", "broken")
            bed.says(refusal, CONFIG_WRONG, "/srv/host/guests/broken.toml", "line 1")
            # One wrong file is a warning in the table of the others.
            listed = await bed.run(bed.alpha, "list")
            assert any("broken.toml" in warning for warning in listed.fault["warnings"])
            assert GUEST in {row["guest"] for row in listed.fault["guests"]}
        finally:
            broken.unlink()
        for append, key, allowed in (
            ('[[disk]]\npath = "x.qcow2"\nbus = "virtoi"\n', "disk[1].bus", "virtio, scsi, ide"),
            ("[overlays]\nroom = 3\n", "overlays.room", "directory, room_ratio, volatile"),
            ('[host.gamma]\nmemory = "1GiB"\n', "host.gamma", "alpha, beta"),
        ):
            with bed.guest_file(hosts=("alpha",), append=append):
                refusal = await bed.refused(CONFIG_WRONG, "/srv/host/guests/demo.toml", key, allowed)
                assert refusal.fault["key"] == key
        # The other host's file: its owner learns it here.
        with bed.guest_file(hosts=("beta",), append="[overlays]\nroom = 3\n"):
            refusal = await bed.refused(NOT_PROTECTABLE, "it runs on as before")
            finding = refusal.finding("host beta")
            assert "/srv/host/guests/demo.toml: overlays.room" in finding["problem"]


async def test_the_secondarys_image_has_another_size(bed: Bed) -> None:
    image = bed.beta.directory / "disk0.qcow2"
    async with harmless(bed):
        await bed.beta.run(["qemu-img", "create", "-q", "-f", "qcow2", "/srv/host/disk0.qcow2", "8M"])
        content = image.read_bytes()
        try:
            with bed.guest_file(append="overwrite_secondary = true\n"):
                refusal = await bed.refused(NOT_PROTECTABLE, "it runs on as before")
            finding = refusal.finding("disk0 on beta")
            assert finding["problem"] == (
                f"/srv/host/disk0.qcow2 has {8 << 20} bytes, the primary's disk has {16 << 20}"
            )
            assert finding["remedy"]
            assert image.read_bytes() == content
            assert not image.with_name("disk0.qcow2.understudy").exists()
        finally:
            image.unlink()


async def test_no_room_for_overlays(bed: Bed) -> None:
    overlays = "/var/lib/understudy/overlays"
    async with harmless(bed):
        await bed.beta.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", overlays])
        try:
            refusal = await bed.refused(NOT_PROTECTABLE, "it runs on as before")
        finally:
            await bed.beta.run(["umount", overlays])
        findings = [each for each in refusal.fault["findings"] if each["subject"] == "overlays on beta"]
        assert [each["severity"] for each in findings] == ["error", "warning"]
        assert "has 1 MiB of room, the copy's writes need 64 MiB" in findings[0]["problem"]
        assert "is in memory" in findings[1]["problem"]


async def test_a_bridge_is_missing(bed: Bed) -> None:
    async with harmless(bed):
        with bed.guest_file(append='[[host.beta.nic]]\nbridge = "nowhere"\n'):
            refusal = await bed.refused(NOT_PROTECTABLE, "it runs on as before")
            assert refusal.finding("nic0 on beta")["problem"] == "there is no bridge nowhere"


async def test_a_guest_is_not_started_without_its_bridge(bed: Bed) -> None:
    async with harmless(bed):
        await bed.beta.run(["qemu-img", "create", "-q", "-f", "qcow2", "/srv/host/third.qcow2", "1M"])
        third = bed.beta.directory / "guests" / "third.toml"
        text = 'hypervisor = "qemu"\nmemory = "16MiB"\n[[disk]]\npath = "/srv/host/third.qcow2"\n'
        third.write_text(text + '[[nic]]\nbridge = "nowhere"\n')
        try:
            refusal = await bed.run(bed.beta, "start", "third")
            bed.says(refusal, FAILED, "nowhere", "beta")
            assert (await bed.row(bed.beta, "third"))["state"] == "off"
        finally:
            third.unlink()
            for name in ("third.qcow2", "third.qcow2.understudy"):
                (bed.beta.directory / name).unlink(missing_ok=True)


# --- Hosts that do not fit -------------------------------------------------------------------------------------------


def other_qemu(distributions: str, chosen: str) -> bytes:
    """Return a QEMU of another version than the one that is chosen."""
    if chosen != distributions:
        # Called where it is: it looks for its modules beside itself.
        return f'#!/bin/sh\nexec {distributions} "$@"\n'.encode()
    program = Path(distributions).read_bytes()
    # The same program, which says of itself that its package is another one.
    words = subprocess.run([distributions, "--version"], capture_output=True, check=True).stdout
    package = words.partition(b"(")[2].partition(b")")[0]
    assert package, words
    assert package in program
    return program.replace(package, b"X" + package[1:])


@asynccontextmanager
async def another_qemu(host: Host) -> AsyncIterator[None]:
    """Give a host a QEMU of another version, in the place of the one that it has."""
    distributions = shutil.which("qemu-system-x86_64")
    assert distributions is not None
    chosen = os.environ.get(QEMU_VARIABLE) or distributions
    patched = host.directory / "other-qemu"
    patched.write_bytes(other_qemu(distributions, chosen))
    patched.chmod(0o755)
    await host.run(["mount", "--bind", f"/srv/host/{patched.name}", chosen])
    try:
        yield
    finally:
        await host.run(["umount", chosen])
        patched.unlink()


async def test_the_peer_has_another_qemu(bed: Bed) -> None:
    async with harmless(bed):
        async with another_qemu(bed.beta):
            refusal = await bed.refused(NOT_PROTECTABLE, "it runs on as before")
        problem = refusal.finding("QEMU on alpha and beta")["problem"]
        assert "different versions" in problem
        assert "on alpha" in problem
        assert "on beta" in problem
        assert refusal.finding("QEMU on alpha and beta")["remedy"]


async def test_the_peers_agent_speaks_another_protocol(bed: Bed) -> None:
    async with harmless(bed):
        await stop(bed.pair._agents["beta"])
        async with stranger(bed.beta, "peer", bed.beta.address, str(PORT), bed.alpha.address) as peer:
            assert peer.stdout is not None
            async with asyncio.timeout(LIMIT_S):
                answer = (await peer.stdout.readline()).decode()
            assert "refuse: protocol version 2 of agent 9.9 on beta is not version 1 of agent" in answer
            status = (await bed.run(bed.alpha, "status")).fault
            (seen,) = status["peers"]
            assert not seen["up"]
            assert "protocol version" in seen["problem"]
            assert "9.9 on beta" in seen["problem"]
            refusal = await bed.refused(NOT_PROTECTABLE, "it runs on as before")
            assert "protocol version" in refusal.finding("host beta")["problem"]
        await bed.pair.start_agent("beta")
        for name in HOSTS:
            await bed.pair.linked(name)
        await bed.becomes(bed.beta, OTHER, role="primary")


async def test_the_agents_port_is_taken(bed: Bed) -> None:
    place = bed.beta.directory / "second"
    async with harmless(bed):
        # The same configuration: somebody answers there already.
        bed.says(await bed.run(bed.beta, "agent run"), WRONG_STATE, "another agent is running")
        place.mkdir()
        try:
            directories = "".join(
                f'{key} = "/srv/host/second/{key}"\n' for key in ("state", "runtime", "guests")
            )
            text = bed.pair.agent_file("beta").replace(
                "[directories]\nguests", f"[directories]\n{directories}#"
            )
            (place / "agent.toml").write_text(text)
            refusal = await bed.run(bed.beta, "agent run", config="/srv/host/second/agent.toml")
            bed.says(refusal, CONFIG_WRONG, "/srv/host/second/agent.toml: listen", f"10.99.0.2 port {PORT}")
            assert "in use" in refusal.fault["message"]
            assert not (place / "runtime" / "agent.sock").exists()
        finally:
            shutil.rmtree(place)


# --- While the guest is protected, or nearly -------------------------------------------------------------------------


async def listeners(bed: Bed, host: Host) -> set[int]:
    """Return the TCP ports on which a host listens."""
    names = (await bed.traces(host)).sockets
    return {
        int(name.rpartition(" ")[2]) for name in names if name.startswith("listens on") and "/" not in name
    }


@asynccontextmanager
async def few_ports(host: Host, first: int, last: int) -> AsyncIterator[None]:
    """Leave the kernel of a host every second port from `first` to `last` to choose from; the others are taken."""
    place = "/proc/sys/net/ipv4/ip_local_port_range"
    before = (await host.run(["cat", place])).stdout.split()
    await host.run(["sh", "-c", f"echo {first} {last} > {place}"])
    try:
        async with stranger(host, "take", str(first), str(last)):
            yield
    finally:
        await host.run(["sh", "-c", f"echo {' '.join(before)} > {place}"])


async def test_rivals_and_strangers(bed: Bed) -> None:
    ports = range(41000, 41064)
    async with harmless(bed):
        async with few_ports(bed.beta, ports[0], ports[-1]):
            taken = await listeners(bed, bed.beta)
            assert len(taken & set(ports)) == len(ports) // 2
            # Three at once: one protects, the others are told so.
            tries = [(bed.alpha, "protect"), (bed.alpha, "protect"), (bed.beta, "protect")]
            done = await asyncio.gather(*(bed.run(host, verb, GUEST) for host, verb in tries))
            assert sorted(each.code for each in done[:2]) == [OK, WRONG_STATE], done
            loser = next(each for each in done[:2] if each.code)
            assert "protect is under way" in loser.fault["message"]
            assert done[2].code in {WRONG_STATE, NOT_PROTECTABLE}, done[2]
            # The kernel chose the session's ports among those that were free.
            chosen = await listeners(bed, bed.beta) - taken
            assert chosen
            assert chosen <= set(ports)
        await among_strangers(bed)
        again = await bed.refused(NOT_PROTECTABLE, "protected")
        assert again.finding("arbiter on alpha")["remedy"]
        await bed.becomes(bed.alpha, state="protected")
        assert (await bed.run(bed.alpha, "unprotect", GUEST)).code == OK


async def among_strangers(bed: Bed) -> None:
    """Send garbage to both agents: the pair stays what it is and goes on."""
    row = await bed.becomes(bed.alpha, state="protected")
    for host, target in ((bed.beta, bed.alpha), (bed.alpha, bed.beta)):
        async with stranger(host, "garbage", target.address, str(PORT)) as process:
            assert await process.wait() == 0
    after = await bed.becomes(bed.alpha, state="protected")
    assert after["session"] == row["session"]
    assert after["generation"] == row["generation"]
    limit = time.monotonic() + LIMIT_S
    while (await bed.row(bed.alpha))["epoch"] <= after["epoch"]:
        assert time.monotonic() < limit
        await asyncio.sleep(0.1)
    for host in (bed.alpha, bed.beta):
        assert "no link was closed" in bed.log(host)
    assert (await bed.row(bed.beta))["state"] == "standby"
    await bed.everybody_answers()


@pytest.mark.parametrize("what", ["disk0", "memory"])
async def test_ctrl_c_during_protect(bed: Bed, what: str) -> None:
    async with harmless(bed):
        argv = [*UNDERSTUDY, "protect", GUEST, "--config", CONFIG, "--bwlimit", "8MiB"]
        process = await bed.alpha.exec(argv, stdout=PIPE, stderr=PIPE)
        assert process.stderr is not None
        said = ""
        async with asyncio.timeout(LIMIT_S):
            async for line in process.stderr:
                said += line.decode()
                if line.startswith(what.encode()):
                    process.send_signal(signal.SIGINT)
                    break
            said += (await process.stderr.read()).decode()
            code = await process.wait()
        assert code == CANCELLED, said
        assert "calling it off" in said
        assert "protect was called off" in said
        assert "Traceback" not in said
        # All of it is undone when the command returns, not some time later.
        assert (await bed.row(bed.alpha))["state"] in {"unprotected", "alone"}
        assert not [words for words in bed.beta.processes().values() if "inspect-demo" in " ".join(words)]


async def test_a_monitor_accepts_and_stays_silent(bed: Bed) -> None:
    socket = "/run/understudy/qemu/demo/qmp"
    async with harmless(bed):
        await stop(bed.pair._agents["alpha"])
        await bed.alpha.run(["mv", socket, f"{socket}.real"])
        async with stranger(bed.alpha, "silent", socket):
            await bed.pair.start_agent("alpha")
            for name in HOSTS:
                await bed.pair.linked(name)
            # While the agent looks for it, whoever wants something of it is told so.
            assert "recovery" in (await bed.refused(WRONG_STATE, "recovery")).text
            row = await bed.becomes(bed.alpha, busy=None)
            assert "did not greet within" in row["problem"], row
            refusal = await bed.refused(NOT_PROTECTABLE, "it runs on as before")
            assert "silent" in refusal.finding(f"guest {GUEST} on alpha")["problem"]
            assert "did not greet within 5 s" in refusal.text
            await bed.everybody_answers()
        await bed.alpha.run(["mv", f"{socket}.real", socket])
        await bed.becomes(bed.alpha, role="primary", problem=None)
