"""Debian's verify-stream-v2, an independent reader of the same specifications, unpacked but not installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Unavailable", "Verdict", "command", "reading_s", "unpacked", "verify_many", "verify_stream_v2"]

CACHE = Path(__file__).parents[2] / ".cache" / "xen-utils-4.17"
_PACKAGE = "xen-utils-4.17"
_PYTHON = "/usr/bin/python3"
_UNPACK_S = 120.0
_RUN_S = 60.0
# Loads the program as a module, and has it read one file after the other; prints the exit statuses, and last how
# much processor time it took.
_MANY = """
import importlib.machinery, importlib.util, pathlib, sys, time
loader = importlib.machinery.SourceFileLoader("verify", sys.argv[1])
program = importlib.util.module_from_spec(importlib.util.spec_from_loader("verify", loader))
loader.exec_module(program)
program.quiet = True
given = pathlib.Path(sys.argv[3])
started = time.process_time()
for path in sorted(given.iterdir()) if given.is_dir() else [given]:
    with path.open("rb", 0) as program.fin:
        print(program.read_stream(sys.argv[2]))
print(time.process_time() - started)
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What it said: exit status 0, 1 (the stream is wrong) or 2 (it broke down itself)."""

    status: int
    text: str


class Unavailable(Exception):
    """The package cannot be had; the text says why."""


@cache
def unpacked() -> Path:
    """Return the directory into which Debian's package has been unpacked, in the checkout's cache.

    Raises:
        Unavailable: It cannot be had.
    """
    if not CACHE.is_dir():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as directory:
            for argv in (["apt-get", "-q", "download", _PACKAGE], ["sh", "-c", "dpkg -x *.deb unpacked"]):
                _run(argv, directory)
            with suppress(OSError):  # another worker was faster
                (Path(directory) / "unpacked").rename(CACHE)
    return CACHE / "usr/lib/xen-4.17"


def _run(argv: list[str], directory: str) -> None:
    try:
        done = subprocess.run(
            argv, cwd=directory, capture_output=True, text=True, timeout=_UNPACK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"verify-stream-v2 comes from Debian's {_PACKAGE}: {error}") from error
    if done.returncode:
        raise Unavailable(f"verify-stream-v2 comes from Debian's {_PACKAGE}: {done.stderr.strip()[-300:]}")


def command(form: str, path: str = "0") -> tuple[list[str], dict[str, str]]:
    """Return its command line and environment.

    Args:
        form: ``xl``, ``libxl`` or ``libxc``.
        path: Of the stream; ``0`` is standard input.

    Raises:
        Unavailable: It cannot be had.
    """
    root = unpacked()
    python = _PYTHON if Path(_PYTHON).exists() else sys.executable
    argv = [python, "-B", str(root / "bin/verify-stream-v2"), "-f", form, "-i", path]
    return argv, {"PYTHONPATH": str(root / "lib/python"), "PATH": "/usr/bin:/bin"}


def verify_stream_v2(stream: bytes, form: str) -> Verdict:
    """Have it look at a stream, in a file: it reads a pipe's records in pieces and calls them truncated.

    Args:
        stream: All of it.
        form: As in `command`.

    Raises:
        Unavailable: It cannot be had.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(stream)
        file.flush()
        argv, environment = command(form, file.name)
        done = subprocess.run(argv, env=environment, capture_output=True, timeout=_RUN_S, check=False)
    return Verdict(done.returncode, (done.stdout + done.stderr).decode())


def verify_many(streams: Sequence[bytes], form: str) -> list[int]:
    """Have it look at many streams, in one process.

    Args:
        streams: All of each.
        form: As in `command`.

    Returns:
        Its exit status for each.

    Raises:
        Unavailable: It cannot be had.
    """
    with tempfile.TemporaryDirectory() as directory:
        for index, stream in enumerate(streams):
            (Path(directory) / f"{index:06}").write_bytes(stream)
        *statuses, _ = _in_one_process(Path(directory), form)
    return [int(status) for status in statuses]


def reading_s(path: Path, form: str) -> float:
    """Return how much processor time it takes to read a stream that is right, without its start, seconds.

    Args:
        path: Of the stream.
        form: As in `command`.

    Raises:
        Unavailable: It cannot be had.
    """
    status, spent_s = _in_one_process(path, form)
    if status != "0":
        raise ValueError(f"{path} is not right: status {status}")
    return float(spent_s)


def _in_one_process(path: Path, form: str) -> list[str]:
    argv, environment = command(form)
    done = subprocess.run(
        [*argv[:2], "-c", _MANY, argv[2], form, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_RUN_S,
        check=True,
    )
    return done.stdout.split()
