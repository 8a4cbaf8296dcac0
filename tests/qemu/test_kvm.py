"""The hypervisor under KVM, wherever /dev/kvm really works; what a session does there is in test_domains.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qemu.conftest import Bed
from tests.testbeds.bed import need
from understudy.device import Mode, ReplicationMode, Severity
from understudy.errors import HypervisorError
from understudy.hypervisor import GuestState
from understudy_qemu.accel import Accel, kvm_runs

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.timeout(120)]

# Some KVMs do not let QEMU read one register that plain `host` wants.
CPU = "host,-arch-capabilities"


@pytest.fixture
async def kvm(bed: Bed) -> Bed:
    problem = await kvm_runs("qemu-system-x86_64", CPU)
    need("kvm", [f"a working KVM ({problem})"] if problem else [])
    return bed


async def test_a_guest_counts_without_the_library_and_with_its_own_memory(kvm: Bed) -> None:
    agent = kvm.agent()
    config = kvm.guest(accel="kvm", cpu=CPU)
    await agent.start(config, kvm.alone())
    await kvm.counts(config)
    qemu = await agent.running(config)
    assert qemu is not None
    assert b"LD_PRELOAD" not in environment_of(qemu.process.pid)
    memory = await qemu.monitor.execute("query-memory-size-summary")
    assert memory["base-memory"] == 16 << 20
    assert (await qemu.monitor.execute("query-kvm"))["enabled"]
    facts = await agent.facts(config)
    assert facts["accel"] == "kvm"
    assert facts["cpu_model"]
    findings = await agent.probe(config, side=ReplicationMode.PRIMARY, mode=Mode.COLO, peer_facts=facts)
    assert not [finding for finding in findings if finding.severity is Severity.ERROR]
    await agent.stop(config, force=True, timeout_s=5)
    assert kvm.traces() == set()


async def test_under_tcg_the_library_is_there_and_the_memory_is_odd(
    bed: Bed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "understudy_qemu")
    agent = bed.agent()
    config = bed.guest(accel="tcg")
    await agent.start(config, bed.alone())
    qemu = await agent.running(config)
    assert qemu is not None
    assert b"LD_PRELOAD" in environment_of(qemu.process.pid)
    assert "qemu-tcg-" in Path(f"/proc/{qemu.process.pid}/maps").read_text()  # noqa: ASYNC240 - not a disk
    memory = await qemu.monitor.execute("query-memory-size-summary")
    assert memory["base-memory"] == (16 << 20) + 8192
    await agent.stop(config, force=True, timeout_s=5)
    await agent.start(config, bed.alone())
    said = [record for record in caplog.records if "deadlock at checkpoints" in record.getMessage()]
    assert len(said) == 1


async def test_kvm_that_cannot_work_is_said_and_not_tried_on_the_guest(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest(accel="kvm", cpu="no-such-cpu")
    _, problem = await agent.accel(config)
    assert "no-such-cpu" in problem or "/dev/kvm" in problem
    with pytest.raises(HypervisorError, match='accel = "kvm" does not work on'):
        await agent.start(config, bed.alone())
    assert bed.traces() == set()
    findings = await agent.probe(config, side=ReplicationMode.PRIMARY, mode=Mode.COLO, peer_facts={})
    assert any(finding.severity is Severity.ERROR and "accel on" in finding.subject for finding in findings)


async def test_auto_falls_back_to_tcg_where_the_trial_fails(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("understudy_qemu.hypervisor.choose_accel", lambda wanted: Accel.KVM)
    agent = bed.agent()
    config = bed.guest(accel="auto", cpu="no-such-cpu")
    accel, problem = await agent.accel(config)
    assert accel is Accel.TCG
    assert "KVM does not work here" in problem
    assert await agent.state(config) is GuestState.ABSENT


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()
