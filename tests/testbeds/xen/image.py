"""What a host of the Xen bed boots from: built once by the script `build`, kept in the checkout's ``.cache``.

An image is named after the recipe and after the versions that apt offers, so a new recipe or a new security update
gives a new image. A machine whose apt offers nothing (its lists were thrown away) takes the newest image of the
recipe, else it fetches the lists.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["XEN_VERSION", "Image", "NotBuilt", "image", "missing_for_xen"]

XEN_VERSION: Final = "4.17"  #: of Debian 12, for which the recipe is written
HERE: Final = Path(__file__).parent
CACHE: Final = HERE.parents[2] / ".cache" / "xen"
# All that goes into the image; the rest of dom0 comes from the checkout at every boot.
RECIPE: Final = (
    "build",
    "dom0/initrd-init",
    "guest/init",
    "guest/counter.c",
    "guest/tiny.S",
    "guest/tiny.ld",
)
OFFERED: Final = (
    f"xen-hypervisor-{XEN_VERSION}-amd64",
    f"xen-utils-{XEN_VERSION}",
    "linux-image-amd64",
    "qemu-system-xen",
    "python3.11",
)
PROGRAMS: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mksquashfs": "squashfs-tools",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ip": "iproute2",
}
BUILDERS: Final = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "cpio": "cpio",
    "modprobe": "kmod",
    "gcc": "gcc",
    "apt-get": "apt",
}
KEPT: Final = 2  # images; older ones are removed
BUILD_S: Final = 900.0  # deadline; 31 s with a near mirror


class NotBuilt(RuntimeError):
    """The image could not be built; the message ends with what the build said."""


@dataclass(frozen=True)
class Image:
    """A directory that `build` has filled."""

    path: Path

    @property
    def hypervisor(self) -> Path:
        """Xen itself, as a multiboot ELF."""
        return self.path / "xen"

    @property
    def kernel(self) -> Path:
        """The kernel of dom0 and of the guests, as an ELF."""
        return self.path / "vmlinux"

    @property
    def initrd(self) -> Path:
        """dom0's initial ramdisk."""
        return self.path / "initrd"

    @property
    def root(self) -> Path:
        """dom0's root file system; never written to."""
        return self.path / "root.ext4"


def missing_for_xen() -> list[str]:
    """Return what the Xen bed lacks here."""
    missing = [] if os.geteuid() == 0 else ["root"]
    if sys.version_info[:2] != (3, 11):
        missing.append(f"Python 3.11, Debian 12's, for dom0 has no other (this is {sys.version.split()[0]})")
    programs = PROGRAMS if any(CACHE.glob(f"{_recipe()}-*/packages")) else {**PROGRAMS, **BUILDERS}
    missing += [
        f"the program {name} (package {package})"
        for name, package in programs.items()
        if shutil.which(name) is None
    ]
    missing += [path for path in ("/dev/net/tun",) if not Path(path).exists()]
    if not Path("/bin/busybox").exists():
        missing.append("/bin/busybox (busybox-static)")
    return missing


def image() -> Image:
    """Return the image for what apt offers now, after building it where it is not there.

    Raises:
        NotBuilt: it cannot be built.

    Guarantees:
        Of several callers at once, also in different processes, one builds and the others wait for it. What was begun
        and not finished, for whatever reason, is never taken for an image.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked():
        if (found := _find()) is not None:
            return found
        # One source that cannot be read need not be the one that is needed: the build decides.
        subprocess.run(["apt-get", "-qq", "update"], stdin=subprocess.DEVNULL, check=False, timeout=BUILD_S)
        if (found := _find()) is not None:
            return found
        return _build(CACHE / f"{_recipe()}-{_offer() or 'unknown'}")


def _find() -> Image | None:
    offer = _offer()
    made = sorted(CACHE.glob(f"{_recipe()}-{offer or '*'}/packages"), key=lambda each: each.stat().st_mtime)
    if not made:
        return None
    os.utime(made[-1])
    return Image(made[-1].parent)


def _build(path: Path) -> Image:
    draft = CACHE / "draft"
    shutil.rmtree(draft, ignore_errors=True)
    log = CACHE / "build.log"
    print(f"building the image of the Xen bed (once; see {log})", file=sys.stderr)  # noqa: T201 - it takes its time
    try:
        with log.open("wb") as said:
            # In a process group of its own would be out of Ctrl-C's reach.
            status = subprocess.run(
                [HERE / "build", draft],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                check=False,
                timeout=BUILD_S,
            ).returncode
    except subprocess.TimeoutExpired:
        status = -1
    if status:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        shutil.rmtree(draft, ignore_errors=True)
        raise NotBuilt(f"{HERE / 'build'} ended with {status} and said:\n{end}")
    draft.rename(path)
    for old in sorted(CACHE.glob("*/packages"), key=lambda each: each.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old.parent, ignore_errors=True)
    return Image(path)


def _recipe() -> str:
    digest = hashlib.sha256()
    for name in RECIPE:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:12]


def _offer() -> str | None:
    # A digest of the versions; None where apt knows of nothing.
    said = subprocess.run(
        ["apt-cache", "policy", *OFFERED],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout
    candidates = re.findall(r"^  Candidate: (.*)$", said, re.MULTILINE)
    if len(candidates) != len(OFFERED) or "(none)" in candidates:
        return None
    return hashlib.sha256("\n".join(candidates).encode()).hexdigest()[:12]


@contextmanager
def _locked() -> Iterator[None]:
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
