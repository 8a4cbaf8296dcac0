"""The hotplug scripts on a real kernel: packets that are held, devices that are DRBD, commands that fail."""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hotplug.scripts import Ended, Fault, Scripts
from tests.testbeds.rounds import rounds

# Some hundred commands, each of which takes 30 ms here on an idle machine.
pytestmark = [pytest.mark.kernel, pytest.mark.timeout(180)]

NETBUF, PROBE = "remus-netbuf-setup", "block-drbd-probe"
CHANGES = re.compile(r"modprobe|ip link (add|set|del)|tc \w+ (add|del|change|replace)")
DEADLINE_S = 20.0
ARP, IPV4, IPV6, VLAN, OTHER = 0x0806, 0x0800, 0x86DD, 0x8100, 0x88B5


def command(line: str) -> str:
    done = subprocess.run(line.split(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}: {done.stdout} {done.stderr}"
    return done.stdout


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path, None, {"vifname": "vif0"})


class Wire:
    """A guest's interface on a bridge: what the guest sends on its end, and what the bridge hears of it."""

    def __init__(self, number: int) -> None:
        self.vif, self.bridge, self.guest = f"vif{number}", f"br{number}", f"guest{number}"
        command(f"ip link add {self.bridge} type bridge")
        command(f"ip link add {self.vif} type veth peer name {self.guest}")
        for name in (self.bridge, self.vif, self.guest):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1", encoding="ascii")
            command(f"ip link set {name} up")
        command(f"ip link set {self.vif} master {self.bridge}")
        until(
            lambda: "state forwarding" in command(f"bridge link show dev {self.vif}"),
            "a bridge that forwards",
        )
        self._out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._out.bind((self.guest, 0))
        self._in = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        self._in.bind((self.bridge, 0))

    def say(self, *words: str, kind: int = OTHER, length_bytes: int = 100) -> None:
        for word in words:
            payload = f"<{word}>".encode().ljust(length_bytes, b"\0")
            if kind == VLAN:
                payload = (5).to_bytes(2, "big") + OTHER.to_bytes(2, "big") + payload
            self._out.send(b"\xff" * 6 + b"\x02" + b"\0" * 5 + kind.to_bytes(2, "big") + payload)

    def heard(self, *, wait_for: int = 0) -> list[str]:
        """Return what came through since the last time; what is not held comes in the sender's system call.

        Args:
            wait_for: how many must come first: what a plug lets go comes by a softirq.
        """
        words: list[str] = []
        while select.select([self._in], [], [], DEADLINE_S if len(words) < wait_for else 0)[0]:
            words += re.findall(r"<([\w.]+)>", self._in.recv(2000).decode("latin-1"))
        return words

    def held(self, ifb: str) -> int:
        """Return how many packets the buffer holds."""
        found = re.search(r"backlog \S+ (\d+)p", command(f"tc -s qdisc show dev {ifb}"))
        assert found
        return int(found[1])

    def close(self) -> None:
        self._in.close()
        self._out.close()
        left = re.findall(r"^\d+: (\w+)", command("ip -o link show type ifb"), re.MULTILINE)
        for name in (self.bridge, self.vif, *left):
            subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire(0)
    yield wire
    wire.close()


@pytest.fixture(params=["matchall", "u32"])
def classifier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The one classifier that the kernel has."""
    hidden = Path("/etc/modprobe.d/hidden.conf")
    if request.param == "u32":
        subprocess.run(["rmmod", "cls_matchall"], check=False, capture_output=True)
        hidden.write_text("install cls_matchall /bin/false\n", encoding="ascii")
    yield request.param
    hidden.unlink(missing_ok=True)


def host() -> str:
    """Return all that a script could have changed; an interface's operational state settles by itself."""
    links = re.sub(r" state \w+", "", command("ip -o link show"))
    return links + command("tc qdisc show") + command("tc filter show dev vif0 ingress")


def complete(ended: Ended, vif: str = "vif0") -> str:
    """Return the ifb of a buffer that stands."""
    assert (ended.status, ended.results["hotplug-status"]) == (0, "connected"), ended.stderr
    ifb = ended.results["ifb"]
    assert re.search(rf"qdisc plug 1: dev {ifb} root", command("tc qdisc show"))
    assert re.search(rf"{ifb}: <\S*\bUP\b.* alias remus-netbuf:{vif}", command("ip -o link show type ifb"))
    assert f"(Egress Redirect to device {ifb})" in command(f"tc filter show dev {vif} ingress")
    return ifb


