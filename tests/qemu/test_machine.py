"""Real guests started, found again, stopped and swept by the hypervisor."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.conftest import POWERS_OFF, Bed, ip
from understudy import interfaces
from understudy.arbiter import RecordState
from understudy.device import Mode, ReplicationMode, Severity
from understudy.errors import HypervisorError, MonitorSilent, StateError
from understudy.hypervisor import GuestState
from understudy_qemu import identity, network
from understudy_qemu.accel import Accel
from understudy_qemu.guestfile import QemuConfig
from understudy_qemu.hypervisor import QemuHypervisor
from understudy_qemu.inventory import Inventory
from understudy_qemu.machine import ImageDrive

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]


def link(name: str) -> str:
    return ip("-d", "link", "show", name)


async def becomes(agent: QemuHypervisor, config: QemuConfig, state: GuestState) -> None:
    async with asyncio.timeout(30):
        while await agent.state(config) is not state:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.02)


def quiet_ipv6(name: str) -> bool:
    return Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").read_text().strip() == "1"


@pytest.mark.parametrize(
    ("machine", "bus"),
    [("pc", "virtio"), ("pc", "scsi"), ("pc", "ide"), ("q35", "virtio"), ("q35", "scsi"), ("q35", "ide")],
)
async def test_every_machine_and_bus_boots_and_writes(bed: Bed, machine: str, bus: str) -> None:
    agent = bed.agent()
    disks = [{"path": f"{index}.qcow2", "bus": bus} for index in range(2)]
    config = bed.guest(machine=machine, disk=disks)
    await agent.start(config, bed.alone())
    await bed.counts(config)
    assert "E" not in bed.serial(config)
    await agent.stop(config, force=True, timeout_s=5)
    assert await agent.state(config) is GuestState.ABSENT
    for disk in config.disks:
        assert bed.raw(disk.path)[1024 + 4 : 1024 + 8] == b"CNTR"


async def test_start_and_stop_leave_no_trace(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest()
    await agent.start(config, bed.alone(generation=7))
    tap = config.nics[0].tap
    assert f"master {bed.bridge}" in link(tap)
    assert "vnet_hdr on" in link(tap)
    assert "state UP" in link(tap) or ",UP" in link(tap)
    assert link(tap).split("link/ether ")[1].startswith("fe:")
    qemu = await agent.running(config)
    assert qemu is not None
    nodes = {node["node-name"] for node in await qemu.monitor.execute("query-named-block-nodes")}
    assert nodes == {"disk0", "disk0-image", "disk0-file"}
    written = agent.images(config).identity(config.disks[0].path)
    assert written is not None
    assert (written.generation, written.role) == (7, ReplicationMode.PRIMARY)
    assert bed.traces()
    await agent.stop(config, force=True, timeout_s=5)
    assert bed.traces() == set()
    assert not qemu.process.alive


async def test_a_second_start_changes_nothing(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest()
    await agent.start(config, bed.alone())
    with pytest.raises(StateError, match="runs already"):
        await agent.start(config, bed.alone())
    assert await agent.state(config) is GuestState.RUNNING
    await bed.counts(config)


async def test_the_guest_outlives_its_agent_and_is_adopted(bed: Bed) -> None:
    first = bed.agent()
    config = bed.guest()
    await first.start(config, bed.alone())
    await bed.counts(config)
    await bed.crash(first)
    await bed.counts(config)
    second = bed.agent()
    assert await second.state(config) is GuestState.RUNNING
    assert await second.sweep(config, bed.alone()) == []
    (found,) = [guest for guest in await second.found() if guest.ours]
    assert (found.name, found.state, found.obstacle) == ("counter", GuestState.RUNNING, "")
    await bed.counts(config)


async def test_two_who_ask_at_once_share_one_connection(bed: Bed) -> None:
    first = bed.agent()
    config = bed.guest()
    await first.start(config, bed.alone())
    await bed.crash(first)
    second = bed.agent()
    one, two = await asyncio.gather(second.running(config), second.running(config))
    assert one is two is not None


async def test_a_guest_that_shuts_down_is_preserved_and_can_be_started_again(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest(sector=POWERS_OFF)
    await agent.start(config, bed.alone())
    await becomes(agent, config, GuestState.SHUTOFF)
    before = (await agent.running(config)).process.pid  # type: ignore[union-attr]
    await agent.start(config, bed.alone())
    assert (await agent.running(config)).process.pid != before  # type: ignore[union-attr]
    await becomes(agent, config, GuestState.SHUTOFF)
    with pytest.raises(
        StateError, match=r"counter does not run on alpha-.*: it has shut down \(run state shutdown\)"
    ):
        await agent.primary(config)
    assert await agent.state(config) is GuestState.SHUTOFF
    await agent.stop(config, force=False, timeout_s=5)
    assert bed.traces() == set()


@pytest.mark.parametrize("bus", ["virtio", "scsi", "ide"])
async def test_a_full_file_system_is_the_guests_own_affair(bed: Bed, bus: str) -> None:
    agent = bed.agent()
    config = bed.guest(disk=[{"path": "disk.raw", "bus": bus}])
    await agent.start(config, bed.alone())
    await bed.counts(config)
    qemu = await agent.running(config)
    assert qemu is not None
    full = {"driver": "blkdebug", "node-name": "full", "image": "disk0-file"}
    no_space = [{"event": "pwritev", "errno": errno.ENOSPC, "iotype": "write"}]
    await qemu.monitor.execute("blockdev-add", full | {"inject-error": no_space})
    image = {"driver": "raw", "node-name": "disk0-image", "file": "full"}
    await qemu.monitor.execute("blockdev-reopen", {"options": [image]})
    async with asyncio.timeout(30):
        while "E" not in bed.serial(config):  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.02)
    await bed.counts(config)
    assert await agent.state(config) is GuestState.RUNNING


async def test_a_guest_that_ignores_the_power_button_runs_on(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest()
    await agent.start(config, bed.alone())
    with pytest.raises(HypervisorError, match=r"did not shut down within 0.3 s and runs on"):
        await agent.stop(config, force=False, timeout_s=0.3)
    await bed.counts(config)


async def test_a_stopped_process_is_silent_and_can_still_be_killed(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("understudy_qemu.running.RECONNECT_S", 0.5)
    monkeypatch.setattr("understudy_qemu.running.STATUS_S", 0.5)
    agent = bed.agent()
    config = bed.guest()
    await agent.start(config, bed.alone())
    qemu = await agent.running(config)
    assert qemu is not None
    os.kill(qemu.process.pid, signal.SIGSTOP)
    assert await agent.state(config) is GuestState.SILENT
    assert await agent.state(config) is GuestState.SILENT
    with pytest.raises(MonitorSilent):
        await agent.stop(config, force=False, timeout_s=1)
    os.kill(qemu.process.pid, signal.SIGCONT)
    await becomes(agent, config, GuestState.RUNNING)
    os.kill(qemu.process.pid, signal.SIGSTOP)
    await agent.stop(config, force=True, timeout_s=1)
    assert bed.traces() == set()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"nic": [{"bridge": "us-no-bridge"}]}, "there is no bridge us-no-bridge on .* for nic0"),
        ({"nic": [{"bridge": "lo"}]}, "there is no bridge lo on .* for nic0"),
        ({"arguments": ["-nonsense"]}, "QEMU ended with status 1; it said: .*nonsense"),
        ({"qemu": "/no/such/qemu"}, "/no/such/qemu cannot be started"),
    ],
)
async def test_a_failed_start_leaves_nothing(bed: Bed, table: dict[str, Any], words: str) -> None:
    agent = bed.agent()
    config = bed.guest(**table)
    with pytest.raises(HypervisorError, match=words):
        await agent.start(config, bed.alone())
    assert bed.traces() == set()
    assert await agent.state(config) is GuestState.ABSENT


async def test_a_replica_or_somebody_elses_image_is_not_started(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest()
    images, path = agent.images(config), config.disks[0].path
    identity.claim(images, config, 3, "id-1")
    mine = images.identity(path)
    assert mine is not None
    images.write_identity(path, type(mine)("id-1", "counter", "disk0", 3, ReplicationMode.SECONDARY))
    with pytest.raises(HypervisorError, match="is a replica that never became the guest's disk"):
        await agent.start(config, bed.alone())
    images.write_identity(path, type(mine)("id-1", "other", "disk0", 3, ReplicationMode.PRIMARY))
    with pytest.raises(HypervisorError, match="is not disk0 of counter"):
        await agent.start(config, bed.alone())
    overlay = agent.overlay_directory(config)
    overlay.mkdir(parents=True)
    (overlay / "disk0-active.qcow2").write_bytes(b"")
    with pytest.raises(HypervisorError, match="were never written into its images"):
        await agent.start(config, bed.alone())
    assert bed.traces() == set()


# --- The janitor -----------------------------------------------------------------------------------------------------


async def test_a_guest_against_the_record_is_discarded(bed: Bed) -> None:
    first = bed.agent()
    config = bed.guest()
    await first.start(config, bed.alone())
    await bed.crash(first)
    agent = bed.agent()
    for state, more in (
        (RecordState.PROTECTED, {"standby": "beta", "session": "s"}),
        (RecordState.PROMOTING, {"standby": "beta", "session": "s"}),
        (RecordState.RELEASED, {"standby": "beta", "session": "s"}),
        (RecordState.ALONE, {}),
    ):
        assert await agent.sweep(config, bed.alone(state=state, **more)) == []
    assert await agent.sweep(config, None) == []
    await bed.counts(config)
    (done,) = await agent.sweep(config, bed.alone("beta", generation=2))
    assert "although the record says: counter: generation 2, alone, owner beta" in done
    assert bed.traces() == set()
    assert await agent.sweep(config, bed.alone("beta", generation=2)) == []


async def test_remains_of_a_dead_guest_are_removed(bed: Bed) -> None:
    first = bed.agent()
    config = bed.guest()
    await first.start(config, bed.alone())
    qemu = await first.running(config)
    assert qemu is not None
    await qemu.process.kill()
    await bed.crash(first)
    assert bed.traces()
    done = await bed.agent().sweep(config, bed.alone())
    assert any(config.nics[0].tap in sentence for sentence in done)
    assert any("files of a dead QEMU" in sentence for sentence in done)
    assert bed.traces() == set()


async def test_what_a_session_left_around_a_guest_that_is_alone_is_removed_and_it_runs(bed: Bed) -> None:
    first = bed.agent()
    config = bed.guest()
    await first.start(config, bed.alone())
    qemu = await first.running(config)
    assert qemu is not None
    born = await Inventory.take(qemu.monitor)
    # A session cut short at its worst: the guest stopped, output held, a disk half mirrored, a second child below the
    # quorum, character devices and filters that refer to each other, a filter on the tap, the interface's way shut.
    execute = qemu.monitor.execute
    await execute("stop")
    backend = {
        "type": "socket",
        "data": {"addr": {"type": "unix", "data": {"path": f"{bed.root}/c"}}, "wait": False},
    }
    await execute("chardev-add", {"id": "mirror0", "backend": backend})
    nic = {"netdev": "nic0", "vnet_hdr_support": True}
    await execute(
        "object-add", {"qom-type": "filter-mirror", "id": "m0", "queue": "tx", "outdev": "mirror0", **nic}
    )
    held = {
        "qom-type": "filter-buffer",
        "id": "held",
        "netdev": "nic0",
        "queue": "rx",
        "interval": 4_000_000_000,
    }
    await execute("object-add", held)
    for node in ("target", "second"):
        await execute("blockdev-add", {"driver": "null-co", "node-name": node, "size": 4 << 20})
    await execute(
        "blockdev-mirror", {"job-id": "resync", "device": "disk0", "target": "target", "sync": "full"}
    )
    await execute("x-blockdev-change", {"parent": "disk0", "node": "second"})
    tc = ["qdisc", "add", "dev", config.nics[0].tap, "clsact"]
    await (await asyncio.create_subprocess_exec("tc", *tc)).wait()
    await interfaces.close_way_out(config.nics[0].tap)
    await bed.crash(first)

    agent = bed.agent()
    undecided = bed.alone(state=RecordState.PROTECTED, standby="beta", session="s")
    assert await agent.sweep(config, undecided) == []
    assert await agent.state(config) is GuestState.PAUSED
    done = await agent.sweep(config, bed.alone())
    assert "removed held, m0, mirror0, second, target" in done[0]
    assert "it runs again" in done[1]
    assert "still had filters" in done[2]
    running = await agent.running(config)
    assert running is not None
    assert await Inventory.take(running.monitor) == born
    assert f"master {bed.bridge}" in link(config.nics[0].tap)
    await bed.counts(config)
    assert await agent.sweep(config, bed.alone()) == []


@pytest.mark.parametrize("owner", ["", "beta"])
async def test_a_copy_whose_session_is_over_is_discarded(bed: Bed, owner: str) -> None:
    first = bed.agent()
    config = bed.guest()
    drives = {disk.name: ImageDrive(disk) for disk in config.disks}
    await first.launch(config, drives, accel=Accel.TCG, copy=True)
    assert f"master {bed.bridge}" not in link(config.nics[0].tap)
    assert ",UP" not in link(config.nics[0].tap)
    assert await first.state(config) is GuestState.INCOMING
    with pytest.raises(StateError, match="a copy of counter waits"):
        await first.start(config, bed.alone())
    await bed.crash(first)
    overlays = first.overlay_directory(config)
    overlays.mkdir(parents=True)
    (overlays / "disk0-active.qcow2").write_bytes(b"")
    agent = bed.agent()
    record = bed.alone("beta", state=RecordState.PROTECTED, standby=bed.name, session="s2")
    if owner:
        record = bed.alone(owner)
    done = await agent.sweep(config, record)
    assert "of a session that is over: discarded" in done[0]
    assert bed.traces() == set()
    assert not overlays.exists()


async def test_overlays_of_an_owned_guest_are_data(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest()
    overlay = agent.overlay_directory(config) / "disk0-active.qcow2"
    overlay.parent.mkdir(parents=True)
    overlay.write_bytes(b"data")
    (told,) = await agent.sweep(config, bed.alone())
    assert "left as they are" in told
    assert overlay.exists()
    await agent.sweep(config, bed.alone("beta"))
    assert not overlay.exists()


# --- The preflight ---------------------------------------------------------------------------------------------------


async def test_all_findings_at_once(bed: Bed, tmp_path: Path) -> None:
    agent = bed.agent()
    good = bed.guest()
    identity.claim(agent.images(good), good, 4, "id-1")
    facts = dict(await agent.facts(good))
    assert facts["disks"]["disk0"]["size_bytes"] == 4 << 20
    assert (facts["guest_id"], facts["generation"]) == ("id-1", 4)
    assert facts["memory_bytes"] == (16 << 20) + 8192
    findings = await agent.probe(good, side=ReplicationMode.PRIMARY, mode=Mode.COLO, peer_facts=facts)
    assert [finding.severity for finding in findings] == [Severity.NOTE]

    bad = bed.guest(
        "other",
        nic=[{"bridge": "us-none"}],
        disk=[{"path": "other.qcow2"}],
        overlays={"room_ratio": 1e9},
        cpus=2,
    )
    facts["host"] = "beta"
    facts["qemu"] = {**facts["qemu"], "version": "1.0"}
    facts["accel"] = "kvm"
    facts["disks"] = {"disk0": {"format": "qcow2", "bus": "virtio", "size_bytes": 8 << 20}}
    words = "\n".join(
        str(finding)
        for finding in await agent.probe(
            bad, side=ReplicationMode.SECONDARY, mode=Mode.REMUS, peer_facts=facts
        )
    )
    for expected in (
        "there is no bridge us-none",
        "other.qcow2 has 4194304 bytes, the primary's disk has 8388608",
        "is not known to be a replica of disk0 of guest other",
        "MiB of room, the copy's writes need",
        "the two hosts have different versions: 1.0 on beta and",
        "one runs it with KVM, the other emulates it",
        "the numbers of CPUs differ: 1 on beta and 2 on",
        "describe different devices",
        "the guest's CPU is emulated",
    ):
        assert expected in words, f"{expected!r} is missing from:\n{words}"
    assert bed.traces() == set()


async def test_a_missing_qemu_and_a_missing_image_are_findings(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest(qemu="/no/such/qemu")
    config.disks[0].path.unlink()
    findings = await agent.probe(config, side=ReplicationMode.PRIMARY, mode=Mode.REMUS, peer_facts={})
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    assert ["/no/such/qemu is not installed" in str(e) or "No such file" in str(e) for e in errors] == [
        True,
        True,
    ]
    assert all(error.remedy for error in errors)
    assert (await agent.facts(config))["qemu"] is None


async def test_a_foreign_qemu_is_found_with_the_reason_and_the_remedy(bed: Bed, tmp_path: Path) -> None:
    program = os.environ.get("UNDERSTUDY_QEMU") or "qemu-system-x86_64"
    argv = [
        program,
        "-name",
        "guest=legacy,debug-threads=on",
        "-S",
        "-nodefaults",
        "-display",
        "none",
        "-m",
        "16M",
    ]
    foreign = await asyncio.create_subprocess_exec(*argv)
    try:
        async with asyncio.timeout(10):
            while True:
                found = [guest for guest in await bed.agent().found() if guest.name == "legacy"]
                if found:
                    break
                await asyncio.sleep(0.02)
        assert not found[0].ours
        assert "was not started by Understudy" in found[0].obstacle
        assert "understudy start" in found[0].remedy
    finally:
        foreign.kill()
        await foreign.wait()


# --- Taps ------------------------------------------------------------------------------------------------------------


async def test_taps_by_hand(bed: Bed) -> None:
    name = network.tap_name(bed.name, "taps", "nic0")
    try:
        await network.create_tap(name, vnet_hdr=False, mac="52:54:00:00:00:01")
        await network.create_tap(name, vnet_hdr=False, mac="52:54:00:00:00:01")
        assert "vnet_hdr off" in link(name)
        assert quiet_ipv6(name)
        await interfaces.open_way_out(name, bed.bridge)
        await interfaces.open_way_out(name, bed.bridge)
        assert f"master {bed.bridge}" in link(name)
        await interfaces.close_way_out(name)
        assert "master" not in link(name)
        assert ",UP" not in link(name)
    finally:
        assert await network.remove_tap(name)
    assert not await network.remove_tap(name)
    await interfaces.close_way_out(name)
    with pytest.raises(
        HypervisorError, match=f"cannot put {name} on {bed.bridge}: there is no interface {name}"
    ):
        await interfaces.open_way_out(name, bed.bridge)
