"""Two hosts as a site has them, each a kernel of its own: an agent, a bridge, a thin pool, DRBD, and QEMU.

The guest has two disks, one on DRBD and one that QEMU replicates, and its output waits in the kernel's plug. It draws a
random value for every word: what it does again after a takeover is never what it did before. A host's disks and its
agent's state outlive its crash; everything else is made anew, as at any boot.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.kernel.wishes import Wishes
from tests.testbeds.kernel.machine import KernelDied
from tests.testbeds.kernel.pair import Host, Pair
from understudy_qemu.demo.chain import DiskCheck, Greeting, check_disk
from understudy_qemu.demo.tinyguest import TinyGuest, build_guest

GUEST = "demo"
_ROOT = Path(__file__).parents[2]
_WATCHED = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from tests.kernel.wishes import main; main()"
_MEMORY_MIB = 900
_DISKS_MIB = (4, 64)
_VOLUME_SECTORS = 8 * 2048
_POOL_SECTORS = _DISKS_MIB[1] * 2048
PATIENCE_S = 30.0  #: how long a client waits for a reply
_REPLICATED = "replicated.raw"
_BOOT_S = 90.0
_STEP_S = 90.0

_HOST = f"""
ip address flush dev vec0
ip link add br0 type bridge stp_state 0 forward_delay 0
ip link set vec0 master br0
ip address add $1/24 dev br0
ip link set br0 up
ip netns add client
ip link add port type veth peer name eth0 netns client
ip link set port master br0 up
ip -n client address add 10.77.0.$2/24 dev eth0
ip -n client link set eth0 up
modprobe -a dm-mod dm-thin-pool
modprobe drbd usermode_helper=/bin/true
dmsetup create pool --table "0 {_POOL_SECTORS} thin-pool /dev/ubda /dev/ubdb 128 0 1 skip_block_zeroing"
"""
_FIRST = """
dmsetup message pool 0 "create_thin 1"
"""
_VOLUME = f"""
dmsetup create volume --table "0 {_VOLUME_SECTORS} thin /dev/mapper/pool 1"
"""
_DRBD = """
global { usage-count no; }
common {
  net { protocol C; ping-int 1; ping-timeout 5; timeout 10; connect-int 1; }
  disk { resync-rate 200M; c-plan-ahead 0; }
}
resource r0 { device minor 0; disk /dev/mapper/volume; meta-disk internal;
  on alpha { address 10.9.0.1:7788; }
  on beta { address 10.9.0.2:7788; } }
