"""The pacer: hold, drain, cut, trigger, release; and what it does when one of them fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from tests.unit.colo_proxy.qemu_model import Qemu
from understudy.errors import HypervisorError, LinkLost
from understudy_colo_proxy import pace
from understudy_colo_proxy.pace import Pacer, pacer_of


class Nic:
    """One NIC, which notes what it is asked and what QEMU had been told by then."""

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu
        self.log: list[str] = []
        self.left_bytes = 0
        self.clean = True
        self.cut_fails: Exception | None = None
        self.release_fails: Exception | None = None

    def note(self, what: str) -> None:
        asked = sum(command == "migrate-set-parameters" for command, _ in self.qemu.commands)
        self.log.append(f"{what} {asked}")

    async def hold(self, *, on: bool) -> None:
        self.note("hold" if on else "release")
        if self.release_fails is not None and not on:
            raise self.release_fails

    def on_the_way(self) -> int:
        return self.left_bytes

    async def cut(self) -> bool:
        self.note("cut")
        if self.cut_fails is not None:
            raise self.cut_fails
        return self.clean


@pytest.fixture
def qemu() -> Qemu:
    made = Qemu()
    made.replicating = True
    return made


@pytest.fixture
async def pacer(qemu: Qemu) -> AsyncIterator[Pacer]:
    made = Pacer(qemu, 60_000)
    nics = made._members
    yield made
    for nic in tuple(nics):
        await made.leave(nic)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - tasks of the pacer get their turns
            await asyncio.sleep(0)


async def test_the_first_checkpoint_comes_with_the_first_resume(qemu: Qemu, pacer: Pacer) -> None:
    nics = [Nic(qemu), Nic(qemu)]
    for nic in nics:
        await pacer.join(nic)
    await asyncio.sleep(0)
    assert not qemu.commands  # the guest has not been resumed by COLO yet
    qemu.tell("RESUME")
    await until(lambda: nics[1].log[-1:] == ["release 1"])
    for nic in nics:
        assert nic.log == ["hold 0", "cut 0", "release 1"]
    assert (pacer.asked_count, pacer.unclean_count) == (1, 0)


async def test_a_difference_asks_for_one_more(qemu: Qemu, pacer: Pacer) -> None:
    nic = Nic(qemu)
    await pacer.join(nic)
    qemu.tell("RESUME")
    await until(lambda: len(nic.log) == 3)
    pacer.ask()
    pacer.ask()
    await until(lambda: len(nic.log) == 6)
    assert nic.log[3:] == ["hold 1", "cut 1", "release 2"]
    assert pacer.asked_count == 2


async def test_without_differences_the_longest_time_asks(qemu: Qemu) -> None:
    pacer = Pacer(qemu, 20)
    nic = Nic(qemu)
    await pacer.join(nic)
    qemu.tell("RESUME")
    await until(lambda: pacer.delay_count >= 2)
    await pacer.leave(nic)
    # QEMU's own delay is longer: it takes over only if we are gone.
    assert qemu.delay_ms == 20 + 1000


async def test_qemus_own_delay_counts_if_it_is_shorter(qemu: Qemu) -> None:
    qemu.delay_ms = 15
    pacer = Pacer(qemu, 60_000)
    nic = Nic(qemu)
    await pacer.join(nic)
    qemu.tell("RESUME")
    await until(lambda: pacer.delay_count >= 1)
    await pacer.leave(nic)
    assert qemu.delay_ms == 15 + 1000


@pytest.mark.parametrize("fault", ["not clean", "link lost", "broken pipe"])
async def test_a_checkpoint_is_taken_also_without_a_cut(qemu: Qemu, pacer: Pacer, fault: str) -> None:
    nic = Nic(qemu)
    nic.clean = fault != "not clean"
    nic.cut_fails = {"link lost": LinkLost("gone"), "broken pipe": BrokenPipeError("gone")}.get(fault)
    await pacer.join(nic)
    qemu.tell("RESUME")
    await until(lambda: len(nic.log) == 3)
    assert nic.log == ["hold 0", "cut 0", "release 1"]
    assert pacer.unclean_count == 1
    pacer.check()


async def test_a_checkpoint_that_does_not_come_is_told(
    qemu: Qemu, pacer: Pacer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_CHECKPOINT_S", 0.02)
    nic = Nic(qemu)
    await pacer.join(nic)
    qemu.answers = False
    qemu.tell("RESUME")
    await until(lambda: nic.log[-1:] == ["release 1"])
    await until(lambda: pacer.failure is not None)
    with pytest.raises(HypervisorError, match="has not come"):
        pacer.check()


@pytest.mark.parametrize("where", ["cut", "release", "trigger"])
async def test_what_nobody_foresaw_ends_the_pacing_and_is_told(
    qemu: Qemu, pacer: Pacer, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    nic, other = Nic(qemu), Nic(qemu)
    await pacer.join(nic)
    await pacer.join(other)
    if where == "cut":
        nic.cut_fails = KeyError("unforeseen")
    elif where == "release":
        nic.release_fails = KeyError("unforeseen")
    else:

        def refuse(command: str, _: object) -> str:
            if command == "migrate-set-parameters":
                raise KeyError("unforeseen")
            return ""

        qemu.refuse = refuse
    qemu.tell("RESUME")
    await until(lambda: pacer.failure is not None)
    with pytest.raises(KeyError, match="unforeseen"):
        pacer.check()
    assert "no more checkpoints are taken by us: KeyError" in caplog.text
    # What comes for the guest is held by nobody, and no further checkpoint is begun.
    await until(lambda: "release" in nic.log[-1] and "release" in other.log[-1])
    pacer.ask()
    for _ in range(20):
        await asyncio.sleep(0)
    assert len([entry for entry in nic.log if "hold" in entry]) == 1


async def test_the_end_of_colo_ends_the_pacing(qemu: Qemu, pacer: Pacer) -> None:
    nic = Nic(qemu)
    await pacer.join(nic)
    qemu.tell("RESUME")
    await until(lambda: len(nic.log) == 3)
    qemu.tell("COLO_EXIT")
    assert pacer._task is not None
    await asyncio.wait_for(asyncio.shield(pacer._task), 5)
    pacer.check()


async def test_a_resume_without_replication_takes_no_checkpoint(qemu: Qemu, pacer: Pacer) -> None:
    nic = Nic(qemu)
    qemu.replicating = False
    await pacer.join(nic)
    qemu.tell("RESUME")
    await until(lambda: ("query-migrate", {}) in qemu.commands)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not nic.log
    qemu.replicating = True
    qemu.tell("RESUME")
    await until(lambda: len(nic.log) == 3)


async def test_leaving_in_the_middle_lets_the_guest_hear_again(qemu: Qemu, pacer: Pacer) -> None:
    nic = Nic(qemu)
    nic.left_bytes = 1  # never drained
    await pacer.join(nic)
    qemu.tell("RESUME")
    await until(lambda: nic.log == ["hold 0"])
    await pacer.leave(nic)
    assert nic.log == ["hold 0", "release 0"]


async def test_the_nics_of_one_session_share_a_pacer(qemu: Qemu) -> None:
    first = pacer_of("web", "s1", qemu, 1000)
    assert pacer_of("web", "s1", qemu, 1000) is first
    assert pacer_of("web", "s2", qemu, 1000) is not first
    assert pacer_of("db", "s1", qemu, 1000) is not first
