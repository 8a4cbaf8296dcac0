"""The simulation itself: its network sees what must not be, its link keeps TCP's promises."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from understudy.arbiter import Record, RecordState, following
from understudy.errors import ArbiterUnavailable, LinkLost, PeerError
from understudy.session import PrimaryState
from understudy.testing.arbiter import MemoryArbiter, Silence
from understudy.testing.clock import in_virtual_time
from understudy.testing.history import BORN, SimulatedNetwork
from understudy.testing.link import SimulatedCable
from understudy.testing.simchannels import Trench
from understudy.testing.world import GUEST, SimulatedPair

FIRST = BORN.after(1)
SECOND = FIRST.after(2)
OTHER = FIRST.after(3)


def network() -> SimulatedNetwork:
    net = SimulatedNetwork()
    for memory in (BORN, FIRST, SECOND, OTHER):
        net.born("g", memory)
    return net


def test_one_history_may_leave_from_two_hosts_also_late() -> None:
    net = network()
    net.open_send("a", "g", SECOND)
    net.open_send("b", "g", FIRST)
    net.check()


@pytest.mark.parametrize("first", [SECOND, OTHER])
def test_diverging_histories_are_seen(first: object) -> None:
    net = network()
    net.open_send("a", "g", SECOND if first is SECOND else OTHER)
    net.open_send("b", "g", OTHER if first is SECOND else SECOND)
    with pytest.raises(AssertionError, match="I2"):
        net.check()


def test_a_history_that_does_not_continue_what_left_is_seen() -> None:
    net = network()
    net.open_send("a", "g", SECOND)
    later = OTHER.after(4)
    net.born("g", later)
    net.open_send("b", "g", later)
    with pytest.raises(AssertionError, match=r"I2.*does not continue"):
        net.check()


def test_a_release_of_what_the_secondary_does_not_hold_is_seen() -> None:
    net = network()
    net.held("g", "s", FIRST)
    net.release("a", "g", FIRST, "s", 1)
    net.check()
    net.release("a", "g", SECOND, "s", 1)
    with pytest.raises(AssertionError, match="I1"):
        net.check()


# --- Controls: a pair whose rules are broken on purpose must be caught ------------------------------------------------


@in_virtual_time
async def test_control_a_gate_that_opens_before_the_acknowledgement() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        (gate,) = pair.sites["alpha"].host.gates.values()
        gate.mark(99)
        while not gate.held:  # noqa: ASYNC110 - time is virtual
            await asyncio.sleep(0.001)
        gate.release_through(gate.held[-1].number, 99)
        with pytest.raises(AssertionError, match="I1"):
            pair.check()


@in_virtual_time
async def test_control_a_guest_that_runs_ungated_while_protected() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        pair.sites["alpha"].host.guests[GUEST].gates.clear()
        await asyncio.sleep(0.1)
        with pytest.raises(AssertionError, match="the record does not say it may"):
            pair.check()


@in_virtual_time
async def test_control_an_outlet_that_opens_before_the_swap() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        await pair.epochs(3)
        copy = pair.sites["beta"].host.guests[GUEST]
        copy.outlet = True
        copy.resume()
        await asyncio.sleep(0.1)
        with pytest.raises(AssertionError, match="the record does not say it may"):
            pair.check()


@in_virtual_time
async def test_control_one_disk_whose_checkpoint_is_skipped() -> None:
    async with SimulatedPair(disks=2) as pair:
        await pair.start()
        await pair.protect()
        await pair.epochs(3)
        driver = pair.sites["beta"].driver
        group = getattr(driver, "group", None)
        assert group is not None
        disk = group.devices["disk1"]
        old = disk.held[disk.taken]
        await pair.epochs(2)
        pair.crash("alpha")
        disk.held = dict.fromkeys(disk.held, old)
        await pair.reach("beta", PrimaryState.UNPROTECTED)
        with pytest.raises(AssertionError, match="I3: disk1"):
            pair.check()


@in_virtual_time
async def test_control_a_copy_that_is_promoted_from_an_old_checkpoint() -> None:
    async with SimulatedPair() as pair:
        await pair.start()
        await pair.protect()
        await pair.epochs(3)
        old = pair.sites["beta"].host.guests[GUEST].memory
        await pair.epochs(3)
        pair.crash("alpha")
        pair.sites["beta"].host.guests[GUEST].memory = old
        await pair.reach("beta", PrimaryState.UNPROTECTED)
        await asyncio.sleep(1)
        with pytest.raises(AssertionError, match=r"(?s)I3.*I2"):
            pair.check()


# --- The link ---------------------------------------------------------------------------------------------------------


class Echo:
    def __init__(self) -> None:
        self.notes: list[int] = []
        self.hung = 0

    async def ask(self, method: str, params: object) -> dict[str, object]:
        if method == "hang":
            self.hung += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.hung -= 1
        if method == "refuse":
            raise ValueError("no")
        return {"method": method}

    def note(self, method: str, params: object) -> None:
        self.notes.append(int(method))


@in_virtual_time
async def test_notes_arrive_in_order_whatever_the_delay_and_after_a_stall() -> None:
    cable = SimulatedCable(jitter_s=0.05, silence_s=10)
    ports = cable.connect("c", "a", "b").ports
    echo = Echo()
    ports["b"].serve(echo.ask, echo.note)
    for number in range(50):
        ports["a"].notify(str(number), {})
        if number == 20:
            cable.cut("a")
        await asyncio.sleep(0.001)
    await asyncio.sleep(1)
    assert echo.notes == sorted(echo.notes)
    assert len(echo.notes) < 25
    cable.mend()
    await asyncio.sleep(1)
    assert echo.notes == list(range(50))


@in_virtual_time
async def test_requests_are_answered_refused_and_cancelled() -> None:
    ports = SimulatedCable().connect("c", "a", "b").ports
    echo = Echo()
    ports["b"].serve(echo.ask)
    assert await ports["a"].request("x", {}, timeout_s=1) == {"method": "x"}
    with pytest.raises(PeerError, match="no") as refused:
        await ports["a"].request("refuse", {}, timeout_s=1)
    assert refused.value.kind == "ValueError"
    with pytest.raises(LinkLost, match="no answer"):
        await ports["a"].request("hang", {}, timeout_s=0.1)
    await asyncio.sleep(0.1)
    assert echo.hung == 0


@in_virtual_time
async def test_one_deaf_side_gives_up_after_its_limit_and_tells_the_other() -> None:
    cable = SimulatedCable(silence_s=0.3)
    ports = cable.connect("c", "a", "b").ports
    lost: list[tuple[str, float]] = []
    loop = asyncio.get_running_loop()
    for name in ("a", "b"):
        ports[name].on_lost(lambda error, name=name: lost.append((name, loop.time())))  # type: ignore[misc]
    began = loop.time()
    cable.cut("a")
    await asyncio.sleep(1)
    assert [name for name, _ in lost] == ["b", "a"]
    assert lost[0][1] - began == pytest.approx(0.3)
    assert lost[1][1] - lost[0][1] == pytest.approx(0.0002)


@in_virtual_time
async def test_channels_carry_bytes_and_stall_with_the_cable() -> None:
    cable = SimulatedCable()
    trench = Trench(cable, "a", "b")
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        accepting = group.create_task(trench.of("b").accept("x", timeout_s=1))
        connecting = group.create_task(trench.of("a").connect("x", timeout_s=1))
    here, there = connecting.result(), accepting.result()
    for sock in (here, there):
        sock.setblocking(False)
    try:
        await loop.sock_sendall(here, b"one")
        assert await loop.sock_recv(there, 10) == b"one"
        cable.cut("a")
        await loop.sock_sendall(here, b"two")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await loop.sock_recv(there, 10)
        cable.mend()
        assert await loop.sock_recv(there, 10) == b"two"
    finally:
        here.close()
        there.close()
        await asyncio.sleep(1)
        trench.close()
        await asyncio.sleep(0)


# --- The arbiter ------------------------------------------------------------------------------------------------------

START = Record("g", 1, RecordState.ALONE, "a", None, None, "a", "a.1")


@pytest.mark.parametrize("silence", list(Silence))
@in_virtual_time
async def test_a_swap_without_an_answer_is_repeated_as_it_is(silence: Silence) -> None:
    truth = MemoryArbiter()
    view = truth.view("a")
    view.script = [silence]
    with pytest.raises(ArbiterUnavailable):
        await view.swap(None, START)
    assert (await truth.read("g") is not None) == (silence is Silence.APPLIED)
    won, record = await view.swap(None, START)
    assert won
    await asyncio.sleep(5)  # a late one changes nothing any more
    assert await truth.read("g") == record == START
    later = following(START, state=RecordState.STOPPED, writer="a", attempt="a.2")
    assert (await view.swap(START, later)).won
    assert (await view.swap(None, START)).record == START  # it had won, and says so
    assert not (await truth.view("b").swap(START, replace(later, attempt="a.3"))).won
