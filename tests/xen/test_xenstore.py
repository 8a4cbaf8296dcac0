"""The client against the real xenstored of a dom0, over its socket and over the kernel's device."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.testbeds.rounds import rounds
from tests.unit.xen.xenstore_exchange import Proxy, comparable, converse, differences, dump, load
from understudy_xen.xenstore import (
    BlockingStore,
    Permission,
    Transaction,
    XenStore,
    XenStoreConflict,
    XenStoreLimit,
    XenStoreLost,
    XenStoreSilent,
)

pytestmark = [pytest.mark.xen(inside=True), pytest.mark.timeout(300)]

SOCKET = Path("/run/xenstored/socket")
DEVICE = Path("/dev/xen/xenbus")
WAYS = [pytest.param(SOCKET, id="socket"), pytest.param(DEVICE, id="device")]
BASE = "/understudy-test"
PATIENT_S = 60.0  # the bed shares its processors


@pytest.fixture(autouse=True)
async def clean() -> AsyncIterator[None]:
    yield
    try:
        async with await XenStore.open(SOCKET, deadline_s=PATIENT_S) as store:
            await store.rm(BASE)
    except XenStoreLost:
        pass  # the last test ends xenstored


@pytest.fixture
async def store() -> AsyncIterator[XenStore]:
    async with await XenStore.open(deadline_s=PATIENT_S) as store:
        yield store


@pytest.mark.parametrize("place", WAYS)
async def test_the_conversation(place: Path) -> None:
    async with await XenStore.open(place, deadline_s=PATIENT_S) as store:
        assert store.place == place
        await converse(store)


async def test_the_recording_is_what_a_real_one_says(tmp_path: Path) -> None:
    async with Proxy(tmp_path / "xenstored", SOCKET) as proxy:
        async with await XenStore.open(proxy.place, deadline_s=PATIENT_S) as store:
            await converse(store)
            await store.get("/")  # what was posted before has been answered, too
        said = proxy.said[:-2]
    assert not differences(comparable(load()), comparable(said)), dump(said)


@pytest.mark.parametrize("place", WAYS)
async def test_many_who_raise_one_number_at_once(place: Path) -> None:
    clients, times = 4, rounds(5, 50)
    conflicts = 0

    async def raise_it(transaction: Transaction) -> None:
        nonlocal conflicts
        conflicts += 1
        await transaction.write(f"{BASE}/n", str(int(await transaction.read(f"{BASE}/n")) + 1))

    async def client() -> None:
        async with await XenStore.open(place, deadline_s=PATIENT_S) as store:
            for _ in range(times):
                await store.atomically(raise_it, tries=1000)

    async with await XenStore.open(deadline_s=PATIENT_S) as store:
        await store.write(f"{BASE}/n", "0")
        await asyncio.gather(*(client() for _ in range(clients)))
        assert int(await store.read(f"{BASE}/n")) == clients * times
    assert conflicts > clients * times  # some were broken, and came again


async def test_a_transaction_that_never_succeeds_ends(store: XenStore) -> None:
    await store.write(f"{BASE}/n", "0")

    async def broken(transaction: Transaction) -> None:
        await transaction.read(f"{BASE}/n")
        await store.write(f"{BASE}/n", "1")
        await transaction.write(f"{BASE}/n", "2")

    with pytest.raises(XenStoreConflict):
        await store.atomically(broken, tries=3)
    assert await store.read(f"{BASE}/n") == "1"


async def test_a_storm_of_changes_loses_none(store: XenStore) -> None:
    names = [f"{number:03}" for number in range(rounds(60, 600))]
    await store.mkdir(BASE)
    async with store.watch(BASE, kept=16) as watch:
        async with await XenStore.open(deadline_s=PATIENT_S) as other:
            await asyncio.gather(*(other.write(f"{BASE}/{name}", name) for name in names))
        # Nobody has looked meanwhile. Whoever looks now finds every change that was told.
        seen: set[str] = set()
        while seen != set(names):
            path = await watch.next(PATIENT_S)
            assert path is not None, f"{len(names) - len(seen)} changes were never told"
            seen |= set(await store.directory(BASE)) if path == BASE else {path.removeprefix(f"{BASE}/")}
        assert watch.collapses


async def tool(*argv: str) -> str:
    ended = await asyncio.to_thread(
        subprocess.run, argv, check=True, capture_output=True, text=True, timeout=PATIENT_S
    )
    return str(ended.stdout)


async def test_what_another_tool_writes_is_read(store: XenStore) -> None:
    await tool("xenstore-write", f"{BASE}/by-a-tool", "a b=c")
    assert await store.read(f"{BASE}/by-a-tool") == "a b=c"
    await store.write(f"{BASE}/by-us", "x y=z")
    assert await tool("xenstore-read", f"{BASE}/by-us") == "x y=z\n"


async def test_permissions_are_what_the_tool_says(store: XenStore) -> None:
    await store.mkdir(f"{BASE}/p")
    await store.set_perms(f"{BASE}/p", [Permission.parse(word) for word in ("n0", "r3", "b7")])
    assert "(n0,r3,b7)" in await tool("xenstore-ls", "-p", BASE)


async def test_requests_of_one_moment_are_all_answered(store: XenStore) -> None:
    await asyncio.gather(*(store.write(f"{BASE}/{number}", str(number)) for number in range(50)))
    values = await asyncio.gather(*(store.read(f"{BASE}/{number}") for number in range(50)))
    assert values == [str(number) for number in range(50)]


@pytest.mark.parametrize("place", WAYS)
async def test_the_largest_request_is_taken_and_a_larger_one_never_sent(place: Path) -> None:
    async with await XenStore.open(place, deadline_s=PATIENT_S) as store:
        await store.mkdir(BASE)
        room = (4096 if place == SOCKET else 4080) - len(f"{BASE}/v") - 1
        with pytest.raises(XenStoreLimit):
            await store.write(f"{BASE}/v", "x" * (room + 1))
        await store.write(f"{BASE}/v", "x" * room)
        # The answer has the value alone, so it is within the limit.
        assert await store.read(f"{BASE}/v") == "x" * room


@pytest.mark.parametrize("place", WAYS)
def test_a_thread_asks_without_a_loop(place: Path) -> None:
    with BlockingStore(place, deadline_s=PATIENT_S) as store:
        assert store.read("/local/domain/0/name") == "Domain-0"
        store.write(f"{BASE}/x", "1")
        assert store.write_if(f"{BASE}/x", "1", "2")
        assert not store.write_if(f"{BASE}/x", "1", "3")
        assert store.read(f"{BASE}/x") == "2"
        assert store.get(f"{BASE}/y") is None
        store.watch(BASE, "w")
        assert store.wait(PATIENT_S)  # it is told at once
        assert not store.wait(0)
        store.write(f"{BASE}/x", "4")
        assert store.wait(PATIENT_S)
        assert not store.wait(0.01)


async def test_a_xenstored_that_stands_still_and_goes_on(store: XenStore) -> None:
    pid = _xenstored()
    store.deadline_s = 0.2
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(XenStoreSilent):
            await store.write(f"{BASE}/late", "1")
        assert time.monotonic() - began < 5
    finally:
        os.kill(pid, signal.SIGCONT)
    store.deadline_s = PATIENT_S
    assert await store.read("/local/domain/0/name") == "Domain-0"
    assert (
        await store.read(f"{BASE}/late") == "1"
    )  # it was only slow: nobody may conclude that nothing was done


# The last test of this dom0: a xenstored that has ended is not started again.


async def test_the_end_of_xenstored_is_told_to_all_at_once(store: XenStore) -> None:
    with BlockingStore(SOCKET, deadline_s=PATIENT_S) as blocking:
        async with store.watch(BASE) as watch:
            assert await watch.next(PATIENT_S) == BASE
            waiting = asyncio.create_task(anext(watch))
            os.kill(_xenstored(), signal.SIGKILL)
            with pytest.raises(XenStoreLost):
                await asyncio.wait_for(waiting, 10)
        assert store.lost is not None
        with pytest.raises(XenStoreLost):
            await store.read("/local/domain/0/name")
        with pytest.raises(XenStoreLost):
            blocking.read("/local/domain/0/name")
    with pytest.raises(XenStoreLost, match="xenstored"):
        await XenStore.open(SOCKET)


def _xenstored() -> int:
    return int(Path("/run/xenstored.pid").read_text())
