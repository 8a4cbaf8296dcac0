"""The subkind ``filter-buffer`` keeps the contract, on a model of QEMU's packet filters and of the kernel's block.

The block in a real kernel is tried in tests/qemu/test_egress_block.py, with a real QEMU behind it in
tests/qemu/test_stopped_agent.py.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from understudy.device import (
    Decline,
    DeviceInfo,
    Finding,
    Gate,
    Kind,
    Mode,
    OpenContext,
    Peer,
    ProbeContext,
    ReplicationMode,
    Severity,
    Verdict,
)
from understudy.errors import HypervisorError
from understudy.matching import in_order
from understudy.plugins import Plugins
from understudy.services import MONITOR, Services
from understudy.testing.subkind_kit import CHECKS, SubkindBed, check_subkind, open_context
from understudy_qemu import filterbuffer, heldnic
from understudy_qemu.filterbuffer import FILTER_BUFFER
from understudy_qemu.heldnic import QUEUE_PACKETS, FilterBufferOptions, HeldNic
from understudy_qemu.nfnetlink import Count

PRIMARY = ReplicationMode.PRIMARY
NUMBERS = itertools.count()


class Block:
    """A model of the kernel's block at one tap."""

    there: ClassVar[dict[str, Block]] = {}

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self.passing = False
        self.fresh = True
        self.passed = self.refused = 0
        self.flushed_ruleset = False
        self.told: list[str] = []

    async def install(self, *, passing: bool = True) -> None:
        await asyncio.sleep(0)
        self.there[self.interface] = self
        self.passing = passing
        await asyncio.sleep(0)

    async def close(self) -> tuple[Count, Count]:
        self.told.append("close")
        await asyncio.sleep(0)
        self.passing = False
        await asyncio.sleep(0)
        return Count(self.passed, 0), Count(self.refused, 0)

    async def renew(self, for_ms: int) -> bool:
        assert 1000 < for_ms <= 60_000
        self.told.append("renew")
        await asyncio.sleep(0)
        there = self._there()
        self.fresh = True
        await asyncio.sleep(0)
        return there

    async def open_for(self, window_ms: int) -> bool:
        assert 0 < window_ms <= 1000
        self.told.append("open")
        await asyncio.sleep(0)
        there = self._there()
        self.passing = there and self.fresh
        await asyncio.sleep(0)
        return there

    def _there(self) -> bool:
        if self.flushed_ruleset:
            self.passing = self.fresh = self.flushed_ruleset = False
            self.passed = self.refused = 0
            return False
        return True

    async def remove(self) -> bool:
        await asyncio.sleep(0)
        return self.there.pop(self.interface, None) is not None

    async def remove_below_nothing(self) -> bool:
        return await self.remove()


async def nothing_missing() -> str:
    return ""


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filterbuffer, "EgressBlock", Block)
    monkeypatch.setattr(filterbuffer, "missing_for_block", nothing_missing)
    monkeypatch.setattr(Block, "there", {})


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
        self.tap = f"tap{next(NUMBERS)}"
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
        block = Block.there.get(self.tap)
        if block is None or block.passing:
            self.sent.append(number)
        if block is not None:
            block.passed += block.passing
            block.refused += not block.passing

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
        properties = {"netdev": "nic0", "tap": self.qemu.tap}
        device = DeviceInfo(Kind.NIC, "nic0", 0, "qemu", properties=properties)
        services = Services((MONITOR, self.qemu)) if side is PRIMARY else Services((MONITOR, Qemu()))
        return open_context(device, side, peer, services=services)

    async def before(self, step: str, side: ReplicationMode, epoch: int) -> None:
        if step == "teardown" and side is PRIMARY:
            self.qemu.commands.clear()

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        if side is not PRIMARY:
            return ()
        blocks = [f"block of {tap}" for tap in Block.there if tap == self.qemu.tap]
        # Nothing was commanded: the verdict was DISCARD, and the guest is dead, its objects with it.
        return [*blocks, *(self.qemu.filters if self.qemu.commands else ())]

    async def send(self, number: int) -> None:
        self.qemu.send(number)

    async def escaped(self) -> Sequence[int]:
        return list(self.qemu.sent)


@asynccontextmanager
async def make() -> AsyncIterator[Bed]:
    yield Bed()


async def test_it_keeps_the_contract() -> None:
    ran = await check_subkind(make)
    assert set(CHECKS) - set(ran) == {"error-told"}, "a full queue is told after a commit only, see below"


