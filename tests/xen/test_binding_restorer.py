"""Domains made from streams by libxl in a process of its own, and what is left of one that was killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.testbeds.xen.guests import tiny
from understudy_xen.libs import (
    LibxlFailed,
    Precopy,
    PrecopyStats,
    RestorerLost,
    Suspender,
    Way,
    Xen,
    open_xen,
    save,
)
from understudy_xen.restorer.client import Restorer, once
from understudy_xen.streams.formats import LibxlType
from understudy_xen.streams.writer import checkpoint, joined, libxl_header, record
from understudy_xen.xenstore import XenStore

pytestmark = [pytest.mark.xen(inside=True), pytest.mark.timeout(300)]

PATIENT_S = 120.0  # the bed shares its processors
COUNTER = 0x200000  # where the tiny guest counts


@dataclass(frozen=True)
class Saved:
    """A guest in a file: its configuration, and a stream of libxl's with two checkpoints."""

    config: str
    stream: bytes
    checkpoint_ends: tuple[int, ...]


class _Checkpoints:
    # Callbacks that write libxl's part between libxenguest's.

    def __init__(self, suspender: Suspender, fd: int, count: int) -> None:
        self.ends: list[int] = []
        self._suspender = suspender
        self._fd = fd
        self._count = count

    def suspend(self) -> None:
        self._suspender.suspend(timeout_s=PATIENT_S)

    def precopy(self, stats: PrecopyStats) -> Precopy:
        return Precopy.STOP if stats.iteration else Precopy.CONTINUE

    def postcopy(self) -> None:
        self._suspender.resume()

    def checkpoint(self) -> bool:
        os.write(self._fd, joined(checkpoint()))
        self.ends.append(os.lseek(self._fd, 0, os.SEEK_CUR))
        return len(self.ends) < self._count

    def wait_checkpoint(self) -> bool:
        raise NotImplementedError

    def switch_qemu_logdirty(self, domid: int, *, enable: bool) -> None:
        pass


@pytest.fixture(scope="module")
def xen() -> Iterator[Xen]:
    with open_xen() as xen:
        yield xen


@pytest.fixture(scope="module")
def saved(xen: Xen) -> Saved:
    config = Path("/run/tiny.cfg")
    config.write_text(tiny())
    subprocess.run(
        ["xl", "create", config],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=120,
    )
    domid = int(subprocess.run(["xl", "domid", "tiny"], check=True, capture_output=True, timeout=60).stdout)

    async def configuration() -> str:
        async with once() as restorer:
            return await restorer.config(domid, timeout_s=PATIENT_S)

    text = asyncio.run(configuration())
    place = Path("/run/tiny.stream")
    with place.open("wb", buffering=0) as file, Suspender(xen, domid, way=Way.OUTSIDE) as suspender:
        file.write(libxl_header() + joined(record(LibxlType.LIBXC_CONTEXT)))
        callbacks = _Checkpoints(suspender, file.fileno(), 2)
        save(xen, domid, file.fileno(), callbacks)
    subprocess.run(["xl", "destroy", str(domid)], check=True, timeout=60)
    stream = place.read_bytes()
    place.unlink()
    return Saved(text, stream, tuple(callbacks.ends))


def fresh(saved: Saved) -> tuple[str, uuid.UUID]:
    """Return the configuration under a UUID of its own, by which the domain is found."""
    config, known = json.loads(saved.config), uuid.uuid4()
    config["c_info"]["uuid"] = str(known)
    return json.dumps(config), known


def write_all(fd: int, data: bytes, *, close: bool = True) -> threading.Thread:
    def write() -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except BrokenPipeError:
            pass  # that is what some tests are about
        if close:
            os.close(fd)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.fixture
async def restorer() -> AsyncIterator[tuple[Restorer, int]]:
    reading, writing = os.pipe()
    async with await Restorer.start(stream_fd=reading, timeout_s=PATIENT_S) as restorer:
        yield restorer, writing


async def left_in_xenstore(domid: int) -> list[str]:
    async with await XenStore.open(deadline_s=PATIENT_S) as store:
        bases = (f"/local/domain/{domid}", f"/libxl/{domid}")
        return [base for base in bases if await store.get(base) is not None]


async def test_a_domain_from_its_last_checkpoint(
    xen: Xen, saved: Saved, restorer: tuple[Restorer, int]
) -> None:
    process, stream = restorer
    config, known = fresh(saved)
    progress: list[tuple[str, int, int]] = []
    process.on_progress = lambda *step: progress.append(step)
    # The stream ends after the second checkpoint, as it does when the primary's host dies.
    writing = write_all(stream, saved.stream[: saved.checkpoint_ends[1]])
    domid = await process.restore(config, checkpointed=True, name="tiny--incoming", timeout_s=PATIENT_S)
    writing.join()
    info = xen.domain(domid)
    assert info
    assert (info.uuid, info.paused, info.shutdown) == (known, True, None)
    async with await XenStore.open(deadline_s=PATIENT_S) as store:
        assert await store.read(f"/local/domain/{domid}/name") == "tiny--incoming"
        await process.rename(domid, "tiny--incoming", "tiny", timeout_s=PATIENT_S)
        assert await store.read(f"/local/domain/{domid}/name") == "tiny"
    assert info.cpu_ns == (xen.domain(domid) or info).cpu_ns
    began = time.monotonic()
    await process.unpause(domid, timeout_s=PATIENT_S)
    print(f"unpause: {(time.monotonic() - began) * 1e3:.0f} ms")  # noqa: T201 - a figure for the report
    until = time.monotonic() + PATIENT_S
    while (now := xen.domain(domid)) and now.cpu_ns <= info.cpu_ns:
        assert time.monotonic() < until, "it does not run"
        await asyncio.sleep(0.05)
    await process.destroy(domid, timeout_s=PATIENT_S)
    assert not xen.find(known)
    assert not await left_in_xenstore(domid)
    await process.close(timeout_s=PATIENT_S)


