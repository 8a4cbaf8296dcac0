"""The embedded arbiter: compare-and-swap by link alone, raced by many processes, some of them killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.arbiter import Record, RecordState, following
from understudy.arbiter_directory import DirectoryArbiter, _Guest, _names_in, understudy_arbiters
from understudy.errors import ArbiterError, ArbiterUnavailable, ConfigError

LONG = os.environ.get("UNDERSTUDY_ROUNDS") == "long"


def first(guest: str = "web", attempt: str = "1", host: str = "alpha") -> Record:
    return following(
        None, guest=guest, state=RecordState.ALONE, owner=host, writer=host, attempt=attempt, reason="test"
    )


async def test_swap_read_history(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path / "made" / "by it")
    assert await arbiter.read("web") is None
    assert await arbiter.history("web") == []
    assert await arbiter.guests() == []
    won, one = await arbiter.swap(None, first())
    assert won
    assert one is not None
    assert one.generation == 1
    assert one.written_at
    won, two = await arbiter.swap(one, following(one, attempt="2"))
    assert won
    assert await arbiter.read("web") == two
    assert await arbiter.history("web") == [one, two]
    assert await arbiter.guests() == ["web"]


async def test_repeat_of_a_swap_that_won_answers_won(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path)
    _, one = await arbiter.swap(None, first())
    desired = following(one, attempt="2")
    answers = [await arbiter.swap(one, desired) for _ in range(3)]
    assert all(won for won, _ in answers)
    assert len({record for _, record in answers}) == 1
    assert len(await arbiter.history("web")) == 2


async def test_a_swap_from_an_older_record_loses_and_is_told_what_counts(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path)
    _, one = await arbiter.swap(None, first())
    _, two = await arbiter.swap(one, following(one, attempt="2"))
    won, current = await arbiter.swap(one, following(one, attempt="3"))
    assert not won
    assert current == two
    won, current = await arbiter.swap(None, first(attempt="4", host="beta"))
    assert not won
    assert current == two


async def test_the_same_generation_with_other_content_is_not_expected(tmp_path: Path) -> None:
    # A standby of another session may know generation 1 by number; that is not enough.
    arbiter = DirectoryArbiter(tmp_path)
    _, one = await arbiter.swap(None, first())
    assert one is not None
    other = replace(one, attempt="somebody else's")
    won, current = await arbiter.swap(other, following(other, attempt="2"))
    assert not won
    assert current == one


async def test_pruning_keeps_the_newest_and_never_lets_a_stale_swap_win(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path, keep=3)
    _, one = await arbiter.swap(None, first())
    current = one
    for number in range(2, 60):
        _, current = await arbiter.swap(current, following(current, attempt=str(number)))
    assert current is not None
    kept = await arbiter.history("web")
    assert kept[-1] == current
    assert 3 <= len(kept) <= 3 + 16
    won, answer = await arbiter.swap(one, following(one, attempt="late"))
    assert not won
    assert answer == current
    # The slowest of all: it checked long ago and only now links its file into the hole.
    guest = _Guest(tmp_path, "web")
    guest._publish(2, following(one, attempt="late").to_json())
    assert await arbiter.read("web") == current
    assert await arbiter.history("web") == kept
    assert not any(name.name.endswith("0002.json") for name in guest.path.iterdir())


async def test_a_link_into_a_hole_whose_writer_died_counts_for_nothing(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path, keep=3)
    _, current = await arbiter.swap(None, first())
    for number in range(2, 40):
        _, current = await arbiter.swap(current, following(current, attempt=str(number)))
    kept = await arbiter.history("web")
    guest = _Guest(tmp_path, "web")
    guest._link(f"{2:020d}.json", json.dumps(first().to_json()).encode())
    assert await arbiter.read("web") == current
    assert await arbiter.history("web") == kept


class _EndsEarly(_Guest):
    """Listings as QEMU's 9p server gives them beside a writer: without their ends, or without anything."""

    told: ClassVar[list[int]] = []  #: how many names of each listing, in order; then all of them

    def _names(self) -> list[str]:
        names = sorted(super()._names())  # numbers come before "tmp-"
        return names[: self.told.pop(0)] if self.told else names


async def test_a_listing_that_ends_early_is_not_believed(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path)
    _, current = await arbiter.swap(None, first())
    for number in range(2, 6):
        _, current = await arbiter.swap(current, following(current, attempt=str(number)))
    guest = _EndsEarly(tmp_path, "web")
    for told in ([0], [0, 0, 0], [1], [3, 0, 2]):
        guest.told[:] = told
        assert guest.read() == current
        assert guest.told == []
    guest.told[:] = [0, 2]
    won, six = guest.exchange(current, following(current, attempt="6"))
    assert won
    assert six is not None
    assert six.generation == 6
    guest.told[:] = [0] * 16
    with pytest.raises(ArbiterUnavailable, match="16 listings in a row"):
        guest.read()