async def test_a_kernel_that_has_no_block_leaves_it_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def missing() -> str:
        return "nft is away"

    monkeypatch.setattr(filterbuffer, "missing_for_block", missing)
    context = Bed().context(PRIMARY, cast("Peer", None))
    answer = await FILTER_BUFFER.open(context)
    assert isinstance(answer, Decline)
    assert "nft is away" in answer.reason
    [finding] = await probed(replace(context, device=replace(context.device, subkind="filter-buffer")))
    assert finding.severity is Severity.ERROR
    assert "nft is away" in finding.problem


async def test_the_check_names_its_weaker_class() -> None:
    [finding] = await probed(Bed().context(PRIMARY, cast("Peer", None)))
    assert finding.severity is Severity.WARNING
    assert "weaker gate" in finding.problem
    assert "netbuffer" in finding.remedy


async def probed(context: OpenContext) -> Sequence[Finding]:
    answer = await FILTER_BUFFER.probe(
        ProbeContext(
            guest=context.guest,
            device=context.device,
            side=context.side,
            mode=context.mode,
            options=context.options,
            services=context.services,
            directory=context.directory,
        )
    )
    assert not isinstance(answer, Decline)
    return answer


def test_a_gate_that_is_wholly_in_the_kernel_is_asked_first() -> None:
    offered = in_order(Plugins.discover().subkinds())
    nics = [each.name for each in offered if each.kind is Kind.NIC and Mode.REMUS in each.modes]
    assert nics.index("netbuffer") < nics.index("filter-buffer")


def test_it_needs_a_guest_that_waits_at_the_end_of_an_epoch() -> None:
    assert FILTER_BUFFER.needs == {Gate.POSTSUSPEND}
    assert FILTER_BUFFER.modes == {Mode.REMUS}


@pytest.fixture
async def held() -> tuple[Qemu, HeldNic]:
    qemu = Qemu()
    block = Block(qemu.tap)
    await block.install()
    nic = HeldNic("nic0", "nic0", qemu, block)
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


