"""Faults that must be seen: the judges of the other tests, shown a fault beside the same scenario without it.

The fault is put into a real session at one step: output that leaves though its checkpoint was never made, a disk that
is older than its guest's memory, a copy that is let out while the primary still runs. If the judge (the client with
its chain, the check of a disk's blocks, whoever listens on the network) found nothing here, its silence elsewhere would
prove nothing.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.qemu.guestnet import Client, GuestNet, NetHost, NetSession, run
from tests.qemu.pair import GUEST
from tests.testbeds.bed import missing_for_qemu, need
from understudy.device import Mode, Verdict
from understudy.hypervisor import Protection
from understudy_qemu.accel import Accel
from understudy_qemu.blockreplication import BLOCK_REPLICATION
from understudy_qemu.demo.chain import BLOCK_BYTES, DiskCheck, Greeting, check_disk
from understudy_qemu.demo.tinyguest import build_guest
from understudy_qemu.filterbuffer import FILTER_BUFFER
from understudy_qemu.guestfile import QemuConfig, parse_config

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(150)]

PERIOD_S = 0.05
PATIENCE_S = 12  # of a client that may be lost


class HeldHost(NetHost):
    """A host of a guest with two disks, whose output is held in mode remus."""

    @functools.cached_property
    def config(self) -> QemuConfig:
        self.root.mkdir(exist_ok=True)
        table: dict[str, Any] = {
            "memory": "128MiB",
            "accel": self.accel.value,
            "kernel": str(self.bed.guest.kernel),
            "initrd": str(self.bed.guest.initrd),
            "cmdline": self.bed.guest.cmdline(["10.77.0.2/24"], draw=0),
            "disk": [{"path": f"disk{number}.qcow2"} for number in range(2)],
            "nic": [{"bridge": self.bed.bridges[0], "subkind": "filter-buffer"}],
        }
        source, protection = self.root / "guest.toml", Protection(mode=Mode.REMUS)
        return parse_config(table, name=GUEST, source=source, protection=protection, host=self.name)

    def judged(self, client: Client) -> list[DiskCheck]:
        """Check the disks of a guest that has ended against what a client was told."""
        told = {line["n"]: line["hash"] for line in client.lines if "hash" in line}
        checks = []
        for number, disk in enumerate(self.config.disks):
            raw = self.root / "check.raw"
            run("qemu-img", "convert", "-O", "raw", str(disk.path), str(raw))
            checks.append(check_disk(raw.read_bytes(), greeting(client), told, number))
        return checks


class HeldSession(NetSession):
    """A session in mode remus, with something to be done to the copy before it is let out."""

    async def before_outlet(self) -> None:
        """Do nothing; a test may."""

    async def _connect(self) -> None:
        await self.before_outlet()
        await super()._connect()


class OldDisk(HeldSession):
    """A session whose copy gets one disk as it was some checkpoints before."""

    client: Client

    async def before_outlet(self) -> None:
        """Give the last words' blocks of disk1 their former content: the ring's first round, so they were empty."""
        told, newest = greeting(self.client), self.client.answered
        first, count = newest - 3, 5
        assert 0 < first < first + count < told.blocks
        monitor = self.secondary.qemu.monitor
        devices = [entry["qdev"] for entry in await monitor.execute("query-block") if "qdev" in entry]
        (device,) = [name for name in devices if "dev-disk1" in name]
        place = (told.slot * told.blocks + first) * BLOCK_BYTES
        line = f'qemu-io -d {device} "write -q -P 0 {place} {count * BLOCK_BYTES}"'
        assert await monitor.execute("human-monitor-command", {"command-line": line}) == ""


def greeting(client: Client) -> Greeting:
    return Greeting(**next(line["greeting"] for line in client.lines if "greeting" in line))


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[GuestNet]:
    need("qemu", missing_for_qemu())
    made = GuestNet(tmp_path, await build_guest(), Accel.TCG)
    try:
        made.make()
        yield made
    finally:
        await made.close()


async def held(bed: GuestNet, kind: type[HeldSession]) -> tuple[HeldSession, Client]:
    """Return a session in mode remus with its first checkpoint, and a client that talks through it."""
    alpha, beta = (HeldHost(f"{name}-{bed.id}", bed.root / name, bed, 1, 0) for name in ("alpha", "beta"))
    for each in (alpha, beta):
        each.disks = 2
        bed.hosts.append(each)
    await alpha.start()
    client = await bed.client(timeout_s=PATIENCE_S)
    session = kind(alpha, beta, mode=Mode.REMUS, subkinds=(BLOCK_REPLICATION, FILTER_BUFFER))
    bed.sessions.append(session)
    await session.protect()
    await by_steps(session.ack, client, 10)
    return session, client


async def by_steps(step: Callable[[], Awaitable[object]], client: Client, replies: int) -> None:
    """Do a step once a period until the client has got some more replies, which wait for it."""
    wanted = client.answered + replies
    clock = asyncio.get_running_loop().time
    async with asyncio.timeout(90):
        while client.answered < wanted:
            began_s = clock()
            await step()
            # Where a step takes long the guest has as long for itself, or it would not get anywhere.
            await asyncio.sleep(max(PERIOD_S, clock() - began_s))


async def pretend(session: NetSession) -> None:
    """Let out an epoch as if it had been acknowledged, without its checkpoint."""
    session.epoch += 1
    await session.running.monitor.execute("stop")
    await session.p_group.postsuspend(session.epoch)
    await session.running.monitor.execute("cont")
    await session.p_group.commit(session.epoch)


async def lose_primary(session: NetSession) -> None:
    """Kill the primary's QEMU and let the copy take over, as the engine does."""
    await session.kill_primary()
    assert isinstance(session.alpha, NetHost)
    await session.alpha.fence()
    for group in (session.s_group, session.p_group):
        group.sever_all()
    await session.fail_over()
    await session.p_group.teardown(Verdict.DISCARD)


