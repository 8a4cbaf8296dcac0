"""Real QEMU processes under this plugin's domains: protected, failed over, left alone, protected again.

No network and no kernel: the guest of pair.py counts on a serial line and on each of its disks, after a second.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.qemu.pair import (
    SIZE_BYTES,
    Bed,
    GroupPhases,
    exists,
    files,
    need_qemu,
    record,
    stands_still,
    survives,
    told,
    traces,
    until,
)
from tests.testbeds.bed import need
from tests.testbeds.rounds import rounds
from understudy.arbiter import RecordState
from understudy.device import Mode, Verdict
from understudy.errors import HypervisorError, NotReplicating, StateError
from understudy.hypervisor import DomainEventKind
from understudy_qemu.accel import Accel, kvm_runs
from understudy_qemu.primary import QemuPrimary

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

BOTH = pytest.mark.parametrize("mode", [Mode.COLO, Mode.REMUS], ids=["colo", "remus"])


@pytest_asyncio.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    need_qemu()
    made = Bed(tmp_path)
    try:
        yield made
    finally:
        await made.close()


# --- The primary is lost ---------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("disks", [1, 3])
async def test_kill_primary(bed: Bed, mode: Mode, disks: int) -> None:
    session = await bed.protected(disks, mode=mode)
    await session.ack(5)
    at_loss = session.alpha.count()
    await session.kill_primary()
    loaded = await session.fail_over()
    assert loaded >= session.epoch
    assert session.connected
    assert DomainEventKind.GONE in [event.kind for event in session.events]
    # What the copy counts on from is the last checkpoint: at most one epoch back, and nothing acknowledged is lost.
    assert session.beta.count() >= at_loss - 10
    assert not list(session.beta.overlays.iterdir())
    assert not (await traces(session.secondary.qemu))["capabilities"]["x-colo"]
    await survives(session.beta)


@pytest.mark.kvm
@pytest.mark.parametrize("disks", [1, 3])
async def test_kill_primary_under_kvm(bed: Bed, disks: int) -> None:
    problem = await kvm_runs("qemu-system-x86_64", "host,-arch-capabilities")
    need("kvm", [f"a working KVM ({problem})"] if problem else [])
    bed.accel = Accel.KVM
    session = await bed.protected(disks)
    await session.ack(5)
    await session.kill_primary()
    assert await session.fail_over() >= session.epoch
    await survives(session.beta)


@pytest.mark.kvm
async def test_kill_secondary_under_kvm(bed: Bed) -> None:
    problem = await kvm_runs("qemu-system-x86_64", "host,-arch-capabilities")
    need("kvm", [f"a working KVM ({problem})"] if problem else [])
    bed.accel = Accel.KVM
    session = await bed.protected()
    await session.ack(5)
    await session.kill_secondary()
    await session.go_on_alone()
    await survives(session.alpha)


async def test_promotion_needs_a_whole_checkpoint(bed: Bed) -> None:
    alpha, beta = bed.host("alpha"), bed.host("beta")
    await alpha.start()
    session = bed.session(alpha, beta, mode=Mode.REMUS)
    await session.open()
    with pytest.raises(StateError, match="no whole checkpoint"):
        await session.secondary.promote(session.s_group, record(RecordState.PROMOTING, "beta", 5))
    await session.replicate()
    assert await session.secondary.sever("test") == 0
    with pytest.raises(StateError, match="no whole checkpoint"):
        await session.secondary.promote(session.s_group, record(RecordState.PROMOTING, "beta", 5))
    await session.go_on_alone()
    await survives(alpha)


# --- The secondary is lost -------------------------------------------------------------------------------------------


async def test_a_cut_yanks_no_disk(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    # QEMU takes two locks in one order there, and in the other where a broken connection is made anew: both monitors
    # and the guest would hang for ever, at 1 of 14 such cuts of a busy disk on a loaded host.
    session = await bed.protected(2)
    await session.ack(2)
    yanked: list[Any] = []
    oob = session.running.oob
    yank = oob.yank

    async def noted(*instances: Mapping[str, str]) -> None:
        yanked.extend(instances)
        await yank(*instances)

    monkeypatch.setattr(oob, "yank", noted)
    await session.primary.sever("test")
    assert yanked == [{"type": "migration"}]
    await session.go_on_alone()
    await survives(session.alpha)


@BOTH
@pytest.mark.parametrize("disks", [1, 3])
async def test_kill_secondary(bed: Bed, mode: Mode, disks: int) -> None:
    alpha, beta = bed.host("alpha", disks), bed.host("beta", disks)
    before = await traces(await alpha.start())
    session = bed.session(alpha, beta, mode=mode)
    await session.protect()
    await session.ack(3)
    await session.kill_secondary()
    with pytest.raises((HypervisorError, ExceptionGroup)):
        await asyncio.wait_for(session.ack(1000), 30)
    await session.go_on_alone()
    assert await traces(session.running) == before
    assert not list(beta.overlays.iterdir())
    await survives(alpha)


@BOTH
async def test_hung_secondary(bed: Bed, mode: Mode) -> None:
    session = await bed.protected(mode=mode)
    await session.ack(3)
    session.hang_secondary()
    waiting = asyncio.create_task(session.ack(100))
    # Not until the guest waits for a write is it certain that a hung peer holds it.
    await stands_still(session.alpha)
    await asyncio.wait_for(session.go_on_alone(), 15)
    with pytest.raises((HypervisorError, StateError, ExceptionGroup)):
        await waiting
    await survives(session.alpha)


@pytest.mark.slow
async def test_mute_monitor_of_a_healthy_guest(bed: Bed) -> None:
    """Nobody cuts anything: the guest's stop waits for a hung copy, and is not taken for a dead QEMU."""
    session = await bed.protected(mode=Mode.REMUS)
    await session.ack(2)
    session.hang_secondary()
    await stands_still(session.alpha)
    with pytest.raises(HypervisorError, match="no answer within"):
        await session.primary.checkpoint(session.epoch + 1, GroupPhases(session.p_group))
    assert session.running.monitor.dead is None
    assert DomainEventKind.GONE not in told(session)
    # The copy is another matter: it is asked whether it lives, and it does not answer.
    await until(lambda: DomainEventKind.GONE in {event.kind for event in session.copy_events}, "told", 10)
    await session.go_on_alone()
    await survives(session.alpha)


