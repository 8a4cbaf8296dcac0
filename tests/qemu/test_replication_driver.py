"""The thirteen cases that QEMU's own unit test puts to its replication driver, put to a real QEMU process here.

A QEMU without a guest holds the graphs that blockprimary.py and blocksecondary.py make; ``qemu-io`` plays the guest,
an NBD client plays the primary, and the commands that Xen's toolstack uses play the checkpoint transaction. The
primary's half of a block is written as 0x22, the secondary's as 0x33, what was there before as 0x11.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.qemu.pair import GUEST, QEMU, need_qemu
from tests.qemu.wires import LoopPeer
from understudy.device import DeviceInfo, Kind, Mode, OpenContext, ReplicationMode, Verdict
from understudy.services import Services
from understudy_qemu.blocksecondary import SecondaryDisk
from understudy_qemu.disksession import DISKS, DiskSession, Replica, block_nodes
from understudy_qemu.guestfile import Disk
from understudy_qemu.images import ImageIdentity, Images
from understudy_qemu.monitor import CommandRefused, QemuMonitor
from understudy_qemu.process import QemuProcess

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

SIZE_BYTES = 64 << 20
HALF = 64 << 10
OLD, PRIMARY, SECONDARY = 0x11, 0x22, 0x33
DISK = "disk0"


class Rig:
    """A QEMU with one disk of one side, and no guest."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = Images("qemu-img", root)
        self.image = root / "image.qcow2"
        self.said = root / "said"
        self.process: QemuProcess | None = None
        self.session = DiskSession(1)
        self.export: Mapping[str, Any] = {}

    async def start(self, nodes: list[Mapping[str, Any]]) -> None:
        # qemu-io's words go to QEMU's standard output, and there at once.
        line = ["stdbuf", "-o0", QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-S"]
        line += ["-pidfile", str(self.root / "pid"), "-qmp", f"unix:{self.root}/qmp,server=on,wait=off"]
        for node in nodes:
            line += ["-blockdev", json.dumps(node)]
        self.process = QemuProcess.start(line, stderr=self.said, environment=os.environ)
        self.monitor = await QemuMonitor.connect(
            self.root / "qmp", name="rig", describe=self.process.describe
        )
        await self.session.attach(self.monitor)

    async def stop(self) -> None:
        if self.process is not None:
            await self.session.close()
            await self.monitor.close()
            await self.process.kill()
            self.process.close()

    # --- The guest, the primary's writes, the transaction ------------------------------------------------------------

    async def io(self, node: str, *words: object) -> str:
        line = f'qemu-io {node} "{" ".join(map(str, words))}"'
        before = self.said.stat().st_size
        await self.monitor.execute("human-monitor-command", {"command-line": line})
        return self.said.read_text()[before:]

    async def write(self, node: str, pattern: int, offset: int, count: int) -> None:
        output = await self.io(node, "write", "-P", pattern, offset, count)
        assert f"wrote {count}/{count}" in output, output

    async def holds(self, node: str, pattern: int, offset: int, count: int) -> bool:
        output = await self.io(node, "read", "-P", pattern, offset, count)
        assert f"read {count}/{count}" in output, output
        return "Pattern verification failed" not in output

    async def primary_writes(self, pattern: int, offset: int, count: int) -> None:
        url = f"nbd://{self.export['host']}:{self.export['port']}/{self.export['export']}"
        process = await asyncio.create_subprocess_exec(
            "qemu-io", "-f", "raw", "-c", f"write -q -P {pattern} {offset} {count}", url
        )
        assert await process.wait() == 0

    async def begin(self, side: ReplicationMode) -> None:
        primary = side is ReplicationMode.PRIMARY
        await self.monitor.execute("xen-set-replication", {"enable": True, "primary": primary})

    async def end(self, side: ReplicationMode, *, failover: bool) -> None:
        primary = side is ReplicationMode.PRIMARY
        arguments = {"enable": False, "primary": primary, "failover": failover}
        await self.monitor.execute("xen-set-replication", arguments)

    async def checkpoint(self) -> None:
        await self.monitor.execute("xen-colo-do-checkpoint")

    async def status(self) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = await self.monitor.execute("query-xen-replication-status")
        return answer


@pytest_asyncio.fixture
async def primary(tmp_path: Path) -> AsyncIterator[Rig]:
    need_qemu()
    rig = Rig(tmp_path)
    await rig.images.create(rig.image, "qcow2", SIZE_BYTES)
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": str(rig.image)}, "node-name": "image"}
    node = {"driver": "replication", "mode": "primary", "node-name": "primary", "file": below}
    try:
        await rig.start([node])
        yield rig
    finally:
        await rig.stop()


class SecondaryRig(Rig):
    """The graph that the secondary's half makes, its image full of what was there before."""

    async def prepare(self) -> None:
        wanted = Replica(
            Disk(DISK, self.image, "qcow2", "virtio", "writeback", "", "auto"),
            SIZE_BYTES,
            ImageIdentity("id-1", GUEST, DISK, 1, ReplicationMode.PRIMARY),
        )
        self.session = DiskSession(1, replicas={DISK: wanted}, images=self.images)
        self.disk = SecondaryDisk(
            OpenContext(
                guest=GUEST,
                device=DeviceInfo(Kind.DISK, DISK, 0, "qemu"),
                side=ReplicationMode.SECONDARY,
                mode=Mode.COLO,
                session="s1",
                options=None,
                services=Services((DISKS, self.session)),
                peer=LoopPeer(DISK, lambda: None),  # type: ignore[arg-type,return-value]
                directory=self.root,
                local_address="127.0.0.1",
                peer_address="127.0.0.1",
            )
        )
        await self.disk.prepare()
        await self.start(list(self.disk.blockdevs()))
        self.export = await self.disk.serve("export", {})
        await self.primary_writes(OLD, 0, 2 * HALF)


@pytest_asyncio.fixture
async def secondary(tmp_path: Path) -> AsyncIterator[SecondaryRig]:
    need_qemu()
    rig = SecondaryRig(tmp_path)
    try:
        await rig.prepare()
        yield rig
    finally:
        await rig.stop()


# --- The primary's side ----------------------------------------------------------------------------------------------


async def test_primary_read_fails(primary: Rig) -> None:
    """Reads are the local image's business: through the replication filter they fail."""
    await primary.begin(ReplicationMode.PRIMARY)
    assert "Input/output error" in await primary.io("primary", "read", 0, HALF)


async def test_primary_write_is_forwarded(primary: Rig) -> None:
    assert "Input/output error" in await primary.io("primary", "write", "-P", PRIMARY, 0, HALF)  # not begun
    await primary.begin(ReplicationMode.PRIMARY)
    await primary.write("primary", PRIMARY, 0, HALF)
    assert await primary.holds("image", PRIMARY, 0, HALF)


async def test_primary_start(primary: Rig) -> None:
    await primary.begin(ReplicationMode.PRIMARY)
    assert (await primary.status())["error"] is False
    with pytest.raises(CommandRefused):  # it runs already
        await primary.begin(ReplicationMode.PRIMARY)


async def test_primary_stop(primary: Rig) -> None:
    await primary.begin(ReplicationMode.PRIMARY)
    await primary.end(ReplicationMode.PRIMARY, failover=True)
    # Done is done: a stop and a start are no errors and change nothing.
    await primary.end(ReplicationMode.PRIMARY, failover=True)
    await primary.begin(ReplicationMode.PRIMARY)


async def test_primary_do_checkpoint(primary: Rig) -> None:
    await primary.begin(ReplicationMode.PRIMARY)
    await primary.write("primary", PRIMARY, 0, HALF)
    await primary.checkpoint()
    assert await primary.holds("image", PRIMARY, 0, HALF)


async def test_primary_get_error_all(primary: Rig) -> None:
    before = await primary.status()
    assert before["error"] is True
    assert "not running" in before["desc"]
    await primary.begin(ReplicationMode.PRIMARY)
    assert (await primary.status())["error"] is False
    assert await primary.session.fault(DISK) == ""


# --- The secondary's side --------------------------------------------------------------------------------------------


async def test_secondary_read(secondary: SecondaryRig) -> None:
    """The copy sees its checkpoint, whatever the primary has written since."""
    await secondary.begin(ReplicationMode.SECONDARY)
    await secondary.primary_writes(PRIMARY, 0, HALF)
    assert await secondary.holds(DISK, OLD, 0, 2 * HALF)


async def test_secondary_write(secondary: SecondaryRig) -> None:
    """What the copy writes stays above the image."""
    await secondary.begin(ReplicationMode.SECONDARY)
    await secondary.write(DISK, SECONDARY, 0, HALF)
    assert await secondary.holds(DISK, SECONDARY, 0, HALF)
    assert await secondary.holds(DISK, OLD, HALF, HALF)
    assert await secondary.holds(f"{DISK}-image", OLD, 0, 2 * HALF)


async def test_secondary_start(secondary: SecondaryRig) -> None:
    with pytest.raises(CommandRefused):  # the wrong side
        await secondary.begin(ReplicationMode.PRIMARY)
    await secondary.begin(ReplicationMode.SECONDARY)
    await secondary.primary_writes(PRIMARY, HALF, HALF)
    assert await secondary.holds(f"{DISK}-image", PRIMARY, HALF, HALF)
    # The old content of what the primary overwrote is kept for the way back.
    assert await secondary.holds(f"{DISK}-hidden", OLD, HALF, HALF)


async def taken_over(secondary: SecondaryRig) -> None:
    """The primary writes its half, the copy the other, and then the copy takes over."""
    await secondary.begin(ReplicationMode.SECONDARY)
    await secondary.primary_writes(PRIMARY, HALF, HALF)
    await secondary.checkpoint()
    await secondary.write(DISK, SECONDARY, 0, HALF)
    await secondary.disk.stop(failover=True)
    await secondary.end(ReplicationMode.SECONDARY, failover=True)
    await secondary.disk.teardown(Verdict.KEEP)


async def test_secondary_stop(secondary: SecondaryRig) -> None:
    await taken_over(secondary)
    for node in (DISK, f"{DISK}-image"):
        assert await secondary.holds(node, SECONDARY, 0, HALF)
        assert await secondary.holds(node, PRIMARY, HALF, HALF)
    assert f"{DISK}-active" not in await block_nodes(secondary.monitor)
    assert not secondary.disk.active.exists()
    assert not secondary.disk.hidden.exists()


async def test_secondary_continuous_replication(secondary: SecondaryRig) -> None:
    """A copy that took over may become a primary: its own node, done, ignores what is said to all."""
    await taken_over(secondary)
    await secondary.begin(ReplicationMode.PRIMARY)
    await secondary.checkpoint()
    await secondary.write(DISK, PRIMARY, 0, HALF)
    await secondary.checkpoint()
    await secondary.end(ReplicationMode.PRIMARY, failover=True)
    assert (await secondary.status())["error"] is False
    assert await secondary.holds(f"{DISK}-image", PRIMARY, 0, 2 * HALF)


async def test_secondary_do_checkpoint(secondary: SecondaryRig) -> None:
    await secondary.begin(ReplicationMode.SECONDARY)
    await secondary.primary_writes(PRIMARY, HALF, HALF)
    await secondary.write(DISK, SECONDARY, 0, HALF)
    assert await secondary.holds(DISK, OLD, HALF, HALF)
    await secondary.checkpoint()
    assert await secondary.holds(DISK, PRIMARY, HALF, HALF)
    assert await secondary.holds(DISK, OLD, 0, HALF)  # the copy's own write was speculation


async def test_secondary_get_error_all(secondary: SecondaryRig) -> None:
    assert (await secondary.status())["error"] is True  # not begun
    await secondary.begin(ReplicationMode.SECONDARY)
    await secondary.primary_writes(PRIMARY, HALF, HALF)
    assert (await secondary.status())["error"] is False
    await secondary.disk.error()
