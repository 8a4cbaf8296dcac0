"""The part of the benchmark `bench.xen_remus` that runs in dom0: ``python -m bench.xen_inside TURNS INTERVAL_MS``.

It prints the samples as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from understudy_xen.libs import ShutdownReason, Suspender, Xen, open_xen

_LOOK_S: Final = 0.001
_COPIED_S: Final = 90.0
_SETTLED: Final = 3  # checkpoints after the first copy that are not measured
_WINDOW_S: Final = 15.0
_TICKS_S: Final = os.sysconf("SC_CLK_TCK")


class _Probe:
    # Sees when a domain is suspended and when it runs.

    def __init__(self, xen: Xen, domid: int) -> None:
        self._xen = xen
        self._domid = domid
        self.pauses_s: list[float] = []

    def look_for(self, seconds: float, *, count: int | None = None) -> None:
        # Until the time is over, or so many pauses were seen.
        end = time.monotonic() + seconds
        since: float | None = None
        self.pauses_s = []
        while (now := time.monotonic()) < end and (count is None or len(self.pauses_s) < count):
            suspended = self._xen.shutdown_reason(self._domid) is ShutdownReason.SUSPEND
            if suspended and since is None:
                since = now
            elif not suspended and since is not None:
                self.pauses_s.append(now - since)
                since = None
            time.sleep(_LOOK_S)
        if count is not None and len(self.pauses_s) < count:
            raise TimeoutError(f"only {len(self.pauses_s)} checkpoints within {seconds:g} s")


def _tree(pid: int) -> list[int]:
    # A process and its descendants.
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(path.name)] = int(fields[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def _cpu_s(pids: Sequence[int]) -> float:
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / _TICKS_S
    return total


def _turn(xen: Xen, domid: int, command: Sequence[str]) -> dict[str, float]:
    probe = _Probe(xen, domid)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        # The first pause ends the first copy.
        probe.look_for(_COPIED_S, count=1 + _SETTLED)
        pids = _tree(process.pid)
        before_s = _cpu_s(pids)
        probe.look_for(_WINDOW_S)
        used_s = _cpu_s(pids) - before_s
    except BaseException:
        print(process.poll(), file=sys.stderr)
        raise
    finally:
        for pid in _tree(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        _run_again(xen, domid)
    pauses = probe.pauses_s
    return {
        "pause_ms": 1000 * statistics.median(pauses),
        "cpu_ms": 1000 * used_s / len(pauses),
        "per_minute": 60 * len(pauses) / _WINDOW_S,
    }


def _run_again(xen: Xen, domid: int) -> None:
    # It may have been killed in the middle of a checkpoint.
    time.sleep(0.5)
    if xen.shutdown_reason(domid) is ShutdownReason.SUSPEND:
        with Suspender(xen, domid) as suspender:
            suspender.resume()
    time.sleep(1.0)


def main(turns: int, interval_ms: int) -> None:
    """Create the guest, and run both loops on it in turns."""
    subprocess.run(["xl", "create", "-q", "-e", "/run/web.cfg"], check=True, stdout=subprocess.DEVNULL)
    domid = int(subprocess.run(["xl", "domid", "web"], check=True, capture_output=True, text=True).stdout)
    console = Path("/var/log/xen/guest-web.log")
    end = time.monotonic() + _COPIED_S
    while not console.exists() or "COUNT 5 " not in console.read_text(errors="replace"):
        if time.monotonic() > end:
            raise TimeoutError("the guest does not count")
        time.sleep(0.2)
    interval = str(interval_ms)
    commands = {
        "stock": ["xl", "remus", "-F", "-n", "-d", "-b", "-i", interval, "web", "none"],
        "ours": ["understudy", "xen", "remus", "web", "-b", "-i", interval, "--allow-unsafe", "-q"],
    }
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in commands}
    with open_xen() as xen:
        for turn in range(turns):
            # Neither is always the first: the emulation warms up.
            order = list(commands) if turn % 2 == 0 else list(reversed(commands))
            for name in order:
                measured = _turn(xen, domid, commands[name])
                print(f"turn {turn}: {name}: {measured}", file=sys.stderr)
                for key, value in measured.items():
                    samples[name].setdefault(key, []).append(value)
    print(json.dumps(samples))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
