"""Whose data an image holds, and what may be overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from understudy.device import ReplicationMode
from understudy.errors import HypervisorError
from understudy_qemu.images import ImageIdentity, Images, free_bytes, is_volatile

MINE = ImageIdentity("id-1", "web", "disk0", 7, ReplicationMode.SECONDARY)


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images("qemu-img", tmp_path / "state")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"")
    return path


def test_identity_there_and_back(images: Images, image: Path) -> None:
    assert images.identity(image) is None
    images.write_identity(image, MINE)
    assert images.identity(image) == MINE
    assert [path.name for path in image.parent.iterdir()] == ["disk.qcow2", "disk.qcow2.understudy"]
    images.forget_identity(image)
    images.forget_identity(image)
    assert images.identity(image) is None


def test_a_damaged_identity_is_an_error_and_no_permission(images: Images, image: Path) -> None:
    image.with_name("disk.qcow2.understudy").write_text("{")
    with pytest.raises(HypervisorError, match="cannot be read"):
        images.identity(image)
    assert "cannot be read" in images.why_not_overwrite(image, MINE)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (MINE, ""),
        (replace(MINE, generation=3), ""),
        (replace(MINE, role=ReplicationMode.PRIMARY, generation=6), ""),
        (replace(MINE, generation=8), "newer than the primary's disk"),
        (replace(MINE, id="id-2"), "holds something else"),
        (replace(MINE, disk="disk1"), "holds something else"),
        (None, "is not known to be a replica"),
    ],
)
def test_what_may_be_overwritten(
    images: Images, image: Path, found: ImageIdentity | None, reason: str
) -> None:
    if found is not None:
        images.write_identity(image, found)
    why = images.why_not_overwrite(image, MINE)
    assert reason in why
    assert bool(reason) == bool(why)


def test_a_missing_image_may_be_made(images: Images, tmp_path: Path) -> None:
    assert images.why_not_overwrite(tmp_path / "none", MINE) == ""


def test_room_and_volatility_of_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == free_bytes(tmp_path)
    assert is_volatile(Path("/dev/shm/understudy/none"))  # noqa: S108 - only asked about
    assert not is_volatile(Path("/proc/self"))


async def test_a_missing_qemu_img_is_one_sentence(image: Path, tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="/no/qemu-img cannot be started: No such file"):
        await Images("/no/qemu-img", tmp_path).info(image)


async def test_a_hanging_qemu_img_ends_at_its_deadline(image: Path, tmp_path: Path) -> None:
    program = tmp_path / "qemu-img"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    with pytest.raises(HypervisorError, match=r"info did not end within 0.1 s"):
        await Images(str(program), tmp_path, deadline_s=0.1).info(image)
