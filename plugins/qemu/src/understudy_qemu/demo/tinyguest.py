"""Build the tiny guest: Debian's cloud kernel, busybox, and one small server of our own.

Nothing is installed: the kernel package is downloaded with ``apt-get download`` and unpacked beside.
The result lies in a cache directory under a name made from everything that went into it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import lzma
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from understudy.errors import UnderstudyError

KERNEL_METAPACKAGE = "linux-image-cloud-amd64"

# In the order in which they can be loaded: virtio before virtio_ring fails with unknown symbols.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_mmio",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
)

_BUSYBOX = Path("/bin/busybox")
_DOWNLOAD_S = 300.0
_LOCAL_S = 60.0
_OTHERS_S = 2 * _DOWNLOAD_S + _LOCAL_S  # lists, package, the rest

#: What this process has got, by cache.
_built: dict[Path, TinyGuest] = {}

_Build = Callable[[Path], None]


class GuestBuildFailed(UnderstudyError):
    """Say in one sentence why the tiny guest cannot be built and what would help."""


@dataclass(frozen=True, slots=True)
class TinyGuest:
    """The files of a built guest."""

    kernel: Path
    initrd: Path

    def cmdline(
        self,
        ips: Sequence[str] = ("10.77.0.2/24",),
        *,
        draw: int = 64,
        tcp_timestamps: bool = False,
        extra: str = "",
    ) -> str:
        """Return the kernel command line.

        Args:
            ips: address and prefix length of eth0, eth1, ...
            draw: every how many words a connection draws a random value; 0 for never. In mode
                ``colo`` every draw makes the outputs differ and costs a checkpoint.
            tcp_timestamps: let the guest use TCP timestamps. Off by default: the two copies' clocks
                differ, and a clock that went back at a takeover makes clients drop segments.
            extra: appended as it is.
        """
        words = [
            "console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off nokaslr",
            f"understudy.ip={','.join(ips)}",
            f"understudy.draw={draw}",
            f"understudy.tcp_timestamps={int(tcp_timestamps)}",
            extra,
        ]
        return " ".join(word for word in words if word)


def default_cache() -> Path:
    """Return ``$UNDERSTUDY_CACHE``, or ``understudy`` in the user's cache directory."""
    if chosen := os.environ.get("UNDERSTUDY_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "understudy"


async def build_guest(cache: Path | None = None) -> TinyGuest:
    """Return the guest, built now unless the cache has it.

    Args:
        cache: directory, made when missing; :func:`default_cache` by default.

    Raises:
        GuestBuildFailed: a program or package is missing, the download failed, or another process
            has been building for so long that it cannot be well.

    Guarantees:
        What is returned is complete, also when several processes build at once: one asks apt and
        builds, in a directory that it renames into place, and the others wait for it. Nothing
        half-built stays behind; after a cancellation the step under way still ends by itself and
        cleans up. A process asks apt once which kernel is the newest: that takes a second.
    """
    return await asyncio.to_thread(_build_guest, cache or default_cache())


def _build_guest(cache: Path) -> TinyGuest:
    known = _built.get(cache)
    if known is None or not (known.kernel.exists() and known.initrd.exists()):
        cache.mkdir(parents=True, exist_ok=True)
        with _alone_in(cache):
            known = _built[cache] = _look_up_or_build(cache)
    return known


@contextmanager
def _alone_in(cache: Path) -> Iterator[None]:
    # apt-get update fails where another one is running, instead of waiting for it.
    deadline = time.monotonic() + _OTHERS_S
    with (cache / ".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise GuestBuildFailed(
                        f"another process has been building the guest in {cache} for {_OTHERS_S:g} s; end it"
                    ) from None
            time.sleep(0.05)
        yield


def _look_up_or_build(cache: Path) -> TinyGuest:
    for program, package in (("gcc", "gcc and libc6-dev"), ("apt-get", "apt"), ("dpkg", "dpkg")):
        if shutil.which(program) is None:
            raise GuestBuildFailed(f"{program} is missing; install {package}")
    if not _BUSYBOX.exists():
        raise GuestBuildFailed(f"{_BUSYBOX} is missing; install busybox-static")
    unpacked = _kernel(cache)
    built = _once(cache, _name_of_guest(unpacked), lambda to: _assemble(unpacked, to))
    return TinyGuest(kernel=built / "vmlinuz", initrd=built / "initrd.cpio")


def _once(cache: Path, name: str, build: _Build) -> Path:
    place = cache / name
    if place.exists():
        return place
    work = Path(tempfile.mkdtemp(prefix=f".{name[:40]}-", dir=cache))
    try:
        work.chmod(0o755)
        build(work)
        try:
            work.rename(place)
        except OSError:
            # Another process was first, which is as good; anything else is a real failure.
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


# --- Kernel ---------------------------------------------------------------------------------------


def _kernel(cache: Path) -> Path:
    try:
        return _kernel_by_the_lists(cache)
    except GuestBuildFailed:
        # Package lists that are weeks old name a version that the mirror no longer has.
        if os.geteuid() != 0:
            raise
    _run("apt-get", "-q", "update", timeout_s=_DOWNLOAD_S)
    return _kernel_by_the_lists(cache)


def _kernel_by_the_lists(cache: Path) -> Path:
    package, version = _kernel_package()
    return _once(cache, f"kernel-{package}-{_safe(version)}", lambda to: _unpack_kernel(package, to))


def _kernel_package() -> tuple[str, str]:
    found = _look_up_kernel()
    if found is None:
        raise GuestBuildFailed(
            f"apt knows no package {KERNEL_METAPACKAGE}; run 'apt-get update' and try again"
        )
    return found


def _look_up_kernel() -> tuple[str, str] | None:
    text = _run("apt-cache", "depends", "--important", KERNEL_METAPACKAGE, check=False)
    names = [line.split()[-1] for line in text.splitlines() if "Depends:" in line]
    package = next((name for name in names if name.startswith("linux-image-")), None)
    if package is None:
        return None
    text = _run("apt-cache", "show", "--no-all-versions", package, check=False)
    versions = [line.split()[1] for line in text.splitlines() if line.startswith("Version:")]
    return (package, versions[0]) if versions else None


def _unpack_kernel(package: str, to: Path) -> None:
    # The sandbox user of apt cannot write into a directory of ours.
    sandbox = ("-o", "APT::Sandbox::User=root")
    _run("apt-get", "-q", *sandbox, "download", package, cwd=to, timeout_s=_DOWNLOAD_S)
    archives = list(to.glob("*.deb"))
    if len(archives) != 1:
        raise GuestBuildFailed(f"apt-get download {package} left {len(archives)} packages, not 1")
    whole = to / "whole"
    _run("dpkg", "-x", str(archives[0]), str(whole), timeout_s=_LOCAL_S)
    _keep_what_is_needed(whole, to)
    archives[0].unlink()


def _keep_what_is_needed(whole: Path, to: Path) -> None:
    # 300 MB of drivers come with the package; ten of them are used.
    kernels = list(whole.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise GuestBuildFailed("the kernel package holds no single boot/vmlinuz")
    shutil.move(kernels[0], to / "vmlinuz")
    (to / "modules").mkdir()
    roots = [root for root in (whole / "lib/modules", whole / "usr/lib/modules") if root.is_dir()]
    present = {path.name: path for root in roots for path in root.rglob("*.ko*")}
    builtin = " ".join(p.read_text() for root in roots for p in root.glob("*/modules.builtin"))
    for name in MODULES:
        if path := present.get(f"{name}.ko"):
            shutil.move(path, to / "modules" / f"{name}.ko")
        elif path := present.get(f"{name}.ko.xz"):
            (to / "modules" / f"{name}.ko").write_bytes(lzma.decompress(path.read_bytes()))
        elif f"/{name}.ko" not in builtin:
            raise GuestBuildFailed(f"the kernel package has no module {name}")
    shutil.rmtree(whole)


# --- Initial RAM file system ----------------------------------------------------------------------


def _name_of_guest(kernel: Path) -> str:
    digest = hashlib.blake2b(digest_size=10)
    digest.update(kernel.name.encode())
    for source in (Path(__file__), _BUSYBOX, *_own_files()):
        digest.update(source.read_bytes())
    return f"guest-{digest.hexdigest()}"


def _own_files() -> tuple[Path, Path]:
    own = files("understudy_qemu.demo") / "guest"
    return Path(str(own / "init")), Path(str(own / "chain.c"))


def _assemble(kernel: Path, to: Path) -> None:
    init, source = _own_files()
    program = to / "chain"
    _run("gcc", "-static", "-O2", "-o", str(program), str(source), timeout_s=_LOCAL_S)
    modules = [kernel / "modules" / f"{name}.ko" for name in MODULES]
    modules = [path for path in modules if path.exists()]
    entries: list[tuple[str, int, bytes]] = [
        (name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "modules", "dev", "proc", "sys")
    ]
    entries += [
        ("init", stat.S_IFREG | 0o755, init.read_bytes()),
        ("bin/busybox", stat.S_IFREG | 0o755, _BUSYBOX.read_bytes()),
        ("bin/chain", stat.S_IFREG | 0o755, program.read_bytes()),
        ("modules/order", stat.S_IFREG | 0o644, "".join(f"{m.name}\n" for m in modules).encode()),
    ]
    entries += [(f"modules/{m.name}", stat.S_IFREG | 0o644, m.read_bytes()) for m in modules]
    # Left uncompressed: emulated processors unpack slowly, and QEMU copies 4 MB in no time.
    (to / "initrd.cpio").write_bytes(cpio_archive(entries))
    shutil.copyfile(kernel / "vmlinuz", to / "vmlinuz")
    program.unlink()


def cpio_archive(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return an archive in cpio's ``newc`` format.

    Args:
        entries: name, mode with file type, content. A directory precedes what is in it.

    Source:
        Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    out = bytearray()
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        encoded = name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out += b"070701" + b"".join(b"%08X" % value for value in fields)
        out += encoded
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


# --- Programs -------------------------------------------------------------------------------------


def _run(*argv: str, cwd: Path | None = None, timeout_s: float = _LOCAL_S, check: bool = True) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise GuestBuildFailed(f"{argv[0]} did not end within {timeout_s:.0f} s") from error
    if check and done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise GuestBuildFailed(f"{' '.join(argv[:3])} failed: {lines[-1]}")
    return done.stdout


def _safe(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".+-~" else "_" for c in text)
