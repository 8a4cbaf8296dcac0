from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy_xen.xenstore import Watch, XenStoreLost


async def drain(watch: Watch) -> list[str]:
    paths = []
    while (path := await watch.next(0)) is not None:
        paths.append(path)
    return paths


async def test_paths_come_in_order_each_once() -> None:
    watch = Watch("/w")
    for path in ("/w", "/w/a", "/w/b", "/w/a", "/w/a"):
        watch.tell(path)
    assert await drain(watch) == ["/w", "/w/a", "/w/b"]
    assert not watch.collapses


async def test_a_path_that_was_taken_comes_again_when_it_changes_again() -> None:
    watch = Watch("/w")
    watch.tell("/w/a")
    assert await anext(watch) == "/w/a"
    watch.tell("/w/a")
    assert await anext(watch) == "/w/a"


async def test_too_many_become_the_watched_one() -> None:
    watch = Watch("/w", kept=3)
    for path in ("/w/a", "/w/b", "/w/c", "/w/d"):
        watch.tell(path)
    assert await drain(watch) == ["/w"]
    assert watch.collapses == 1


@given(st.lists(st.sampled_from("abcdefg"), max_size=40), st.integers(1, 4))
def test_no_change_is_lost_and_no_more_is_kept_than_was_said(names: list[str], kept: int) -> None:
    async def run() -> list[str]:
        watch = Watch("/w", kept=kept)
        for name in names:
            watch.tell(f"/w/{name}")
            assert len(watch._waiting) <= kept
        return await drain(watch)

    paths = asyncio.run(run())
    for name in set(names):
        assert f"/w/{name}" in paths or "/w" in paths


async def test_who_waits_is_woken() -> None:
    watch = Watch("/w")
    waiting = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)
    watch.tell("/w/a")
    assert await waiting == "/w/a"


async def test_nothing_in_time() -> None:
    assert await Watch("/w").next(0.001) is None


async def test_a_lost_connection_ends_it_for_good() -> None:
    watch = Watch("/w")
    watch.tell("/w")
    watch.lose(XenStoreLost("gone"))
    for _ in range(2):
        with pytest.raises(XenStoreLost, match="gone"):
            await anext(watch)
