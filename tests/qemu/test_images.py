"""Images made, looked at and protected from being overwritten, with the real qemu-img."""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.testbeds.bed import missing_for_qemu, need
from understudy.device import ReplicationMode
from understudy.errors import HypervisorError
from understudy_qemu.images import ImageIdentity, Images

pytestmark = pytest.mark.qemu

SIZE = 3 << 20
WANTED = ImageIdentity("id-1", "web", "disk0", 5, ReplicationMode.PRIMARY)


@pytest.fixture
def images(tmp_path: Path) -> Images:
    need("qemu", missing_for_qemu())
    return Images("qemu-img", tmp_path / "state")


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
async def test_create_and_look(images: Images, tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "disk"
    await images.create(path, image_format, SIZE)
    info = await images.info(path)
    assert (info.format, info.size_bytes, info.backing, info.corrupt) == (image_format, SIZE, "", False)
    assert await images.size_bytes(path, image_format) == SIZE
    assert await images.check(path, image_format) == ""
    assert names(tmp_path) == {"disk"}


async def test_a_raw_image_is_never_taken_for_what_its_guest_wrote_into_it(
    images: Images, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    await images.create(path, "qcow2", 1 << 30)
    assert await images.size_bytes(path, "raw") < 1 << 20


async def test_what_is_no_image(images: Images, tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="No such file"):
        await images.info(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(HypervisorError, match="not in qcow2 format"):
        await images.size_bytes(tmp_path / "text", "qcow2")
    with pytest.raises(HypervisorError):
        await images.create(tmp_path / "no" / "dir", "qcow2", SIZE)
    assert not (tmp_path / "no").exists()


async def test_damage_is_found(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    await images.create(path, "qcow2", SIZE)
    damage(path)
    assert await images.check(path, "qcow2")


def damage(path: Path) -> None:
    subprocess.run(["qemu-io", "-c", "write -q 0 64k", path], check=True)
    data = bytearray(path.read_bytes())
    data[0x10000:0x20000] = bytes(0x10000)  # the table of reference counts
    path.write_bytes(data)


async def test_a_replica_is_made_overwritten_and_refused(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    await images.prepare_replica(path, "qcow2", SIZE, WANTED, overwrite=False)
    assert images.identity(path) == replace(WANTED, role=ReplicationMode.SECONDARY)
    await images.prepare_replica(path, "qcow2", SIZE, replace(WANTED, generation=9), overwrite=False)
    with pytest.raises(HypervisorError, match=f"has {SIZE} bytes, the primary's disk0 has {2 * SIZE}"):
        await images.prepare_replica(path, "qcow2", 2 * SIZE, replace(WANTED, generation=9), overwrite=True)
    other = replace(WANTED, id="id-2", generation=99)
    with pytest.raises(
        HypervisorError, match=r"holds something else.*overwrite_secondary = true would allow"
    ):
        await images.prepare_replica(path, "qcow2", SIZE, other, overwrite=False)
    assert images.identity(path) == replace(WANTED, generation=9, role=ReplicationMode.SECONDARY)
    await images.prepare_replica(path, "qcow2", SIZE, other, overwrite=True)
    assert images.identity(path) == replace(other, role=ReplicationMode.SECONDARY)


async def test_a_cancelled_create_leaves_nothing(images: Images, tmp_path: Path) -> None:
    program = tmp_path / "qemu-img"
    program.write_text('#!/bin/sh\ntouch "$5"\nexec sleep 60\n')
    program.chmod(0o755)
    creating = asyncio.create_task(Images(str(program), tmp_path).create(tmp_path / "disk", "qcow2", SIZE))
    async with asyncio.timeout(10):
        while not drafts(tmp_path):  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.01)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert names(tmp_path) == {"qemu-img"}


def drafts(directory: Path) -> list[Path]:
    return list(directory.glob(".disk*"))


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}