def test_everything_is_held_until_the_caller_lets_it_go(
    scripts: Scripts, wire: Wire, classifier: str
) -> None:
    wire.say("before")
    assert wire.heard(wait_for=1) == ["before"]
    ifb = complete(scripts.run(NETBUF, "setup"))
    assert f" {classifier} " in command("tc filter show dev vif0 ingress")
    for kind, word in ((IPV4, "ipv4"), (ARP, "arp"), (IPV6, "ipv6"), (VLAN, "vlan"), (OTHER, "other")):
        wire.say(word, kind=kind)
    until(lambda: wire.held(ifb) == 5, "five packets in the buffer")
    assert wire.heard() == []
    command(f"tc qdisc change dev {ifb} root handle 1: plug release_indefinite")
    assert wire.heard(wait_for=5) == ["ipv4", "arp", "ipv6", "vlan", "other"]


def test_what_it_holds_is_the_guests_alone(scripts: Scripts, wire: Wire) -> None:
    ifb = complete(scripts.run(NETBUF, "setup"))
    command(f"ip link set {ifb} down")
    command(f"ip link set {ifb} up")  # when a host greets its IPv6 neighbours
    assert "inet6" not in command(f"ip -o address show dev {ifb}")


def test_a_second_setup_lets_nothing_out(scripts: Scripts, wire: Wire) -> None:
    ifb = complete(scripts.run(NETBUF, "setup"))
    wire.say("first", "second")
    before = host()
    assert complete(scripts.run(NETBUF, "setup")) == ifb
    assert host() == before
    assert (wire.held(ifb), wire.heard()) == (2, [])


def test_the_limit_is_the_kernels(scripts: Scripts, wire: Wire) -> None:
    ifb = complete(scripts.run(NETBUF, "setup", env={"REMUS_LIMIT_BYTES": "400"}))
    wire.say(*"abcdefgh", length_bytes=100)
    until(lambda: "dropped 5" in command(f"tc -s qdisc show dev {ifb}"), "drops above the limit")
    assert wire.held(ifb) == 3


def test_teardown_drops_what_is_held_and_leaves_the_host_as_before(scripts: Scripts, wire: Wire) -> None:
    before = host()
    ifb = complete(scripts.run(NETBUF, "setup"))
    wire.say("held")
    until(lambda: wire.held(ifb) == 1, "a packet in the buffer")
    for _ in range(2):
        assert scripts.run(NETBUF, "teardown", env={"REMUS_IFB": ifb}).status == 0
        assert host() == before
    wire.say("after")
    assert wire.heard(wait_for=1) == ["after"]


def test_it_fails_as_before_at_every_change(scripts: Scripts, wire: Wire) -> None:
    ended = scripts.run(NETBUF, "setup")
    complete(ended)
    scripts.run(NETBUF, "teardown")
    before = host()
    points = [at for at, call in enumerate(ended.calls, 1) if CHANGES.match(call)]
    assert len(points) == 8
    for fault in (Fault.REFUSES, Fault.LIES)[: rounds(1, 2)]:
        for at in points:
            ended = scripts.run(NETBUF, "setup", fault=fault, at=at)
            if ended.status == 0:
                assert re.search(r"^modprobe|addrgenmode|matchall", ended.calls[at - 1]), ended
                complete(ended)
                scripts.run(NETBUF, "teardown")
            assert host() == before, (fault, ended)


def test_a_teardown_finds_what_a_killed_setup_left(scripts: Scripts, wire: Wire) -> None:
    ended = scripts.run(NETBUF, "setup")
    ifb = complete(ended)
    scripts.run(NETBUF, "teardown")
    before = host()
    points = [at for at, call in enumerate(ended.calls, 1) if CHANGES.match(call)]
    for at in points[1 :: rounds(2, 1)]:
        assert scripts.run(NETBUF, "setup", fault=Fault.KILLED, at=at).status == -9
        assert scripts.run(NETBUF, "teardown", env={"REMUS_IFB": ifb}).status == 0
        assert host() == before, ended.calls[at - 1]


@pytest.mark.parametrize("kind", ["ingress", "clsact"])
def test_an_ingress_qdisc_of_somebody_else_stays_his(scripts: Scripts, wire: Wire, kind: str) -> None:
    command(f"tc qdisc add dev vif0 {kind}")
    before = host()
    ended = scripts.run(NETBUF, "setup")
    assert ended.status == 2
    assert "already" in ended.results["hotplug-error"]
    assert scripts.run(NETBUF, "teardown").status == 0
    assert host() == before


def test_a_guest_made_mute_by_a_deleted_ifb_speaks_after_teardown(scripts: Scripts, wire: Wire) -> None:
    before = host()
    command(f"ip link del {complete(scripts.run(NETBUF, 'setup'))}")
    wire.say("lost")
    assert "call teardown first" in scripts.run(NETBUF, "setup").results["hotplug-error"]
    assert scripts.run(NETBUF, "teardown").status == 0
    assert host() == before
    wire.say("after")
    assert wire.heard(wait_for=1) == ["after"]


