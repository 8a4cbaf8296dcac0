"""A primary's stream cut at every record boundary and inside records, before a real libxl.

Wherever it is cut, and however it ends, the secondary holds exactly what it has acknowledged: promoted, the guest's
memory is byte for byte that of the last acknowledged checkpoint, and where there is none nothing is promoted. In either
case nothing is left behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import pytest

from tests.testbeds.rounds import LONG
from tests.xen.memory import read_pages
from tests.xen.played import (
    STEP_S,
    Played,
    Primary,
    config_of,
    hypervisor_of,
    left_behind,
    owned,
    processes,
    until,
)
from tests.xen.recorded import BIOS, CHECKPOINTS, NAME, TINY, Point, Recorded, record
from understudy.arbiter import RecordState
from understudy.errors import HypervisorError, StateError
from understudy.hypervisor import DomainEventKind
from understudy_xen import copies, janitor
from understudy_xen.domainconfig import INCOMING
from understudy_xen.hypervisor import XenHypervisor
from understudy_xen.wire import Coding
from understudy_xen.xenstore import XenStore

pytestmark = [pytest.mark.xen(inside=True), pytest.mark.timeout(180)]

LATER: Final = 3  # the checkpoint that is cut everywhere; there is one more behind it
ORPHANED_S: Final = 90.0


class Ending(Enum):
    """What the primary does after the last byte."""

    SILENCE = "silence"  #: its host has died
    END = "end"
    RESET = "reset"


@dataclass(frozen=True)
class Cut:
    """One case."""

    point: Point
    ending: Ending
    coding: Coding = Coding.PLAIN

    def __str__(self) -> str:
        return f"{self.point}-{self.ending.value}{'-coded' if self.coding is Coding.ZSTD else ''}"


#: The records of a checkpoint of a PVH guest, in order; libxl's own are the last.
RECORDS: Final = ("PAGE_DATA", "X86_TSC_INFO", "HVM_CONTEXT", "HVM_PARAMS", "CHECKPOINT", "CHECKPOINT_END")
_PLACES: Final = ("start", "header", "body", "middle", "last")
_EMPTY: Final = ("start", "header", "last")  # without a body
POINTS: Final = (
    *(Point(0, "preamble", place) for place in ("start", "header", "middle", "last")),
    *(Point(0, "header", place) for place in ("start", "middle")),
    *(Point(0, "LIBXC_CONTEXT", place) for place in ("start", "last", "end")),
    *(Point(0, "headers", place) for place in ("middle", "end")),
    *(Point(0, "PAGE_DATA", place) for place in ("start", "header", "body", "middle", "last")),
    Point(0, "HVM_CONTEXT", "middle"),
    *(Point(0, "CHECKPOINT", place) for place in ("start", "last", "end")),
    *(Point(0, "CHECKPOINT_END", place) for place in ("header", "last", "end")),
    *(Point(1, "PAGE_DATA", place) for place in ("header", "middle")),
    *(
        Point(LATER, name, place)
        for name in RECORDS
        for place in (_EMPTY if name.startswith("CHECKPOINT") else _PLACES)
    ),
    Point(LATER, "CHECKPOINT_END", "end"),
    Point(LATER + 1, "PAGE_DATA", "header"),
)
SHORT: Final = (
    Cut(Point(0, "preamble", "middle"), Ending.END),
    Cut(Point(0, "header", "middle"), Ending.END),  # libxl is killed over a domain without a name
    Cut(Point(0, "PAGE_DATA", "middle"), Ending.SILENCE),
    Cut(Point(0, "CHECKPOINT_END", "end"), Ending.SILENCE),
    Cut(Point(LATER, "PAGE_DATA", "middle"), Ending.SILENCE, Coding.ZSTD),
    Cut(Point(LATER, "CHECKPOINT_END", "start"), Ending.SILENCE),  # where libxl's own receiver spins
    Cut(Point(LATER, "CHECKPOINT_END", "end"), Ending.END),
)
REST: Final = (
    *(Cut(point, ending) for point in POINTS for ending in (Ending.SILENCE, Ending.END)),
    *(
        Cut(point, Ending.RESET)
        for point in (
            Point(0, "PAGE_DATA", "middle"),
            Point(0, "CHECKPOINT_END", "end"),
            Point(LATER, "PAGE_DATA", "middle"),
            Point(LATER, "CHECKPOINT_END", "end"),
        )
    ),
    *(
        Cut(Point(number, name, "middle"), Ending.END, Coding.ZSTD)
        for number, name in ((0, "preamble"), (0, "PAGE_DATA"), (1, "PAGE_DATA"), (LATER, "CHECKPOINT_END"))
    ),
)
CUTS: Final = tuple(dict.fromkeys((*SHORT, *REST))) if LONG else SHORT
#: Of a guest with a device model, whose state lies between libxc's CHECKPOINT and libxl's CHECKPOINT_END.
EMULATED_CUTS: Final = (
    Cut(Point(0, "EMULATOR_CONTEXT", "middle"), Ending.END),
    *(Cut(Point(LATER, "EMULATOR_CONTEXT", place), Ending.SILENCE) for place in _PLACES),
    Cut(Point(LATER, "CHECKPOINT_END", "start"), Ending.END),
    Cut(Point(LATER, "CHECKPOINT_END", "end"), Ending.SILENCE),
)


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return record(Path("/run/tiny.stream"), TINY)


@pytest.fixture(scope="module")
def emulated() -> Recorded:
    return record(Path("/run/bios.stream"), BIOS)


@pytest.fixture(scope="module")
def hypervisor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    hypervisor = hypervisor_of(tmp_path_factory.mktemp("beta"))
    with hypervisor.xen:
        yield hypervisor


@asynccontextmanager
async def nothing_stays(hypervisor: XenHypervisor) -> AsyncIterator[None]:
    """See that there is nothing after the block that was not there before it."""
    before = await left_behind(hypervisor)
    yield
    assert await left_behind(hypervisor) == before


def test_every_record_of_a_checkpoint_is_cut(recorded: Recorded) -> None:
    assert len(recorded.ends) == 1 + CHECKPOINTS
    assert tuple(frame.name for frame in recorded.of_checkpoint(LATER)) == RECORDS
    cuts = {recorded.offset(point) for point in POINTS}
    assert len(cuts) >= 30
    assert cuts >= {at for frame in recorded.of_checkpoint(LATER) for at in (frame.start, frame.end)}
    counts = [recorded.count(number) for number in range(1 + CHECKPOINTS)]
    assert counts == sorted(set(counts)), "the guest did not count between two checkpoints"


@pytest.mark.parametrize("cut", CUTS, ids=str)
async def test_a_cut(cut: Cut, recorded: Recorded, hypervisor: XenHypervisor, tmp_path: Path) -> None:
    await _cut(cut, recorded, hypervisor, tmp_path)


@pytest.mark.long  # a guest with a device model takes a minute to record
@pytest.mark.parametrize("cut", EMULATED_CUTS, ids=str)
async def test_a_cut_before_a_device_model(
    cut: Cut, emulated: Recorded, hypervisor: XenHypervisor, tmp_path: Path
) -> None:
    await _cut(cut, emulated, hypervisor, tmp_path)


async def _cut(cut: Cut, recorded: Recorded, hypervisor: XenHypervisor, directory: Path) -> None:
    at = recorded.offset(cut.point)
    whole = recorded.whole(at)
    began = time.monotonic()
    async with nothing_stays(hypervisor), Played(hypervisor, directory) as played:
        primary = Primary(recorded.stream[:at], torn=recorded.stream[at : at + 3000], coding=cut.coding)
        receiving = played.receive(primary)
        launched = time.monotonic()
        await _end(cut, primary)
        if whole:
            await asyncio.wait([receiving], timeout=STEP_S)
        if cut.ending is Ending.SILENCE and whole:
            # All of it has come; nothing more will, and nobody says so.
            since = at - recorded.ends[whole - 1]
            held = played.copy.held  # type: ignore[attr-defined]
            await until(lambda: len(primary.acks) == whole, f"{whole} acknowledgements")
            if whole > 1 and cut.coding is Coding.PLAIN:
                await until(lambda: _partial(played) == since, f"{since} bytes of the next one; {held}")
        elif cut.ending is not Ending.SILENCE:
            await _noticed(played, whole)
        loaded = await played.copy.sever("cut")
        severed = time.monotonic()
        if cut.ending is not Ending.RESET:
            await primary.over()
            assert [ack.count for ack in primary.acks] == list(range(1, whole + 1))
        assert len(primary.acks) - 1 <= loaded <= max(0, whole - 1)
        assert cut.ending is Ending.RESET or loaded == max(0, whole - 1)
        assert not primary.refusals
        if not whole:
            await asyncio.wait([receiving], timeout=STEP_S)
            with pytest.raises(HypervisorError):
                receiving.result()
        outcome = await _taken_over(played, recorded, loaded) if loaded else await _not_promoted(played)
        promoted = time.monotonic()
        await primary.close()
        async with asyncio.timeout(STEP_S):
            await played.copy.discard()
    print(  # noqa: T201 - the table of a run, with -rP
        f"CUT {cut} offset {at}: {len(primary.acks)} acknowledged, {outcome}; launch {launched - began:.1f} s, "
        f"stream {severed - launched:.1f} s, outcome {promoted - severed:.1f} s, all {time.monotonic() - began:.1f} s"
    )


async def _end(cut: Cut, primary: Primary) -> None:
    async with asyncio.timeout(STEP_S):
        if cut.ending is Ending.END:
            await primary.end()
        elif cut.ending is Ending.RESET:
            await primary.reset()
        elif not cut.point.checkpoint:
            # A part of a first copy is nowhere to be seen; it may have come, or still be on its way.
            await asyncio.sleep(0.3)


async def _noticed(played: Played, whole: int) -> None:
    # The end of the first copy's stream is its failure; a later one is an event.
    receiving = played.receiving
    assert receiving is not None
    await until(receiving.done, "the first copy is whole, or has failed")
    if not receiving.exception():
        await until(lambda: played.told(DomainEventKind.STREAM_LOST), "the end of the stream is noticed")


def _partial(played: Played) -> int:
    held = played.copy.held  # type: ignore[attr-defined]
    return -1 if held is None else int(held.partial_bytes)


async def _not_promoted(played: Played) -> str:
    with pytest.raises(StateError):
        await played.copy.promote(played.group, owned(RecordState.PROMOTING))
    assert await played.hypervisor.find(played.config) is None
    return "not promoted"


async def _taken_over(played: Played, recorded: Recorded, loaded: int) -> str:
    began = time.monotonic()
    async with asyncio.timeout(STEP_S):
        await played.copy.promote(played.group, owned(RecordState.PROMOTING))
    took_s = time.monotonic() - began
    domain = await played.hypervisor.find(played.config)
    assert domain is not None
    assert (domain.info.paused, domain.info.shutdown) == (True, None)
    assert await played.hypervisor.find(played.config, copy=True) is None
    expected = recorded.memory(loaded)
    found = read_pages(domain.domid, expected)
    wrong = [hex(pfn) for pfn, page in expected.items() if found[pfn] != page]
    count = recorded.guest.count
    assert count(found) == recorded.count(loaded)
    assert not wrong, f"pages that are not as at checkpoint {loaded}"
    async with asyncio.timeout(STEP_S):
        await played.copy.open_outlet(owned(RecordState.ALONE))

    def goes_on() -> bool:
        return count(read_pages(domain.domid, [recorded.guest.pfn])) > count(found)

    await until(goes_on, "the guest counts on")
    return f"promoted at {loaded} in {took_s:.2f} s, counter {count(found)}"


async def test_libxls_death_is_told_to_both_sides(
    recorded: Recorded, hypervisor: XenHypervisor, tmp_path: Path
) -> None:
    at = recorded.offset(Point(LATER, "PAGE_DATA", "middle"))
    async with nothing_stays(hypervisor), Played(hypervisor, tmp_path) as played:
        primary = Primary(recorded.stream[:at])
        await played.receive(primary)
        await until(lambda: len(primary.acks) == LATER, "all acknowledgements")
        os.killpg(played.copy._restorer.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        await until(lambda: played.told(DomainEventKind.GONE), "the loss of the copy")
        await until(lambda: primary.refusals, "the refusal")
        assert "libxl" in primary.refusals[0].reason
        primary.more(recorded.stream[at:])
        await primary.over()
        assert len(primary.acks) == LATER  # nothing is acknowledged that nobody can be made of
        assert await played.copy.sever("libxl is dead") == LATER - 1
        with pytest.raises(HypervisorError):
            await played.copy.promote(played.group, owned(RecordState.PROMOTING))
        assert await hypervisor.find(played.config) is None
        await primary.close()


@asynccontextmanager
async def agent_that_holds(checkpoints: int, recorded: Recorded, directory: Path) -> AsyncIterator[None]:
    """Have an agent of its own hold a copy of so many checkpoints, and kill it at the end of the block."""
    stream = directory / "stream"
    stream.write_bytes(recorded.stream[: recorded.offset(Point(checkpoints + 1, "HVM_CONTEXT", "middle"))])
    agent = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.xen.dying_agent", str(stream), str(directory), str(checkpoints)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert agent.stdout is not None
        async with asyncio.timeout(2 * STEP_S):
            assert await agent.stdout.readline() == b"held\n"
        yield
    finally:
        agent.kill()
        await agent.wait()


async def test_a_dead_agents_copy_is_swept(
    recorded: Recorded, hypervisor: XenHypervisor, tmp_path: Path
) -> None:
    config = config_of(hypervisor)
    async with nothing_stays(hypervisor):
        async with agent_that_holds(LATER - 1, recorded, tmp_path):
            pass
        # Nobody has cut the stream: its end alone makes libxl make a domain, which stays a copy, and paused.
        await until(lambda: not processes(), "the restorer has ended by itself", ORPHANED_S)
        copy = await hypervisor.find(config, copy=True)
        assert copy is not None
        assert copy.info.paused
        assert await hypervisor.find(config) is None
        # There is no place for a second one, and whoever tries leaves this one alone.
        second = Played(hypervisor, tmp_path)
        with pytest.raises(HypervisorError, match=NAME + INCOMING):
            await second.__aenter__()
        await second.copy.discard()
        assert await hypervisor.find(config, copy=True) is not None
        async with asyncio.timeout(STEP_S):
            done = await janitor.sweep(hypervisor, config, None)
        assert done == [f"a copy of {NAME} was left on beta: discarded"]
        assert not await janitor.sweep(hypervisor, config, None)


async def test_what_an_agent_and_its_restorer_leave_half_made_is_swept_and_other_copies_are_not(
    recorded: Recorded, hypervisor: XenHypervisor, tmp_path: Path
) -> None:
    config = config_of(hypervisor)
    async with nothing_stays(hypervisor):
        async with agent_that_holds(1, recorded, tmp_path):
            # With libxl's helper, which is in its group.
            (restorer,) = (each for each in processes() if "understudy_xen.restorer" in each)
            os.killpg(int(restorer.split()[0]), signal.SIGKILL)
        await until(lambda: not processes(), "the restorer has ended")
        copy = await hypervisor.find(config, copy=True)
        assert copy is not None
        # As `understudy xen receive` would have it: no agent has noted it.
        await copies.forget(NAME)
        assert not await janitor.sweep(hypervisor, config, None)
        assert await hypervisor.find(config, copy=True) is not None
        # As an agent leaves it that is killed with its restorer right after libxl has made the domain.
        await copies.note(NAME, copy.uuid)
        async with await XenStore.open(deadline_s=STEP_S) as store:
            await store.rm(f"/local/domain/{copy.domid}/name")
        async with asyncio.timeout(STEP_S):
            done = await janitor.sweep(hypervisor, config, None)
        assert done == [f"a copy of {NAME} was left half-made on beta: discarded"]
        assert not hypervisor.xen.find(copy.uuid)


async def test_a_stream_that_comes_after_sever_is_not_taken(
    recorded: Recorded, hypervisor: XenHypervisor, tmp_path: Path
) -> None:
    async with nothing_stays(hypervisor), Played(hypervisor, tmp_path) as played:
        assert await played.copy.sever("before it began") == 0
        primary = Primary(recorded.stream)
        with pytest.raises(HypervisorError, match="severed"):
            await played.receive(primary)
        await primary.over()
        assert not primary.acks
        await primary.close()


async def test_a_second_session_right_after_one_that_was_cut(
    recorded: Recorded, hypervisor: XenHypervisor, tmp_path: Path
) -> None:
    async def session(loaded: int) -> None:
        async with Played(hypervisor, tmp_path) as played:
            primary = Primary(recorded.stream[: recorded.offset(Point(loaded, "CHECKPOINT_END", "end"))])
            await played.receive(primary)
            await until(lambda: len(primary.acks) == loaded + 1, "all acknowledgements")
            assert await played.copy.sever("cut") == loaded
            if loaded:
                await _taken_over(played, recorded, loaded)
            await primary.close()

    async with nothing_stays(hypervisor):
        await session(0)
        await session(CHECKPOINTS)