def test_a_listing_is_whole_or_fails(tmp_path: Path) -> None:
    names = {f"{number:0200d}" for number in range(400)} | {
        "\udcff\u00e4"
    }  # more than one answer of the kernel
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "gone").mkdir()
    for place, expected in ((tmp_path, names | {"gone"}), (tmp_path / "gone", set())):
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert set(_names_in(handle)) == expected
        finally:
            os.close(handle)
    handle = os.open(tmp_path / "gone", os.O_RDONLY | os.O_DIRECTORY)
    (tmp_path / "gone").rmdir()
    try:
        assert os.listdir(handle) == []  # noqa: PTH208 - the C library takes ENOENT for the end
        with pytest.raises(FileNotFoundError):
            _names_in(handle)
    finally:
        os.close(handle)


async def test_a_listing_that_the_kernel_gives_up_is_not_believed(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path)
    _, current = await arbiter.swap(None, first())
    failures = [FileNotFoundError()] * 3

    class GivesUp(_Guest):
        def _names(self) -> list[str]:
            if failures:
                raise failures.pop()
            return super()._names()

    assert GivesUp(tmp_path, "web").read() == current
    assert [place.name for place in (tmp_path / "g-web").iterdir()] == ["00000000000000000001.json"]


async def test_a_listing_without_the_newest_generations_is_completed_by_name(tmp_path: Path) -> None:
    class Lacks(_Guest):
        def _names(self) -> list[str]:
            return [name for name in super()._names() if not name.endswith(("4.json", "5.json"))]

    arbiter = DirectoryArbiter(tmp_path)
    _, current = await arbiter.swap(None, first())
    for number in range(2, 6):
        _, current = await arbiter.swap(current, following(current, attempt=str(number)))
    assert Lacks(tmp_path, "web").read() == current


async def test_a_directory_that_lacks_all_above_its_floor_is_no_arbiter(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path, keep=3)
    _, current = await arbiter.swap(None, first())
    for number in range(2, 17):
        _, current = await arbiter.swap(current, following(current, attempt=str(number)))
    for place in (tmp_path / "g-web").glob("*.json"):
        place.unlink()
    assert [place.name for place in (tmp_path / "g-web").iterdir()] == ["00000000000000000013.floor"]
    with pytest.raises(ArbiterUnavailable, match="no generation was above the floor, 13"):
        _Guest(tmp_path, "web").read()


async def test_debris_is_ignored_and_old_debris_removed(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path, keep=3)
    _, current = await arbiter.swap(None, first())
    directory = tmp_path / "g-web"
    young, old = directory / "tmp-young", directory / "tmp-old"
    young.write_text("{half")
    old.write_text("")
    os.utime(old, (1, 1))
    for number in range(2, 34):
        _, current = await arbiter.swap(current, following(current, attempt=str(number)))
    assert young.exists()
    assert not old.exists()
    assert await arbiter.read("web") == current


