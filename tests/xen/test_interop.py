"""With the stock tools as independent peers: both ways of Remus, and both ways of a file. One host is both hosts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest

from tests.testbeds.rounds import rounds
from tests.testbeds.xen.guests import linux
from tests.xen.memory import read_pages
from tests.xen.recorded import TINY, Point, Recorded, record
from understudy_xen.libs import DomainInfo, Xen, open_xen
from understudy_xen.streams.formats import Layer
from understudy_xen.streams.framer import Framer

pytestmark = [pytest.mark.xen(inside=True), pytest.mark.timeout(300)]

PATIENT_S = 60.0  # the bed shares its processors
CHECKPOINTS = rounds(3, 30)
LOGS = Path("/var/log/xen")


class Program:
    """A program whose lines are read as they come."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line.rstrip())

    def line(self, pattern: str, timeout_s: float = PATIENT_S) -> str:
        """Return the next line that matches."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                raise AssertionError(f"no {pattern!r} within {timeout_s:g} s; it said {self.said}") from None
            self.said.append(line)
            if re.search(pattern, line):
                return line

    def end(self, timeout_s: float = PATIENT_S) -> int:
        """Wait for its end and return its status."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it alone."""
        self.process.send_signal(number)


@contextmanager
def running(*words: str) -> Iterator[Program]:
    program = Program(*words)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            os.killpg(program.process.pid, signal.SIGKILL)
            program.process.wait(PATIENT_S)


def run(*words: str, status: int = 0, stdin: bytes | None = None) -> str:
    done = subprocess.run(
        words, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, check=False
    )
    said = done.stdout.decode(errors="replace")
    assert done.returncode == status, said
    return said


def seen(condition: Callable[[], object], what: str, timeout_s: float = PATIENT_S) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def domid(name: str) -> int | None:
    done = subprocess.run(["xl", "domid", name], capture_output=True, text=True, timeout=60, check=False)
    return None if done.returncode else int(done.stdout)


def count() -> int:
    """Return how far the guest has counted, by the console of whichever domain it is now."""
    logs = sorted(LOGS.glob("guest-web*.log"), key=lambda log: log.stat().st_mtime)
    lines = [line for line in logs[-1].read_text().splitlines() if line.startswith("COUNT ")] if logs else []
    # The last line may be written just now.
    return int(lines[-2].split()[1]) if len(lines) > 1 else 0


def goes_on(since: int) -> None:
    """See the guest, who had counted to `since` when it was copied, count on from about there."""
    now = count()
    seen(lambda: count() > max(now, since) + 2, f"the guest counts on from {since}")
    # Not from the beginning, and not after a jump.
    assert count() < since + 1000


def info(xen: Xen, name: str) -> DomainInfo:
    number = domid(name)
    assert number is not None
    found = xen.domain(number)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def xen() -> Iterator[Xen]:
    with open_xen() as xen:
        yield xen


@pytest.fixture(scope="module")
def _guests() -> Iterator[None]:
    yield
    for name in ("web", "web--incoming", "tiny", "tiny--incoming"):
        if domid(name) is not None:
            run("xl", "destroy", name)


@pytest.fixture
def web(_guests: None) -> str:
    """A guest that counts; the one before, where it is still there."""
    if domid("web") is None:
        for log in LOGS.glob("guest-web*.log"):
            log.unlink()
        Path("/run/web.cfg").write_text(linux("web", nics=()))
        run("sh", "-c", "xl create -q /run/web.cfg >/run/web.out 2>&1")
    seen(count, "the guest counts", 120)
    return "web"


def ours(*words: str) -> Sequence[str]:
    return ("understudy", "xen", *words)


def test_when_our_sender_ends_as_asked_a_stock_receiver_drops_its_copy(web: str) -> None:
    receiver = "xl migrate-receive -r -e"
    said = run(*ours("remus", web, "-i", "100", "--command", receiver, "--count", "2", "--allow-unsafe"))
    assert "checkpoint 2" in said
    assert "has dropped its copy" in said
    assert domid("web--incoming") is None
    goes_on(count())


def test_an_interrupted_sender_says_what_has_become_of_all(web: str) -> None:
    receiver = "xl migrate-receive -r -e"
    with running(*ours("remus", web, "-i", "100", "--allow-unsafe", "--command", receiver)) as sender:
        sender.line("checkpoint 2:", 120)
        sender.signal(signal.SIGINT)
        sender.line("interrupted; web runs on; the receiver has dropped its copy")
        assert sender.end() == 0
    goes_on(count())


