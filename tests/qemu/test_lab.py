"""The laboratory of namespaces: isolation, the cable, crashes, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.testbeds.bed import missing_for_namespaces, need
from understudy_qemu.demo.lab import Host, Lab, LabError, Machine, running, stop

pytestmark = pytest.mark.qemu

# One request and answer over TCP, and over a connection that stays open.
SERVER = """
import socket, threading
def echo(c):
    while data := c.recv(100):
        c.sendall(data)
s = socket.create_server(("", 7000)); print("up", flush=True)
while True:
    threading.Thread(target=echo, args=(s.accept()[0],)).start()
"""
CLIENT = """
import socket, sys
s = socket.create_connection((sys.argv[1], 7000), timeout=20)
for line in sys.stdin:
    s.settimeout(float(line))
    try:
        s.sendall(b"x"); print(s.recv(1) and "answer", flush=True)
    except TimeoutError:
        print("silence", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    need("qemu", missing_for_namespaces())
    async with Lab(tmp_path, networks=2) as lab:
        yield lab


@pytest.fixture
def alpha(lab: Lab) -> Host:
    return lab.hosts["alpha"]


@pytest.fixture
def beta(lab: Lab) -> Host:
    return lab.hosts["beta"]


class Talk:
    """A client program inside a machine with one connection to a server program in another."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self, timeout_s: float) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{timeout_s}\n".encode())
        async with asyncio.timeout(30):
            return (await self.process.stdout.readline()).decode().strip()


async def serve(machine: Machine) -> None:
    process = await machine.exec([sys.executable, "-c", SERVER], stdout=PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"up\n"


async def talk(machine: Machine, address: str) -> Talk:
    return Talk(await machine.exec([sys.executable, "-c", CLIENT, address], stdin=PIPE, stdout=PIPE))


async def test_hosts_have_their_own_names_files_processes_and_network(
    alpha: Host, beta: Host, lab: Lab
) -> None:
    assert (await alpha.run(["hostname"])).stdout == "alpha\n"
    for line in ("> /run/here", "> /var/lib/understudy/kept", "> /srv/arbiter/record"):
        await alpha.run(["sh", "-c", f"echo mine {line}"])
    seen = await beta.run(["sh", "-c", f"ls /run /var/lib/understudy /srv/host/lib /srv/arbiter {lab.root}"])
    assert "record" in seen.stdout
    assert "here" not in seen.stdout
    assert "kept" not in seen.stdout
    assert "alpha" not in seen.stdout
    assert (lab.root / "alpha/lib/kept").read_text() == "mine\n"
    assert "here" not in os.listdir("/run")  # noqa: PTH208 - a moment's look
    links = (await beta.run(["ls", "/sys/class/net"])).stdout.split()
    assert sorted(links) == ["br0", "br1", "cable0", "lo", "up0", "up1"]
    inside = (await beta.run(["sh", "-c", "ls -d /proc/[0-9]*"])).stdout.split()
    assert "/proc/1" in inside
    assert len(inside) < 6


async def test_a_cut_cable_is_silence_and_a_mended_one_goes_on(alpha: Host, beta: Host) -> None:
    await serve(beta)
    line = await talk(alpha, beta.address)
    assert await line.ask(10) == "answer"
    await beta.cut_cable()
    assert await line.ask(1) == "silence"
    carrier = (await alpha.run(["cat", "/sys/class/net/cable0/carrier"])).stdout
    assert carrier == "1\n", "the other end must not notice"
    await beta.mend_cable()
    assert await line.ask(10) == "answer"


async def test_the_client_reaches_the_bridges_and_a_cut_network_is_silent(alpha: Host, lab: Lab) -> None:
    await alpha.ip("address add 10.77.0.9/24 dev br0", "address add 10.78.0.9/24 dev br1")
    await serve(alpha)
    first, second = await talk(lab.client, "10.77.0.9"), await talk(lab.client, "10.78.0.9")
    assert [await first.ask(10), await second.ask(10)] == ["answer", "answer"]
    await alpha.cut_network(0)
    assert [await first.ask(1), await second.ask(10)] == ["silence", "answer"]
    await alpha.mend_network(0)
    assert await first.ask(10) == "answer"


async def test_a_crash_after_the_cable_was_cut_sends_no_reset(alpha: Host, beta: Host) -> None:
    await serve(alpha)
    line = await talk(beta, alpha.address)
    assert await line.ask(10) == "answer"
    await alpha.cut_cable()
    await alpha.kill_all()
    assert await line.ask(1) == "silence"


async def test_a_crash_kills_everything_also_what_ran_away(alpha: Host, beta: Host) -> None:
    away = await alpha.exec(
        ["sh", "-c", "(setsid sleep 1000 & setsid setsid sleep 1001 &) > /dev/null; echo done"], stdout=PIPE
    )
    assert (await away.communicate())[0] == b"done\n"
    foreground = await alpha.exec(["sleep", "1002"])
    sleeps = [pid for pid, words in alpha.processes().items() if words[:1] == ["sleep"]]
    assert len(sleeps) >= 2
    bystander = await beta.exec(["sleep", "1003"])
    await alpha.kill_all()
    assert foreground.returncode is not None
    assert bystander.returncode is None
    assert not any(alive(pid) for pid in sleeps)
    with pytest.raises(LabError, match="not running"):
        await alpha.exec(["true"])


async def test_a_killed_host_comes_back_with_what_it_left(alpha: Host, beta: Host) -> None:
    await alpha.run(["sh", "-c", "echo stale > /run/left.pid"])
    await alpha.ip("tuntap add dev tap7 mode tap", "link set tap7 master br0")
    await alpha.cut_cable()
    await alpha.kill_all()
    await alpha.revive()
    assert (await alpha.run(["cat", "/run/left.pid"])).stdout == "stale\n"
    assert "tap7" in (await alpha.run(["ls", "/sys/class/net"])).stdout
    assert len((await alpha.run(["sh", "-c", "ls -d /proc/[0-9]*"])).stdout.split()) < 6
    await serve(alpha)
    assert await (await talk(beta, alpha.address)).ask(10) == "answer"


async def test_programs_get_signals_and_end_with_their_own_code(alpha: Host) -> None:
    trap = 'trap "exit 7" TERM; echo ready; while :; do sleep 0.01; done'
    async with running(alpha, ["sh", "-c", trap]) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        assert await stop(process) == 7
    dead = await alpha.exec(["sh", "-c", "kill -KILL $$"])
    assert await dead.wait() == -signal.SIGKILL
    with pytest.raises(LabError, match="no-such-program"):
        await alpha.run(["no-such-program"])
    with pytest.raises(LabError, match="did not end within"):
        await alpha.run(["sleep", "1000"], timeout_s=0.2)
    assert not [words for words in alpha.processes().values() if words[:1] == ["sleep"]]


async def test_two_laboratories_at_once(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> None:
    async with Lab(tmp_path_factory.mktemp("second")) as other:
        await serve(other.hosts["beta"])
        await lab.hosts["alpha"].ip("route get 10.99.0.2")
        line = await talk(lab.hosts["alpha"], "10.99.0.2")
        assert await line.ask(1) == "", "nobody listens in this laboratory"
        assert await (await talk(other.hosts["alpha"], "10.99.0.2")).ask(10) == "answer"


def machine_processes(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in text and "namespaces.py" in text:
            found.append(int(entry.parent.name))
    return found


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def interfaces() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


async def until(condition: Callable[[], bool]) -> None:
    # What is awaited happens in the kernel or in another process, which tell nobody.
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_nothing_is_left_after_a_failure_inside(tmp_path: Path) -> None:
    need("qemu", missing_for_namespaces())
    files, links = open_files(), interfaces()
    lab = Lab(tmp_path)
    await lab.__aenter__()
    try:
        await lab.hosts["alpha"].exec(["sleep", "1000"])
        assert machine_processes(str(tmp_path))
    finally:
        await lab.__aexit__(None, None, None)
    assert not machine_processes(str(tmp_path))
    assert interfaces() == links
    # Transports of ended processes are closed in the loop's next rounds.
    await until(lambda: open_files() <= files)


async def test_nothing_is_left_when_building_fails(tmp_path: Path) -> None:
    need("qemu", missing_for_namespaces())
    # Names of interfaces end at 15 characters.
    lab = Lab(tmp_path)
    lab.hosts["alpha"].name = "a-name-that-is-too-long"
    with pytest.raises(LabError, match="ip on switch"):
        await lab.__aenter__()
    assert not machine_processes(str(tmp_path))


async def test_nothing_is_left_after_the_owner_was_killed(tmp_path: Path) -> None:
    need("qemu", missing_for_namespaces())
    program = f"""
import asyncio, pathlib
from understudy_qemu.demo.lab import Lab
async def main():
    async with Lab(pathlib.Path({str(tmp_path)!r})) as lab:
        await lab.hosts["alpha"].exec(["sleep", "1000"])
        print(*lab.hosts["alpha"].processes(), flush=True)
        await asyncio.sleep(1000)
asyncio.run(main())
"""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=PIPE)
    assert owner.stdout is not None
    inside = [int(word) for word in (await owner.stdout.readline()).split()]
    assert inside
    assert len(machine_processes(str(tmp_path))) >= 4
    owner.kill()
    await owner.wait()
    await until(lambda: not machine_processes(str(tmp_path)))
    await until(lambda: not any(alive(pid) for pid in inside))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_without_root_it_says_so(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        with pytest.raises(LabError, match="run this as root"):
            await Lab(tmp_path).__aenter__()
        return
    program = (
        "import asyncio, os, pathlib\nfrom understudy_qemu.demo.lab import Lab\nos.setuid(65534)\n"
        f"asyncio.run(Lab(pathlib.Path({str(tmp_path)!r})).__aenter__())"
    )
    done = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stderr=PIPE)
    assert re.search(rb"LabError: .*run this as root", (await done.communicate())[1])
