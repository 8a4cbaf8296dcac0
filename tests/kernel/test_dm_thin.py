"""Cuts of a thin volume and the way back to them, with a real pool."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.thinpool import MIB_SECTORS, Pool, device, loop_device, run, thin_pool
from tests.testbeds.rounds import rounds
from understudy.errors import StateError
from understudy_drbd.dm import MapperRefused, Target
from understudy_drbd.thin import FIRST_CUT_ID, MAX_VOLUME_ID, NotThin, ThinVolume

pytestmark = pytest.mark.kernel

SIZE_MIB = 4
BLOCK_BYTES = 4096
BLOCKS = SIZE_MIB * 256


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with thin_pool(tmp_path_factory.mktemp("pool"), 64) as made:
        yield made


@pytest.fixture
def path(pool: Pool) -> Iterator[Path]:
    with pool.volume("understudy-volume", 7, SIZE_MIB) as volume:
        yield volume


@pytest.fixture
def volume(pool: Pool, path: Path) -> Iterator[ThinVolume]:
    found = ThinVolume.find(pool.mapper, path)
    yield found
    found.clear()


def write(path: Path, block: int, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, text.encode().ljust(BLOCK_BYTES, b"\0"), block * BLOCK_BYTES)
        os.fsync(fd)
    finally:
        os.close(fd)


def content(path: Path) -> list[str]:
    run("blockdev", "--flushbufs", path)
    data = path.read_bytes()
    return [data[at : at + 32].rstrip(b"\0").decode() for at in range(0, len(data), BLOCK_BYTES)]


def test_a_volume_is_found_by_its_path(volume: ThinVolume, path: Path) -> None:
    assert volume.name == "understudy-volume"
    assert volume.number == path.stat().st_rdev
    assert volume.identity == 7
    assert volume.sectors == SIZE_MIB * MIB_SECTORS


def test_back_to_a_cut_under_the_same_name_and_id(pool: Pool, volume: ThinVolume, path: Path) -> None:
    write(path, 3, "first")
    volume.cut(1)
    write(path, 3, "second")
    write(path, 4, "too")
    volume.roll_back(1)
    assert [text for text in content(path) if text] == ["first"]
    assert content(path)[3] == "first"
    assert ThinVolume.find(pool.mapper, path).identity == 7
    # The cut is still there, and the volume is its own again.
    write(path, 3, "third")
    volume.roll_back(1)
    assert content(path)[3] == "first"


def test_a_cut_is_dropped_once_and_its_place_is_free_again(volume: ThinVolume, path: Path) -> None:
    for epoch in range(1, 10):
        write(path, 0, f"epoch {epoch}")
        volume.cut(epoch)
        volume.drop(epoch - 1)
        volume.drop(epoch - 1)
    volume.roll_back(9)
    assert content(path)[0] == "epoch 9"
    with pytest.raises(StateError, match="no cut of epoch 8"):
        volume.roll_back(8)
    assert content(path)[0] == "epoch 9"


def test_no_cut_takes_the_place_of_one_that_is_kept(volume: ThinVolume, path: Path) -> None:
    write(path, 0, "kept")
    for epoch in (1, 2, 3):
        volume.cut(epoch)
    write(path, 0, "later")
    with pytest.raises(StateError, match="no room for the cut of epoch 4"):
        volume.cut(4)
    write(path, 0, "it takes writes")  # and is not left suspended
    volume.roll_back(1)
    assert content(path)[0] == "kept"


def test_a_cut_is_a_writable_device_whose_writes_are_kept(pool: Pool, volume: ThinVolume, path: Path) -> None:
    write(path, 0, "checkpoint")
    volume.cut(1)
    write(path, 0, "uncommitted")
    with device(pool.mapper, "understudy-copy", volume.target(1)) as copy:
        write(copy, 1, "of the copy")
        with pytest.raises(MapperRefused) as caught:
            volume.drop(1)
        assert caught.value.errno == errno.EBUSY
    volume.roll_back(1)
    assert content(path)[:2] == ["checkpoint", "of the copy"]


def test_a_volume_in_use_is_not_rolled_back(volume: ThinVolume, path: Path) -> None:
    write(path, 0, "cut")
    volume.cut(1)
    write(path, 0, "now")
    with path.open("rb"), pytest.raises(StateError, match="is open"):
        volume.roll_back(1)
    assert content(path)[0] == "now"


def test_a_rollback_that_broke_off_is_done_again(pool: Pool, volume: ThinVolume, path: Path) -> None:
    write(path, 0, "cut")
    volume.cut(1)
    # What is there when it broke off after its worst step.
    pool.mapper.swap(volume.number, Target(0, volume.sectors, "error"))
    pool.mapper.message(pool.name, "delete 7")
    volume.roll_back(1)
    assert content(path)[0] == "cut"


def test_what_a_dead_agent_left_is_found_and_cleared(pool: Pool, volume: ThinVolume, path: Path) -> None:
    assert not volume.clear()
    volume.cut(1)
    volume.cut(2)
    pool.mapper.suspend(volume.number)  # it died in the middle of a cut
    afterwards = ThinVolume.find(pool.mapper, path)
    assert afterwards.clear()
    assert not pool.mapper.status(volume.number).suspended
    assert not afterwards.clear()
    for epoch in (1, 2):
        with pytest.raises(StateError):
            afterwards.roll_back(epoch)


def test_nobody_elses_snapshot_is_touched(pool: Pool, volume: ThinVolume, path: Path) -> None:
    with pool.volume("understudy-other", 8, SIZE_MIB) as other_path:
        other = ThinVolume.find(pool.mapper, other_path)
        pool.mapper.message(pool.name, "create_snap 9 7")
        write(other_path, 0, "other")
        other.cut(1)
        write(other_path, 0, "other later")
        volume.cut(1)
        volume.clear()
        other.roll_back(1)
        assert content(other_path)[0] == "other"
        other.clear()
        pool.mapper.message(pool.name, "delete 9")
    assert volume.cut_id(1) != other.cut_id(1)
    assert FIRST_CUT_ID + MAX_VOLUME_ID * 4 + 3 == 0xFF_FFFF


def test_a_pool_says_how_full_it_is(volume: ThinVolume, path: Path) -> None:
    before = volume.pool_state()
    assert before.writable
    assert not before.trouble
    assert before.total_data_blocks == 64 * 16
    write(path, 100, "more")
    after = volume.pool_state()
    assert after.used_data_blocks == before.used_data_blocks + 1
    assert after.fill_ratio > 0


def test_what_is_no_thin_volume_is_said(pool: Pool, tmp_path: Path) -> None:
    def reason(path: Path) -> str:
        with pytest.raises(NotThin) as caught:
            ThinVolume.find(pool.mapper, path)
        return caught.value.reason

    assert "No such file" in reason(tmp_path / "nothing")
    assert reason(tmp_path) == "it is no block device"
    with loop_device(tmp_path / "image", 1) as loop:
        assert reason(loop) == "it is no device of the device mapper"
        with device(pool.mapper, "understudy-linear", Target(0, 2048, "linear", f"{loop} 0")) as linear:
            assert "makes it of linear" in reason(linear)


def test_a_cut_that_the_pool_refuses_leaves_the_volume_running(tmp_path: Path) -> None:
    with thin_pool(tmp_path, 8, "understudy-small") as pool, pool.volume("understudy-v", 1, 4) as path:
        volume = ThinVolume.find(pool.mapper, path)
        write(path, 0, "before")
        [table] = pool.mapper.table(pool.name)
        pool.mapper.swap(
            pool.name, replace(table, parameters=f"{table.parameters} read_only".replace(" 1 ", " 2 "))
        )
        with pytest.raises(MapperRefused, match="create_snap"):
            volume.cut(1)
        assert not pool.mapper.status(volume.number).suspended
        assert content(path)[0] == "before"
        state = volume.pool_state()
        assert not state.writable
        assert state.trouble == "it takes no writes (ro)"
        pool.mapper.swap(pool.name, table)
        volume.cut(1)
        volume.clear()


@pytest.mark.parametrize("seed", range(rounds(3, 10)))
def test_thirty_epochs_and_back_to_a_random_one(volume: ThinVolume, path: Path, seed: int) -> None:
    chance = random.Random(seed)
    last = chance.randrange(1, 31)
    wanted = [""] * BLOCKS
    for epoch in range(1, last + 1):
        for _ in range(4):
            block, text = chance.randrange(BLOCKS), f"{seed} {epoch} {chance.random():.9f}"
            write(path, block, text)
            wanted[block] = text
        volume.cut(epoch)
        volume.drop(epoch - 1)
    for _ in range(8):
        write(path, chance.randrange(BLOCKS), "never committed")
    assert content(path) != wanted
    volume.roll_back(last)
    assert content(path) == wanted


def test_dmsetup_sees_the_same(volume: ThinVolume) -> None:
    shown = run("dmsetup", "table", volume.name)
    assert shown.split() == ["0", str(volume.sectors), "thin", volume.pool, "7"]
