"""What a barrier and a release of 1, 4 and 16 gates cost, beside C with raw netlink and with libnl, in the kernel bed.

The rivals are built on the spot and take turns with us in one kernel, on the same gates. Each does what it can do best:
they send a message and wait for its acknowledgement, interface by interface; we send one for all of them and get the
counters of each with the acknowledgement. pyroute2's calls and ``tc`` are measured for the record.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from bench.bed import answer, is_inside, measured_inside
from bench.figures import Figure, ratio
from understudy.device import Verdict
from understudy.phases import Step, run_phase
from understudy_netbuffer.nic import BufferedNic

__all__ = ["measure"]

_COUNTS = (1, 4, 16)
_TURNS = 12
_ROUNDS = 150
_RECORD_ROUNDS = 10
_SOURCE = Path(__file__).with_suffix(".c")
_DEADLINE_S = 600.0


def measure() -> list[Figure]:
    """Measure inside one fresh kernel."""
    samples = measured_inside("bench.barrier", _DEADLINE_S)
    figures = {name: Figure(name, values) for name, values in samples.items()}
    ours = {count: figures[f"barrier_{count}nic_us"] for count in _COUNTS}
    ratios = [
        ratio("barrier_1nic_vs_c_raw_ratio", ours[1], figures["barrier_1nic_c_raw_us"], 1.2),
        ratio("barrier_4nic_vs_libnl_ratio", ours[4], figures["barrier_4nic_libnl_us"], 0.8),
        ratio("barrier_16nic_vs_libnl_ratio", ours[16], figures["barrier_16nic_libnl_us"], 0.8),
    ]
    return [*figures.values(), *ratios]


# --- Inside ----------------------------------------------------------------------------------------------------------


async def _measure() -> dict[str, list[float]]:
    from tests.kernel.netbuffer_bed import Lan, opened, run  # noqa: PLC0415 - only where the plugin is needed

    program = Path("/run/barrier")
    run("gcc", "-O2", "-o", str(program), str(_SOURCE), "-I/usr/include/libnl3", "-lnl-route-3", "-lnl-3")
    samples: dict[str, list[float]] = {}
    with Lan(max(_COUNTS)):
        theirs = [f"theirs{number}" for number in range(max(_COUNTS))]
        for name in theirs:
            run("ip", "link", "add", name, "type", "ifb")
            run("tc", "qdisc", "add", "dev", name, "root", "handle", "1:", "plug", "limit", "10000000")
            run("ip", "link", "set", name, "up")

        def rivals(count: int) -> None:
            for how, name in (("raw", "c_raw"), ("libnl", "libnl")):
                for _ in range(_TURNS // 2):
                    done = run(str(program), how, str(_ROUNDS), *theirs[:count])
                    taken = statistics.median(map(float, done.split())) / 1e3
                    samples.setdefault(f"barrier_{count}nic_{name}_us", []).append(taken)

        for count in _COUNTS:
            # Before and after ours, while none of our sockets listens to what they change.
            rivals(count)
            nics = [await opened(guest, session="bench", name="bench") for guest in range(count)]
            for nic in nics:
                await nic.stop(failover=False)  # nobody looks at the fill: only what is measured is done
            barriers, releases = [nic.postsuspend for nic in nics], [nic.commit for nic in nics]
            samples[f"barrier_{count}nic_us"] = [
                _ours(barriers, releases, turn * _ROUNDS) for turn in range(_TURNS)
            ]
            samples[f"barrier_{count}nic_in_phases_us"] = [await _in_phases(nics)]
            if any(nic.gate.lost_count or nic.gate.failure for nic in nics):
                raise RuntimeError("somebody touched a gate that was measured")
            for nic in nics:
                await nic.teardown(Verdict.KEEP)
            rivals(count)
        samples["barrier_1nic_pyroute2_us"] = await asyncio.to_thread(_pyroute2, theirs[0])
        samples["barrier_1nic_tc_us"] = [_timed(lambda: _tc(theirs[0])) for _ in range(_RECORD_ROUNDS)]
    return samples


def _pyroute2(interface: str) -> list[float]:
    from pyroute2 import IPRoute  # noqa: PLC0415 - as above

    with IPRoute() as ip:
        [index] = ip.link_lookup(ifname=interface)

        def pair() -> None:
            for action in ("TCQ_PLUG_BUFFER", "TCQ_PLUG_RELEASE_ONE"):
                ip.tc("change", "plug", index, handle=0x10000, parent=0xFFFFFFFF, action=action)

        return [_timed(pair) for _ in range(_RECORD_ROUNDS)]


def _tc(interface: str) -> None:
    for action in ("block", "release"):
        command = ("tc", "qdisc", "change", "dev", interface, "root", "handle", "1:", "plug", action)
        subprocess.run(command, check=True)


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e3


Phase = Callable[[int], Coroutine[Any, Any, None]]


def _ours(barriers: Sequence[Phase], releases: Sequence[Phase], before: int) -> float:
    # What the subkind costs, driven step by step as a loop would: what a phase costs besides is measured by itself
    # (phases.py). Those that wait for the batch to be whole are taken up again when it is.
    taken = []
    for epoch in range(before + 1, before + _ROUNDS + 1):
        began = time.perf_counter_ns()
        for phase in (barriers, releases):
            waiting = [step for step in (start(epoch) for start in phase) if not _ended(step)]
            if not all(map(_ended, waiting)):
                raise RuntimeError("a step waits for more than the batch")
        taken.append(time.perf_counter_ns() - began)
    return statistics.median(taken) / 1e3


def _ended(step: Coroutine[Any, Any, None]) -> bool:
    try:
        step.send(None)
    except StopIteration:
        return True
    return False


async def _in_phases(nics: Sequence[BufferedNic]) -> float:
    # The same as the engine does it, for the record.
    barriers = [Step(f"nic{index}", "netbuffer", nic.postsuspend) for index, nic in enumerate(nics)]
    releases = [Step(f"nic{index}", "netbuffer", nic.commit) for index, nic in enumerate(nics)]
    taken = []
    for epoch in range(_TURNS * _ROUNDS + 1, (_TURNS + 1) * _ROUNDS):
        began = time.perf_counter_ns()
        await run_phase("postsuspend", barriers, epoch, epoch=epoch, deadline_s=5.0)
        await run_phase("commit", releases, epoch, epoch=epoch, deadline_s=5.0)
        taken.append(time.perf_counter_ns() - began)
    return statistics.median(taken) / 1e3


if __name__ == "__main__" and is_inside():
    answer(asyncio.run(_measure()))
