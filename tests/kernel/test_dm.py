"""The device mapper's ioctls against a real one."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy_drbd.dm import Mapped, Mapper, MapperRefused, Target

pytestmark = pytest.mark.kernel

SECTORS = 2048
NAMES = ("understudy-upper", "understudy-one")


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    subprocess.run(["modprobe", "-a", "loop", "dm-mod", "dm-zero"], check=True)


def present() -> set[str]:
    return {path.read_text().strip() for path in Path("/sys/block").glob("dm-*/dm/name")}


@pytest.fixture
def mapper() -> Iterator[Mapper]:
    with Mapper() as opened:
        yield opened
        for name in NAMES:
            if name in present():
                opened.resume(name)
                opened.remove(name)


@pytest.fixture
def one(mapper: Mapper) -> Mapped:
    mapper.create("understudy-one", "UNDERSTUDY-test")
    mapper.load("understudy-one", Target(0, SECTORS, "zero"))
    mapper.resume("understudy-one")
    return mapper.status("understudy-one")


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "image"
    image.write_bytes(b"one\n" + bytes(SECTORS * 512 - 4))
    device = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def node(path: Path, number: int) -> Path:
    os.mknod(path, 0o600 | 0o060000, number)
    return path


def test_a_device_from_its_making_to_its_end(mapper: Mapper, one: Mapped) -> None:
    assert mapper.version >= (4, 0, 0)
    assert (one.name, one.uuid) == ("understudy-one", "UNDERSTUDY-test")
    assert one.has_table
    assert not one.suspended
    assert not one.has_inactive_table
    assert one.open_count == 0
    assert Path(f"/sys/dev/block/{os.major(one.number)}:{os.minor(one.number)}").exists()
    assert mapper.status(one.number) == one
    assert mapper.table(one.number) == (Target(0, SECTORS, "zero"),)
    mapper.remove(one.number)
    with pytest.raises(MapperRefused) as caught:
        mapper.status("understudy-one")
    assert caught.value.errno == errno.ENXIO
    assert caught.value.ioctl == "DM_DEV_STATUS"
    assert caught.value.device == "understudy-one"
    assert "DM_DEV_STATUS of understudy-one" in str(caught.value)
    assert "[ENXIO]" in str(caught.value)


def test_a_table_of_several_targets_comes_back_as_it_was_loaded(
    mapper: Mapper, one: Mapped, loop: str
) -> None:
    number = Path(loop).stat().st_rdev
    below = f"{os.major(number)}:{os.minor(number)}"
    table = (
        Target(0, 8, "linear", f"{below} 0"),
        Target(8, 1000, "zero"),
        Target(1008, 40, "linear", f"{below} 8"),
    )
    mapper.load(one.number, *table)
    assert mapper.status(one.number).has_inactive_table
    assert mapper.table(one.number) == (Target(0, SECTORS, "zero"),)
    mapper.resume(one.number)
    assert mapper.table(one.number) == table
    assert [each.kind for each in mapper.target_status(one.number)] == ["linear", "zero", "linear"]


def test_a_table_is_swapped_under_its_user(mapper: Mapper, one: Mapped, loop: str, tmp_path: Path) -> None:
    fd = os.open(node(tmp_path / "node", one.number), os.O_RDONLY)
    try:
        assert os.pread(fd, 4, 0) == bytes(4)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        mapper.swap(one.number, Target(0, SECTORS, "linear", f"{loop} 0"))
        assert mapper.status(one.number).open_count == 1
        assert os.pread(fd, 4, 0) == b"one\n"
        with pytest.raises(MapperRefused) as caught:
            mapper.remove(one.number)
        assert caught.value.errno == errno.EBUSY
    finally:
        os.close(fd)


def test_a_table_that_the_target_refuses_is_not_loaded(mapper: Mapper, one: Mapped) -> None:
    with pytest.raises(MapperRefused, match=r"DM_TABLE_LOAD of .*nonsense here") as caught:
        mapper.swap(one.number, Target(0, SECTORS, "linear", "nonsense here"))
    assert caught.value.errno in {errno.EINVAL, errno.ENOENT, errno.ENODEV}
    now = mapper.status(one.number)
    assert now.has_table
    assert not now.has_inactive_table


def test_a_message_nobody_understands_is_refused_with_its_text(mapper: Mapper, one: Mapped) -> None:
    with pytest.raises(MapperRefused, match="hello there") as caught:
        mapper.message(one.number, "hello there")
    assert caught.value.ioctl == "DM_TARGET_MSG"
    assert caught.value.errno == errno.EINVAL


def test_a_name_is_taken_once(mapper: Mapper, one: Mapped) -> None:
    with pytest.raises(MapperRefused) as caught:
        mapper.create(one.name)
    assert caught.value.errno == errno.EBUSY


def test_what_does_not_fit_is_refused_before_the_kernel_sees_it(mapper: Mapper, one: Mapped) -> None:
    with pytest.raises(MapperRefused) as caught:
        mapper.message(one.number, "x" * 1000)
    assert caught.value.errno == errno.E2BIG


def test_a_closed_mapper_and_one_that_is_none_say_so(tmp_path: Path) -> None:
    closed = Mapper()
    closed.close()
    closed.close()
    with pytest.raises(MapperRefused) as caught:
        closed.status("understudy-one")
    assert caught.value.errno == errno.EBADF
    with pytest.raises(MapperRefused) as caught:
        Mapper(tmp_path / "control")
    assert caught.value.errno == errno.ENOENT
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(MapperRefused) as caught:
        Mapper(Path("/dev/null"))
    assert caught.value.errno == errno.ENOTTY


def test_a_suspension_that_waits_stops_no_other_thread(mapper: Mapper, one: Mapped, tmp_path: Path) -> None:
    # A write into the upper device waits below; the suspension of the upper one waits for the write. Were the
    # interpreter's lock held meanwhile, nobody could resume the lower one, and this would never end.
    upper = mapper.create("understudy-upper")
    mapper.swap(
        upper.number, Target(0, SECTORS, "linear", f"{os.major(one.number)}:{os.minor(one.number)} 0")
    )
    fd = os.open(node(tmp_path / "node", upper.number), os.O_WRONLY | os.O_SYNC)
    mapper.suspend(one.number)
    writer = threading.Thread(target=os.pwrite, args=(fd, b"x" * 4096, 0))
    writer.start()
    under_way = Path(f"/sys/dev/block/{os.major(upper.number)}:{os.minor(upper.number)}/inflight")
    until = time.monotonic() + 30
    while under_way.read_text().split() == ["0", "0"]:
        assert time.monotonic() < until
        time.sleep(0.005)
    suspender = threading.Thread(target=mapper.suspend, args=(upper.number,))
    suspender.start()
    suspender.join(0.05)
    assert suspender.is_alive()
    assert not mapper.status(upper.number).suspended
    mapper.resume(one.number)
    suspender.join(30)
    writer.join(30)
    assert not suspender.is_alive()
    assert mapper.status(upper.number).suspended
    mapper.resume(upper.number)
    os.close(fd)
