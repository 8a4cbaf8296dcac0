"""What an agent costs: processor time per epoch with 1, 10 and 100 simulated guests at 20 epochs a second each.

Two agents in two processes, real link and sockets on loopback; measured is the primary's agent.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.figures import Figure
from understudy.cli.client import AgentUnreachable, ask
from understudy.config import read_config

__all__ = ["measure", "one_agent"]

_HOSTS = ("alpha", "beta")
_LOOPBACK = "127.0.0.1"
_MANY = 100
_RATE_HZ = 20.0
_REACHED_HZ = 18.0
_PERIOD_MS = 1e3 / _RATE_HZ
_WINDOWS = 5
_WINDOW_S = 2.0
_BOOT_S = 15.0
_AT_ONCE = 4


def measure() -> list[Figure]:
    """Measure 1, 10 and 100 guests."""
    figures = []
    for count in (1, 10, 100):
        seen = _run(count)
        many = count == _MANY
        name = f"agent_{count}_guests"
        # What the wanted rate costs, also where the machine was too busy with other things to reach it.
        cores = [epoch_us * count * _RATE_HZ / 1e6 for epoch_us in seen.epoch_us]
        figures += [
            Figure(f"{name}_20hz_cores", cores, aim=1.0 if many else None),
            Figure(f"{name}_epochs_per_guest_hz", seen.rate_hz, floor=_REACHED_HZ),
            Figure(f"{name}_epoch_us", seen.epoch_us),
            Figure(f"{name}_waiting_for_processor_ratio", seen.waiting),
        ]
    return figures


@dataclass(frozen=True, slots=True)
class _Seen:
    # Of the primary's agent, a sample per window.

    rate_hz: list[float] = field(default_factory=list)  # epochs of one guest
    epoch_us: list[float] = field(default_factory=list)  # processor time
    waiting: list[float] = field(
        default_factory=list
    )  # how much of the time it could run and had no processor

    def add(self, before: _Look, after: _Look, count: int) -> None:
        seconds, epochs = after.now_s - before.now_s, after.epochs - before.epochs
        self.rate_hz.append(epochs / seconds / count)
        self.epoch_us.append((after.used_s - before.used_s) / max(epochs, 1) * 1e6)
        self.waiting.append((after.waited_s - before.waited_s) / seconds)


def _run(count: int) -> _Seen:
    seen = _Seen()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        root = Path(directory)
        _write(root, count)
        agents = {host: stack.enter_context(_agent(root, host)) for host in _HOSTS}
        control = read_config(root / "alpha" / "agent.toml").socket
        names = [f"g{index}" for index in range(count)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda name: ask(control, "start", {"guest": name}), names))
            list(pool.map(lambda name: ask(control, "protect", {"guest": name}), names))
        time.sleep(_WINDOW_S)
        before = _Look.at(control, agents["alpha"].pid)
        for _ in range(_WINDOWS):
            time.sleep(_WINDOW_S)
            after = _Look.at(control, agents["alpha"].pid)
            seen.add(before, after, count)
            before = after
    return seen


@dataclass(frozen=True, slots=True)
class _Look:
    now_s: float
    used_s: float  # processor time, the counting itself included
    waited_s: float  # of its main thread, for a processor
    epochs: int  # committed

    @classmethod
    def at(cls, control: Path, pid: int) -> _Look:
        rows = _rows(ask(control, "list", {}))
        epochs = sum(row.get("epoch") or 0 for row in rows if row["role"] == "primary")
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        used_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        waited_s = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
        return cls(time.monotonic(), used_s, waited_s, epochs)


def _rows(answer: Any) -> list[Mapping[str, Any]]:
    return list(answer["guests"] if isinstance(answer, Mapping) else answer)


@contextmanager
def one_agent(root: Path) -> Iterator[Path]:
    """Run one simulated agent, whose other host is not there, with one guest; yield its configuration.

    Args:
        root: For its files.
    """
    _write(root, 1)
    with _agent(root, _HOSTS[0]):
        yield root / _HOSTS[0] / "agent.toml"


@contextmanager
def _agent(root: Path, host: str) -> Iterator[subprocess.Popen[bytes]]:
    config = root / host / "agent.toml"
    with (root / host / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.simulated_agent", str(config)], stdout=log, stderr=log
        )
        try:
            _answering(read_config(config).socket, process, root / host / "log")
            yield process
        finally:
            process.kill()
            process.wait()


def _answering(control: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _BOOT_S
    while True:
        try:
            ask(control, "list", {})
        except AgentUnreachable as error:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(
                    f"the simulated agent does not answer: {log.read_text()[-2000:]}"
                ) from error
            time.sleep(0.05)
        else:
            return


def _write(root: Path, count: int) -> None:
    ports = dict(zip(_HOSTS, _free_ports(len(_HOSTS)), strict=True))
    for host, other in (_HOSTS, _HOSTS[::-1]):
        home = root / host
        (home / "guests").mkdir(parents=True)
        (home / "agent.toml").write_text(
            f'host = "{host}"\ninsecure = true\n'
            f'[listen]\naddress = "{_LOOPBACK}"\nport = {ports[host]}\n'
            f'[peers.{other}]\naddress = "{_LOOPBACK}"\nport = {ports[other]}\n'
            f'[directories]\nstate = "{home}/state"\nruntime = "{home}/run"\nguests = "{home}/guests"\n'
            f'[arbiter]\nkind = "directory"\npath = "{root}/arbiter"\n'
            "[limits]\nheartbeat_limit_ms = 10000\n"
        )
        for index in range(count):
            (home / "guests" / f"g{index}.toml").write_text(
                'hypervisor = "simulated"\n[protection]\nmode = "remus"\n'
                f"interval_options = {{ period_ms = {_PERIOD_MS} }}\n"
            )
    (root / "arbiter").mkdir()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]
