"""The library preloaded into linux.uml, without which it does not boot on processors newer than its registers."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["COMPILER", "built_library"]

COMPILER: Final = "gcc"
_SOURCE: Final = Path(__file__).with_suffix(".c")
_CACHE: Final = Path(__file__).parents[3] / ".cache"
_COMPILE_S: Final = 60.0  # a deadline only; it takes 0.1 s


def built_library() -> Path:
    """Return the library, compiled unless it is there from another time.

    Raises:
        RuntimeError: the compiler failed; its words are in the text.
        TimeoutExpired: it did not end.

    Guarantees:
        A library that is half written is never seen, whoever else builds at the same time.
    """
    source = _SOURCE.read_bytes()
    library = _CACHE / f"uml-xstate-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if library.exists():
        return library
    _CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=_CACHE) as place:
        made = Path(place, library.name)
        command = [COMPILER, "-O2", "-shared", "-fPIC", "-o", str(made), str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{COMPILER} cannot build {_SOURCE.name} for the kernel bed: {done.stderr}")
        made.replace(library)
    return library
