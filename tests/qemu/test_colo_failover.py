"""The eight cases of QEMU's own COLO failover test, put to this plugin's domains and real processes.

{one stream, multifd} x {the primary survives, the secondary survives} x {between, during a checkpoint}: checkpoints
every 300 ms, three of them, then the stream is cut out of band and the survivor is told; its console goes on.

QEMU's multifd cannot run over a descriptor, and on QEMU 7.2 it writes pages past COLO's cache of the guest's memory
and so corrupts the copy. The domains switch it off for a session whatever the guest had, and on again afterwards; the
multifd cases show that, and that the failover is then that of one stream.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.qemu.pair import Host, Session, need_qemu
from understudy.device import Mode
from understudy_qemu.accel import Accel
from understudy_qemu.running import Qemu

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

MOMENTS = pytest.mark.parametrize("during", [False, True], ids=["between", "during"])
STREAMS = pytest.mark.parametrize("multifd", [False, True], ids=["plain", "multifd"])


@pytest_asyncio.fixture
async def session(tmp_path: Path) -> AsyncIterator[Session]:
    need_qemu()
    alpha, beta = (
        Host("alpha", tmp_path / "alpha", Accel.TCG, 1),
        Host("beta", tmp_path / "beta", Accel.TCG, 1),
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(alpha.kill)
        stack.push_async_callback(beta.kill)
        await alpha.start()
        made = Session(alpha, beta, mode=Mode.COLO, delay_ms=300)
        stack.push_async_callback(made.close)
        yield made


async def set_multifd(qemu: Qemu, *, on: bool) -> None:
    entry = {"capability": "multifd", "state": on}
    await qemu.monitor.execute("migrate-set-capabilities", {"capabilities": [entry]})


async def has_multifd(qemu: Qemu) -> bool:
    entries = await qemu.monitor.execute("query-migrate-capabilities")
    return any(entry["state"] for entry in entries if entry["capability"] == "multifd")


async def three_checkpoints(session: Session, *, multifd: bool) -> None:
    await set_multifd(session.running, on=multifd)
    await session.open()
    await session.replicate()
    assert not await has_multifd(session.running)
    assert not await has_multifd(session.secondary.qemu)
    await session.ack(3)


async def reach(session: Session, *, during: bool) -> None:
    """Wait for a moment between two checkpoints, or for one that has begun and is not acknowledged."""
    async with session.running.monitor.events("STOP", "RESUME") as events:
        async for event in events:
            if event.name == ("STOP" if during else "RESUME"):
                return


@MOMENTS
@STREAMS
async def test_primary_failover(session: Session, multifd: bool, during: bool) -> None:
    await three_checkpoints(session, multifd=multifd)
    await reach(session, during=during)
    await session.go_on_alone()
    assert await session.running.status() == "running"
    assert await has_multifd(session.running) is multifd
    await session.alpha.counts_on(5)


@MOMENTS
@STREAMS
async def test_secondary_failover(session: Session, multifd: bool, during: bool) -> None:
    await three_checkpoints(session, multifd=multifd)
    await reach(session, during=during)
    loaded = await session.secondary.sever("test")
    assert loaded >= 3
    await session.fail_over()
    assert await session.secondary.qemu.status() == "running"
    await session.beta.counts_on(5)
    # The old primary waits for a decision; nothing of what it does now is acknowledged or leaves.
    await asyncio.wait_for(session.primary.freeze(), 10)


async def test_multifd_does_not_take_a_descriptor(session: Session) -> None:
    """Why multifd has to be off: QEMU itself refuses it over the sockets that we make."""
    await set_multifd(session.running, on=True)
    near, far = socket.socketpair()
    with near, far:
        await session.running.monitor.give_fd("stream", near.fileno())
        try:
            await session.running.monitor.execute("migrate", {"uri": "fd:stream"})
        except Exception as error:  # noqa: BLE001 - how QEMU says it differs by version
            said = str(error)
        else:
            answer = await session.running.monitor.execute("query-migrate")
            assert answer["status"] != "active"
            said = answer.get("error-desc", "") + session.running.process.last_words()
    assert "multifd" in said or "multi-channel" in said
    await set_multifd(session.running, on=False)
    await session.alpha.counts_on(2)
