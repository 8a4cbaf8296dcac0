"""The primary's ways out: what an acknowledgement is, and that nothing waits for a receiver that is gone."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.testbeds.rounds import rounds
from tests.unit.xen.link import tcp_pair
from understudy.errors import HypervisorError
from understudy_xen.coding import Decoder, Encoder
from understudy_xen.outlet import Blackhole, LinkOutlet, Outlet, ProgramOutlet, _delivery_rate
from understudy_xen.wire import HELLO_BYTES, Ack, Coding, Hello, Refusal

MUCH = bytes(64 << 20)  # more than any pipe or connection takes
PAGES = random.Random(1).randbytes(4096) * 16  # fits into a connection that nobody reads
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["tcp", "unix"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = tcp_pair() if request.param == "tcp" else socket.socketpair()
    made[1].settimeout(10)
    yield made
    for sock in made:
        sock.close()


@pytest.fixture(params=[False, True], ids=["plain", "coded"])
def link(request: pytest.FixtureRequest, pair: Pair) -> Iterator[LinkOutlet]:
    outlet = LinkOutlet(pair[0], compress=request.param)
    yield outlet
    outlet.close()
    assert outlet._pump is None or not outlet._pump.is_alive()
    assert outlet.fd == -1
    assert pair[0].fileno() == -1


@pytest.fixture
def other(pair: Pair, link: LinkOutlet) -> socket.socket:
    """The secondary, after the greeting."""
    data = b""
    while len(data) < HELLO_BYTES:
        data += pair[1].recv(HELLO_BYTES - len(data))
    assert Hello.decode(data) == Hello(Coding.ZSTD if link.figures() else Coding.PLAIN)
    return pair[1]


def read(sock: socket.socket, size: int, *, coded: bool) -> bytes:
    """Read so much of the stream."""
    decoder, data = Decoder(), b""
    while len(data) < size:
        more = sock.recv(1 << 16)
        assert more, "the stream has ended"
        data += b"".join(decoder.feed(more)) if coded else more
    return data


def fill(fd: int) -> None:
    while True:
        os.write(fd, PAGES)


def in_time(call: Callable[[], object], seconds: float = 5) -> Exception | None:
    """Run a call in a thread; return what it raised, fail if it hangs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_raised, call).result(seconds)


def write_on(link: LinkOutlet) -> None:
    """Write until that fails: compressed, which the coder may find worth it, much is little."""
    while True:
        link.write(MUCH)