"""


class Client:
    """A client in a host's network, whose replies are read from outside.

    It sends words before those before are answered: a guest whose output is held has something to do in every epoch.

    Args:
        host: Where it runs.
        name: Of its files there.
    """

    def __init__(self, host: Host, name: str) -> None:
        self._host = host
        self._file = f"/run/{name}.jsonl"
        line = f"echo $$ >/run/{name}.pid; exec ip netns exec client {sys.executable} -m understudy_qemu.demo.client"
        line += f" --interval-ms 30 --window 8 --timeout-s {PATIENCE_S:g} --connect-timeout-s {_BOOT_S:g}"
        line += f" >{self._file}"
        self.process = asyncio.create_task(host.run("sh", "-c", line, check=False, timeout_s=900))
        self.process.add_done_callback(_hear)

    async def lines(self) -> list[dict[str, Any]]:
        """Return what it has said until now."""
        said = (await self._host.run("cat", self._file, check=False)).output
        return [json.loads(line) for line in said.split("\n")[:-1]]

    async def replies(self, more: int, timeout_s: float = 90.0) -> list[dict[str, Any]]:
        """Wait for `more` replies from now on; return all lines."""
        wanted = None
        async with asyncio.timeout(timeout_s):
            while True:
                lines = await self.lines()
                answered = sum("n" in line for line in lines)
                wanted = answered + more if wanted is None else wanted
                if answered >= wanted:
                    return lines
                assert not [line for line in lines if "summary" in line], lines[-3:]
                await asyncio.sleep(0.2)

    async def end(self) -> dict[str, Any]:
        """Let it send no more words and end; return its last line."""
        await self._host.run("sh", "-c", f"kill $(cat {self._file.removesuffix('.jsonl')}.pid)")
        await asyncio.wait({self.process}, timeout=PATIENCE_S)
        summary: dict[str, Any] = (await self.lines())[-1]["summary"]
        return summary

    async def harmed(self, timeout_s: float = PATIENCE_S + 30) -> list[str]:
        """Wait until it has seen that something is wrong; return what."""
        limit = time.monotonic() + timeout_s
        while True:
            lines = await self.lines()
            found = [str(line.get("why") or line["lost"]) for line in lines if {"why", "lost"} & {*line}]
            if found:
                return found
            assert time.monotonic() < limit, lines[-20:]
            await asyncio.sleep(0.2)


def _hear(process: asyncio.Task[Any]) -> None:
    # One that dies with its host, as it is to, is asked by nobody else.
    if not process.cancelled():
        process.exception()


@asynccontextmanager
async def whole_stack(*, watched: bool = False) -> AsyncIterator[Stack]:
    """Boot two kernels and make both hosts; no guest runs yet.

    Args:
        watched: The agents hear of `tests.kernel.wishes`.
    """
    guest = await build_guest()
    async with Pair(memory_mib=_MEMORY_MIB, disks_mib=_DISKS_MIB) as pair:
        made = Stack(pair, guest, watched=watched)
        await made.make()
        yield made


class Stack:
    """The two hosts and their guest.

    Args:
        pair: The kernels.
        guest: The tiny guest.
        watched: The agents hear of `tests.kernel.wishes`.
    """

    def __init__(self, pair: Pair, guest: TinyGuest, *, watched: bool) -> None:
        self.pair = pair
        self._guest = guest
        self._watched = watched
        self._agents: dict[str, asyncio.Task[Any]] = {}

    async def make(self) -> None:
        """Make both hosts, the mirror with alpha as its primary, and start both agents."""
        with (self.pair.alpha.directory / _REPLICATED).open("wb") as image:
            image.truncate(_VOLUME_SECTORS * 512)
        for host in (self.pair.alpha, self.pair.beta):
            self._write_files(host)
            await self._boot(host, first=True)
        alpha = self.pair.alpha
        await self._sh(alpha, "until [ $(drbdadm cstate r0) = Connected ]; do sleep 0.1; done")
        await self._sh(alpha, "drbdadm new-current-uuid --clear-bitmap r0; drbdadm primary r0")
        await self.mirrored(alpha)
        for host in (self.pair.alpha, self.pair.beta):
            await self._linked(host)

    def other(self, host: Host) -> Host:
        """Return the other host."""
        return self.pair.beta if host is self.pair.alpha else self.pair.alpha

    def _write_files(self, host: Host) -> None:
        peer = self.other(host)
        (host.directory / "guests").mkdir()
        (host.directory / "agent.toml").write_text(
            f"""
host = "{host.name}"
insecure = true
[listen]
address = "{host.address}"
[peers.{peer.name}]
address = "{peer.address}"
[directories]
guests = "{host.directory}/guests"
state = "{host.directory}/state"
overlays = "{host.directory}/overlays"
[arbiter]
kind = "directory"
path = "{self.pair.common}/arbiter"
[limits]
heartbeat_limit_ms = 4000
"""
        )
        (host.directory / "guests" / f"{GUEST}.toml").write_text(
            f"""