# --- A checkpoint that was not made ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [False, True], ids=["made", "skipped"])
async def test_output_leaves_and_its_checkpoint_was_not_made(bed: GuestNet, skipped: bool) -> None:
    session, client = await held(bed, HeldSession)
    # The second of these replies answers a word that the guest has got after the first had left, and so on: no
    # checkpoint holds it.
    await by_steps(functools.partial(pretend, session) if skipped else session.ack, client, 3)
    await lose_primary(session)
    if skipped:
        with pytest.raises(AssertionError):
            await client.kept()
    else:
        await client.replies(10)
        await client.kept()
    assert isinstance(session.beta, HeldHost)
    await session.beta.quit()
    for check in session.beta.judged(client):
        assert bool(check.acknowledged_lost) is skipped, check
        assert bool(check.problems) is skipped, check


# --- A disk that is older than its guest -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [HeldSession, OldDisk], ids=["both", "skipped"])
async def test_one_disks_checkpoint_is_skipped(bed: GuestNet, kind: type[HeldSession]) -> None:
    session, client = await held(bed, kind)
    if isinstance(session, OldDisk):
        session.client = client
    await lose_primary(session)
    await client.replies(10)
    assert isinstance(session.beta, HeldHost)
    if kind is HeldSession:
        await client.kept()
        await session.beta.quit()
        assert not [check for check in session.beta.judged(client) if check.problems]
        return
    summary = await client.end()
    assert summary["bad"]
    assert "disk 1: BAD-PAST" in summary["problems"][0]
    assert not [words for words in summary["problems"] if "disk 0" in words]
    await session.beta.quit()
    sound, old = session.beta.judged(client)
    assert not sound.problems
    assert not old.contiguous
    assert old.acknowledged_lost


# --- A copy that is let out while the primary runs -------------------------------------------------------------------

_SO_TIMESTAMPNS: Final = 35  # asm-generic/socket.h; Python has no name for it
_ETH_P_ALL: Final = 3
_TIMESPEC: Final = struct.Struct("qq")


class Observer:
    """Sees whose packets come out of which tap, by the kernel's own clock; knows nothing of sessions.

    Args:
        taps: Ports of a bridge.
        mac: The guest's address.
    """

    def __init__(self, taps: list[str], mac: str) -> None:
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self._seen: list[tuple[tuple[int, int], str]] = []
        self._sockets = {tap: self._listen(tap) for tap in taps}

    def _listen(self, tap: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.bind((tap, _ETH_P_ALL))
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._take, sock, tap)
        return sock

    def _take(self, sock: socket.socket, tap: str) -> None:
        frame, extra, _, address = sock.recvmsg(64, 128)
        # What the bridge sends to the guest is outgoing here, also when it comes from the guest's other self.
        if frame[6:12] == self._mac and address[2] != socket.PACKET_OUTGOING:
            (time,) = [data for _, kind, data in extra if kind == _SO_TIMESTAMPNS]
            seconds, nanoseconds = _TIMESPEC.unpack(time)
            self._seen.append(((seconds, nanoseconds), tap))

    async def turns(self, at_least: int, timeout_s: float = 20.0) -> list[str]:
        """Wait until the guest was seen in so many turns; return where it was in each, in the order of time."""
        async with asyncio.timeout(timeout_s):
            while len(found := self.now()) < at_least:  # noqa: ASYNC110 - a network tells nobody
                await asyncio.sleep(0.05)
        return found

    def now(self) -> list[str]:
        """Return where the guest was seen until now, each change once."""
        return [tap for tap, _ in itertools.groupby(tap for _, tap in sorted(self._seen))]

    def close(self) -> None:
        """Listen no more."""
        for sock in self._sockets.values():
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()


@pytest.mark.parametrize("early", [False, True], ids=["swapped", "early"])
async def test_the_outlet_is_opened_before_the_swap(bed: GuestNet, early: bool) -> None:
    alpha, beta = bed.host("alpha"), bed.host("beta")
    await alpha.start()
    session = bed.session(alpha, beta)
    await session.protect()
    (here,), (there,) = alpha.config.nics, beta.config.nics
    assert here.mac is not None
    assert here.mac == there.mac
    observer = Observer([here.tap, there.tap], here.mac)
    try:
        client = await bed.client()
        await client.replies(10)
        # While both copies run and say the same, one of them is heard.
        assert observer.now() == [here.tap]
        if early:
            for group in (session.s_group, session.p_group):
                group.sever_all()
            # Nobody was asked: the primary, whose record it is, goes on alone when it misses the copy.
            await session.fail_over()
            await session.primary.sever("test")
            await session.primary.resume_alone(session.p_group)
            await session.p_group.teardown(Verdict.KEEP)
            # A question to everybody on the network, which both answer.
            run("ip", "-n", bed.namespace, "neigh", "flush", "all")
            assert (await observer.turns(3))[:3] == [here.tap, there.tap, here.tap]
        else:
            await lose_primary(session)
            await client.replies(10)
            run("ip", "-n", bed.namespace, "neigh", "flush", "all")
            await client.replies(10)
            await client.kept()
            assert observer.now() == [here.tap, there.tap]
    finally:
        observer.close()
