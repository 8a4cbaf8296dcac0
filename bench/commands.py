"""How long the command line takes to answer, as a user waits for it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.agents import one_agent
from bench.figures import Figure

__all__ = ["measure"]

_ROUNDS = 15


def _timed_ms(*argv: str) -> float:
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1e3


def measure() -> list[Figure]:
    """Time ``understudy --version``, ``understudy list`` and, for the record, the bare interpreter below them.

    The list is that of a running agent with one guest that is off.
    """
    command = str(Path(sys.executable).with_name("understudy"))
    with tempfile.TemporaryDirectory() as directory, one_agent(Path(directory)) as config:
        ways = {
            "version_ms": (command, "--version"),
            "list_ms": (command, "list", "--config", str(config)),
            "bare_interpreter_ms": (sys.executable, "-c", "pass"),
        }
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for argv in ways.values():
            _timed_ms(*argv)  # byte code is compiled and cached now
        for _ in range(_ROUNDS):
            for name, argv in ways.items():
                samples[name].append(_timed_ms(*argv))
    return [
        Figure(name, values, aim=120.0 if name == "version_ms" else None) for name, values in samples.items()
    ]
