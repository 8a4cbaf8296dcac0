"""A copy is promoted with the disks of the checkpoint that its memory holds, and discarded alone."""

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
from tests.unit.xen.hypervisor import Domains, Played
from tests.unit.xen.xenstored import Xenstored
from understudy.arbiter import Record, RecordState
from understudy.device import ReplicationMode
from understudy.errors import HypervisorError
from understudy.group import DeviceGroup
from understudy.hypervisor import SecondaryDomain
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


async def launched(
    hypervisor: XenHypervisor, config: XenConfig, world: FakeWorld | None = None
) -> tuple[DeviceGroup, Primary, SecondaryDomain]:
    """Return a secondary that waits for its primary, the devices of the world, and that primary."""
    world = world or FakeWorld({"disk0": {}})
    group = await DeviceGroup.open(world.setup(side=ReplicationMode.SECONDARY))
    secondary = await hypervisor.secondary(config, {})
    await secondary.launch(group)
    return group, Primary(), secondary


@pytest.mark.parametrize("told", [2, 1])
async def test_the_disks_are_those_of_the_memory_also_if_they_were_not_told_of_it(
    hypervisor: XenHypervisor, config: XenConfig, restorer_is: Callable[[str], None], told: int
) -> None:
    restorer_is("reads")
    world = FakeWorld({"disk0": {}})
    group, primary, secondary = await launched(hypervisor, config, world)
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


async def test_a_domain_that_came_in_the_way_while_the_devices_copied_is_not_destroyed(
    hypervisor: XenHypervisor,
    config: XenConfig,
    restorer_is: Callable[[str], None],
    domains: Domains,
    store: Xenstored,
) -> None:
    restorer_is("reads")
    group, primary, secondary = await launched(hypervisor, config)
    domains[5] = Played(pauses=1)  # an operator's, of 'understudy xen receive'
    store["/local/domain/5/name"] = "web--incoming"
    with pytest.raises(HypervisorError, match="there is a domain web--incoming on alpha already"):
        await secondary.receive(cast("Channels", primary), group)
    primary.close()
    await secondary.discard()
    await secondary.close()
    assert list(domains) == [5]


@pytest.mark.parametrize("name", ["web--incoming", "web"])
async def test_a_copy_is_discarded_by_its_number_whatever_it_is_called_by_now(
    hypervisor: XenHypervisor,
    config: XenConfig,
    restorer_is: Callable[[str], None],
    domains: Domains,
    store: Xenstored,
    name: str,
) -> None:
    restorer_is("reads")
    group, primary, secondary = await launched(hypervisor, config)
    await secondary.receive(cast("Channels", primary), group)
    primary.hear(3)
    primary.close()
    await secondary.sever("a test")
    await secondary.promote(group, WON)
    domains[5], domains[8] = Played(), Played(pauses=1)  # the restorer says that it has made 8
    store["/local/domain/5/name"] = "web" if name != "web" else "web--incoming"
    store["/local/domain/8/name"] = name
    await secondary.discard()
    await secondary.close()
    assert [info.domid for info in hypervisor.xen.domains()] == [5]


@pytest.mark.parametrize(
    ("behaviour", "renamed"),
    [("fragile", False), ("fragile-and-strict", True)],
    ids=["not-renamed", "answer-lost"],
)
async def test_a_copy_gets_its_name_although_the_restorer_ends_before_it_says_so(
    hypervisor: XenHypervisor,
    config: XenConfig,
    restorer_is: Callable[[str], None],
    domains: Domains,
    store: Xenstored,
    behaviour: str,
    renamed: bool,
) -> None:
    restorer_is(behaviour)
    group, primary, secondary = await launched(hypervisor, config)
    await secondary.receive(cast("Channels", primary), group)
    primary.hear(3)
    primary.close()
    await secondary.sever("a test")
    domains[8] = Played(pauses=1)
    store["/local/domain/8/name"] = "web" if renamed else "web--incoming"
    await secondary.promote(group, WON)
    await secondary.open_outlet(WON)
    await secondary.close()
    assert list(domains) == [8]
