"""The library that QEMU needs under TCG: with it checkpoints go on, without it they end in a deadlock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.qemu.pair import Host, Session, need_qemu
from understudy.device import Mode
from understudy.errors import UnderstudyError
from understudy_qemu.accel import Accel

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(180)]

CHECKPOINTS = 40


class BareHost(Host):
    """A host whose QEMU gets no library."""

    async def preload(self) -> Path | None:
        return None


@pytest_asyncio.fixture
async def session(tmp_path: Path, kind: type[Host]) -> AsyncIterator[Session]:
    need_qemu()
    hosts = [kind(name, tmp_path / name, Accel.TCG, 1) for name in ("alpha", "beta")]
    made: Session | None = None
    try:
        await hosts[0].start()
        made = Session(hosts[0], hosts[1], mode=Mode.REMUS)
        await made.open()
        yield made
    finally:
        for host in hosts:
            await host.kill()
        if made is not None:
            await made.close()


async def protect(session: Session, checkpoints: int = CHECKPOINTS) -> int:
    await session.replicate()
    return len(await session.ack(checkpoints))


@pytest.mark.parametrize("kind", [Host])
async def test_checkpoints_go_on(session: Session, kind: type[Host]) -> None:
    assert await protect(session) == CHECKPOINTS


@pytest.mark.parametrize("kind", [BareHost])
async def test_control_without_the_library_qemu_falls_silent(session: Session, kind: type[Host]) -> None:
    # A race between two of QEMU's threads: mostly lost within four checkpoints, once won for forty.
    with pytest.raises((UnderstudyError, TimeoutError)):
        await protect(session, 25 * CHECKPOINTS)
    assert session.running.process.alive
    with pytest.raises(UnderstudyError):
        await session.running.reconnect()
