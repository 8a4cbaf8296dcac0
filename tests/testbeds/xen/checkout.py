"""This checkout with its ``.venv`` as a read-only disk: dom0 imports from a local file system, at the paths of outside.

A share would be read file by file through the emulation: under TCG an import of pytest takes 10 s from there.
"""

from __future__ import annotations

import compileall
import subprocess
import sys
from pathlib import Path
from typing import Final

__all__ = ["ROOT", "pack"]

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


def pack(disk: Path) -> None:
    """Write the checkout as it is now to a squashfs image, with compiled modules.

    Args:
        disk: the file to make.

    Raises:
        OSError: it cannot be made; the message is mksquashfs'.
    """
    for place in ("core/src", "plugins", "tests", PACKAGES):
        # To compile a module takes dom0 twenty times as long. What does not compile fails where it is imported.
        compileall.compile_dir(ROOT / place, quiet=2)
    # Uncompressed: the outside has it in its page cache anyway, and decompression would be emulated.
    words = ["mksquashfs", str(ROOT), str(disk), "-quiet", "-no-progress", "-noappend", "-no-xattrs"]
    words += ["-noI", "-noD", "-noF", "-noX", "-wildcards", "-e", *LEFT_OUT]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"mksquashfs ended with {done.returncode} and said: {done.stderr or done.stdout}")
