"""A bridge with guests and a client on it, whose packets are made and seen by AF_PACKET sockets, not by our code.

::

    g0 ─veth─ vif0 ┐
    g1 ─veth─ vif1 ┼ br0 ─ ext ─veth─ client
    m0 ─veth─ mark ┘

A packet says which guest sent it, in which epoch, and its number. What the guest's side sends is *inside*, what is
captured at ``client`` is *outside*. A mark that passes no gate tells when everything that was let out has arrived.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from understudy.device import DeviceInfo, Kind, OpenContext, ReplicationMode
from understudy.services import Services
from understudy.testing.subkind_kit import open_context
from understudy_netbuffer.nic import BufferedNic
from understudy_netbuffer.options import NetbufferOptions

IPV4, ARP, IPV6, VLAN, UNKNOWN = 0x0800, 0x0806, 0x86DD, 0x8100, 0x88B6
DEADLINE_S = 10.0

_PACKET = struct.Struct("!6s6sH4sHIQ")
_MAGIC = b"USTB"
_ETH_P_ALL = 3
_MARK = 0xFFFF
_SO_SNDBUFFORCE = 32
_SO_TIMESTAMPNS = 35
_sessions = itertools.count(1)


def run(*command: str, given: str = "") -> str:
    """Run a command as an administrator would; it must succeed."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, input=given)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Seen:
    """A packet outside."""

    guest: int
    epoch: int
    number: int
    protocol: int
    at_ns: int  #: when the kernel saw it, realtime clock


class Lan:
    """The bridge and everything on it; a context manager.

    Args:
        guests: How many.
    """

    def __init__(self, guests: int = 1) -> None:
        self.guests = guests
        self._inside: list[socket.socket] = []
        self._marks = 0

    def __enter__(self) -> Self:
        # The host's own neighbour discovery would be packets that nobody counted; whoever opens the first socket of
        # that family would begin it later.
        run("modprobe", "ipv6")
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1", encoding="ascii")
        lines = ["link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set br0 up"]
        pairs = [(f"g{n}", f"vif{n}") for n in range(self.guests)] + [("m0", "mark"), ("client", "ext")]
        for mine, port in pairs:
            lines.append(f"link add {mine} type veth peer name {port}")
            lines += [f"link set {port} master br0 up", f"link set {mine} up"]
        run("ip", "-batch", "-", given="\n".join(lines))
        self._outside = packet_socket("client")
        self._outside.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._outside.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._mark = packet_socket("m0")
        self._inside = [packet_socket(f"g{n}") for n in range(self.guests)]
        return self

    def __exit__(self, *_: object) -> None:
        for each in (*self._inside, self._mark, self._outside):
            each.close()
        # What is not of the kernel's own making, gates of a test that failed included.
        names = [
            name for name in interfaces() if name != "lo" and not name.startswith(("vif", "ext", "mark"))
        ]
        lines = "\n".join(f"link del {name}" for name in names)
        # A test may have deleted some of them.
        subprocess.run(
            ("ip", "-force", "-batch", "-"), check=False, capture_output=True, input=lines, text=True
        )

    def send(
        self, epoch: int, numbers: Sequence[int], *, guest: int = 0, protocol: int = IPV4, size: int = 60
    ) -> None:
        """Let a guest send packets with these numbers."""
        for number in numbers:
            self._inside[guest].send(packet(guest, epoch, number, protocol, size))

    def inside(self, guest: int = 0) -> socket.socket:
        """Return the socket by which a guest sends."""
        return self._inside[guest]

    def captured(self) -> list[Seen]:
        """Return what has been captured outside since the last call, marks included."""
        found: list[Seen] = []
        while True:
            try:
                data, control, _, address = self._outside.recvmsg(1 << 16, 64)
            except BlockingIOError:
                return found
            if address[2] == socket.PACKET_OUTGOING or data[14:18] != _MAGIC:
                continue
            _, _, protocol, _, guest, epoch, number = _PACKET.unpack_from(data)
            at_ns = 0
            for level, kind, value in control:
                if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
                    seconds, nanoseconds = struct.unpack("qq", value)
                    at_ns = seconds * 10**9 + nanoseconds
            found.append(Seen(guest, epoch, number, protocol, at_ns))

    async def outside(self) -> list[Seen]:
        """Return what has left since the last call, once everything that was let out has arrived."""
        # The kernel delivers in the background: two marks, one after the other, are behind what was let out before.
        found: list[Seen] = []
        for _ in range(2):
            self._marks += 1
            self._mark.send(packet(_MARK, 0, self._marks, UNKNOWN, 60))
            until = time.monotonic() + DEADLINE_S
            while not any((each.guest, each.number) == (_MARK, self._marks) for each in found):
                assert time.monotonic() < until, "a mark that passes no gate did not arrive"
                await asyncio.sleep(0.002)
                found += self.captured()
        return [each for each in found if each.guest != _MARK]

    async def numbers(self) -> list[int]:
        """Return the numbers of what has left since the last call, in order."""
        return [each.number for each in await self.outside()]


