"""A copy is promoted with the disks of the checkpoint that its memory holds."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tests.unit.device_fakes import FakeWorld
from tests.unit.xen import link
from understudy.arbiter import Record, RecordState
from understudy.device import ReplicationMode
from understudy.group import DeviceGroup
from understudy.services import Channels
from understudy_xen.guestfile import XenConfig
from understudy_xen.hypervisor import XenHypervisor
from understudy_xen.streams.writer import preamble
from understudy_xen.wire import Coding

TINY = Path(__file__).with_name("tiny-pvh.json")
WON = Record("web", 5, RecordState.PROMOTING, "beta", "alpha", "s1", "alpha", "a5")


class Primary:
    """The primary's end of a session: says the first copy and two checkpoints, and hears the answers."""

    def __init__(self) -> None:
        config = json.loads(TINY.read_text())
        config["c_info"] |= {"name": "web", "uuid": str(uuid.uuid4())}
        said = preamble(json.dumps(config).encode()) + b"".join(link.stream(2).parts)
        self._sock, self.theirs = socket.socketpair()
        self._sock.sendall(link.said(said, Coding.PLAIN))
        self._listener = link.Listener(self._sock)

    async def accept(self, _channel: str, *, timeout_s: float) -> socket.socket:
        assert timeout_s > 0
        return self.theirs

    def hear(self, count: int) -> None:
        assert len(self._listener.next(count)) == count

    def close(self) -> None:
        self._sock.close()


@pytest.mark.parametrize("told", [2, 1])
async def test_the_disks_are_those_of_the_memory_also_if_they_were_not_told_of_it(
    hypervisor: XenHypervisor, config: XenConfig, restorer_is: Callable[[str], None], told: int
) -> None:
    restorer_is("reads")
    world = FakeWorld({"disk0": {}})
    group = await DeviceGroup.open(world.setup(side=ReplicationMode.SECONDARY))
    primary = Primary()
    secondary = await hypervisor.secondary(config, {})
    await secondary.launch(group)
    await secondary.receive(cast("Channels", primary), group)
    primary.hear(3)
    for epoch in range(1, told + 1):
        await group.do_checkpoint_all(epoch)
    primary.close()  # it dies, and with it what it was about to say
    assert await secondary.sever("a test") == 2
    await secondary.promote(group, WON)
    done = [step for step in world.journal.of("disk0") if not step.endswith("done")]
    assert done == ["open", "start secondary", "checkpoint 1", "checkpoint 2", "stop failover"]
    await secondary.close()