async def test_a_hung_directory_is_no_answer_and_holds_nobody_up(tmp_path: Path) -> None:
    # A FIFO in the place of a record: opening it blocks in the kernel, as a dead NFS server does.
    directory = tmp_path / "g-web"
    directory.mkdir()
    os.mkfifo(directory / f"{1:020d}.json")
    arbiter = DirectoryArbiter(tmp_path, timeout_s=0.05)
    for _ in range(4):
        with pytest.raises(ArbiterUnavailable, match="no answer within"):
            await arbiter.read("web")
    with pytest.raises(ArbiterUnavailable, match="4 earlier calls still hang"):
        await arbiter.read("web")
    # The server comes back: the threads finish and the arbiter answers again.
    (directory / "real").write_text(json.dumps(first().to_json()))
    for _ in range(200):
        try:
            handle = os.open(directory / f"{1:020d}.json", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            break
        os.write(handle, (directory / "real").read_bytes())
        os.close(handle)
        await asyncio.sleep(0.005)
    (directory / f"{1:020d}.json").unlink()
    (directory / "real").rename(directory / f"{1:020d}.json")
    arbiter.timeout_s = 5.0
    while arbiter._threads.hung:  # noqa: ASYNC110 - threads, not tasks, are waited for
        await asyncio.sleep(0.005)
    assert await arbiter.read("web") is not None


async def test_many_guests_may_ask_at_once(tmp_path: Path) -> None:
    # A host with many guests decides about all of them at the same moment.
    arbiter = DirectoryArbiter(tmp_path, timeout_s=30)
    answers = await asyncio.gather(*(arbiter.swap(None, first(f"guest{number}")) for number in range(24)))
    assert all(won for won, _ in answers)


async def test_calls_that_were_given_up_count_as_hung(tmp_path: Path) -> None:
    directory = tmp_path / "g-web"
    directory.mkdir()
    fifo = directory / f"{1:020d}.json"
    os.mkfifo(fifo)
    arbiter = DirectoryArbiter(tmp_path, timeout_s=30)
    for _ in range(4):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(arbiter.read("web"), 0.05)
    with pytest.raises(ArbiterUnavailable, match="4 earlier calls still hang"):
        await arbiter.read("web")
    # Opening it lets the threads in, its closing ends their reading.
    handle = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    fifo.unlink()
    os.close(handle)
    while arbiter._threads.hung:  # noqa: ASYNC110 - threads, not tasks, are waited for
        await asyncio.sleep(0.005)


async def test_a_file_of_somebody_else_is_left_alone_by_pruning(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path, keep=2)
    _, record = await arbiter.swap(None, first())
    (tmp_path / "g-web" / "backup.json").write_text("{}")
    for number in range(2, 33):
        assert record is not None
        won, record = await arbiter.swap(record, following(record, attempt=str(number)))
        assert won
    assert (tmp_path / "g-web" / "backup.json").exists()
    assert len(await arbiter.history("web")) == 2


async def test_an_unusable_directory_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arbiter = DirectoryArbiter(tmp_path / "file")
    with pytest.raises(ArbiterUnavailable):
        await arbiter.swap(None, first())


async def test_a_damaged_record_is_an_error_not_an_absent_guest(tmp_path: Path) -> None:
    arbiter = DirectoryArbiter(tmp_path)
    await arbiter.swap(None, first())
    (tmp_path / "g-web" / f"{2:020d}.json").write_text("{}")
    with pytest.raises(ArbiterError, match="no record"):
        await arbiter.read("web")
    (tmp_path / "g-web" / f"{3:020d}.json").write_text("[")
    with pytest.raises(ArbiterError, match="damaged"):
        await arbiter.read("web")


@settings(max_examples=60)
@given(st.text(min_size=1, max_size=20))
def test_any_name_becomes_one_name_below_the_root(name: str) -> None:
    root = Path("/root-of-all")
    path = _Guest(root, name).path
    assert path.parent == root
    assert path.name.startswith("g-")
    assert "/" not in path.name
    assert path != _Guest(root, name + "x").path


@pytest.mark.parametrize("name", ["", "ü" * 50])
def test_names_that_are_too_short_or_too_long(name: str) -> None:
    with pytest.raises(ArbiterError, match="name must have"):
        _Guest(Path("/"), name)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans(), st.booleans()), max_size=25))
def test_model(tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, bool, bool]]) -> None:
    # Three swappers, each knowing some record; a move is (who, read first, repeat the last swap instead).
    arbiter = DirectoryArbiter(tmp_path_factory.mktemp("model"), keep=2)

    async def play() -> None:
        model: list[Record] = []
        known: dict[str, Record | None] = dict.fromkeys("abc")
        last: dict[str, tuple[Record | None, Record]] = {}
        for number, (who, fresh, repeat) in enumerate(moves):
            if fresh:
                known[who] = await arbiter.read("web")
                assert known[who] == (model[-1] if model else None)
            old = known[who]
            desired = (
                following(
                    None,
                    guest="web",
                    state=RecordState.ALONE,
                    owner="h",
                    writer="h",
                    attempt=f"{who}{number}",
                )
                if old is None
                else following(old, attempt=f"{who}{number}")
            )
            if repeat and who in last:
                old, desired = last[who]
            last[who] = (old, desired)
            current = model[-1] if model else None
            won, record = await arbiter.swap(old, desired)
            repeated = current is not None and current.identity == desired.identity
            assert won == (repeated or current == old)
            if won and not repeated:
                assert record is not None
                assert record.generation == (current.generation if current else 0) + 1
                model.append(record)
            assert record == (model[-1] if model else None)

    asyncio.run(play())


