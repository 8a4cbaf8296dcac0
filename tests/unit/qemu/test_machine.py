"""The command line: what must be on it, and what must be equal on both hosts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from understudy.device import Mode
from understudy.errors import HypervisorError
from understudy.hypervisor import Protection
from understudy_qemu.accel import Accel
from understudy_qemu.guestfile import QemuConfig, parse_config
from understudy_qemu.machine import GuestPaths, ImageDrive, command_line, environment
from understudy_qemu.speculating import CopyDrive


def make(host: str = "alpha", **table: Any) -> QemuConfig:
    table = {"memory": "64MiB", **table}
    return parse_config(
        table, name="web", source=Path("/g/web.toml"), protection=Protection(Mode.REMUS), host=host
    )


def line(
    config: QemuConfig, *, accel: Accel = Accel.TCG, incoming: bool = False, root: str = "/r"
) -> list[str]:
    drives = {disk.name: ImageDrive(disk) for disk in config.disks}
    taps = {nic.name: nic.tap for nic in config.nics}
    paths = GuestPaths(Path(root, "run"), Path(root, "state"))
    return command_line(config, paths, accel=accel, drives=drives, taps=taps, incoming=incoming)


def values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(arguments) if name == option]


def objects(arguments: list[str], option: str) -> list[dict[str, Any]]:
    return [json.loads(value) for value in values(arguments, option)]


def test_every_disk_is_born_below_a_quorum() -> None:
    arguments = line(make(disk=[{"path": "a.qcow2"}, {"path": "b.raw"}]))
    nodes = {node["node-name"]: node for node in objects(arguments, "-blockdev")}
    devices = {device["id"]: device for device in objects(arguments, "-device")}
    for name, image in (("disk0", "qcow2"), ("disk1", "raw")):
        assert devices[f"dev-{name}"]["drive"] == name
        assert (nodes[name]["driver"], nodes[name]["children"]) == ("quorum", [f"{name}-image"])
        assert (nodes[f"{name}-image"]["driver"], nodes[f"{name}-image"]["file"]) == (image, f"{name}-file")


def test_taps_have_no_vhost_and_headers_only_for_virtio() -> None:
    arguments = line(make(nic=[{"bridge": "b"}, {"bridge": "b", "model": "e1000"}]))
    first, second = values(arguments, "-netdev")
    assert "vhost=off" in first
    assert "vhost=off" in second
    assert first.endswith("vnet_hdr=on")
    assert second.endswith("vnet_hdr=off")


def test_one_more_device_moves_no_other() -> None:
    def slots(config: QemuConfig) -> dict[str, str]:
        return {device["id"]: device["addr"] for device in objects(line(config), "-device")}

    small = slots(make(disk=[{"path": "a"}], nic=[{"bridge": "b"}]))
    large = slots(make(disk=[{"path": "a"}, {"path": "c"}], nic=[{"bridge": "b"}, {"bridge": "b"}]))
    assert small.items() <= large.items()
    assert len(set(large.values())) == len(large)


def test_both_hosts_have_the_same_machine() -> None:
    table: dict[str, Any] = {"disk": [{"path": "a"}], "nic": [{"bridge": "b"}], "cpus": 2}
    primary, copy = line(make("alpha", **table)), line(make("beta", **table), incoming=True, root="/q")
    assert values(copy, "-incoming") == ["defer"]
    for option in ("-machine", "-cpu", "-m", "-smp", "-device", "-accel", "-rtc", "-action"):
        assert values(primary, option) == values(copy, option)


def test_shutdown_and_crash_pause_and_nothing_runs_by_itself() -> None:
    arguments = line(make())
    assert values(arguments, "-action") == ["reboot=reset,shutdown=pause,panic=pause"]
    assert "-S" in arguments


@pytest.mark.parametrize(
    ("accel", "memory", "given"),
    [(Accel.TCG, "64MiB", "65544K"), (Accel.TCG, "65540KiB", "65540K"), (Accel.KVM, "64MiB", "65536K")],
)
def test_memory_under_tcg_is_no_multiple_of_256_kib(accel: Accel, memory: str, given: str) -> None:
    assert values(line(make(memory=memory), accel=accel), "-m") == [given]


@pytest.mark.parametrize(("accel", "cpu"), [(Accel.TCG, "qemu64"), (Accel.KVM, "host")])
def test_the_cpu_fits_the_accelerator_unless_it_is_named(accel: Accel, cpu: str) -> None:
    assert values(line(make(), accel=accel), "-cpu") == [cpu]
    assert values(line(make(cpu="max"), accel=accel), "-cpu") == ["max"]


def test_q35_has_its_own_bus() -> None:
    arguments = line(
        make(machine="q35", disk=[{"path": "a"}, {"path": "b", "bus": "ide"}], nic=[{"bridge": "b"}])
    )
    assert [device["bus"] for device in objects(arguments, "-device")] == ["pcie.0", "ide.0", "pcie.0"]


def test_ide_disks_of_pc_share_two_buses() -> None:
    arguments = line(make(disk=[{"path": str(n), "bus": "ide"} for n in range(3)]))
    assert [(d["bus"], d["unit"]) for d in objects(arguments, "-device")] == [
        ("ide.0", 0),
        ("ide.0", 1),
        ("ide.1", 0),
    ]


def test_scsi_disks_get_one_controller() -> None:
    arguments = line(make(disk=[{"path": "a", "bus": "scsi"}, {"path": "b", "bus": "scsi"}]))
    assert [d["driver"] for d in objects(arguments, "-device")] == ["virtio-scsi-pci", "scsi-hd", "scsi-hd"]


@pytest.mark.parametrize("incoming", [False, True])
def test_no_disk_that_fails_stops_a_guest_or_a_copy(incoming: bool) -> None:
    disks = [{"path": "a"}, {"path": "b", "bus": "scsi"}, {"path": "c", "bus": "ide"}]
    devices = objects(line(make(disk=disks), incoming=incoming), "-device")
    told = [(d["werror"], d["rerror"]) for d in devices if "drive" in d]
    assert told == [("report", "report")] * 3


def test_caches() -> None:
    arguments = line(make(disk=[{"path": "a", "cache": "none"}, {"path": "b", "cache": "writethrough"}]))
    files = [node["cache"]["direct"] for node in objects(arguments, "-blockdev") if node["driver"] == "file"]
    assert files == [True, False]
    assert [d["write-cache"] for d in objects(arguments, "-device")] == ["on", "off"]


def test_a_comma_in_a_path_ends_no_option() -> None:
    (name,) = values(line(make(serial="/a,b/c")), "-serial")
    assert name == "chardev:serial"
    assert any("path=/a,,b/c" in value for value in values(line(make(serial="/a,b/c")), "-chardev"))


def test_the_library_is_preloaded_before_others_and_the_service_manager_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/other.so")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    made = environment(Path("/ours.so"))
    assert made["LD_PRELOAD"] == "/ours.so /other.so"
    assert "NOTIFY_SOCKET" not in made
    assert environment(None)["LD_PRELOAD"] == "/other.so"


def test_a_copy_has_what_its_disks_subkind_names() -> None:
    config = make(disk=[{"path": "/dev/drbd0", "format": "raw", "cache": "none", "subkind": "drbd"}])
    paths = GuestPaths(Path("/r/run"), Path("/r/state"))
    drives = {"disk0": CopyDrive(config.disk("disk0"), Path("/dev/null"))}
    copy = command_line(config, paths, accel=Accel.TCG, drives=drives, taps={}, incoming=True)
    nodes = {node["node-name"]: node for node in objects(copy, "-blockdev")}
    assert nodes.keys() == {"disk0", "disk0-image", "disk0-copy"}
    assert nodes["disk0-image"]["file"] == "disk0-copy"
    assert (nodes["disk0-copy"]["filename"], nodes["disk0-copy"]["cache"]) == ("/dev/null", {"direct": True})
    # The guest's device is the same on both hosts.
    assert objects(copy, "-device") == objects(line(config), "-device")


def test_a_copy_whose_disk_is_changed_under_it_is_raw() -> None:
    config = make(disk=[{"path": "/dev/drbd0", "format": "qcow2", "subkind": "drbd"}])
    with pytest.raises(HypervisorError, match='its subkind drbd serves raw disks; say format = "raw"'):
        CopyDrive(config.disk("disk0"), Path("/dev/null"))


@pytest.mark.parametrize(
    ("subkind", "replicated"), [("auto", True), ("block-replication", True), ("drbd", False)]
)
def test_a_disk_is_replicated_by_qemu_unless_it_names_another_way(subkind: str, replicated: bool) -> None:
    assert make(disk=[{"path": "a.raw", "subkind": subkind}]).disk("disk0").replicated is replicated
