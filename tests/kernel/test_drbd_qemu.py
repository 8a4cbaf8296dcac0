"""A QEMU guest whose disk is a real DRBD device, behind the kernel's plug: its host dies at every bad moment.

One kernel has both DRBD nodes and both QEMUs; what ends is a host's QEMU and its half of the disk. The guest's hash
chain is on its disk too, so the client sees a disk of another moment than the memory's, and the disk is judged in the
end. The controls are the same with the gate but without the way back of the disk, and, in long runs, without the gate.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.drbdpair import PRIMARY, SECONDARY, DrbdPair, drbd_pair
from tests.kernel.test_guest_behind_plug import NOTHING, FreeHost, build
from tests.kernel.thinpool import run
from tests.qemu.guestnet import Client, GuestNet
from tests.qemu.pair import GroupPhases
from tests.qemu.test_controls import HeldSession, by_steps, greeting, lose_primary
from tests.testbeds.bed import missing_for_qemu, need
from tests.testbeds.rounds import rounds
from understudy.device import Mode, Subkind
from understudy_drbd.dm import MapperRefused
from understudy_drbd.subkind import DRBD
from understudy_drbd.thin import ThinVolume
from understudy_netbuffer.subkind import NETBUFFER
from understudy_qemu import network
from understudy_qemu.accel import Accel
from understudy_qemu.demo.chain import DiskCheck, check_disk
from understudy_qemu.demo.tinyguest import build_guest

pytestmark = [
    pytest.mark.kernel(memory_mib=1500, outside=build),
    pytest.mark.slow,
    pytest.mark.timeout(rounds(300, 1500)),
]

NODES = {"alpha": PRIMARY, "beta": SECONDARY}


class DrbdHost(FreeHost):
    """A host whose guest has a disk on DRBD."""

    device: Path

    def disk_tables(self) -> list[dict[str, Any]]:
        """Return the entry of the DRBD device."""
        return [{"path": str(self.device), "format": "raw", "cache": "none", "subkind": "drbd"}]

    def make_images(self) -> None:
        """Do nothing: DRBD is there."""

    def judged(self, client: Client) -> list[DiskCheck]:
        """Check the disk of a guest that stands still against what a client was told, past the page cache."""
        raw = self.root / "check.raw"
        run("qemu-img", "convert", "-U", "-T", "none", "-f", "raw", "-O", "raw", self.device, raw)
        told = {line["n"]: line["hash"] for line in client.lines if "hash" in line}
        return [check_disk(raw.read_bytes(), greeting(client), told, 0)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrbdPair]:
    # As at any boot, and not while an emulated guest has the one CPU.
    run("modprobe", "-a", "sch_plug", "sch_ingress", "act_mirred", "cls_matchall")
    run("modprobe", "ifb", "numifbs=0")
    with drbd_pair(tmp_path_factory.mktemp("drbd"), both_thin=True) as pair:
        yield pair


@pytest.fixture
async def bed(made: DrbdPair, tmp_path: Path) -> AsyncIterator[GuestNet]:
    need("qemu", missing_for_qemu())
    await made.begin()
    net = GuestNet(tmp_path, await build_guest(), Accel.TCG)
    try:
        net.make()
        yield net
    finally:
        await net.close()


async def begun(bed: GuestNet, pair: DrbdPair) -> tuple[dict[str, DrbdHost], Client]:
    """Start the guest on alpha, and a client that talks to it."""
    hosts = {name: DrbdHost(f"{name}-{bed.id}", bed.root / name, bed, 1, 0) for name in NODES}
    for name, host in hosts.items():
        host.device = pair.devices[NODES[name]]
        bed.hosts.append(host)
    await hosts["alpha"].start()
    return hosts, await bed.client(timeout_s=DrbdHost.patience_s)


async def protected(
    bed: GuestNet, here: DrbdHost, there: DrbdHost, client: Client, nic: Subkind = NETBUFFER
) -> HeldSession:
    """Protect the guest and let the client get some replies."""
    session = HeldSession(here, there, mode=Mode.REMUS, subkinds=(DRBD, nic), name=f"s{len(bed.sessions)}")
    bed.sessions.append(session)
    await session.protect()
    await by_steps(session.ack, client, 5)
    return session


def device_is_gone(pair: DrbdPair) -> bool:
    for minor in (0, 1):
        try:
            pair.pool.mapper.status(f"understudy-drbd{minor}")
        except MapperRefused:
            continue
        return False
    return True


# --- The moments -----------------------------------------------------------------------------------------------------


async def in_an_epoch(session: HeldSession, client: Client) -> None:
    """The guest has gone on and written, and nobody has heard of it."""
    with pytest.raises(TimeoutError):
        await client.replies(3, timeout_s=2.0)


async def after_the_cut(session: HeldSession, client: Client) -> None:
    """The disk is one checkpoint ahead of the memory."""
    await in_an_epoch(session, client)
    await session.running.monitor.execute("stop")
    for group in (session.p_group, session.s_group):
        await group.postsuspend(session.epoch + 1)


class Unheard(GroupPhases):
    """The primary dies before it can tell what QEMU has told it."""

    async def checkpoint(self, epoch: int) -> None:
        """Tell nobody."""

    async def postresume(self, epoch: int) -> None:
        """Tell nobody."""


async def after_the_load(session: HeldSession, client: Client) -> None:
    """The copy holds a checkpoint of which its host has not been told."""
    await in_an_epoch(session, client)
    await session.primary.checkpoint(session.epoch + 1, Unheard(session.p_group, session.s_group))
    await in_an_epoch(session, client)


async def in_the_transfer(session: HeldSession, client: Client) -> None:
    """A checkpoint is on its way."""
    await in_an_epoch(session, client)
    taking = asyncio.ensure_future(
        session.primary.checkpoint(session.epoch + 1, Unheard(session.p_group, session.s_group))
    )
    await asyncio.sleep(random.random() * 0.3)
    await session.kill_primary()
    await asyncio.wait({taking})
    taking.exception()


MOMENTS: tuple[Callable[[HeldSession, Client], Awaitable[None]], ...] = (
    after_the_cut,
    after_the_load,
    in_the_transfer,
    in_an_epoch,
)


async def test_kills_there_and_back(bed: GuestNet, made: DrbdPair, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts, client = await begun(bed, made)
    here, there = hosts["alpha"], hosts["beta"]
    for moment in itertools.islice(itertools.cycle(MOMENTS), rounds(2, 20)):
        session = await protected(bed, here, there, client)
        await moment(session, client)
        await taken_over(session, made)
        await client.replies(5, timeout_s=60.0)
        here, there = there, here
    await client.kept()
    await sound(here, client)

    for _ in range(rounds(0, 1)):  # in short runs test_guest_behind_plug has it, with QEMU's own replication
        await without_a_gate(bed, here, there, made)
        here, there = there, here
    await without_the_way_back(bed, here, there, made, monkeypatch)


async def taken_over(session: HeldSession, pair: DrbdPair) -> None:
    """Lose the primary; what was between the guest and DRBD must be gone, and the mirror whole again."""
    assert isinstance(session.alpha, DrbdHost)
    assert isinstance(session.beta, DrbdHost)
    await lose_primary(session)
    assert device_is_gone(pair)
    nodes = await session.secondary.qemu.monitor.execute("query-named-block-nodes", {"flat": True})
    assert [node["file"] for node in nodes if node["node-name"] == "disk0-file"] == [str(session.beta.device)]
    await pair.mirrored()
    for nic in session.alpha.config.nics:
        await network.remove_tap(nic.tap)


async def sound(host: DrbdHost, client: Client) -> None:
    """Check the disk of a guest that runs against what a client was told that has ended."""
    assert host.qemu is not None
    await host.qemu.monitor.execute("stop")
    for check in host.judged(client):
        assert check.contiguous
        assert not check.acknowledged_lost, check
        assert not check.problems, check
    await host.qemu.monitor.execute("cont")


# --- What must be seen -----------------------------------------------------------------------------------------------


async def without_a_gate(bed: GuestNet, here: DrbdHost, there: DrbdHost, pair: DrbdPair) -> None:
    """Let the primary die after it has said what no checkpoint holds."""
    client = await bed.client(timeout_s=10)
    session = await protected(bed, here, there, client, NOTHING)
    await client.replies(3, timeout_s=60.0)
    await taken_over(session, pair)
    with pytest.raises(AssertionError):
        await client.kept()


async def without_the_way_back(
    bed: GuestNet, here: DrbdHost, there: DrbdHost, pair: DrbdPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promote the disk as it is: later than the memory."""
    client = await bed.client(timeout_s=DrbdHost.patience_s)
    session = await protected(bed, here, there, client)
    await in_an_epoch(session, client)
    rolled = []
    monkeypatch.setattr(ThinVolume, "roll_back", lambda _, epoch: rolled.append(epoch))
    await taken_over(session, pair)
    assert rolled == [session.epoch]
    await client.replies(1, timeout_s=60.0)
    summary = await client.end()
    assert summary["bad"]
    assert "disk 0: BAD-FUTURE" in summary["problems"][0]
