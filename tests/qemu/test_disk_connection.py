"""The connection of a primary's disk to a host that falls silent: it must never hold QEMU's main loop.

QEMU shakes hands with an NBD server from its main loop, without a deadline: a server that accepts and says nothing
stops the monitor, and the guest with it, until somebody cuts the connection.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.qemu.pair import need_qemu
from tests.qemu.test_replication_driver import Rig
from understudy.errors import HypervisorError

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

NODE = "disk0-nbd"


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    need_qemu()
    rig = Rig(tmp_path)
    try:
        await rig.start([])
        yield rig
    finally:
        await rig.stop()


async def answers(rig: Rig) -> bool:
    """Whether the monitor answers; it has nothing else to do, so it does at once or not at all."""
    try:
        await rig.monitor.execute("query-status", timeout_s=4.0)
    except HypervisorError:
        return False
    return True


# Before QEMU has the socket, while it is handed over, and in the middle of the handshake.
@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.005, 0.5])
async def test_calling_it_off_lets_go_of_the_monitor(rig: Rig, after_s: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        connecting = asyncio.create_task(rig.session.connect(NODE, "127.0.0.1", port, "x", timeout_s=30))
        await asyncio.sleep(after_s)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert await answers(rig)
        assert not rig.session.clients


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.005, 0.5])
async def test_a_cut_lets_go_of_the_monitor(rig: Rig, after_s: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        connecting = asyncio.create_task(rig.session.connect(NODE, "127.0.0.1", port, "x", timeout_s=30))
        await asyncio.sleep(after_s)
        rig.session.cut_clients()
        with pytest.raises(HypervisorError):
            await connecting
        assert await answers(rig)


async def test_after_a_cut_nobody_is_let_in(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        rig.session.cut_clients()
        with pytest.raises(HypervisorError, match="it is cut"):
            await rig.session.connect(NODE, "127.0.0.1", mute.getsockname()[1], "x", timeout_s=30)
    assert await answers(rig)
