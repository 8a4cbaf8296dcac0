"""A thin pool on memory, for tests inside the kernel bed."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from understudy_drbd.dm import Mapper, Target

MIB_SECTORS = 2048


def run(*argv: object, check: bool = True) -> str:
    done = subprocess.run([str(each) for each in argv], check=False, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return (done.stdout if check else done.stdout + done.stderr).strip()


@contextmanager
def loop_device(image: Path, size_mib: int) -> Iterator[Path]:
    """Make a file of zeros a block device."""
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    device = Path(run("losetup", "--find", "--show", image))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
        image.unlink()


@contextmanager
def device(mapper: Mapper, name: str, *targets: Target) -> Iterator[Path]:
    """Make a device of the device mapper with its node; there is no udev in the bed."""
    made = mapper.create(name)
    path = Path("/dev/mapper") / name
    try:
        mapper.swap(name, *targets)
        os.mknod(path, 0o600 | stat.S_IFBLK, made.number)
        yield path
    finally:
        path.unlink(missing_ok=True)
        mapper.remove(name)


@dataclass(frozen=True)
class Pool:
    mapper: Mapper
    name: str

    @contextmanager
    def volume(self, name: str, identity: int, size_mib: int) -> Iterator[Path]:
        """Make a thin volume, as a site would."""
        self.mapper.message(self.name, f"create_thin {identity}")
        number = self.mapper.status(self.name).number
        parameters = f"{os.major(number)}:{os.minor(number)} {identity}"
        try:
            with device(self.mapper, name, Target(0, size_mib * MIB_SECTORS, "thin", parameters)) as path:
                yield path
        finally:
            self.mapper.message(self.name, f"delete {identity}")


@contextmanager
def thin_pool(directory: Path, size_mib: int, name: str = "understudy-pool") -> Iterator[Pool]:
    """Make a thin pool of loop devices."""
    run("modprobe", "-a", "loop", "dm-mod", "dm-thin-pool")
    with ExitStack() as stack:
        metadata = stack.enter_context(loop_device(directory / f"{name}.metadata", 4))
        data = stack.enter_context(loop_device(directory / f"{name}.data", size_mib))
        mapper = stack.enter_context(Mapper())
        parameters = f"{metadata} {data} 128 0 1 skip_block_zeroing"
        target = Target(0, size_mib * MIB_SECTORS, "thin-pool", parameters)
        stack.enter_context(device(mapper, name, target))
        yield Pool(mapper, name)
