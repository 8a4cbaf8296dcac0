"""This checkout with its ``.venv`` as a read-only disk: dom0 imports from a local file system, at the paths of outside.

A share would be read file by file through the emulation: under TCG an import of pytest takes 10 s from there.
"""

from __future__ import annotations

import compileall
import functools
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["ROOT", "Checkout", "packed"]

ROOT: Final = Path(__file__).parents[3]
PACKAGES: Final = f".venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
# What is of no use inside is more than half of it.
LEFT_OUT: Final = (
    ".git",
    ".cache",
    ".tools",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    ".import_linter_cache",
    ".venv/bin/ruff",
    *(
        f"{PACKAGES}/{name}"
        for name in (
            "*.a",
            "*sanitizer*",
            "*_with_fuzzer.so",
            "*mypyc*",
            "atheris*",
            "ast_serialize*",
            "grimp*",
            "hatchling*",
            "importlinter",
            "librt*",
            "mypy*",
            "pip*",
            "ruff*",
            "trove_classifiers*",
        )
    ),
)


_packing: Final = threading.Lock()  # hosts are booted at the same time


@dataclass(frozen=True)
class Checkout:
    """A packed checkout: a file without a name, gone with this process and the machines that have it."""

    fd: int

    @property
    def path(self) -> str:
        """How a process that inherits `fd` opens it."""
        return f"/proc/self/fd/{self.fd}"


def packed() -> Checkout:
    """Return the checkout, packed as it was when this process first asked for it, with compiled modules.

    Raises:
        OSError: it cannot be packed; the message is mksquashfs'.
    """
    with _packing:
        return _pack()


@functools.cache
def _pack() -> Checkout:
    for place in ("core/src", "plugins", "tests", PACKAGES):
        # To compile a module takes dom0 twenty times as long. What does not compile fails where it is imported.
        compileall.compile_dir(ROOT / place, quiet=2)
    with tempfile.TemporaryDirectory(prefix="understudy-xen-") as scratch:
        disk = Path(scratch) / "checkout"
        # Uncompressed: the outside has it in its page cache anyway, and decompression would be emulated.
        words = ["mksquashfs", str(ROOT), str(disk), "-quiet", "-no-progress", "-noappend", "-no-xattrs"]
        words += ["-noI", "-noD", "-noF", "-noX", "-wildcards", "-e", *LEFT_OUT]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"mksquashfs ended with {done.returncode} and said: {done.stderr or done.stdout}")
        return Checkout(os.open(disk, os.O_RDONLY | os.O_CLOEXEC))