def test_a_stock_receiver_takes_over_from_our_sender(xen: Xen, web: str) -> None:
    words = ("remus", web, "-i", "100", "--allow-unsafe", "--format", "json")
    with running(*ours(*words, "--command", "xl migrate-receive -r -e")) as sender:
        lines = [json.loads(sender.line(r'"checkpoint"', 120)) for _ in range(CHECKPOINTS)]
        reached = count()
        # To xl it is a host that died.
        run("xl", "destroy", web)
        sender.line("the receiver goes on with its last whole checkpoint")
        assert sender.end() == 1
    assert [line["checkpoint"] for line in lines] == list(range(1, CHECKPOINTS + 1))
    assert all(0 < line["pause_ms"] < 60_000 for line in lines)
    assert not info(xen, "web").paused
    goes_on(reached)


def test_our_receiver_takes_a_guest_from_a_stock_sender(xen: Xen, web: str) -> None:
    receiver = "exec understudy xen receive"
    with running("xl", "remus", "-Fnd", "-i", "100", "-s", "", web, receiver) as sender:
        # libxl tells nothing of its checkpoints; that the receiver holds some is seen in the end.
        sender.line("web--incoming: the first copy is whole", 120)
        before = count()
        seen(lambda: count() > before + 5 * CHECKPOINTS, "some checkpoints")
        reached = count()
        # Not `xl destroy`: seen in the middle of a checkpoint, it leaves a stock sender waiting for ever.
        sender.signal(signal.SIGKILL)
        held = sender.line(r"holds the first copy and \d+ checkpoints")
        run("xl", "destroy", web)
    checkpoints = int(re.search(r"and (\d+) checkpoints", held)[1])  # type: ignore[index]
    assert checkpoints >= CHECKPOINTS
    assert info(xen, "web--incoming").paused
    # Nobody's word but an operator's makes it the guest.
    assert "--force and --reason TEXT are needed" in run(*ours("promote", web), status=2)
    assert info(xen, "web--incoming").paused
    run(*ours("promote", web, "--force", "--reason", "its host is dead"))
    assert domid("web--incoming") is None
    goes_on(reached)
    assert "no copy web--incoming" in run(*ours("promote", web, "--force", "--reason", "again"), status=1)


@pytest.fixture(scope="module")
def recorded(_guests: None) -> Recorded:
    return record(Path("/run/interop.stream"), TINY)


def test_the_end_that_makes_xl_spin_leaves_a_copy(xen: Xen, recorded: Recorded) -> None:
    # Between libxc's CHECKPOINT and libxl's CHECKPOINT_END of the third one.
    cut = recorded.offset(Point(3, "CHECKPOINT", "end"))
    said = run(*ours("receive"), stdin=recorded.stream[:cut])
    assert "holds the first copy and 2 checkpoints" in said
    copy = info(xen, "tiny--incoming")
    assert copy.paused
    assert TINY.count(read_pages(copy.domid, [TINY.pfn])) == recorded.count(2)
    # The next one finds its place taken, and leaves it alone.
    assert "there is a domain tiny--incoming already" in run(
        *ours("receive"), status=1, stdin=recorded.stream
    )
    assert info(xen, "tiny--incoming").domid == copy.domid
    run("xl", "destroy", "tiny--incoming")


def test_the_end_that_makes_xl_crash_leaves_nothing(recorded: Recorded) -> None:
    header = next(frame for frame in recorded.frames if frame.layer is Layer.LIBXL)
    for cut in (header.start + 8, recorded.offset(Point(0, "CHECKPOINT", "end"))):
        said = run(*ours("receive"), status=1, stdin=recorded.stream[:cut])
        assert "nothing is left of the copy" in said
        assert domid("tiny--incoming") is None


def test_a_file_of_xl_is_right(web: str) -> None:
    file = Path("/run/xl.save")
    run("xl", "save", "-c", web, str(file))
    assert "HVM_CONTEXT" in run("understudy", "stream", "inspect", str(file))
    run("understudy", "stream", "verify", str(file))
    # It can tell: one byte of a record's length.
    frames = Framer().feed(file.read_bytes())
    with file.open("r+b") as opened:
        opened.seek(frames[-1].start + 4)
        opened.write(b"\x01")
    run("understudy", "stream", "verify", str(file), status=1)
    file.unlink()


@pytest.mark.parametrize("keep", [True, False], ids=["live", "stopped"])
def test_a_file_of_ours_is_restored_by_xl(xen: Xen, web: str, keep: bool) -> None:
    file = Path("/run/ours.save")
    reached = count()
    run(*ours("save", *(["-c"] if keep else []), web, str(file)))
    if keep:
        goes_on(reached)
        run("xl", "destroy", web)
    assert domid("web") is None
    run("understudy", "stream", "verify", str(file))
    run("sh", "-c", f"xl restore -e {file} >/run/restore.out 2>&1")
    file.unlink()
    assert not info(xen, "web").paused
    goes_on(reached)
