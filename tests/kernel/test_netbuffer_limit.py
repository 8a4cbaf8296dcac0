"""A gate that fills: an early checkpoint, then what the operator chose, and no packet is dropped untold."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from subprocess import PIPE, Popen
from typing import Literal

import pytest

from tests.kernel.netbuffer_bed import Lan, no_trace, opened, spoken, until
from understudy.device import Verdict
from understudy.errors import HypervisorError
from understudy.services import GUEST_PAUSE, PACE, Services
from understudy_netbuffer.options import NetbufferOptions

pytestmark = pytest.mark.kernel

SIZE = 1000


class Asked:
    """Counts how often the next checkpoint was asked for."""

    def __init__(self) -> None:
        self.count = 0

    def hurry(self) -> None:
        self.count += 1


class Guest:
    """A process that sends until it is stopped, as a guest whose hypervisor lets it run before the acknowledgement."""

    def __init__(self, lan: Lan) -> None:
        code = "import socket,sys\ns=socket.socket(fileno=int(sys.argv[1]))\np=bytes.fromhex(sys.argv[2])\n"
        # A queue on the way may be full for a moment: a guest would try again, too.
        code += "s.setblocking(True)\nprint(flush=True)\nwhile True:\n try: s.send(p)\n except OSError: pass"
        sender = lan.inside(0)
        packet = (b"\xff" * 6 + bytes((2, 0, 0, 0, 0, 0)) + b"\x08\x00").ljust(SIZE, b"\0")
        os.set_inheritable(sender.fileno(), True)
        command = ("/usr/bin/python3", "-c", code, str(sender.fileno()), packet.hex())
        self.process = Popen(command, stdout=PIPE, close_fds=False)
        assert self.process.stdout
        self.process.stdout.readline()
        self.calls: list[str] = []

    async def pause(self) -> None:
        self.calls.append("pause")
        self.process.send_signal(signal.SIGSTOP)

    async def proceed(self) -> None:
        self.calls.append("proceed")
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


def options(
    when_full: Literal["stall", "unprotect"] = "stall", limit_bytes: int = 100_000
) -> NetbufferOptions:
    return NetbufferOptions(limit_bytes=limit_bytes, when_full=when_full, look_ms=2)


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made, no_trace():
        yield made


async def test_a_gate_that_is_half_full_asks_for_a_checkpoint(lan: Lan) -> None:
    asked = Asked()
    nic = await opened(options=options(), services=Services((PACE, asked)))
    await spoken(lan, nic, 1, range(45), size=SIZE)
    assert asked.count == 0
    await spoken(lan, nic, 1, range(45, 55), size=SIZE)
    await until(lambda: asked.count > 0, "a checkpoint is asked for")
    await nic.postsuspend(1)
    await nic.commit(1)
    assert await lan.numbers() == list(range(55))
    assert nic.counters()["early_checkpoint_count"] > 0
    await nic.teardown(Verdict.KEEP)


async def test_the_guest_is_stalled_until_its_output_is_acknowledged(lan: Lan) -> None:
    # It fills a gate of 8 MB at full speed: dropped is nothing, because it is stopped in time. Between three quarters
    # and the limit there is time enough for a look that comes late: this kernel has one processor, which floods.
    guest = Guest(lan)
    try:
        guest.process.send_signal(signal.SIGSTOP)
        chosen = replace(options(limit_bytes=8_000_000), full_share=0.75)
        nic = await opened(options=chosen, services=Services((GUEST_PAUSE, guest)))
        for epoch in (1, 2):
            guest.process.send_signal(signal.SIGCONT)
            await until(lambda epoch=epoch: guest.calls.count("pause") == epoch, "the guest is stalled")  # type: ignore[misc]
            # When it ran again, what had been let out may still have been on its way, and counted.
            assert (await nic.gate.look()).held_bytes <= 8_000_000
            await nic.postsuspend(epoch)
            assert guest.calls.count("proceed") == epoch - 1
            await nic.error()
            await nic.commit(epoch)
            assert guest.calls.count("proceed") == epoch
            guest.process.send_signal(signal.SIGSTOP)
        assert nic.counters()["stall_count"] == 2
        assert nic.counters()["dropped_packets"] == 0
        await nic.teardown(Verdict.DISCARD)
    finally:
        guest.end()


async def test_a_stalled_guest_runs_on_when_the_protection_ends(lan: Lan) -> None:
    guest = Guest(lan)
    try:
        nic = await opened(options=options(limit_bytes=1_000_000), services=Services((GUEST_PAUSE, guest)))
        await until(lambda: "pause" in guest.calls, "the guest is stalled")
        await nic.stop(failover=True)
        assert guest.calls == ["pause", "proceed"]
        await nic.teardown(Verdict.DISCARD)
    finally:
        guest.end()


async def test_what_is_dropped_is_counted_and_told(lan: Lan, caplog: pytest.LogCaptureFixture) -> None:
    nic = await opened(options=options())
    caplog.set_level(logging.WARNING)
    await spoken(lan, nic, 1, range(130), size=SIZE)
    await nic.postsuspend(1)
    await nic.error()
    assert nic.counters()["dropped_packets"] == 30
    assert (nic.counters()["held_packets"], nic.counters()["held_bytes"]) == (100, 100_000)
    await nic.commit(1)
    # The limit is a bound of what is held, not an end: the protection goes on.
    assert await lan.numbers() == list(range(100))
    assert sum(int(record.getMessage().split("dropped ")[1].split()[0]) for record in caplog.records) == 30
    await spoken(lan, nic, 2, [200])
    await nic.postsuspend(2)
    await nic.error()
    await nic.commit(2)
    assert await lan.numbers() == [200]
    await nic.teardown(Verdict.KEEP)


@pytest.mark.parametrize("packets", [95, 130], ids=["nearly full", "full"])
async def test_the_protection_ends_where_the_operator_chose_that(lan: Lan, packets: int) -> None:
    nic = await opened(options=options("unprotect"))
    await spoken(lan, nic, 1, range(packets), size=SIZE)
    await until(lambda: nic.gate.failure is not None, "the policy is carried out")
    await nic.postsuspend(1)
    with pytest.raises(HypervisorError, match='when_full is "unprotect"'):
        await nic.error()
    # Alone, the guest's output leaves.
    await nic.stop(failover=True)
    await nic.teardown(Verdict.KEEP)
    assert await lan.numbers() == list(range(min(packets, 100)))


@pytest.mark.parametrize("barrier", [True, False], ids=["at the barrier", "before it"])
async def test_a_drop_is_told_by_the_next_error_although_nobody_has_looked(lan: Lan, barrier: bool) -> None:
    # The next look is a second away; the epoch that lost packets must not be acknowledged meanwhile.
    nic = await opened(options=replace(options("unprotect"), look_ms=1000))
    for epoch in (1, 2):
        await nic.postsuspend(epoch)
        await nic.error()
        await nic.commit(epoch)
    lan.send(3, range(130), size=SIZE)
    assert await lan.numbers() == []  # what is behind it has arrived
    if barrier:
        await nic.postsuspend(3)
    with pytest.raises(HypervisorError, match="was full and dropped 30 packets"):
        await nic.error()
    assert nic.counters()["dropped_packets"] == 30
    await nic.teardown(Verdict.DISCARD)


async def test_an_epoch_that_joins_one_not_released_is_asked_for_its_drops(lan: Lan) -> None:
    # No barrier of its own tells of them: the one before it is outstanding, and told all that it knew.
    nic = await opened(options=replace(options("unprotect"), look_ms=1000))
    await spoken(lan, nic, 1, range(50), size=SIZE)
    await nic.postsuspend(1)
    await nic.error()
    lan.send(2, range(50, 101), size=SIZE)
    assert await lan.numbers() == []
    await nic.postsuspend(2)
    with pytest.raises(HypervisorError, match="was full and dropped 1 packets"):
        await nic.error()
    await nic.teardown(Verdict.DISCARD)