async def test_the_processs_end_leaves_a_domain_that_was_made(xen: Xen, saved: Saved) -> None:
    config, known = fresh(saved)
    reading, writing = os.pipe()
    async with await Restorer.start(stream_fd=reading, timeout_s=PATIENT_S) as process:
        write_all(writing, saved.stream[: saved.checkpoint_ends[0]])
        domid = await process.restore(config, checkpointed=True, timeout_s=PATIENT_S)
    (info,) = xen.find(known)
    assert info.domid == domid
    assert info.paused
    async with once() as another:
        await another.destroy(domid, timeout_s=PATIENT_S)
    assert not xen.find(known)


@pytest.mark.parametrize("stream", [b"", b"garbage", b"garbage" * 1000], ids=["nothing", "little", "much"])
async def test_what_is_no_stream_is_refused_and_leaves_nothing(
    xen: Xen, saved: Saved, restorer: tuple[Restorer, int], stream: bytes
) -> None:
    process, writing = restorer
    config, known = fresh(saved)
    write_all(writing, stream)
    try:
        with pytest.raises((LibxlFailed, RestorerLost)) as caught:
            await process.restore(config, checkpointed=True, timeout_s=30)
    finally:
        await process.kill()
    print(caught.value)  # noqa: T201 - libxl's words, for the report
    for info in xen.find(known):
        async with once() as another:
            await another.destroy(info.domid, timeout_s=PATIENT_S)
    assert not xen.find(known)


async def test_a_stream_cut_in_its_first_copy_fails_and_leaves_nothing(
    xen: Xen, saved: Saved, restorer: tuple[Restorer, int]
) -> None:
    process, writing = restorer
    config, known = fresh(saved)
    write_all(writing, saved.stream[: saved.checkpoint_ends[0] // 2])
    with pytest.raises(LibxlFailed) as caught:
        await process.restore(config, checkpointed=True, timeout_s=PATIENT_S)
    assert caught.value.operation == "libxl_domain_create_restore"
    assert caught.value.name == "ERROR_FAIL"
    assert caught.value.said
    assert not xen.find(known)


async def test_a_configuration_that_is_none(saved: Saved, restorer: tuple[Restorer, int]) -> None:
    process, writing = restorer
    os.close(writing)
    with pytest.raises(LibxlFailed, match="libxl_domain_config_from_json"):
        await process.restore("{ no JSON", checkpointed=True, timeout_s=PATIENT_S)


async def test_killed_in_the_middle_and_nothing_is_left_after_the_cleaning(
    xen: Xen, saved: Saved, restorer: tuple[Restorer, int]
) -> None:
    process, writing = restorer
    config, known = fresh(saved)
    # All of the first checkpoint and a part of the second: libxl waits for the rest.
    write_all(writing, saved.stream[: saved.checkpoint_ends[0] + 1000], close=False)
    restoring = asyncio.create_task(process.restore(config, checkpointed=True))
    until = time.monotonic() + PATIENT_S
    while not helpers() or not xen.find(known):
        assert time.monotonic() < until, "libxl did not begin"
        await asyncio.sleep(0.05)
    await process.kill()
    with pytest.raises(RestorerLost):
        await restoring
    assert not helpers()  # its children, too
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    os.close(writing)
    (info,) = xen.find(known)
    assert info.paused or not info.running
    async with once() as another:
        await another.destroy(info.domid, timeout_s=PATIENT_S)
    assert not xen.find(known)
    assert not await left_in_xenstore(info.domid)


async def test_a_process_that_was_killed_by_somebody_else_is_noticed(restorer: tuple[Restorer, int]) -> None:
    process, writing = restorer
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RestorerLost):
        await process.config(0, timeout_s=PATIENT_S)
    with pytest.raises(RestorerLost):
        await process.unpause(0, timeout_s=PATIENT_S)
    os.close(writing)


async def test_a_domain_that_is_not_there() -> None:
    async with once() as process:
        with pytest.raises(LibxlFailed) as caught:
            await process.destroy(4711, timeout_s=PATIENT_S)
        assert (caught.value.operation, caught.value.domid) == ("libxl_domain_destroy", 4711)
        assert caught.value.name == "ERROR_DOMAIN_NOTFOUND"


def helpers() -> list[int]:
    """Return the running libxl-save-helpers."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdecimal() and b"libxl-save-helper" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return found
