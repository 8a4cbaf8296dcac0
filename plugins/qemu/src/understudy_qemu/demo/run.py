"""The demo: protect a guest, lose its host, get the host back, protect again, lose the other host."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy_qemu.demo.chain import DiskCheck
from understudy_qemu.demo.lab import HOSTS, LabError
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair
from understudy_qemu.demo.result import DemoResult, Epoch, Failover, Mark, Segment, percentile
from understudy_qemu.demo.talk import Talk
from understudy_qemu.demo.tinyguest import build_guest

__all__ = ["DemoOptions", "missing_programs", "run_demo"]

_TAKEOVER_S = 30.0
_REPLIES_S = 30.0
_SETTLE_S = 10.0
_REPLIES = 5  # that show that the connection goes on, not only that one late packet came
_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "ip": "iproute2",
    "bridge": "iproute2",
}


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to show.

    Args:
        plan: the guest.
        protected_s: how long the guest is protected before each loss.
        alone_s: how long it is watched after each takeover.
        heartbeat_limit_ms: silence that the agents take for a loss.
        cache: where the built guest is kept.
        keep: directory for the hosts' files, kept afterwards; a temporary one otherwise.
        show_progress: let ``protect`` draw its progress on the terminal.
    """

    plan: GuestPlan = field(default_factory=GuestPlan)
    protected_s: float = 8.0
    alone_s: float = 3.0
    heartbeat_limit_ms: int = 1000
    cache: Path | None = None
    keep: Path | None = None
    show_progress: bool = False


def missing_programs() -> str:
    """Return one sentence about what the demo lacks on this machine, empty if nothing."""
    if os.geteuid() != 0:
        return "the demo makes network namespaces and bridges: run it as root, for example with sudo"
    missing = [program for program in _PACKAGES if shutil.which(program) is None]
    if missing:
        packages = sorted({_PACKAGES[program] for program in missing})
        return f"the demo needs {', '.join(missing)}: apt-get install {' '.join(packages)}"
    if not Path("/dev/net/tun").exists():
        return "the demo needs /dev/net/tun: modprobe tun"
    return ""


async def run_demo(options: DemoOptions, tell: Callable[[str], None]) -> DemoResult:
    """Run the demo.

    Args:
        options: what to show.
        tell: called with one line at a time, for people.

    Returns:
        What was measured, also when something went wrong on the way: ``problems`` says what.

    Raises:
        UnderstudyError: it could not begin.

    Guarantees:
        Afterwards no process, namespace or interface of the demo is left, also after a failure or a
        cancellation; the files of ``options.keep`` are.
    """
    if sentence := missing_programs():
        raise LabError(sentence)
    tell("building the guest")
    guest = await build_guest(options.cache)
    # Not in /tmp, which may be in memory, where disks cannot be opened past the page cache.
    root = options.keep or Path(tempfile.mkdtemp(prefix="understudy-demo-", dir="/var/tmp"))
    try:
        tell("starting two hosts, an agent on each")
        pair = Pair(root, guest, options.plan, heartbeat_limit_ms=options.heartbeat_limit_ms)
        async with pair:
            return await _Demo(pair, options, tell).run()
    finally:
        if options.keep is None:
            await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)


