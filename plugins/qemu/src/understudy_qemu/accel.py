"""KVM where it works, otherwise TCG; and what TCG needs: the preloaded library and an odd size of memory.

An existing ``/dev/kvm`` is not enough: some run only firmware and real-mode code, so KVM is chosen only when the
CPU has the extensions, the device opens, and QEMU gets a virtual CPU to run. The guest file can force either.

Two faults of QEMU under TCG matter here. There is nothing to ask that would tell whether a QEMU has them, so the
cures, which do no harm, are applied to every QEMU under TCG, and to none under KVM:

* A checkpoint deadlocks the process; preload.c describes and cures it.
* QEMU before 9 loses dirty pages where a memory block's bitmap ends on a word's boundary (the fast path of
  cpu_physical_memory_sync_dirty_bitmap does not make the CPU notice the next write). A size that is not a multiple
  of 64 pages takes the slow, right path.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Final

from understudy.errors import HypervisorError

__all__ = [
    "DEFAULT_CPU",
    "ODD_BYTES",
    "Accel",
    "build_preload",
    "choose_accel",
    "guest_memory_bytes",
    "kvm_runs",
]

#: The CPU that a guest gets whose file names none.
DEFAULT_CPU: Final = {"kvm": "host", "tcg": "qemu64"}

_BITMAP_WORD_BYTES = 64 * 4096  #: memory that one word of the dirty bitmap stands for
ODD_BYTES = 8192  #: added to such a size: two pages
NO_COMPILER: Final = (
    "QEMU without KVM can be protected only with a small library of ours preloaded, and there is no C compiler here "
    "to build it; install gcc and libc6-dev, or use KVM"
)
_TRIAL_S = 10.0
_COMPILE_S = 60.0


class Accel(Enum):
    """What runs the guest's CPU."""

    KVM = "kvm"
    TCG = "tcg"


def guest_memory_bytes(wanted_bytes: int, accel: Accel) -> int:
    """Return the size of memory that the guest really gets, bytes.

    Args:
        wanted_bytes: What the guest file says.
        accel: What runs it.
    """
    if accel is Accel.TCG and wanted_bytes % _BITMAP_WORD_BYTES == 0:
        return wanted_bytes + ODD_BYTES
    return wanted_bytes


def choose_accel(
    wanted: str, *, cpuinfo: Path = Path("/proc/cpuinfo"), kvm: Path = Path("/dev/kvm")
) -> Accel:
    """Decide what runs a guest on this host.

    Args:
        wanted: The guest file's ``accel``: ``"auto"``, ``"kvm"`` or ``"tcg"``.
        cpuinfo: Where the CPU's flags stand.
        kvm: KVM's device.
    """
    if wanted != "auto":
        return Accel(wanted)
    return Accel.KVM if _has_extensions(cpuinfo) and _opens(kvm) else Accel.TCG


async def kvm_runs(binary: str, cpu: str) -> str:
    """Try KVM with `binary`: give it a virtual CPU of the model `cpu` and wait until it runs.

    Returns:
        Why it does not work, in words; ``""`` if it does.
    """
    if not _opens(Path("/dev/kvm")):
        return "/dev/kvm does not exist or cannot be opened"
    argv = [binary, "-accel", "kvm", "-cpu", cpu, "-machine", "pc", "-m", "16M", "-nodefaults"]
    argv += ["-display", "none", "-monitor", "stdio", "-no-shutdown"]
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        return f"{binary} cannot be started: {error.strerror}"
    try:
        async with asyncio.timeout(_TRIAL_S):
            output, _ = await process.communicate(b"info status\nquit\n")
    except TimeoutError:
        return f"a trial did not end within {_TRIAL_S:g} s"
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    text = output.decode(errors="replace")
    if process.returncode == 0 and "running" in text:
        return ""
    return f"a trial failed: {' '.join(text.split())[-300:]}"


def build_preload(cache: Path) -> Path:
    """Compile the library that QEMU needs under TCG, unless it is there already; blocks for a second then.

    Args:
        cache: A directory of ours; made if missing. Different sources get different names in it.

    Raises:
        HypervisorError: There is no C compiler, or it failed; its words are in the text.

    Guarantees:
        A library that is half written is never seen, whoever else builds at the same time.
    """
    source = resources.files("understudy_qemu").joinpath("preload.c").read_bytes()
    library = cache / f"qemu-tcg-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise HypervisorError(NO_COMPILER)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as place:
        made = Path(place, "preload.so")
        Path(place, "preload.c").write_bytes(source)
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(Path(place, "preload.c"))]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_COMPILE_S, check=False)
        except subprocess.TimeoutExpired:
            raise HypervisorError(f"{compiler} did not end within {_COMPILE_S:g} s") from None
        if done.returncode != 0:
            raise HypervisorError(f"{compiler} cannot build the library for TCG: {done.stderr.decode()}")
        made.replace(library)
    return library


def _has_extensions(cpuinfo: Path) -> bool:
    try:
        words = cpuinfo.read_text().split()
    except OSError:
        return False
    return "vmx" in words or "svm" in words


def _opens(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True