# --- Silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_bytes", [None, 300, 3000, 20_000])
async def test_cable_dropped(bed: Bed, after_bytes: int | None) -> None:
    """Both live and hear nothing; with bytes: in the middle of a checkpoint, where the copy's monitor may be mute."""
    session = await bed.protected(relayed=True, delay_ms=100)
    await session.ack(2)
    if after_bytes is None:
        session.drop_cable()
    else:
        stream = session.stream
        stream.silent_after_bytes = after_bytes
        await until(lambda: not stream.passes, "the cable is silent", 10)
        session.drop_cable()
    loaded = await asyncio.wait_for(session.fail_over(), 10)
    assert loaded >= session.epoch
    # The old primary, fenced: it stops and stays so, whatever it was waiting for.
    await asyncio.wait_for(session.primary.freeze(), 20)
    stopped_at = session.alpha.count()
    await survives(session.beta)
    assert session.alpha.count() == stopped_at
    await session.primary.discard()
    await session.p_group.teardown(Verdict.DISCARD)
    assert not exists(session.running)


async def test_cable_dropped_in_a_disk_write(bed: Bed) -> None:
    """The copy's QEMU waits for the rest of a write and would wait for ever when it next drains its disks."""
    session = await bed.protected(relayed=True, delay_ms=100)
    await session.ack(2)
    [to_disk] = [relay for relay in session.relays if relay is not session.stream]
    to_disk.silent_after_bytes = 28 + 100  # a request's header and a part of its 512 bytes
    await until(lambda: not to_disk.passes, "the cable is silent", 10)
    # Long enough for the next checkpoint to begin: the guest waits for its write, the copy for the rest of it.
    await stands_still(session.alpha)
    session.drop_cable()
    await asyncio.wait_for(session.fail_over(), 10)
    await asyncio.wait_for(session.primary.freeze(), 20)
    await survives(session.beta)


# --- Losses at other moments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["primary", "secondary"])
async def test_kill_during_initial_sync(bed: Bed, lost: str) -> None:
    alpha, beta = bed.host("alpha"), bed.host("beta")
    before = await traces(await alpha.start())
    session = bed.session(alpha, beta, bwlimit_bytes_per_s=1 << 20)
    moved = asyncio.Event()
    session.progress = lambda what, done, total: moved.set()
    opening = asyncio.create_task(session.open())
    await asyncio.wait_for(moved.wait(), 10)
    if lost == "primary":
        await session.kill_primary()
    else:
        await session.kill_secondary()
    with pytest.raises(ExceptionGroup):
        await asyncio.wait_for(opening, 20)
    await session.secondary.discard()
    await session.s_group.teardown(Verdict.DISCARD)
    assert not list(beta.overlays.iterdir())
    if lost == "secondary":
        assert await traces(session.running) == before
        await survives(alpha)


async def test_cancelled_during_initial_sync(bed: Bed) -> None:
    alpha, beta = bed.host("alpha", 3), bed.host("beta", 3)
    before = await traces(await alpha.start())
    session = bed.session(alpha, beta, bwlimit_bytes_per_s=1 << 20)
    moved = asyncio.Event()
    session.progress = lambda what, done, total: moved.set()
    opening = asyncio.create_task(session.open())
    await asyncio.wait_for(moved.wait(), 10)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await session.secondary.discard()
    await session.s_group.teardown(Verdict.DISCARD)
    assert await traces(session.running) == before
    await survives(alpha)


