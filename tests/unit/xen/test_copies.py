"""Copies that an agent has made are told from others, and found although they have no name yet."""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from tests.unit.xen.hypervisor import Domains, Played
from tests.unit.xen.link import said
from tests.unit.xen.xenstored import Xenstored
from understudy.arbiter import Record, RecordState
from understudy.device import ReplicationMode
from understudy.errors import HypervisorError
from understudy.group import DeviceGroup
from understudy.services import Channels
from understudy_xen import copies
from understudy_xen.guestfile import XenConfig
from understudy_xen.hypervisor import XenHypervisor
from understudy_xen.streams.writer import preamble
from understudy_xen.wire import Coding

TINY = Path(__file__).with_name("tiny-pvh.json")
ELSEWHERE = Record("web", 4, RecordState.ALONE, "beta", None, None, "beta", "a4")


@pytest.fixture
def copy(domains: Domains, store: Xenstored) -> Played:
    store["/local/domain/8/name"] = "web--incoming"
    domains[8] = Played()
    return domains[8]


async def test_a_copy_that_no_agent_has_made_stays(
    hypervisor: XenHypervisor, config: XenConfig, domains: Domains, copy: Played
) -> None:
    await copies.note("mail", copy.uuid)
    assert await hypervisor.sweep(config, ELSEWHERE) == []
    await hypervisor.stop(config, force=True, timeout_s=1)
    assert domains[8].pauses == 0


async def test_a_copy_that_an_agent_has_made_is_discarded_and_forgotten(
    hypervisor: XenHypervisor, config: XenConfig, domains: Domains, copy: Played
) -> None:
    await copies.note("web", copy.uuid)
    assert await hypervisor.sweep(config, ELSEWHERE) == ["a copy of web was left on alpha: discarded"]
    assert 8 not in domains
    assert await copies.noted("web") == set()
    assert await hypervisor.sweep(config, ELSEWHERE) == []


async def test_a_copy_that_was_being_promoted_stays_an_agents(
    hypervisor: XenHypervisor, config: XenConfig, domains: Domains, copy: Played
) -> None:
    await copies.note("web", copy.uuid)
    promoting = replace(ELSEWHERE, state=RecordState.PROMOTING, standby="alpha")
    (said,) = await hypervisor.sweep(config, promoting)
    assert "web--incoming is kept for an operator" in said
    assert 8 in domains
    assert await copies.noted("web") == {copy.uuid}


async def test_what_has_no_name_yet_is_found_by_its_uuid(
    hypervisor: XenHypervisor, config: XenConfig, domains: Domains, store: Xenstored
) -> None:
    domains[8] = half_made = Played()
    domains[9] = Played()  # somebody else's
    domains[10] = Played(uuid=half_made.uuid)
    store["/local/domain/10/name"] = "web"  # the guest itself, while this host owns it
    await copies.note("web", half_made.uuid)
    ours = replace(ELSEWHERE, state=RecordState.PROTECTED, owner="alpha", standby="beta")
    assert await hypervisor.sweep(config, ours) == ["a copy of web was left half-made on alpha: discarded"]
    assert sorted(domains) == [9, 10]
    assert await hypervisor.sweep(config, ours) == []


class Link:
    """The primary's end of a session, which sends the beginning of a stream.

    Args:
        known: UUID of the domain.
    """

    def __init__(self, known: uuid.UUID) -> None:
        self.config = json.loads(TINY.read_text())
        self.config["c_info"] |= {"name": "web", "uuid": str(known)}
        self.theirs, self._ours = socket.socketpair()

    async def accept(self, _channel: str, *, timeout_s: float) -> socket.socket:
        assert timeout_s > 0
        self.theirs.sendall(said(preamble(json.dumps(self.config).encode()), Coding.PLAIN))
        return self._ours

    async def start_all(self, _mode: ReplicationMode) -> None:
        """No device needs it."""


async def has_noted(known: set[uuid.UUID]) -> bool:
    return await copies.noted("web") == known


async def until(done: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await done():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


async def test_a_copy_is_noted_before_libxl_makes_it_and_until_its_end(
    hypervisor: XenHypervisor, config: XenConfig, restorer_is: Callable[[str], None]
) -> None:
    restorer_is("reads")
    known = uuid.uuid4()
    link = Link(known)
    secondary = await hypervisor.secondary(config, {})
    await secondary.launch(cast("DeviceGroup", link))
    assert await copies.noted("web") == set()
    receiving = asyncio.ensure_future(secondary.receive(cast("Channels", link), cast("DeviceGroup", link)))
    await until(lambda: has_noted({known}))
    link.theirs.close()
    with pytest.raises(HypervisorError):
        await receiving
    assert await copies.noted("web") == {known}
    await secondary.discard()
    assert await copies.noted("web") == set()