def _raised(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except HypervisorError as error:
        return error
    return None


def test_written_and_acknowledged(link: LinkOutlet, other: socket.socket) -> None:
    for count in range(1, 4):
        link.write(PAGES)
        assert read(other, len(PAGES), coded=link.figures() is not None) == PAGES
        ack = Ack(count, len(PAGES), 64)
        for byte in ack.encode():
            other.sendall(bytes([byte]))
        assert link.acknowledged(count, 5) == ack
        assert link.acknowledged(count, 0) == ack
    figures = link.figures()
    assert figures is None or figures.plain_bytes == 3 * len(PAGES)


def test_i4_silence_is_no_acknowledgement(link: LinkOutlet, other: socket.socket) -> None:
    other.sendall(Ack(1, 1, 1).encode() + Ack(2, 1, 1).encode()[:-1])
    assert link.acknowledged(1, 5).count == 1
    began = time.monotonic()
    with pytest.raises(HypervisorError, match=r"checkpoint 2 was not acknowledged within 0\.05 s"):
        link.acknowledged(2, 0.05)
    assert time.monotonic() - began < 2
    other.sendall(Ack(2, 1, 1).encode()[-1:])
    assert link.acknowledged(2, 5).count == 2


def test_i1_only_the_checkpoint_that_was_asked_for(link: LinkOutlet, other: socket.socket) -> None:
    other.sendall(Ack(1, 1, 1).encode() + Ack(2, 1, 1).encode())
    with pytest.raises(HypervisorError, match="checkpoint 2 before it was made"):
        link.acknowledged(1, 5)


@pytest.mark.parametrize("bad", [Ack(2, 1, 1).encode(), b"HTTP/1.1 400\r\n", bytes(40)])
def test_i1_other_answers_acknowledge_nothing(link: LinkOutlet, other: socket.socket, bad: bytes) -> None:
    other.sendall(bad)
    for _ in range(2):
        with pytest.raises(HypervisorError, match="the secondary a"):
            link.acknowledged(1, 5)


def test_refused(link: LinkOutlet, other: socket.socket) -> None:
    other.sendall(Ack(1, 1, 1).encode() + Refusal("no room").encode())
    assert link.acknowledged(1, 5).count == 1  # it was held before
    with pytest.raises(HypervisorError, match="the secondary takes no further checkpoint: no room"):
        link.acknowledged(2, 5)


def test_i7_a_refusal_is_the_cause_of_the_broken_write(link: LinkOutlet, other: socket.socket) -> None:
    writer = ThreadPoolExecutor(1)
    writing = writer.submit(_raised, lambda: write_on(link))
    other.sendall(Refusal("no room").encode())
    other.close()
    error = writing.result(5)
    writer.shutdown()
    assert str(error) == "the secondary takes no further checkpoint: no room"
    # libxc's own write to the descriptor is asked for likewise.
    assert str(link.broken("libxc: EPIPE")) == "the secondary takes no further checkpoint: no room"
    link.cut("later")
    assert "no room" in str(link.broken(""))


def test_the_secondary_ends(link: LinkOutlet, other: socket.socket) -> None:
    other.close()
    with pytest.raises(HypervisorError, match="the checkpoint stream is broken: "):
        link.acknowledged(1, 5)
    error = in_time(lambda: write_on(link))
    assert "the checkpoint stream is broken: " in str(error)


def test_i4_cut_ends_a_write_that_nobody_reads(link: LinkOutlet, other: socket.socket) -> None:
    threading.Timer(0.1, link.cut, ["the peer is silent"]).start()
    error = in_time(lambda: write_on(link))
    assert str(error) == "the checkpoint stream is broken: the peer is silent"
    with pytest.raises(HypervisorError, match="the peer is silent"):
        link.write(b"x")
    with pytest.raises(OSError, match="Broken pipe"):
        fill(link.fd)  # libxc's way; what is in the pipe may be taken once more


def test_i4_cut_ends_a_wait(link: LinkOutlet, other: socket.socket) -> None:
    threading.Timer(0.1, link.cut, ["unprotected"]).start()
    error = in_time(lambda: link.acknowledged(1, 30))
    assert str(error) == "the checkpoint stream is broken: unprotected"
    assert link.reason == "unprotected"
    link.cut("again")
    assert link.reason == "unprotected"
    with suppress(OSError):
        other.sendall(Ack(1, 1, 1).encode())
    with pytest.raises(HypervisorError, match="unprotected"):
        link.acknowledged(1, 30)


@pytest.mark.parametrize("seed", range(rounds(30, 1000)))
def test_i1_cut_against_an_acknowledgement(seed: int) -> None:
    # Whatever comes first: an answer that was there, or the cut; never a hang, and after the cut nothing counts.
    random_ = random.Random(seed)
    here, there = socket.socketpair()
    outlet = LinkOutlet(here, compress=bool(seed % 2))
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(_raised, lambda: outlet.acknowledged(1, 30))
        delays = [random_.random() * 0.002 for _ in range(2)]

        def answer() -> None:
            time.sleep(delays[0])
            with suppress(OSError):
                there.sendall(Ack(1, 1, 1).encode())

        def cut() -> None:
            time.sleep(delays[1])
            outlet.cut("now")

        pool.submit(answer)
        pool.submit(cut).result(5)
        error = waiting.result(5)
        assert error is None or "now" in str(error)
        with pytest.raises(HypervisorError, match="now"):
            outlet.acknowledged(1, 30)
    outlet.close()
    there.close()


def test_close_while_the_coder_is_busy(pair: Pair) -> None:
    outlet = LinkOutlet(pair[0], compress=True)
    os.set_blocking(outlet.fd, False)
    with pytest.raises(BlockingIOError):
        fill(outlet.fd)
    began = time.monotonic()
    outlet.close()
    outlet.close()
    assert time.monotonic() - began < 1.5
    assert outlet._pump is not None
    assert not outlet._pump.is_alive()
    assert outlet.fd == -1
    with pytest.raises(HypervisorError, match="closed"):
        outlet.write(b"x")
    with pytest.raises(HypervisorError, match="closed"):
        outlet.acknowledged(1, 1)


def test_the_rate_is_tcps_own(pair: Pair) -> None:
    # A write into an empty buffer takes no time, however slow the link is.
    here, there = pair
    data = bytes(1 << 20)
    before = _delivery_rate(here)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, there, len(data), coded=False)
        here.sendall(data)
        assert reading.result(10) == data
    tcp = here.family == socket.AF_INET
    assert before == 0 or tcp
    assert (_delivery_rate(here) > 1_000_000) == tcp