@BOTH
async def test_kill_secondary_while_memory_is_copied(bed: Bed, mode: Mode) -> None:
    alpha, beta = bed.host("alpha"), bed.host("beta")
    before = await traces(await alpha.start())
    session = bed.session(alpha, beta, mode=mode, relayed=True)
    await session.open()
    session.stream.silent_after_bytes = 50_000
    copying = asyncio.create_task(
        session.primary.replicate(session.p_group, session.channels, session.progress)
    )
    await until(lambda: not session.stream.passes, "some of the memory is over", 10)
    await session.kill_secondary()
    session.stream.hang_up()
    with pytest.raises(HypervisorError):
        await asyncio.wait_for(copying, 30)
    # As the contract says: it runs again, and what the devices did is undone afterwards.
    assert await session.running.status() == "running"
    await session.p_group.stop_all(failover=True)
    await session.p_group.teardown(Verdict.KEEP)
    await session.secondary.discard()
    await session.s_group.teardown(Verdict.DISCARD)
    assert await traces(session.running) == before
    await survives(alpha)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["primary", "secondary"])
async def test_kill_at_random_moments(bed: Bed, lost: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it when the test fails
    chance = random.Random(seed)
    for number in range(rounds(3, 20)):
        alpha, beta = bed.host(f"alpha{number}", 2), bed.host(f"beta{number}", 2)
        await alpha.start()
        session = bed.session(alpha, beta, delay_ms=20)
        await session.protect()
        await asyncio.sleep(chance.random() * 0.2)
        if lost == "primary":
            await session.kill_primary()
            await session.fail_over()
            await survives(beta)
        else:
            await session.kill_secondary()
            await session.go_on_alone()
            await survives(alpha)


# --- Out of protection, and into it again ----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("disks", [1, 3])
async def test_unprotect_leaves_no_trace(bed: Bed, mode: Mode, disks: int) -> None:
    alpha, beta = bed.host("alpha", disks), bed.host("beta", disks)
    before = await traces(await alpha.start())
    files_before = files(alpha)
    for number in range(2):
        session = bed.session(alpha, beta, mode=mode, name=f"s{number}")
        await session.protect()
        await session.ack(3)
        await session.go_on_alone()
        assert await traces(session.running) == before
        assert files(alpha) == files_before
        # The images stay, as replicas; of the copy nothing else does.
        images = {f"disk{index}.qcow2{end}" for index in range(disks) for end in ("", ".understudy")}
        assert files(beta) - images == {"state/qemu.log", "state/serial.log"}
        await session.close()
    await survives(alpha)


async def test_protected_again_and_again(bed: Bed) -> None:
    """Each survivor is the next primary; its graph still has the replication node of its time as a copy."""
    hosts = [bed.host(f"host{number}", 2) for number in range(4)]
    await hosts[0].start()
    for number, (alpha, beta) in enumerate(itertools.pairwise(hosts)):
        session = bed.session(alpha, beta, name=f"s{number}")
        await session.protect()
        await session.ack(3)
        await session.kill_primary()
        await session.fail_over(generation=5 + 2 * number)
        await beta.counts_on(2)
    await survives(hosts[-1])


async def test_survivor_is_protected_twice(bed: Bed) -> None:
    session = await bed.protected(2)
    await session.kill_primary()
    await session.fail_over()
    beta = session.beta
    assert beta.qemu is not None
    before = await traces(beta.qemu)
    for number in range(2):
        again = bed.session(beta, bed.host(f"gamma{number}", 2), name=f"again{number}")
        await again.protect()
        await again.ack(2)
        await again.go_on_alone()
        after = await traces(beta.qemu)
        assert after == before
    await survives(beta)


# --- What else may happen --------------------------------------------------------------------------------------------


class PlainPrimary(QemuPrimary):
    """A primary whose QEMU forgets COLO at the last moment, as some versions do by themselves."""

    async def _command(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0
    ) -> Any:
        if command == "migrate":
            off = [{"capability": "x-colo", "state": False}]
            await super()._command("migrate-set-capabilities", {"capabilities": off})
        return await super()._command(command, arguments, timeout_s=timeout_s)


async def test_completed_instead_of_colo(bed: Bed) -> None:
    alpha, beta = bed.host("alpha"), bed.host("beta")
    before = await traces(await alpha.start())
    session = bed.session(alpha, beta)
    session.primary_class = PlainPrimary
    await session.open()
    with pytest.raises(NotReplicating, match="plain migration"):
        await session.primary.replicate(session.p_group, session.channels, session.progress)
    # The primary runs, confirmed, and only now may the secondary be killed.
    assert await session.running.status() == "running"
    assert session.secondary.qemu.process.alive
    assert not session.copy_dead
    await alpha.counts_on(2)
    await session.p_group.stop_all(failover=True)
    await session.p_group.teardown(Verdict.KEEP)
    await session.secondary.discard()
    await session.s_group.teardown(Verdict.DISCARD)
    assert await traces(session.running) == before
    await survives(alpha)


@BOTH
@pytest.mark.parametrize("noticed", [True, False], ids=["hangup", "unnoticed"])
async def test_swallowed_write_error_voids_the_epoch(bed: Bed, mode: Mode, noticed: bool) -> None:
    """The disks' connections break, memory's does not; the guest sees no error, and QEMU would go on."""
    session = await bed.protected(2, mode=mode, delay_ms=1000)
    await session.ack(2)
    if not noticed:
        # What the kernel tells of the connection is taken away: the driver's own word must be enough.
        for node in session.p_disks.clients:
            session.p_disks._ignore_hangup(node)
    await session.secondary.qemu.monitor.execute("nbd-server-stop")
    await session.alpha.counts_on(3)
    loaded = session.secondary._timeline.follower.loaded
    with pytest.raises((ExceptionGroup, HypervisorError)):
        await session.ack(20)
    if noticed or mode is Mode.REMUS:
        # No checkpoint came after the loss: memory and disks of the copy still agree.
        assert session.secondary._timeline.follower.loaded == loaded
    await session.go_on_alone()
    await survives(session.alpha)


@BOTH
async def test_reset_and_shutdown_are_told(bed: Bed, mode: Mode) -> None:
    session = await bed.protected(mode=mode)
    await session.ack(2)
    before = await session.alpha.counts_on(5)
    await session.running.monitor.execute("system_reset")
    await until(lambda: DomainEventKind.RESET in told(session), "RESET is told")
    await session.ack(3)
    await until(lambda: session.alpha.count() < before, "the guest counts from the beginning")
    # The guest switches itself off: port 0x604 is the ACPI control register that SeaBIOS sets up.
    line = {"command-line": "o/w 0x604 0x2000"}
    await session.running.monitor.execute("human-monitor-command", line)
    await until(lambda: DomainEventKind.SHUTDOWN in told(session), "SHUTDOWN is told")
    assert session.running.process.alive
    if mode is Mode.REMUS:
        with pytest.raises(HypervisorError, match="shut itself down"):
            await session.ack()
        assert await session.running.status() == "shutdown"


async def test_quit_is_no_shutdown_of_the_guest(bed: Bed) -> None:
    session = await bed.protected()
    await session.running.monitor.execute("quit")
    await until(lambda: DomainEventKind.GONE in told(session), "GONE is told")
    assert DomainEventKind.SHUTDOWN not in told(session)
    await session.fail_over()
    await survives(session.beta)


async def test_frozen_stays_frozen(bed: Bed) -> None:
    session = await bed.protected()
    await session.ack(2)
    await session.primary.freeze()
    assert await session.running.status() in {"paused", "colo"}
    at = session.alpha.count()
    await session.fail_over()
    await session.beta.counts_on(5)
    assert session.alpha.count() == at
    await session.primary.discard()
    await session.p_group.teardown(Verdict.DISCARD)
    assert not exists(session.running)
    await survives(session.beta)


async def test_ungated_checkpoint_is_told(bed: Bed) -> None:
    """In mode remus, a checkpoint that somebody else caused during our barriers releases nothing."""
    session = await bed.protected(mode=Mode.REMUS)

    class Meddling:
        async def postsuspend(self, epoch: int) -> None:
            await session.running.monitor.execute("cont")
            await session.alpha.counts_on(1)

        async def checkpoint(self, epoch: int) -> None:
            pass

        preresume = postresume = checkpoint

    meddled = await session.primary.checkpoint(100, Meddling())
    assert not meddled.gated
    [clean] = await session.ack_at(101)
    assert clean.gated


async def test_images_of_others_are_not_overwritten(bed: Bed) -> None:
    alpha, beta = bed.host("alpha"), bed.host("beta")
    await alpha.start()
    beta.make_images()
    content = beta.config.disks[0].path.read_bytes()
    session = bed.session(alpha, beta)
    with pytest.raises(ExceptionGroup, match="not known to be a replica"):
        await session.open()
    assert beta.config.disks[0].path.read_bytes() == content
    assert not list(beta.overlays.iterdir())
    await survives(alpha)


async def test_size_in_bytes_is_the_primarys(bed: Bed) -> None:
    session = await bed.protected()
    for disk in session.beta.config.disks:
        assert await session.beta.images.size_bytes(disk.path, disk.format) == SIZE_BYTES
    with suppress(HypervisorError):
        await session.go_on_alone()
    await survives(session.alpha)
