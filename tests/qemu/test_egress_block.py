"""The block at a tap's ingress, in this host's kernel: shut, open for a window, shut by itself whoever has died.

The test writes to the tap what QEMU would write, and listens behind the bridge, where the world is.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import uuid
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.qemu.conftest import Bed, ip
from tests.testbeds.bed import missing_for_namespaces, need
from understudy.arbiter import RecordState
from understudy.errors import HypervisorError
from understudy_qemu.egressblock import EgressBlock, missing_for_block
from understudy_qemu.guestfile import QemuConfig
from understudy_qemu.nfnetlink import Count, Nfnetlink, counter_request

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x1002
_ETHERTYPE = 0x88B5  # for local experiments
_BYTES = 46  # of a smallest packet, its Ethernet header left out
_NUMBER = struct.Struct("!Q")

# An agent that opens the block again and again, and says once that it has.
AGENT = """
import asyncio, sys
from understudy_qemu.egressblock import EgressBlock
async def main():
    block = EgressBlock(sys.argv[1])
    await block.renew(60_000)
    while True:
        await block.open_for(400)
        print("open", flush=True)
        await asyncio.sleep(0.02)
asyncio.run(main())
"""


class Wire:
    """A tap on a bridge, and a cable out of that bridge."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex[:8]
        self.tap, self.bridge, self.inner, self.outer = (
            f"{kind}{self.id}" for kind in ("ust", "usb", "usi", "uso")
        )
        self.fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", self.tap.encode(), _IFF_TAP_NO_PI))
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "add", self.inner, "type", "veth", "peer", "name", self.outer)
        for port in (self.tap, self.inner):
            ip("link", "set", port, "master", self.bridge)
        for each in (self.bridge, self.inner, self.outer, self.tap):
            ip("link", "set", each, "up")
        self.sent = 0
        self.seen: set[int] = set()
        self.listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPE))
        self.listener.bind((self.outer, _ETHERTYPE))
        self.listener.setblocking(False)

    def send(self) -> int:
        """Send the next number and return it."""
        self.sent += 1
        frame = b"\xff" * 6 + b"\x02\0\0\0\0\x01" + struct.pack("!H", _ETHERTYPE) + _NUMBER.pack(self.sent)
        os.write(self.fd, frame.ljust(60, b"\0"))
        return self.sent

    def arrived(self, number: int) -> bool:
        """Tell whether a number has come out."""
        while True:
            try:
                frame = self.listener.recv(100)
            except BlockingIOError:
                return number in self.seen
            self.seen.add(_NUMBER.unpack_from(frame, 14)[0])

    async def passes(self) -> None:
        """See that what is sent comes out."""
        number = self.send()
        await until(lambda: self.arrived(number))

    def spread(self) -> None:
        """Have the tap's packets handled by another processor (RPS)."""
        Path(f"/sys/class/net/{self.tap}/queues/rx-0/rps_cpus").write_text("1", encoding="ascii")

    def close(self) -> None:
        self.listener.close()
        os.close(self.fd)
        for each in (self.bridge, self.inner):
            ip("link", "delete", each)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a network tells nobody
            await asyncio.sleep(0.01)


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    need("qemu", missing_for_namespaces())
    missing = await missing_for_block()
    need("qemu", [missing] if missing else [])
    wire = Wire()
    # A new port of a bridge learns and forwards as soon as its carrier is seen.
    try:
        async with asyncio.timeout(20):
            while not wire.arrived(wire.send()):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
        yield wire
    finally:
        await EgressBlock(wire.tap).remove()
        wire.close()


@pytest.fixture
async def block(wire: Wire) -> AsyncIterator[EgressBlock]:
    block = EgressBlock(wire.tap)
    try:
        await block.install()
        yield block
    finally:
        await block.remove()


def nft(*arguments: str) -> str:
    return subprocess.run(["nft", *arguments], capture_output=True, text=True, check=True).stdout


def refused(block: EgressBlock) -> int:
    """Return how many packets the block has refused."""
    netlink = Nfnetlink()
    try:
        return netlink.counter(counter_request(block.table, "refused")).packets
    finally:
        netlink.close()


async def test_it_passes_until_it_is_closed_and_then_in_windows_alone(wire: Wire, block: EgressBlock) -> None:
    await wire.passes()
    assert await block.close() == (Count(1, _BYTES), Count(0, 0))
    held = {wire.send(), wire.send()}
    assert await block.renew(600_000)
    held.add(wire.send())
    assert await block.open_for(60_000)
    await wire.passes()
    assert await block.close() == (Count(2, 2 * _BYTES), Count(3, 3 * _BYTES))
    held.add(wire.send())
    assert await block.open_for(60_000)
    await wire.passes()
    assert await block.remove()
    await wire.passes()
    assert not wire.seen & held
    assert not await block.remove()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_it_closes_by_itself_when_its_agent_is_gone(
    wire: Wire, block: EgressBlock, how: signal.Signals
) -> None:
    await block.close()
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", AGENT, wire.tap, stdout=PIPE)
    try:
        assert agent.stdout is not None
        async with asyncio.timeout(20):
            for _ in range(5):
                assert await agent.stdout.readline() == b"open\n"
        await wire.passes()
        agent.send_signal(how)
        last = wire.sent
        async with asyncio.timeout(20):
            while not refused(block):
                last = wire.send()
                await asyncio.sleep(0.01)
        # That one was refused. From now on none passes, as long as nobody opens it.
        late = {last, *(wire.send() for _ in range(50))}
        assert refused(block) == len(late)
        if how is signal.SIGSTOP:
            # Its next step is its own: it opens the block again.
            before = wire.sent
            agent.send_signal(signal.SIGCONT)
            async with asyncio.timeout(20):
                while not wire.arrived(wire.sent) or wire.sent == before:
                    wire.send()
                    await asyncio.sleep(0.01)
        assert not wire.seen & late
    finally:
        if agent.returncode is None:
            agent.kill()
        await agent.wait()