@pytest.mark.parametrize("link", [True], indirect=True, ids=["coded"])
def test_i7_the_coder_fails(link: LinkOutlet, other: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Encoder, chunk: bytes) -> None:
        raise MemoryError("no room to compress")

    monkeypatch.setattr(Encoder, "encode", fail)
    link.write(b"x" * 100)
    error = in_time(lambda: link.acknowledged(1, 30))
    assert str(error) == "the checkpoint stream is broken: no room to compress"


def test_a_broken_connection_is_told_and_closed(pair: Pair) -> None:
    pair[0].shutdown(socket.SHUT_RDWR)
    with pytest.raises(HypervisorError, match="could not begin"):
        LinkOutlet(pair[0], compress=True)
    assert pair[0].fileno() == -1


def test_blackhole() -> None:
    outlet = Blackhole()
    outlet.write(MUCH)
    assert outlet.acknowledged(7, 0) == Ack(7, 0, 0)
    assert not outlet.acknowledges
    assert outlet.figures() is None
    outlet.cut("measured")
    for call in (lambda: outlet.acknowledged(8, 0), lambda: outlet.write(b"x")):
        with pytest.raises(HypervisorError, match="measured"):
            call()
    outlet.close()
    outlet.close()
    assert outlet.fd == -1


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def gone(pid: int) -> bool:
    """Tell whether a process is dead; one that is not our child may still wait to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_program_that_reads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    outlet: Outlet = ProgramOutlet(
        python(
            f"import sys; print('ready', flush=True); open({str(out)!r}, 'wb').write(sys.stdin.buffer.read())"
        )
    )
    assert isinstance(outlet, ProgramOutlet)
    assert outlet.read_exactly(6, 10) == b"ready\n"
    with pytest.raises(HypervisorError, match=r"said only b'' within 0\.01 s"):
        outlet.read_exactly(1, 0.01)
    outlet.write(PAGES)
    assert outlet.acknowledged(1, 0) == Ack(1, 0, 0)
    outlet.close()
    outlet.close()
    assert out.read_bytes() == PAGES  # it was let end by itself
    assert gone(outlet.pid)
    with pytest.raises(HypervisorError):
        outlet.write(b"x")
    outlet.cut("again")


def test_program_that_ends(tmp_path: Path) -> None:
    outlet = ProgramOutlet(python("import sys; print('sorry', flush=True); sys.exit(3)"))
    with pytest.raises(HypervisorError, match=r"has ended with status 3|ended after it said b'sorry"):
        outlet.read_exactly(100, 10)
    error = in_time(lambda: outlet.write(MUCH))
    assert error is not None
    os.waitid(os.P_PID, outlet.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(HypervisorError, match="has ended with status 3"):
        outlet.acknowledged(1, 0)
    outlet.close()


def test_i4_cut_ends_a_write_to_a_program_that_hangs() -> None:
    sleeps = "import time; time.sleep(60)"
    script = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {sleeps!r}]); "
    script += f"print(f'{{child.pid:9}}', flush=True); {sleeps}"
    outlet = ProgramOutlet(python(script))
    child = int(outlet.read_exactly(10, 10))
    threading.Timer(0.1, outlet.cut, ["given up"]).start()
    error = in_time(lambda: outlet.write(MUCH))
    assert str(error) == "the checkpoint stream is broken: given up"
    outlet.close()
    assert gone(outlet.pid)
    deadline = time.monotonic() + 5
    while not gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_i4_close_ends_a_program_that_ignores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("understudy_xen.outlet._END_S", 0.2)
    outlet = ProgramOutlet(python("import time; print('x', flush=True); time.sleep(60)"))
    outlet.read_exactly(2, 10)
    outlet.close()
    assert outlet._process.returncode == -signal.SIGKILL
    assert outlet.reason == "closed"


def test_program_that_is_not_there() -> None:
    with pytest.raises(HypervisorError, match="'/nonexistent/xl' could not be started"):
        ProgramOutlet(["/nonexistent/xl", "migrate-receive"])
