"""The agent's side of the restorer, before a process without libxl."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.unit.xen.link import descriptors
from understudy_xen.libs import LibxlFailed, RestorerLost
from understudy_xen.restorer.client import Restorer

SOON_S = 5.0  # half of what a process is given to be killed


async def test_what_keeps_its_standard_error_open_is_not_waited_for(
    restorer_is: Callable[[str], None],
) -> None:
    restorer_is("leaves")
    before = descriptors()
    begun = time.monotonic()
    restorer = await Restorer.start()
    await restorer.unpause(8)
    await restorer.close()
    assert time.monotonic() - begun < SOON_S
    await asyncio.sleep(0)
    assert not {each for each in descriptors() - before if "eventpoll" not in each}


async def test_the_last_words_are_told_of_one_that_leaves_a_process(
    restorer_is: Callable[[str], None],
) -> None:
    restorer_is("leaves")
    async with await Restorer.start() as restorer:
        begun = time.monotonic()
        with pytest.raises(RestorerLost, match="exit status 3; its last words: libxl: assertion failed"):
            await restorer.rename(8, "die", "now")
        assert time.monotonic() - begun < SOON_S


async def test_what_it_has_started_ends_with_it_and_its_number_is_not_used_later(
    restorer_is: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    restorer_is("breeds")
    restorer = await Restorer.start()
    with pytest.raises(RestorerLost):
        await restorer.rename(8, "die", "now")
    async with asyncio.timeout(SOON_S):
        with suppress(ProcessLookupError):
            while True:
                os.killpg(restorer.pid, 0)
                await asyncio.sleep(0.01)
    asked: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: asked.append(group))
    await restorer.kill()
    assert not asked  # by now it may be the number of another group


async def test_libxls_failure_and_its_words(restorer_is: Callable[[str], None]) -> None:
    restorer_is("refuses")
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        async with await Restorer.start(stream_fd=reading) as restorer:
            with pytest.raises(LibxlFailed, match="no such bridge"):
                await restorer.restore("{}", checkpointed=True)
    finally:
        os.close(writing)