name = "{GUEST}"
hypervisor = "qemu"
machine = "pc"
memory = "128MiB"
kernel = "{self._guest.kernel}"
initrd = "{self._guest.initrd}"
cmdline = "{self._guest.cmdline(["10.77.0.2/24"], draw=1)}"
[[disk]]
path = "/dev/drbd0"
format = "raw"
cache = "none"
subkind = "drbd"
[[disk]]
path = "{host.directory}/{_REPLICATED}"
format = "raw"
subkind = "block-replication"
[[nic]]
bridge = "br0"
mac = "52:54:00:77:00:02"
[protection]
mode = "remus"
interval = "fixed"
[protection.interval_options]
period_ms = 200
"""
        )

    async def _boot(self, host: Host, *, first: bool) -> None:
        number = host.address.rpartition(".")[2]
        script = _HOST + (_FIRST if first else "") + _VOLUME
        await host.run("sh", "-ec", script, "sh", host.address, f"{10 + int(number)}")
        await host.run("sh", "-ec", "cat >/etc/drbd.conf", text=_DRBD)
        if first:
            await self._sh(host, "drbdadm create-md --force r0")
        await self._sh(host, "drbdadm up r0")
        program = ("-c", _WATCHED, self.pair.common, host.name) if self._watched else ("-m", "understudy")
        command = (sys.executable, *program, "agent", "run", "--config", self._config(host))
        line = f"exec {shlex.join(map(str, command))} >>/run/agent.log 2>&1"
        agent = asyncio.create_task(host.run("sh", "-c", line, check=False, timeout_s=900))
        agent.add_done_callback(_hear)
        self._agents[host.name] = agent

    async def comes_back(self, host: Host) -> None:
        """Boot a host that crashed, its mirror and its agent, and see both whole."""
        await self.pair.start(host)
        await self._boot(host, first=False)
        await self.mirrored(self.other(host))
        await self._linked(host)

    async def crash(self, host: Host) -> None:
        """Kill a host's kernel."""
        await self.pair.crash(host)
        agent = self._agents.pop(host.name)
        await asyncio.wait({agent})
        assert isinstance(agent.exception(), KernelDied)

    @staticmethod
    def _config(host: Host) -> Path:
        return host.directory / "agent.toml"

    async def _sh(self, host: Host, text: str) -> None:
        await host.run("sh", "-ec", text)

    async def mirrored(self, host: Host) -> None:
        """Wait until every write is on both hosts."""
        await self._sh(host, "until drbdadm dstate r0 | grep -q ^UpToDate/UpToDate; do sleep 0.1; done")

    # --- Commands ------------------------------------------------------------------------------------------------

    async def command(self, host: Host, verb: str, *arguments: str) -> Any:
        """Run ``understudy VERB …`` on a host; return what it printed."""
        argv = (sys.executable, "-m", "understudy", verb, *arguments, "--format", "json")
        done = await host.run(*argv, "--config", self._config(host), check=False, timeout_s=_STEP_S)
        assert not done.status, f"{verb} on {host.name}: {done.output}{done.errors}{await self.log(host)}"
        return json.loads(done.output)

    async def log(self, host: Host) -> str:
        """Return the end of the agent's log."""
        return (await host.run("tail", "-n", "25", "/run/agent.log", check=False)).output

    async def promoted_at(self, host: Host) -> int:
        """Return the checkpoint that the disk on DRBD went back to at a host's last takeover."""
        said = await host.run("grep", "-o", "resource r0 is primary at checkpoint [0-9]*", "/run/agent.log")
        return int(said.output.split()[-1])

    async def _linked(self, host: Host) -> None:
        limit = time.monotonic() + _BOOT_S
        argv = (sys.executable, "-m", "understudy", "status", "--format", "json", "--config")
        while True:
            done = await host.run(*argv, self._config(host), check=False)
            if not done.status and all(peer["up"] for peer in json.loads(done.output)["peers"]):
                return
            assert time.monotonic() < limit, f"{host.name}: {done.output}{done.errors}{await self.log(host)}"
            await asyncio.sleep(0.2)

    async def becomes(self, host: Host, state: str) -> None:
        """Wait until an agent says that the guest is in a state."""
        limit = time.monotonic() + _STEP_S
        while True:
            rows = [row for row in (await self.command(host, "list"))["guests"] if row["host"] == host.name]
            if rows and rows[0].get("state") == state:
                return
            assert time.monotonic() < limit, f"{host.name} says {rows}; {await self.log(host)}"
            await asyncio.sleep(0.2)

    async def without(self, host: Host, word: str, *argv: str) -> None:
        """Wait until a command on a host does not say `word` any more."""
        limit = time.monotonic() + _STEP_S
        while word in (said := (await host.run(*argv)).output):
            assert time.monotonic() < limit, f"{host.name}: {said}; {await self.log(host)}"
            await asyncio.sleep(0.2)

    # --- The disks -----------------------------------------------------------------------------------------------

    async def check_disks(self, host: Host, lines: list[dict[str, Any]]) -> list[DiskCheck]:
        """Check a host's disks against what a client was told that has ended."""
        told = {line["n"]: line["hash"] for line in lines if "hash" in line}
        greeting = Greeting(**next(line["greeting"] for line in lines if "greeting" in line))
        checks = []
        for number, (disk, flag) in enumerate((("/dev/drbd0", "iflag=direct"), (_REPLICATED, ""))):
            copy = host.directory / "copy.raw"
            await self._sh(
                host, f"cd {host.directory}; dd if={disk} of={copy} bs=1M {flag} conv=fsync status=none"
            )
            checks.append(check_disk(copy.read_bytes(), greeting, told, number))
        return checks

    async def halves(self) -> list[str]:
        """Return a digest of what each host has below DRBD, but for DRBD's own metadata; nobody writes meanwhile."""
        # A DRBD device that is secondary cannot be opened; its size stands in sysfs, in sectors.
        line = "blockdev --flushbufs /dev/mapper/volume; "
        line += "head -c $(($(cat /sys/block/drbd0/size) * 512)) /dev/mapper/volume | sha256sum"
        return [(await host.run("sh", "-ec", line)).output for host in (self.pair.alpha, self.pair.beta)]

    def wishes(self, host: Host) -> Wishes:
        """Return what a host's agent can be told to do."""
        return Wishes(self.pair.common, host.name)