async def test_a_commit_that_ended_in_its_middle_leaves_no_hole(
    held: tuple[Qemu, HeldNic], monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu, nic = held
    qemu.send(1)
    await nic.postsuspend(1)

    async def half(command: str, arguments: Mapping[str, Any] | None = None, **_: Any) -> Any:
        if (arguments or {}).get("value") != "on":
            return await Qemu.execute(qemu, command, arguments)
        while qemu.filters["nic0-ended"].on:  # noqa: ASYNC110 - one step of the loop at a time
            await asyncio.sleep(0)
        raise HypervisorError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(qemu, "execute", half)
        with pytest.raises(HypervisorError, match="refused"):
            await nic.commit(1)
    assert not qemu.filters["nic0-ended"].on
    qemu.send(2)
    await nic.postsuspend(2)
    assert qemu.sent == [1], "epoch 2 is not acknowledged"
    await nic.commit(2)
    assert qemu.sent == [1, 2]


def told(block: Block) -> list[str]:
    """Return what the block was told since the last time."""
    before, block.told = block.told, []
    return before


async def test_the_guest_does_not_wait_for_the_block(
    held: tuple[Qemu, HeldNic], monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu, nic = held
    block = Block.there[qemu.tap]
    await nic.postsuspend(1)
    assert told(block) == ["close", "renew"], "as it began to hold, and before the first switch"
    await nic.commit(1)
    assert told(block) == ["open", "close", "renew"]
    await nic.postsuspend(2)
    assert told(block) == []
    await nic.commit(2)
    told(block)
    later_s = time.monotonic() + 30
    monkeypatch.setattr(heldnic, "time", SimpleNamespace(monotonic=lambda: later_s))
    await nic.postsuspend(3)
    assert told(block) == ["renew"], "half of the minute has passed"


async def test_a_commit_that_the_next_epoch_overtook_begins_no_minute(held: tuple[Qemu, HeldNic]) -> None:
    # The timer of what waits for the next commit has begun: a minute that begins later might outlast it.
    qemu, nic = held
    block = Block.there[qemu.tap]
    await nic.postsuspend(1)
    told(block)
    committing = asyncio.ensure_future(nic.commit(1))
    while "close" not in block.told:  # noqa: ASYNC110 - one step of the loop at a time
        await asyncio.sleep(0)
    await nic.postsuspend(2)
    await committing
    assert told(block) == ["open", "close"]


async def test_a_block_that_was_lost_is_told_anew(held: tuple[Qemu, HeldNic]) -> None:
    qemu, nic = held
    block = Block.there[qemu.tap]
    await nic.postsuspend(1)
    await nic.commit(1)
    qemu.send(1)
    await nic.postsuspend(2)
    block.flushed_ruleset = True
    await nic.commit(2)
    told(block)
    await nic.postsuspend(3)
    assert told(block) == ["renew"]
    await nic.commit(3)
    assert qemu.sent == [1]


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


# --- The block -------------------------------------------------------------------------------------------------------


async def test_what_qemu_lets_out_by_itself_does_not_leave(
    held: tuple[Qemu, HeldNic], caplog: pytest.LogCaptureFixture
) -> None:
    qemu, nic = held
    qemu.send(1)
    await nic.postsuspend(1)
    qemu.send(2)
    for name in ("nic0-epoch", "nic0-ended"):
        qemu.flush(name)
    assert qemu.sent == []
    await nic.commit(1)
    assert nic.counters()["refused_packets"] == 2
    assert "let out 2 packets" in caplog.text
    assert not Block.there[qemu.tap].passing


async def test_an_agent_that_slept_lets_out_nothing_of_what_qemus_timer_has_mixed(
    held: tuple[Qemu, HeldNic],
) -> None:
    qemu, nic = held
    qemu.send(1)
    await nic.postsuspend(1)
    qemu.send(2)
    Block.there[qemu.tap].fresh = False
    qemu.flush("nic0-epoch")
    await nic.commit(1)
    assert qemu.sent == []
    assert nic.counters()["refused_packets"] == 2
    assert not Block.there[qemu.tap].passing
    qemu.send(3)
    await nic.postsuspend(2)
    await nic.commit(2)
    assert qemu.sent == [3]


@pytest.mark.parametrize("when", ["postsuspend", "commit"])
async def test_a_block_that_somebody_removed_is_counted(held: tuple[Qemu, HeldNic], when: str) -> None:
    qemu, nic = held
    block = Block.there[qemu.tap]
    qemu.send(1)
    block.flushed_ruleset = when == "postsuspend"
    await nic.postsuspend(1)
    block.flushed_ruleset = when == "commit"
    await nic.commit(1)
    assert nic.counters()["lost_block_count"] == 1
    # Put back in a commit it does not know how old that epoch is: it waits for the next.
    assert qemu.sent == ([1] if when == "postsuspend" else [])
    qemu.send(2)
    await nic.postsuspend(2)
    await nic.commit(2)
    assert qemu.sent == [1, 2]
    assert not block.passing
    assert nic.counters()["released_packets"] == 2 - (when == "postsuspend")


@pytest.mark.parametrize("when_full", ["unprotect", "tell"])
async def test_a_full_queue_is_told(when_full: Any, caplog: pytest.LogCaptureFixture) -> None:
    qemu = Qemu()
    block = Block(qemu.tap)
    await block.install()
    nic = HeldNic("nic0", "nic0", qemu, block, FilterBufferOptions(when_full=when_full))
    await nic.start(PRIMARY)
    for epoch, packets in ((1, QUEUE_PACKETS - 1), (2, QUEUE_PACKETS)):
        await nic.error()
        for number in range(packets):
            qemu.send(number)
        await nic.postsuspend(epoch)
        await nic.commit(epoch)
    assert nic.counters()["full_epoch_count"] == 1
    if when_full == "tell":
        await nic.error()
        assert "was full in epoch 2" in caplog.text
    else:
        with pytest.raises(HypervisorError, match="was full in epoch 2"):
            await nic.error()


async def test_a_guest_that_sends_much_gets_its_checkpoint_early() -> None:
    hurried = asyncio.Event()
    qemu = Qemu()
    block = Block(qemu.tap)
    await block.install()
    pace = SimpleNamespace(hurry=hurried.set)
    nic = HeldNic("nic0", "nic0", qemu, block, FilterBufferOptions(early_share=0.001), pace)
    await nic.start(PRIMARY)
    for number in range(100):
        qemu.send(number)
    await nic.postsuspend(1)
    await nic.commit(1)
    async with asyncio.timeout(20):
        await hurried.wait()
    assert nic.counters()["early_checkpoint_count"] == 1
    for number in range(100):
        qemu.send(number)
    await nic.postsuspend(2)
    hurried.clear()
    await nic.stop(failover=True)
    assert not hurried.is_set()
