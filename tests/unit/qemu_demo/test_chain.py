"""The guest's C program against the Python that verifies it, on files instead of disks."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from tests.testbeds.bed import need
from understudy_qemu.demo.chain import (
    BLOCK_BYTES,
    BrokenChain,
    Chain,
    Greeting,
    Reply,
    check_disk,
)

DISK_BYTES = 16 * 1024 * BLOCK_BYTES


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("qemu", [] if shutil.which("gcc") else ["the program gcc"])
    binary = tmp_path_factory.mktemp("chain") / "chain"
    source = str(files("understudy_qemu.demo") / "guest" / "chain.c")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", str(binary), source], check=True)
    return binary


class Guest:
    """The program, running on this machine."""

    def __init__(self, program: Path, disks: list[Path], draw: int) -> None:
        self.disks = disks
        self.port = free_pair()
        self.process = subprocess.Popen(
            [program, str(draw), str(self.port), *map(str, disks)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "CTR 1\n", "it listens before the first beat"

    def connect(self) -> Line:
        return Line(socket.create_connection(("127.0.0.1", self.port), timeout=5))

    def command(self, word: str) -> str:
        with socket.create_connection(("127.0.0.1", self.port + 1), timeout=5) as sock:
            sock.sendall(f"{word}\n".encode())
            return sock.recv(100).decode()

    def close(self) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Line:
    """A connection, one line at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rwb")

    def ask(self, line: str) -> str:
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        return self.file.readline().decode().rstrip("\n")

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def free_pair() -> int:
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    started: list[Guest] = []

    def start(disks: int = 1, draw: int = 4) -> Guest:
        paths = [tmp_path / f"disk{number}" for number in range(disks)]
        for path in paths:
            path.write_bytes(bytes(DISK_BYTES))
        started.append(Guest(program, paths, draw))
        return started[-1]

    yield start
    for guest in started:
        guest.close()


def converse(line: Line, connection_id: int, words: list[str]) -> tuple[Chain, dict[int, str]]:
    chain = Chain(Greeting.parse(line.ask(f"HELLO {connection_id:016x}")))
    hashes = {}
    for word in words:
        reply = Reply.parse(line.ask(word))
        chain.follow(word, reply)
        hashes[reply.n] = reply.hash
    return chain, hashes


def test_both_sides_compute_the_same_chain(start: Callable[..., Guest]) -> None:
    guest = start(disks=3, draw=4)
    line = guest.connect()
    words = ["", "x", "a word", "w" * 400, *(f"word {n}" for n in range(2500))]
    chain, hashes = converse(line, 0xFEDCBA9876543210, words)
    line.close()
    assert chain.n == len(words)
    assert chain.draws == len(words) // 4
    for number, path in enumerate(guest.disks):
        check = check_disk(path.read_bytes(), chain.greeting, hashes, number)
        assert (check.newest, check.contiguous, check.acknowledged_lost, check.problems) == (
            len(words),
            True,
            0,
            (),
        )


def test_connections_have_chains_of_their_own(start: Callable[..., Guest]) -> None:
    guest = start(disks=1, draw=0)
    lines = [guest.connect() for _ in range(3)]
    chains = [Chain(Greeting.parse(line.ask(f"HELLO {i:x}"))) for i, line in enumerate(lines, start=1)]
    for n in range(60):
        line, chain = lines[n % 3], chains[n % 3]
        chain.follow(f"{n}", Reply.parse(line.ask(f"{n}")))
    assert [chain.n for chain in chains] == [20, 20, 20]
    assert len({chain.greeting.slot for chain in chains}) == 3
    for line in lines:
        line.close()


def test_a_slot_is_used_again_over_what_another_connection_left(start: Callable[..., Guest]) -> None:
    guest = start(disks=1)
    first = guest.connect()
    converse(first, 1, ["a"] * 50)
    first.close()
    second = guest.connect()
    chain, hashes = converse(second, 2, ["b"] * 10)
    second.close()
    check = check_disk(guest.disks[0].read_bytes(), chain.greeting, hashes, 0)
    assert (check.newest, check.acknowledged_lost) == (10, 0)


def blocks(path: Path, greeting: Greeting, n: int) -> tuple[int, bytes]:
    at = (greeting.slot * greeting.blocks + n % greeting.blocks) * BLOCK_BYTES
    return at, path.read_bytes()[at : at + BLOCK_BYTES]


