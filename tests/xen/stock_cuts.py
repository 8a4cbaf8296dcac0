"""What ``xl migrate-receive -r`` does with a checkpoint stream that ends somewhere: ``python -m tests.xen.stock_cuts``.

Run in a dom0 of the bed: ``python -m tests.testbeds.xen -- python3 -m tests.xen.stock_cuts``. It measures somebody
else's program, so it passes and fails nothing; it prints the table that docs/explanation/xen-remus.md shows. The stream
is one of ours (recorded.py); each receiver has a deadline and is killed with its process group.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.xen.memory import read_pages
from tests.xen.recorded import NAME, TINY, Point, Recorded, record
from understudy_xen.libs import Xen, open_xen

POINTS: Final = (
    Point(0, "HVM_CONTEXT", "middle"),
    Point(0, "CHECKPOINT", "start"),
    Point(0, "CHECKPOINT", "end"),
    Point(0, "CHECKPOINT_END", "header"),
    Point(0, "CHECKPOINT_END", "end"),
    Point(1, "PAGE_DATA", "header"),
    Point(1, "PAGE_DATA", "middle"),
    Point(1, "PAGE_DATA", "end"),
    Point(1, "HVM_CONTEXT", "start"),
    Point(1, "HVM_CONTEXT", "last"),
    Point(1, "CHECKPOINT", "header"),
    Point(1, "CHECKPOINT", "end"),
    Point(1, "CHECKPOINT_END", "header"),
    Point(1, "CHECKPOINT_END", "last"),
    Point(1, "CHECKPOINT_END", "end"),
    Point(2, "HVM_PARAMS", "body"),
    Point(2, "CHECKPOINT", "end"),
    Point(2, "CHECKPOINT_END", "end"),
)
_HEADS: Final = (("in xl's preamble", 40), ("in libxl's header", -8))
_COMMAND: Final = ("xl", "migrate-receive", "-r", "-e")
_APPLIED: Final = b"All records processed"
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_NAME_S: Final = 30.0


@dataclass(frozen=True)
class Outcome:
    """How one receiver ended.

    Args:
        status: of the receiver; ``None``: it still ran at the deadline.
        seconds: until then.
        cpu: share of the time in which it, or its helper, computed.
        domain: ``""`` (there is none), ``paused`` or ``running``.
        applied: how many checkpoints it said to have applied, the first copy not counted.
        count: the guest's, as it is now; ``None`` without a domain.
        said: the last line of what it said.
    """

    status: int | None
    seconds: float
    cpu: float
    domain: str
    applied: int
    count: int | None
    said: str

    def __str__(self) -> str:
        if self.status is None:
            does = f"never ends ({self.cpu:.0%} of a processor)"
        elif self.status < 0:
            does = f"dies of {signal.Signals(-self.status).name}"
        else:
            does = f"ends after {self.seconds:.1f} s, status {self.status}"
        left = {"": "none is left", "running": f"takes over at checkpoint {self.applied}"}.get(
            self.domain, f"is left {self.domain}"
        )
        return f"{does} | {left}"


def receive(xen: Xen, stream: bytes, deadline_s: float) -> Outcome:
    """Feed a stream to a stock receiver, and see what it does; whatever it left is removed.

    Args:
        xen: The hypervisor.
        stream: All that comes.
        deadline_s: Seconds after which it is killed.
    """
    with tempfile.TemporaryFile(dir="/run") as said:
        process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True
        )
        began = time.monotonic()
        writer = threading.Thread(target=_feed, args=(process, stream), daemon=True)
        writer.start()
        try:
            writer.join(deadline_s)
            fed, before = time.monotonic(), _cpu_s(process.pid)
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, began + deadline_s - time.monotonic()))
            status, now = process.poll(), time.monotonic()
            cpu = (_cpu_s(process.pid) - before) / max(now - fed, 0.01) if status is None else 0.0
            found = _find(xen)
            count = None
            if found is not None:
                with suppress(AssertionError):  # its page has not come
                    count = TINY.count(read_pages(found[0], [TINY.pfn]))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            writer.join(5.0)
        said.seek(0)
        text = said.read()
    _remove(xen)
    words = text.decode(errors="replace").strip().splitlines()
    return Outcome(
        status,
        now - began,
        cpu,
        found[1] if found else "",
        text.count(_APPLIED),
        count,
        words[-1] if words else "",
    )


def _feed(process: subprocess.Popen[bytes], stream: bytes) -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.write(stream)
    with suppress(OSError):
        process.stdin.close()


def _cpu_s(group: int) -> float:
    # Of all processes of the group: libxl reads libxc's records in a helper.
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = re.sub(r"^.*\) ", "", stat.read_text()).split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def _find(xen: Xen) -> tuple[int, str] | None:
    for info in xen.domains():
        if info.domid and not info.dying:
            return info.domid, "paused" if info.paused else "running"
    return None


def _remove(xen: Xen) -> None:
    deadline = time.monotonic() + _NAME_S
    while (found := [info for info in xen.domains() if info.domid]) and time.monotonic() < deadline:
        for info in found:
            subprocess.run(["xl", "destroy", str(info.domid)], check=False, capture_output=True, timeout=30)
        time.sleep(0.1)


def cuts(recorded: Recorded) -> Iterator[tuple[str, int]]:
    """Yield where the stream is cut: in words, and the offset."""
    first = recorded.frames[0].end
    for words, offset in _HEADS:
        yield words, offset if offset > 0 else first - offset
    for point in POINTS:
        place = {
            "start": "before",
            "end": "after",
            "header": "in the header of",
            "body": "after the header of",
        }
        words = f"{place.get(point.place, 'in')} {point.name}"
        yield (
            f"{words}, {'first copy' if not point.checkpoint else f'checkpoint {point.checkpoint}'}",
            (recorded.offset(point)),
        )


def main() -> int:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deadline", type=float, default=20.0, metavar="S", help="for each receiver")
    given = parser.parse_args()
    with open_xen() as xen:
        recorded = record(Path(f"/run/{NAME}.stream"), TINY)
        counts = [recorded.count(number) for number in range(len(recorded.ends))]
        print(f"the guest's count at each checkpoint: {counts}", flush=True)  # noqa: T201 - a table is printed
        print("| the stream ends | whole before | the receiver | the copy |\n|---|---|---|---|")  # noqa: T201
        for words, offset in cuts(recorded):
            outcome = receive(xen, recorded.stream[:offset], given.deadline)
            whole = recorded.whole(offset)
            held = ("nothing", "the first copy")[whole] if whole < 2 else f"checkpoint {whole - 1}"
            print(f"| {words} | {held} | {outcome} |", flush=True)  # noqa: T201
            print(f"  count {outcome.count}; {outcome.said}", file=sys.stderr, flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