class _Demo:
    def __init__(self, pair: Pair, options: DemoOptions, tell: Callable[[str], None]) -> None:
        self.pair = pair
        self.options = options
        self.tell = tell
        plan = options.plan
        self.result = DemoResult(mode=plan.mode, disks=plan.disks, nics=plan.nics)
        self.events: dict[str, list[dict[str, Any]]] = {name: [] for name in HOSTS}
        self._offsets = dict.fromkeys(HOSTS, 0)
        self._began_ns = time.monotonic_ns()

    async def run(self) -> DemoResult:
        result = self.result
        result.hypervisor = await _qemu_version()
        first = HOSTS[0]
        self.tell(f"starting the guest on {first}")
        await self.pair.command(first, "start", GUEST)
        talk = await Talk.begin(self.pair.lab)
        self._segment(first, protected=False)
        try:
            try:
                await self._both_rounds(talk)
            except (LabError, TimeoutError) as error:
                result.problems.append(str(error) or "a step of the demo did not end in time")
        finally:
            result.client = await talk.end()
            result.replies = talk.replies
        result.problems += talk.problems[:3]
        self._read_traces()
        self._end_segment(time.monotonic_ns())
        result.duration_s = (time.monotonic_ns() - self._began_ns) / 1e9
        return result

    async def _both_rounds(self, talk: Talk) -> None:
        for primary, standby in (HOSTS, HOSTS[::-1]):
            await self._protect(primary)
            await self._watch(talk, self.options.protected_s, f"on {primary}, protected")
            await self._lose(primary, standby, talk)
            if standby != HOSTS[0]:
                await self._bring_back(primary)

    async def _protect(self, primary: str) -> None:
        self.tell(f"protecting the guest on {primary}")
        await self.pair.protect(primary, show=self.options.show_progress)
        self._end_segment(time.monotonic_ns())
        self._mark("protected", primary, "protected" if primary == HOSTS[0] else "protected again")
        self._segment(primary, protected=True)

    async def _lose(self, primary: str, standby: str, talk: Talk) -> None:
        self.tell(f"cutting the cable of {primary} and killing everything on it")
        lost_ns = await self.pair.lose(primary)
        self._end_segment(lost_ns)
        self._mark("kill", primary, f"{primary} killed", lost_ns)
        suspect_ns, running_ns = await self._takeover(standby, lost_ns)
        self._mark("suspect", standby, f"{standby} suspects", suspect_ns)
        self._mark("running", standby, f"{standby} takes over", running_ns)
        self._segment(standby, protected=False, start_ns=running_ns)
        first = await talk.replies_after(suspect_ns, _REPLIES, _REPLIES_S)
        first_ms = (first.t_ns - lost_ns) / 1e6
        self.tell(f"{standby} runs the guest; the client waited {first_ms:.0f} ms")
        await self._watch(talk, self.options.alone_s, f"on {standby}, alone")
        checks = await self._settled_disks(standby, talk)
        failover = Failover(
            detection_ms=round((suspect_ns - lost_ns) / 1e6, 1),
            takeover_ms=round((running_ns - suspect_ns) / 1e6, 1),
            first_reply_ms=round(first_ms, 1),
            connection_kept=talk.lost_ns is None,
            acknowledged_lost=sum(check.acknowledged_lost for check in checks),
            disk_contiguous=all(check.contiguous for check in checks),
        )
        self.result.failovers.append(failover)
        self.result.problems += [problem for check in checks for problem in check.problems[:2]]

    async def _takeover(self, standby: str, lost_ns: int) -> tuple[int, int]:
        limit = time.monotonic() + _TAKEOVER_S
        while time.monotonic() < limit:
            self._read_traces()
            events = [event for event in self.events[standby] if event["t_ns"] > lost_ns]
            suspect = next((e["t_ns"] for e in events if e["facts"].get("to") == "suspect"), None)
            running = next((e["t_ns"] for e in events if e["event"] == "promoted"), None)
            if suspect and running:
                return suspect, running
            await asyncio.sleep(0.02)
        seen = [event["event"] for event in self.events[standby]][-5:]
        raise LabError(
            f"{standby} did not take the guest over within {_TAKEOVER_S:.0f} s; its last events: {seen}"
        )

    async def _settled_disks(self, name: str, talk: Talk) -> list[DiskCheck]:
        # What the copy wrote before its promotion is still being committed into its images.
        limit = time.monotonic() + _SETTLE_S
        while True:
            checks = await self.pair.check_disks(name, talk)
            if time.monotonic() > limit or not any(check.problems for check in checks):
                return checks
            await asyncio.sleep(0.5)

    async def _bring_back(self, name: str) -> None:
        self.tell(f"{name} comes back; its janitor cleans")
        await self.pair.bring_back(name)
        self._mark("back", name, f"{name} is back")

    # --- Watching -----------------------------------------------------------------------------------

    async def _watch(self, talk: Talk, seconds: float, where: str) -> None:
        begin = time.monotonic()
        replies, epochs = len(talk.replies), len(self.result.epochs)
        while time.monotonic() - begin < seconds:
            await asyncio.sleep(min(1.0, seconds))
            self._read_traces()
            new = talk.replies[replies:]
            pauses = [epoch.pause_ns / 1e6 for epoch in self.result.epochs[epochs:]]
            replies, epochs = len(talk.replies), len(self.result.epochs)
            rtt = percentile([reply.rtt_ns / 1e6 for reply in new], 50)
            line = f"{(time.monotonic_ns() - self._began_ns) / 1e9:5.1f} s  {where}: {len(new)} replies"
            line += f", round trip {rtt:.0f} ms" if rtt is not None else ""
            line += f", {len(pauses)} checkpoints, pause {percentile(pauses, 50):.0f} ms" if pauses else ""
            self.tell(line + (f", {len(talk.problems)} PROBLEMS" if talk.problems else ""))

    def _read_traces(self) -> None:
        for name in HOSTS:
            rows, self._offsets[name] = self.pair.trace(name, self._offsets[name])
            for row in rows:
                if epoch := row.get("epoch"):
                    self.result.epochs.append(
                        Epoch(
                            t_ns=row["t_ns"],
                            host=name,
                            number=epoch["epoch"],
                            pause_ns=epoch["pause_ns"],
                            length_ns=epoch["length_ns"],
                            acknowledge_ns=epoch["acknowledge_ns"],
                        )
                    )
                else:
                    self.events[name].append(row)

    def _mark(self, kind: str, host: str, text: str, t_ns: int | None = None) -> None:
        self.result.marks.append(Mark(t_ns or time.monotonic_ns(), kind, host, text))

    def _segment(self, host: str, *, protected: bool, start_ns: int | None = None) -> None:
        start = start_ns or time.monotonic_ns()
        self.result.segments.append(Segment(start, 0, host, protected))

    def _end_segment(self, end_ns: int) -> None:
        last = self.result.segments.pop() if self.result.segments else None
        if last is not None:
            end = last.end_ns or end_ns
            self.result.segments.append(Segment(last.start_ns, end, last.host, last.protected))


async def _qemu_version() -> str:
    program = os.environ.get("UNDERSTUDY_QEMU") or "qemu-system-x86_64"
    process = await asyncio.create_subprocess_exec(program, "--version", stdout=PIPE, stderr=DEVNULL)
    out, _ = await process.communicate()
    words = out.decode(errors="replace").split()
    return f"QEMU {words[3]}" if len(words) > 3 else "QEMU"  # noqa: PLR2004 - QEMU emulator version X