def put(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_the_guest_sees_a_stale_block(start: Callable[..., Guest]) -> None:
    guest = start(disks=2)
    line = guest.connect()
    chain, _ = converse(line, 7, ["a"] * 20)
    at, _ = blocks(guest.disks[1], chain.greeting, 20)
    put(guest.disks[1], at, bytes(BLOCK_BYTES))
    with pytest.raises(BrokenChain, match=r"word 21: disk 1: BAD-PAST"):
        chain.follow("b", Reply.parse(line.ask("b")))
    line.close()


def test_the_guest_sees_a_block_from_the_future(start: Callable[..., Guest], tmp_path: Path) -> None:
    guest = start(disks=1, draw=0)
    line = guest.connect()
    chain, _ = converse(line, 7, ["a"] * 10)
    at, newest = blocks(guest.disks[0], chain.greeting, 10)
    forged = Line(guest.connect().sock)
    _, _ = converse(forged, 7, ["a"] * 11)
    # The second connection has the same id and words, so its block 11 is this one's future.
    slot1 = Greeting(7, 1, 1, chain.greeting.blocks, 1024, 0)
    _, future = blocks(guest.disks[0], slot1, 11)
    put(guest.disks[0], at + BLOCK_BYTES, future)
    with pytest.raises(BrokenChain, match=r"word 11: disk 0: BAD-FUTURE"):
        chain.follow("a", Reply.parse(line.ask("a")))
    assert newest != future
    line.close()
    forged.close()


def test_the_guest_sees_a_torn_block(start: Callable[..., Guest]) -> None:
    guest = start(disks=1)
    line = guest.connect()
    chain, _ = converse(line, 7, ["a"] * 10)
    at, _ = blocks(guest.disks[0], chain.greeting, 10)
    put(guest.disks[0], at + 200, b"torn")
    with pytest.raises(BrokenChain, match=r"disk 0: BAD-SUM"):
        chain.follow("a", Reply.parse(line.ask("a")))
    line.close()


def test_the_guest_comes_upon_an_old_stale_block_some_day(start: Callable[..., Guest]) -> None:
    guest = start(disks=1)
    line = guest.connect()
    chain, _ = converse(line, 7, ["a"] * 10)
    at, _ = blocks(guest.disks[0], chain.greeting, 5)
    put(guest.disks[0], at, bytes(BLOCK_BYTES))

    def until_found() -> None:
        for _ in range(1100):
            chain.follow("a", Reply.parse(line.ask("a")))

    with pytest.raises(BrokenChain, match="BAD-PAST"):
        until_found()
    line.close()


def test_the_host_side_check_sees_what_is_lost(start: Callable[..., Guest]) -> None:
    guest = start(disks=1)
    line = guest.connect()
    chain, hashes = converse(line, 7, ["a"] * 900)
    line.close()
    image = guest.disks[0].read_bytes()

    def damage(n: int, data: bytes) -> bytes:
        at, _ = blocks(guest.disks[0], chain.greeting, n)
        return image[:at] + data + image[at + BLOCK_BYTES :]

    hole = check_disk(damage(800, bytes(BLOCK_BYTES)), chain.greeting, hashes, 0)
    assert (hole.contiguous, hole.acknowledged_lost) == (False, 1)
    _, older = blocks(guest.disks[0], chain.greeting, 899)
    cut = check_disk(damage(900, bytes(BLOCK_BYTES)), chain.greeting, hashes, 0)
    assert (cut.newest, cut.contiguous, cut.acknowledged_lost) == (899, True, 1)
    misplaced = check_disk(damage(900, older), chain.greeting, hashes, 0)
    assert not misplaced.contiguous
    other = check_disk(image, chain.greeting, hashes | {899: "0" * 32}, 0)
    assert (other.contiguous, other.acknowledged_lost) == (True, 1)
    assert check_disk(b"", chain.greeting, hashes, 0).acknowledged_lost == 900


@pytest.mark.parametrize("field", ["n", "draws", "draw", "hash", "disks"])
def test_any_changed_field_of_a_reply_breaks_the_chain(start: Callable[..., Guest], field: str) -> None:
    guest = start(disks=1, draw=2)
    line = guest.connect()
    chain, _ = converse(line, 7, ["a"] * 3)
    words = line.ask("b").split()
    change = {
        "n": ("0", 0),
        "draws": ("9", 1),
        "draw": ("-", 2),
        "hash": ("0" * 32, 3),
        "disks": ("ok,ok", 4),
    }
    value, place = change[field]
    words[place] = value
    with pytest.raises(BrokenChain):
        chain.follow("b", Reply.parse(" ".join(words)))
    line.close()


def test_a_stale_page_of_the_table_breaks_the_chain() -> None:
    greeting = Greeting(1, 0, 0, 1024, 16, 0)
    sound, stale = Chain(greeting), Chain(greeting)
    for n in range(1, 200):
        expected = sound_reply(sound, f"{n}")
        sound.follow(f"{n}", expected)
        stale.follow(f"{n}", expected)
    page = random.Random(5).choice(list(stale._entries))
    stale._entries[page] = bytes(16)

    def go_on() -> None:
        for n in range(200, 300):
            expected = sound_reply(stale, f"{n}")
            stale.follow(f"{n}", expected)
            sound.follow(f"{n}", expected)

    with pytest.raises(BrokenChain, match="hash"):
        go_on()


def sound_reply(chain: Chain, word: str) -> Reply:
    # What a guest with exactly this state answers: the error tells the hash that was expected.
    probe = Reply(chain.n + 1, chain.draws, b"", "", ())
    try:
        chain.follow(word, probe)
    except BrokenChain as error:
        return Reply(chain.n + 1, chain.draws, b"", str(error).rsplit(maxsplit=1)[-1], ())
    raise AssertionError("an empty hash was accepted")


def test_rubbish_ends_the_connection_and_nothing_else(start: Callable[..., Guest]) -> None:
    guest = start()
    rude = guest.connect()
    assert rude.ask("GET / HTTP/1.0") == "ERROR say HELLO first"
    assert rude.file.read() == b""
    rude.close()
    endless = guest.connect()
    endless.sock.sendall(b"x" * 600)
    # A reset is the same end, with input that nobody read.
    with contextlib.suppress(ConnectionResetError):
        assert endless.sock.recv(10) == b""
    endless.close()
    line = guest.connect()
    converse(line, 3, ["still", "here"])
    line.close()


def test_more_connections_than_slots_are_turned_away(start: Callable[..., Guest]) -> None:
    guest = start()
    lines = [guest.connect() for _ in range(16)]
    for number, line in enumerate(lines):
        converse(line, number, ["a"])
    surplus = guest.connect()
    assert surplus.sock.recv(10) == b""
    for line in [surplus, *lines]:
        line.close()


def test_the_power_commands_work_in_a_guest_only(start: Callable[..., Guest]) -> None:
    guest = start()
    assert guest.command("ping") == "pong\n"
    for word in ("poweroff", "reboot", "panic"):
        assert guest.command(word) == "ERROR not in a guest\n"
    assert guest.command("shutdown") == "ERROR unknown command\n"


def test_what_is_no_greeting_or_reply_is_refused() -> None:
    for line in (
        "",
        "HELLO",
        "HELLO 1 slot 0",
        "HELLO x slot 0 disks 1 blocks 4 pages 4 draw 0",
        "1 0 - 00 ok",
    ):
        with pytest.raises(BrokenChain):
            Greeting.parse(line)
    for line in ("", "1 0 - 00", "one 0 - 00 ok", "1 0 zz 00 ok", "HELLO a b c d"):
        with pytest.raises(BrokenChain):
            Reply.parse(line)


def test_the_client_program_reports_and_sums_up(start: Callable[..., Guest]) -> None:
    guest = start(disks=2, draw=5)
    argv = [sys.executable, "-m", "understudy_qemu.demo.client", "--host", "127.0.0.1"]
    argv += ["--port", str(guest.port), "--interval-ms", "0", "--count", "40", "--window", "3"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    greeting = Greeting(**rows[0]["greeting"])
    words, summary = rows[1:-1], rows[-1]["summary"]
    assert [row["n"] for row in words] == list(range(1, 41))
    assert all(row["ok"] and row["t_reply_ns"] >= row["t_send_ns"] for row in words)
    assert (summary["words"], summary["acknowledged"], summary["bad"], summary["unanswered"]) == (
        40,
        40,
        0,
        0,
    )
    assert summary["connection_kept"]
    hashes = {row["n"]: row["hash"] for row in words}
    for number, path in enumerate(guest.disks):
        assert check_disk(path.read_bytes(), greeting, hashes, number).acknowledged_lost == 0


def test_the_client_program_notices_a_guest_that_dies(start: Callable[..., Guest]) -> None:
    guest = start()
    argv = [sys.executable, "-m", "understudy_qemu.demo.client", "--host", "127.0.0.1"]
    argv += ["--port", str(guest.port), "--interval-ms", "5"]
    client = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    while json.loads(client.stdout.readline()).get("n", 0) < 5:
        pass
    guest.process.kill()
    out, _ = client.communicate(timeout=20)
    assert client.returncode == 1
    summary = json.loads(out.splitlines()[-1])["summary"]
    assert not summary["connection_kept"]


def test_the_client_program_ends_in_order_when_told(start: Callable[..., Guest]) -> None:
    guest = start()
    argv = [sys.executable, "-m", "understudy_qemu.demo.client", "--host", "127.0.0.1"]
    client = subprocess.Popen([*argv, "--port", str(guest.port)], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    while json.loads(client.stdout.readline()).get("n", 0) < 3:
        pass
    client.terminate()
    out, _ = client.communicate(timeout=20)
    assert client.returncode == 0
    summary = json.loads(out.splitlines()[-1])["summary"]
    assert summary["acknowledged"] == summary["words"] >= 3


def test_the_client_program_gives_up_on_a_silent_guest() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        argv = [sys.executable, "-m", "understudy_qemu.demo.client", "--host", "127.0.0.1"]
        argv += ["--port", str(silent.getsockname()[1]), "--timeout-s", "0.2"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    assert not summary["connection_kept"]
    assert "no reply for 0.2 s" in summary["problems"][0]
