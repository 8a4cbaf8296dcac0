"""The janitor after an agent that died while its guest was protected, with real sessions of block replication."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.qemu.pair import Host, Session, need_qemu, record
from understudy.arbiter import RecordState
from understudy.device import Mode, ReplicationMode
from understudy.hypervisor import GuestState, HostContext
from understudy_qemu.accel import Accel
from understudy_qemu.hypervisor import QemuHypervisor
from understudy_qemu.inventory import Inventory
from understudy_qemu.janitor import uncommitted
from understudy_qemu.machine import GuestPaths
from understudy_qemu.restoring import restore
from understudy_qemu.running import Qemu

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]


@pytest_asyncio.fixture
async def session(tmp_path: Path, mode: Mode, kind: type[Host]) -> AsyncIterator[Session]:
    need_qemu()
    hosts = [kind(name, tmp_path / name, Accel.TCG, 2) for name in ("alpha", "beta")]
    made: Session | None = None
    try:
        await hosts[0].start()
        made = Session(hosts[0], hosts[1], mode=mode)
        await made.protect()
        yield made
    finally:
        if made is not None:
            await made.close()
        for host in hosts:
            await host.kill()


async def adopted(session: Session) -> Qemu:
    # As a new agent would find the guest; the old agent's sockets to the secondary died with it.
    await session.close()
    await session.running.close()
    qemu = await Qemu.adopt(session.alpha.paths, name="counter on alpha")
    assert qemu is not None
    session.alpha.everything[:] = [qemu]
    session.alpha.qemu = qemu
    return qemu


@pytest.mark.parametrize("mode", [Mode.COLO, Mode.REMUS])
@pytest.mark.parametrize("stopped", [False, True], ids=["between", "stopped"])
async def test_the_guest_goes_on_as_if_it_had_never_been_protected(
    session: Session, mode: Mode, *, stopped: bool
) -> None:
    await session.ack(3)
    if stopped:
        # In remus mode the agent may die after it has stopped the guest for a checkpoint.
        await session.running.monitor.execute("stop")
    await session.secondary.discard()
    qemu = await adopted(session)
    done = await restore(qemu)
    assert any("parts of a session" in sentence for sentence in done)
    assert (await Inventory.take(qemu.monitor)).to_json() == qemu.launched.born
    assert await qemu.status() == "running"
    assert await restore(qemu) == []
    last = await session.alpha.counts_on(3)
    await session.alpha.quit()
    for counts in session.alpha.disk_counts():
        assert counts == list(range(1, len(counts) + 1))
        assert len(counts) >= last


# --- A takeover cut short --------------------------------------------------------------------------------------------


class AgentsHost(Host):
    """A host whose files lie where its agent's hypervisor has them."""

    @functools.cached_property
    def agent(self) -> QemuHypervisor:
        here = HostContext(self.name, "127.0.0.1", self.root / "lib", self.root / "agent", self.root / "over")
        return QemuHypervisor(here)

    @property
    def paths(self) -> GuestPaths:
        return self.agent.paths(self.config)

    @property
    def overlays(self) -> Path:
        made = self.agent.overlay_directory(self.config)
        made.mkdir(exist_ok=True, parents=True)
        return made


@pytest.fixture
def kind() -> type[Host]:
    return AgentsHost


@pytest.mark.parametrize("mode", [Mode.REMUS])
@pytest.mark.parametrize("promoted", [True, False], ids=["promoted", "only-severed"])
async def test_a_takeover_is_finished_only_if_the_copy_was_promoted(
    session: Session, mode: Mode, *, promoted: bool
) -> None:
    await session.ack(2)
    await session.kill_primary()
    await session.secondary.sever("test")
    if promoted:
        await session.secondary.promote(session.s_group, record(RecordState.PROMOTING, "alpha", 5))
    await session.close()
    await session.secondary.qemu.close()
    beta = session.beta
    assert isinstance(beta, AgentsHost)
    beta.everything.clear()
    done = await beta.agent.sweep(beta.config, record(RecordState.ALONE, "beta", 6))
    beta.qemu = await beta.agent.running(beta.config)
    if not promoted:
        assert "of a session that is over: discarded" in done[0]
        assert beta.qemu is None
        return
    assert beta.qemu is not None
    beta.everything.append(beta.qemu)
    assert "its takeover was finished" in done[0]
    assert await beta.agent.state(beta.config) is GuestState.RUNNING
    for disk in beta.config.disks:
        identity = beta.agent.images(beta.config).identity(disk.path)
        assert identity is not None
        assert (identity.role, identity.generation) == (ReplicationMode.PRIMARY, 6)
    last = await beta.counts_on(2)
    async with asyncio.timeout(30):
        while await uncommitted(beta.qemu):  # noqa: ASYNC110 - the job is QEMU's own
            await asyncio.sleep(0.05)
    await beta.agent.sweep(beta.config, record(RecordState.ALONE, "beta", 6))
    assert not beta.agent.overlay_directory(beta.config).exists()
    await beta.quit()
    for counts in beta.disk_counts():
        assert counts == list(range(1, len(counts) + 1))
        assert len(counts) >= last


@pytest.mark.parametrize("mode", [Mode.REMUS])
async def test_a_secondary_that_hangs_holds_nobody(session: Session, mode: Mode) -> None:
    await session.ack(2)
    session.secondary.qemu.process._child.send_signal(19)  # type: ignore[union-attr]
    qemu = await adopted(session)
    async with asyncio.timeout(20):
        await restore(qemu)
    await session.alpha.counts_on(3)
