"""The subkind ``filter-buffer`` keeps the contract, on a model of QEMU's packet filters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

from understudy.device import (
    Decline,
    DeviceInfo,
    Gate,
    Kind,
    Mode,
    OpenContext,
    Peer,
    ReplicationMode,
    Verdict,
)
from understudy.errors import HypervisorError
from understudy.services import MONITOR, Services
from understudy.testing.subkind_kit import CHECKS, SubkindBed, check_subkind, open_context
from understudy_qemu.filterbuffer import FILTER_BUFFER, HeldNic

PRIMARY = ReplicationMode.PRIMARY
DEVICE = DeviceInfo(Kind.NIC, "nic0", 0, "qemu", subkind="filter-buffer", properties={"netdev": "nic0"})


class Filter:
    """One filter-buffer of the model."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.on = True
        self.held: list[int] = []


class Qemu:
    """A monitor over a model of what net/filter.c does with packets that the guest sends."""

    def __init__(self) -> None:
        self.filters: dict[str, Filter] = {}  # in the order of their making
        self.sent: list[int] = []
        self.commands: list[str] = []

    def send(self, number: int, before: str | None = None) -> None:
        """Let a packet pass the filters from the newest, or from the one made before `before`, on."""
        names = list(self.filters)
        if before is not None:
            names = names[: names.index(before)]
        for name in reversed(names):
            if self.filters[name].on:
                self.filters[name].held.append(number)
                return
        self.sent.append(number)

    def flush(self, name: str) -> None:
        held, self.filters[name].held = self.filters[name].held, []
        for number in held:
            self.send(number, before=name)

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        await asyncio.sleep(0)
        arguments = arguments or {}
        self.commands.append(command)
        if command == "object-add":
            assert arguments["qom-type"] == "filter-buffer"
            assert arguments["queue"] == "rx"
            assert 0 < arguments["interval"] < 2**32
            self.filters[arguments["id"]] = Filter(arguments["interval"])
        elif command == "object-del":
            self._known(arguments["id"])
            self.flush(arguments["id"])
            del self.filters[arguments["id"]]
        elif command == "qom-set":
            name = self._known(arguments["path"].removeprefix("/objects/"))
            self.filters[name].on = arguments["value"] == "on"
            if not self.filters[name].on:
                self.flush(name)
        elif command == "qom-list":
            return [{"name": name, "type": "child<filter-buffer>"} for name in self.filters]
        else:
            raise AssertionError(command)
        await asyncio.sleep(0)
        return {}

    def _known(self, name: str) -> str:
        if name not in self.filters:
            raise HypervisorError(f"object '{name}' not found")
        return name

    async def supports(self, command: str, *members: str) -> bool:
        return True

    async def give_fd(self, name: str, fd: int) -> None:
        raise AssertionError("no file descriptor is needed")

    def events(self, *names: str) -> Any:
        raise AssertionError("no event is needed")


class Bed(SubkindBed):
    """One interface of a guest."""

    subkind = FILTER_BUFFER

    def __init__(self) -> None:
        self.qemu = Qemu()

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        services = Services((MONITOR, self.qemu)) if side is PRIMARY else Services((MONITOR, Qemu()))
        return open_context(DEVICE, side, peer, services=services)

    async def before(self, step: str, side: ReplicationMode, epoch: int) -> None:
        if step == "teardown" and side is PRIMARY:
            self.qemu.commands.clear()

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        # Nothing was commanded: the verdict was DISCARD, and the guest is dead, its objects with it.
        return list(self.qemu.filters) if side is PRIMARY and self.qemu.commands else ()

    async def send(self, number: int) -> None:
        self.qemu.send(number)

    async def escaped(self) -> Sequence[int]:
        return list(self.qemu.sent)


@asynccontextmanager
async def make() -> AsyncIterator[Bed]:
    yield Bed()


async def test_it_keeps_the_contract() -> None:
    ran = await check_subkind(make)
    assert set(CHECKS) - set(ran) == {"error-told"}, "QEMU tells of no error of a filter"


async def test_nobody_gets_it_without_asking_for_it_by_name() -> None:
    bed = Bed()
    here = bed.context(PRIMARY, cast("Peer", None))
    answer = await FILTER_BUFFER.open(replace(here, device=replace(DEVICE, subkind="auto")))
    assert isinstance(answer, Decline)
    assert "by name" in answer.reason


def test_it_needs_a_guest_that_waits_at_the_end_of_an_epoch() -> None:
    assert FILTER_BUFFER.needs == {Gate.POSTSUSPEND}
    assert FILTER_BUFFER.modes == {Mode.REMUS}


@pytest.fixture
async def held() -> tuple[Qemu, HeldNic]:
    qemu = Qemu()
    nic = HeldNic("nic0", "nic0", qemu)
    await nic.start(PRIMARY)
    return qemu, nic


async def test_nothing_of_a_later_epoch_leaves_with_a_late_commit(held: tuple[Qemu, HeldNic]) -> None:
    qemu, nic = held
    qemu.send(1)
    await nic.postsuspend(1)
    qemu.send(2)
    await nic.postsuspend(2)
    await nic.commit(1)
    assert qemu.sent == []
    await nic.commit(2)
    assert qemu.sent == [1, 2]


async def test_a_commit_cut_in_its_middle_leaves_no_hole(held: tuple[Qemu, HeldNic]) -> None:
    qemu, nic = held
    qemu.send(1)
    await nic.postsuspend(1)
    committing = asyncio.ensure_future(nic.commit(1))
    while qemu.filters["nic0-ended"].on:  # noqa: ASYNC110 - one step of the loop at a time
        await asyncio.sleep(0)
    committing.cancel()
    await asyncio.wait([committing])
    assert not qemu.filters["nic0-ended"].on
    qemu.send(2)
    await nic.postsuspend(2)
    assert qemu.sent == [1], "epoch 2 is not acknowledged"
    await nic.commit(2)
    assert qemu.sent == [1, 2]


async def test_what_cannot_be_let_out_is_told(
    held: tuple[Qemu, HeldNic], monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu, nic = held
    qemu.send(1)

    async def stubborn(command: str, arguments: Mapping[str, Any] | None = None, **_: Any) -> Any:
        if command == "object-del":
            raise HypervisorError("no")
        return await Qemu.execute(qemu, command, arguments)

    monkeypatch.setattr(qemu, "execute", stubborn)
    with pytest.raises(HypervisorError, match="still held"):
        await nic.teardown(Verdict.KEEP)
    assert qemu.sent == []
