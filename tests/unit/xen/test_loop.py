"""The checkpoint loop, with a thread that calls back as libxc does: by order, by its own pace, cut and ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from understudy.device import no_progress
from understudy.errors import HypervisorError, StateError
from understudy_xen.loop import RemusLoop, Taken
from understudy_xen.outlet import Blackhole

SOON_S = 10.0


class Guest:
    """A guest that does what it is asked, and writes down what that was."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def suspend(self) -> None:
        self.steps.append("suspend")

    def resume(self) -> None:
        self.steps.append("resume")

    def records(self) -> Sequence[bytes]:
        return [b"end"]

    def log_dirty(self, *, enable: bool) -> None:
        self.steps.append(f"log dirty {enable}")


def save(fd: int, callbacks: RemusLoop) -> None:
    """Call back as xc_domain_save does of a stream of checkpoints."""
    while True:
        callbacks.suspend()
        callbacks.postcopy()
        if not callbacks.checkpoint():
            return


@pytest.fixture
def guest() -> Guest:
    return Guest()


Make = Callable[..., RemusLoop]


@pytest.fixture
async def make(guest: Guest) -> AsyncIterator[Make]:
    outlet = Blackhole()
    made: list[RemusLoop] = []

    def loop(intact: Callable[[], None] = lambda: None) -> RemusLoop:
        made.append(RemusLoop(guest, outlet, save, intact=intact))
        return made[-1]

    yield loop
    for each in made:
        each.cut("the test has ended")
        await each.join(SOON_S)
    outlet.close()


async def test_it_makes_as_many_as_it_is_asked_for_and_rests(make: Make, guest: Guest) -> None:
    loop = make()
    await loop.copy(None, no_progress)
    told: list[Taken] = []
    await loop.run(0, 3, told.append)
    assert [taken.ack.count for taken in told] == [2, 3, 4]
    assert guest.steps == ["suspend", "resume"] * 4
    assert loop.resting
    assert (await loop.take(5, None)).ack.count == 5
    await loop.end()
    await loop.join(SOON_S)
    assert (loop.failure, loop.busy) == (None, False)
    with pytest.raises(HypervisorError, match="the save has ended: as it was told"):
        await loop.run(0, 1)


async def test_it_rests_when_it_is_told_to_however_often(make: Make, guest: Guest) -> None:
    loop = make()
    await loop.copy(None, no_progress)
    for _ in range(2):
        told: list[Taken] = []
        running = asyncio.ensure_future(loop.run(0.001, 0, told.append))
        async with asyncio.timeout(SOON_S):
            while len(told) < 3:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.001)
            with pytest.raises(HypervisorError, match="another one is under way"):
                await loop.take(1, None)
            loop.rest()
            loop.rest()
            await running
        assert loop.resting
        assert guest.steps[-1] == "resume"


@pytest.mark.parametrize("cut", [False, True])
async def test_a_long_interval_does_not_hold_up_rest_nor_a_cut(make: Make, cut: bool) -> None:
    loop = make()
    await loop.copy(None, no_progress)
    told = asyncio.Event()
    running = asyncio.ensure_future(loop.run(3600, 0, lambda _: told.set()))
    async with asyncio.timeout(SOON_S):
        await told.wait()
        if cut:
            loop.cut("a test")
            with pytest.raises(HypervisorError, match="the checkpoint stream was cut: a test"):
                await running
            await loop.join(SOON_S)
        else:
            loop.rest()
            await running
    assert loop.resting is not cut


async def test_a_checkpoint_that_lacks_pages_never_becomes_whole(make: Make) -> None:
    found: list[str] = []

    def intact() -> None:
        if found:
            raise HypervisorError(found[0])

    loop = make(intact)
    await loop.copy(None, no_progress)
    told: list[Taken] = []
    found.append("another toolstack has begun to save it")
    with pytest.raises(HypervisorError, match="another toolstack"):
        await loop.run(0, 0, told.append)
    await loop.join(SOON_S)
    assert told == []
    assert str(loop.failure) == found[0]


async def test_one_that_nobody_waits_for_any_more_ends_before_the_guest_is_stopped_again(
    make: Make, guest: Guest
) -> None:
    loop = make()
    await loop.copy(None, no_progress)
    told = asyncio.Event()
    running = asyncio.ensure_future(loop.run(0.05, 0, lambda _: told.set()))
    await told.wait()
    running.cancel()
    await loop.join(SOON_S)
    assert "nobody waits for this checkpoint" in str(loop.failure)
    assert guest.steps[-1] == "resume"


async def test_it_is_begun_once(make: Make) -> None:
    loop = make()
    with pytest.raises(HypervisorError, match="the first copy has not been made"):
        await loop.run(0, 1)
    await loop.copy(None, no_progress)
    with pytest.raises(StateError):
        await loop.copy(None, no_progress)