def packet(guest: int, epoch: int, number: int, protocol: int, size: int) -> bytes:
    """Return a packet that says who sent it when; to everybody, as the bridge floods it."""
    source = bytes((2, 0, 0, 0, guest >> 8, guest & 0xFF))
    inner = UNKNOWN if protocol == VLAN else protocol
    made = _PACKET.pack(b"\xff" * 6, source, inner, _MAGIC, guest, epoch, number).ljust(size, b"\0")
    # The tag stands before the protocol; the kernel takes it off before we capture.
    return made[:12] + struct.pack("!HH", VLAN, 5) + made[12:] if protocol == VLAN else made


def packet_socket(interface: str) -> socket.socket:
    """Return a non-blocking socket that sends and captures whole frames on an interface."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    made.bind((interface, _ETH_P_ALL))
    # What a gate holds stays charged to its sender; a guest's interface knows no such account.
    made.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 1 << 26)
    made.setblocking(False)
    return made


def device(guest: int = 0, interface: str = "") -> DeviceInfo:
    """Return the interface of a guest as a hypervisor describes it."""
    return DeviceInfo(Kind.NIC, "nic0", 0, "sim", properties={"vif": interface or f"vif{guest}"})


def context(
    guest: int = 0,
    *,
    options: NetbufferOptions | None = None,
    services: Services | None = None,
    session: str = "s",
    name: str = "",
) -> OpenContext:
    """Return what a subkind's open gets on the primary's side."""
    made = open_context(device(guest), ReplicationMode.PRIMARY, NoPeer(), options=options, services=services)
    return replace(made, guest=name or f"guest{guest}", session=session)


class NoPeer:
    """The other half says nothing: a gate needs nothing of it."""

    async def request(self, method: str, params: object, *, timeout_s: float) -> dict[str, object]:
        """Refuse."""
        raise AssertionError(method)


async def opened(
    guest: int = 0,
    *,
    options: NetbufferOptions | None = None,
    services: Services | None = None,
    start: bool = True,
    session: str = "",
    name: str = "",
) -> BufferedNic:
    """Return a gate of a guest, closed unless told otherwise."""
    session = session or f"session-{next(_sessions)}"
    nic = await BufferedNic.open(
        context(guest, options=options, services=services, session=session, name=name)
    )
    if start:
        await nic.start(ReplicationMode.PRIMARY)
    return nic


async def spoken(
    lan: Lan,
    nic: BufferedNic,
    epoch: int,
    numbers: Sequence[int],
    *,
    guest: int = 0,
    protocol: int = IPV4,
    size: int = 60,
) -> None:
    """Let a guest send, and wait until its gate has taken it in: a guest that is stopped has nothing on the way."""
    before = await entered(nic)
    lan.send(epoch, numbers, guest=guest, protocol=protocol, size=size)
    end = time.monotonic() + DEADLINE_S
    while await entered(nic) < before + len(numbers):
        assert time.monotonic() < end, "what the guest sent did not come to its gate"
        await asyncio.sleep(0.001)


async def entered(nic: BufferedNic) -> int:
    """Return how many packets have ever come to a gate."""
    stats = await nic.gate.look()
    return stats.sent_packets + stats.held_packets + stats.dropped_packets


async def until(condition: Callable[[], bool], what: str, limit_s: float = DEADLINE_S) -> None:
    """Wait for a condition, with a deadline."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.002)


def traces() -> Collection[str]:
    """Return every interface and qdisc of this host, without their counters and numbers."""
    return [*interfaces(), *run("tc", "qdisc").splitlines()]


def interfaces() -> list[str]:
    """Return the names of this host's interfaces."""
    return [name for _, name in socket.if_nameindex()]


@contextmanager
def no_trace() -> Iterator[None]:
    """Check that the host is afterwards as it was before."""
    before = sorted(traces())
    yield
    assert sorted(traces()) == before