def test_a_guest_that_is_gone_leaves_nothing(scripts: Scripts, wire: Wire) -> None:
    complete(scripts.run(NETBUF, "setup"))
    command("ip link del vif0")
    assert scripts.run(NETBUF, "teardown").status == 0
    assert command("ip -o link show type ifb") == ""


def test_guests_at_once_get_a_buffer_each(scripts: Scripts, wire: Wire) -> None:
    other = Wire(1)
    try:
        running = {vif: scripts.start(NETBUF, "setup", env={"vifname": vif}) for vif in (wire.vif, other.vif)}
        said = {vif: process.communicate(timeout=DEADLINE_S) for vif, process in running.items()}
        ifbs = {dict(line.split("=") for line in out.splitlines())["ifb"] for out, _ in said.values()}
        assert len(ifbs) == 2, said
        other.say("other")
        assert (wire.heard(), other.heard()) == ([], [])
        scripts.run(NETBUF, "teardown")
        wire.say("first")
        other.say("second")
        assert (wire.heard(wait_for=1), other.heard()) == (["first"], [])
    finally:
        scripts.run(NETBUF, "teardown", env={"vifname": other.vif})
        other.close()


class Pair:
    """Two DRBD nodes in one kernel: /dev/drbd0 and /dev/drbd1, connected to each other."""

    def __init__(self, directory: Path) -> None:
        command("modprobe drbd")
        self.disks = []
        for minor, name in enumerate("ab"):
            image = directory / name
            image.touch()
            os.truncate(image, 32 << 20)
            self.disks.append(command(f"losetup --find --show {image}").strip())
            command(f"drbdmeta --force {minor} v08 {self.disks[minor]} internal create-md")
            command(f"drbdsetup new-resource {name}")
            command(f"drbdsetup new-minor {name} {minor} 0")

    def attach(self) -> None:
        for minor, disk in enumerate(self.disks):
            command(f"drbdsetup attach {minor} {disk} {disk} internal")

    def connect(self, protocol: str) -> None:
        ends = ["ipv4:127.0.0.1:7001", "ipv4:127.0.0.1:7002"]
        command(f"drbdsetup connect a {ends[0]} {ends[1]} --protocol={protocol}")
        command(f"drbdsetup connect b {ends[1]} {ends[0]} --protocol={protocol}")
        until(lambda: self.events().count("connection:Connected") == 2, "two connected nodes")

    def sync(self) -> None:
        command("drbdsetup new-current-uuid --clear-bitmap 0")
        until(lambda: self.events().count("disk:UpToDate") == 4, "disks that are up to date")

    def events(self) -> str:
        return command("drbdsetup events2 --now")

    def close(self) -> None:
        for name in "ab":
            subprocess.run(["drbdsetup", "down", name], check=False, capture_output=True)
        for disk in self.disks:
            command(f"losetup --detach {disk}")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def test_a_device_becomes_usable_step_by_step(scripts: Scripts, pair: Pair, tmp_path: Path) -> None:
    def probe(device: str = "/dev/drbd0") -> tuple[int, str]:
        ended = scripts.run(PROBE, device)
        reason = re.search(r"(?:is not usable|DRBD's): (.*)", ended.stderr)
        return ended.status, reason[1] if reason else ended.stderr.strip()

    assert probe(pair.disks[0]) == (1, "block special file, major number 0x7")
    assert probe(str(tmp_path / "a")) == (1, "regular file, major number 0x0")
    assert probe() == (4, "connection to the peer is StandAlone, not Connected")
    pair.attach()
    pair.connect("C")
    assert probe() == (4, "disk on this host is Inconsistent, not UpToDate")
    pair.sync()
    assert probe() == (0, "")
    command("drbdsetup primary 0")
    assert (probe("/dev/drbd0"), probe("/dev/drbd1")) == ((0, ""), (0, ""))
    (tmp_path / "link").symlink_to("/dev/drbd1")
    assert probe(str(tmp_path / "link")) == (0, "")
    command("drbdsetup suspend-io 0")
    assert probe() == (4, "its I/O is suspended (user)")
    command("drbdsetup resume-io 0")
    command("drbdsetup detach 1")
    assert probe() == (4, "disk on the peer is Diskless, not UpToDate")
    assert probe("/dev/drbd1") == (4, "disk on this host is Diskless, not UpToDate")
    command("drbdsetup disconnect ipv4:127.0.0.1:7001 ipv4:127.0.0.1:7002")
    assert probe() == (4, "connection to the peer is StandAlone, not Connected")
    command("drbdsetup down a")
    status, reason = probe()
    assert (status, "up" in reason) == (4, True)


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_a_device_that_confirms_too_early_is_told_by_its_protocol(
    scripts: Scripts, pair: Pair, protocol: str
) -> None:
    pair.attach()
    pair.connect(protocol)
    pair.sync()
    ended = scripts.run(PROBE, "/dev/drbd0")
    assert ended.status == 3
    assert f"its protocol is {protocol}, not C" in ended.stderr