RACER = """
import asyncio, json, random, sys
from pathlib import Path
from understudy.arbiter import RecordState, following
from understudy.arbiter_directory import DirectoryArbiter

async def main(path, host, swaps, seed):
    arbiter = DirectoryArbiter(Path(path), timeout_s=60, keep=64)
    chance = random.Random(seed)
    log = open(f"{path}/../{host}.log", "a", buffering=1)
    for number in range(swaps):
        old = await arbiter.read("web")
        attempt = f"{host}.{seed}.{number}"
        if old is None:
            new = following(None, guest="web", state=RecordState.ALONE, owner="all", writer="all", attempt=attempt)
        else:
            new = following(old, attempt=attempt)
        print("try", attempt, old.generation if old else 0, file=log)
        won, record = await arbiter.swap(old, new)
        print("won" if won else "lost", attempt, record.generation, file=log)
        if chance.random() < 0.2:
            await arbiter.swap(old, new)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


def _race(tmp_path: Path, racers: int, swaps: int, kills: int, seed: int) -> tuple[dict[int, str], Path]:
    # Returns who won which generation, by the logs of the racers and the files that are left.
    root = tmp_path / "root"
    root.mkdir()
    chance = random.Random(seed)

    def start(number: int, life: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", RACER, str(root), f"h{number}", str(swaps), str(seed * 1000 + life)],
            start_new_session=True,
        )

    processes = {number: start(number, 0) for number in range(racers)}
    try:
        for life in range(1, kills + 1):
            victim = chance.randrange(racers)
            try:
                processes[victim].wait(timeout=chance.uniform(0.05, 0.4))
            except subprocess.TimeoutExpired:
                processes[victim].send_signal(signal.SIGKILL)
                processes[victim].wait()
            processes[victim] = start(victim, life)
        for process in processes.values():
            assert process.wait(timeout=120) == 0
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    winners: dict[int, str] = {}
    for log in tmp_path.glob("*.log"):
        for line in log.read_text().splitlines():
            words = line.split()
            if words[0] == "won" and len(words) == 3:
                assert winners.setdefault(int(words[2]), words[1]) == words[1], line
    return winners, root


def _check(winners: dict[int, str], root: Path) -> int:
    history = asyncio.run(DirectoryArbiter(root).history("web"))
    newest = history[-1].generation
    # No gaps among the records that are kept, and each is the one whose writer was told so.
    assert [r.generation for r in history] == list(range(history[0].generation, newest + 1))
    for record in history:
        assert winners.get(record.generation, record.attempt) == record.attempt
    assert max(winners) <= newest
    return newest


def test_race_of_processes(tmp_path: Path) -> None:
    racers, swaps = (12, 400) if LONG else (6, 40)
    winners, root = _race(tmp_path, racers, swaps, kills=0, seed=1)
    # Nobody was killed, so every generation has exactly one process that was told that it won it.
    assert sorted(winners) == list(range(1, _check(winners, root) + 1))
    assert len(set(winners.values())) == len(winners)


def test_race_of_processes_with_kills(tmp_path: Path) -> None:
    seed = int(os.environ.get("UNDERSTUDY_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    print(f"UNDERSTUDY_SEED={seed}")  # noqa: T201 - pytest shows it with a failure
    racers, swaps, kills = (8, 400, 120) if LONG else (4, 60, 6)
    winners, root = _race(tmp_path, racers, swaps, kills, seed)
    newest = _check(winners, root)
    # A killed process may have won without being told: its generation has no winner in the logs, never two.
    assert newest - len(winners) <= kills


def test_the_offer_checks_its_table(tmp_path: Path) -> None:
    (offer,) = understudy_arbiters()
    assert offer.name == "directory"
    assert isinstance(offer.make({"path": str(tmp_path)}, "alpha"), DirectoryArbiter)
    for table in ({}, {"path": "relative"}, {"path": "/x", "timeout_s": 0}, {"path": "/x", "colour": 1}):
        with pytest.raises(ConfigError, match=r"agent\.toml: arbiter"):
            offer.make(table, "alpha")


class _Interleaved(_Guest):
    """A swapper that somebody else gets ahead of, before or after its own link."""

    when = "before"

    def _link(self, name: str, content: bytes) -> None:
        if self.when == "before":
            self._other()
        super()._link(name, content)
        if self.when == "after":
            self._other()

    def _other(self) -> None:
        other = _Guest(self.path.parent, self.guest)
        current = other.read()
        won, _ = other.exchange(current, following(current, attempt="fast"))
        assert won


async def test_a_swapper_that_was_beaten_to_the_link_is_told_who_won(tmp_path: Path) -> None:
    _, one = await DirectoryArbiter(tmp_path).swap(None, first())
    won, record = _Interleaved(tmp_path, "web").exchange(one, following(one, attempt="slow"))
    assert not won
    assert record is not None
    assert (record.generation, record.attempt) == (2, "fast")


async def test_a_swapper_that_won_and_was_overtaken_at_once_has_won(tmp_path: Path) -> None:
    _, one = await DirectoryArbiter(tmp_path).swap(None, first())
    slow = _Interleaved(tmp_path, "web")
    slow.when = "after"
    won, record = slow.exchange(one, following(one, attempt="slow"))
    assert won
    assert record is not None
    assert (record.generation, record.attempt) == (2, "slow")
    newest = slow.read()
    assert newest is not None
    assert (newest.generation, newest.attempt) == (3, "fast")
    # Asked again later, it is told what counts: its own win is history.
    won, record = _Guest(tmp_path, "web").exchange(one, following(one, attempt="slow"))
    assert not won
    assert record == newest
