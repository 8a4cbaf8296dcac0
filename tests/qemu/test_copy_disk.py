"""A guest that took over gets its disk from where its copy had it to where its guest file says, and runs on."""

from __future__ import annotations

import functools
import shutil
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.qemu.conftest import Bed
from tests.qemu.pair import GUEST, QEMU, SIZE_BYTES, Host, boot_sector, need_qemu
from understudy.device import Mode
from understudy.hypervisor import Protection
from understudy_qemu.accel import Accel
from understudy_qemu.guestfile import QemuConfig, parse_config
from understudy_qemu.inventory import Inventory
from understudy_qemu.monitor import CommandRefused
from understudy_qemu.restoring import restore
from understudy_qemu.running import Launched, Qemu
from understudy_qemu.speculating import CopyDrive, settle_disk

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]


class RawHost(Host):
    """A host whose guest has a raw disk of a subkind that is not QEMU's."""

    @functools.cached_property
    def config(self) -> QemuConfig:
        self.root.mkdir(exist_ok=True)
        disk = {"path": "disk0.raw", "cache": "writeback", "subkind": "elsewhere"}
        table = {"memory": "16MiB", "machine": "pc", "disk": [disk], "accel": self.accel.value}
        source, protection = self.root / "guest.toml", Protection(mode=Mode.REMUS)
        return parse_config(table, name=GUEST, source=source, protection=protection, host=self.name)

    @property
    def elsewhere(self) -> Path:
        """Where the copy had the disk."""
        return self.root / "elsewhere"

    async def take_over(self) -> Qemu:
        """Run the guest from elsewhere, as one that took over does."""
        [disk] = self.config.disks
        self.elsewhere.write_bytes(boot_sector().ljust(SIZE_BYTES, b"\0"))
        self.qemu = await self.launch({disk.name: CopyDrive(disk, self.elsewhere)}, copy=False)
        await self.qemu.monitor.execute("cont")
        await self.counts_on(2)
        return self.qemu

    def counts_on_disk(self) -> list[int]:
        data = self.config.disks[0].path.read_bytes()
        blocks = (data[512 * n : 512 * n + 8] for n in range(1, 1025))
        return [struct.unpack("<I", block[:4])[0] for block in blocks if block[4:] == b"CNTR"]


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RawHost]:
    need_qemu()
    made = RawHost("alpha", tmp_path / "alpha", Accel.TCG, 1)
    try:
        yield made
    finally:
        await made.kill()


async def test_the_disk_moves_below_the_guest(host: RawHost) -> None:
    qemu = await host.take_over()
    [disk] = host.config.disks
    # Two files cannot be one disk as two devices can: the guest stands still while they become the same.
    await qemu.monitor.execute("stop")
    shutil.copyfile(host.elsewhere, disk.path)
    assert await settle_disk(qemu, disk)
    await qemu.monitor.execute("cont")
    host.elsewhere.unlink()
    last = await host.counts_on(5)
    assert not await settle_disk(qemu, disk)

    nodes = (await Inventory.take(qemu.monitor)).nodes
    assert nodes == {"disk0", "disk0-image", "disk0-file"}
    # For a janitor the node is the guest's own, and stays.
    launched = Launched.read(qemu.paths.launched)
    assert launched is not None
    assert launched.qemu == QEMU
    assert "disk0-file" in launched.born["nodes"]
    assert await restore(qemu) == []
    await host.quit()
    counts = host.counts_on_disk()
    assert counts == list(range(1, len(counts) + 1))
    assert len(counts) >= last


async def test_a_disk_that_cannot_move_stays(host: RawHost) -> None:
    qemu = await host.take_over()
    [disk] = host.config.disks
    with pytest.raises(CommandRefused):
        await settle_disk(qemu, disk)
    await host.counts_on(2)
    assert "disk0-copy" in (await Inventory.take(qemu.monitor)).nodes


async def test_the_janitor_finishes_what_a_dead_agent_began(bed: Bed) -> None:
    first = bed.agent()
    config = bed.guest(disk=[{"path": "counter-disk0.raw", "subkind": "elsewhere"}])
    [disk] = config.disks
    elsewhere = bed.root / "elsewhere"
    shutil.copyfile(disk.path, elsewhere)
    drives = {disk.name: CopyDrive(disk, elsewhere)}
    qemu = await first.launch(config, drives, accel=Accel.TCG, copy=False)
    await qemu.monitor.execute("cont")
    await bed.counts(config)
    await qemu.monitor.execute("stop")
    shutil.copyfile(elsewhere, disk.path)
    await bed.crash(first)

    second = bed.agent()
    moved, resumed = await second.sweep(config, bed.alone())
    assert f"was still on the device that its copy had: put on {disk.path}" in moved
    assert "it runs again" in resumed
    elsewhere.unlink()
    await bed.counts(config)
    assert await second.sweep(config, bed.alone()) == []