async def test_a_window_has_no_effect_for_what_is_not_fresh_any_more(wire: Wire, block: EgressBlock) -> None:
    await block.close()
    await block.renew(200)
    await block.open_for(60_000)
    last = 0
    async with asyncio.timeout(20):
        while not refused(block):
            last = wire.send()
            await asyncio.sleep(0.01)
    late = {last, wire.send()}
    await block.open_for(60_000)
    late.add(wire.send())
    assert refused(block) == len(late)
    await block.renew(60_000)
    await wire.passes()
    assert not wire.seen & late


async def test_a_window_begins_anew_while_another_is_open(wire: Wire, block: EgressBlock) -> None:
    def expires_s() -> int:
        listed = json.loads(nft("--json", "list", "set", "netdev", block.table, "open"))
        [made] = [entry["set"] for entry in listed["nftables"] if "set" in entry]
        [element] = made["elem"]
        return int(element["elem"]["expires"])

    await block.open_for(600_000)
    assert 500 < expires_s() <= 600
    await block.open_for(60_000)
    assert 30 < expires_s() <= 60
    await block.open_for(600_000)
    assert 500 < expires_s() <= 600


async def test_what_somebody_else_removed_is_put_back(wire: Wire, block: EgressBlock) -> None:
    await block.close()
    nft("delete", "table", "netdev", block.table)
    with pytest.raises(HypervisorError):
        await block.close()
    assert not await block.open_for(60_000)
    assert block.lost_count == 1
    # Nobody knows how old what is held has become.
    held = {wire.send()}
    assert await block.open_for(60_000)
    held.add(wire.send())
    assert await block.close() == (Count(0, 0), Count(2, 2 * _BYTES))
    nft("delete", "table", "netdev", block.table)
    assert not await block.renew(60_000)
    held.add(wire.send())
    assert await block.open_for(60_000)
    await wire.passes()
    assert not wire.seen & held


async def test_one_that_a_dead_agent_left_is_replaced(wire: Wire, block: EgressBlock) -> None:
    await block.close()
    held = wire.send()
    mine = EgressBlock(wire.tap)
    await mine.install(passing=False)
    assert await mine.close() == (Count(0, 0), Count(0, 0))
    await mine.install()
    await wire.passes()
    assert held not in wire.seen
    assert await mine.remove()


async def test_it_stays_above_an_interface_that_is_up(wire: Wire, block: EgressBlock) -> None:
    await block.close()
    with pytest.raises(HypervisorError, match="is up"):
        await block.remove_below_nothing()
    held = wire.send()
    assert refused(block) == 1
    ip("link", "set", wire.tap, "down")
    assert await block.remove_below_nothing()
    assert not await block.remove_below_nothing()
    assert not wire.arrived(held)
    assert not await EgressBlock("nothing").remove_below_nothing()


async def test_an_interface_that_it_cannot_guard_is_refused(wire: Wire) -> None:
    with pytest.raises(HypervisorError, match="there is no interface nothing"):
        await EgressBlock("nothing").install()
    wire.spread()
    with pytest.raises(HypervisorError, match="write 0 to"):
        await EgressBlock(wire.tap).install()
    assert not await EgressBlock(wire.tap).remove()


async def test_the_look_whether_it_would_work_leaves_nothing(wire: Wire) -> None:
    before = nft("list", "tables")
    assert await missing_for_block() == ""
    assert nft("list", "tables") == before


# --- The janitor -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def blocked(bed: Bed) -> AsyncIterator[tuple[QemuConfig, EgressBlock]]:
    """A guest that runs behind a closed block, and whose agent is dead."""
    missing = await missing_for_block()
    need("qemu", [missing] if missing else [])
    first = bed.agent()
    config = bed.guest()
    await first.start(config, bed.alone())
    block = EgressBlock(config.nics[0].tap)
    await block.install(passing=False)
    await bed.crash(first)
    try:
        yield config, block
    finally:
        await block.remove()


async def test_the_janitor_opens_only_to_a_guest_that_is_alone_here(
    bed: Bed, blocked: tuple[QemuConfig, EgressBlock]
) -> None:
    config, block = blocked
    undecided = bed.alone(state=RecordState.PROTECTED, standby="beta", session="s")
    assert await bed.agent().sweep(config, undecided) == []
    assert block.table in nft("list", "tables")
    done = await bed.agent().sweep(config, bed.alone())
    assert any("still blocked" in sentence for sentence in done)
    assert not await block.remove()


async def test_the_janitor_opens_only_after_the_guest_that_lives_elsewhere_is_dead(
    bed: Bed, blocked: tuple[QemuConfig, EgressBlock]
) -> None:
    config, block = blocked
    done = await bed.agent().sweep(config, bed.alone("beta"))
    assert "discarded" in done[0]
    assert "still blocked" in done[-1]
    assert bed.traces() == set()
    assert not await block.remove()
