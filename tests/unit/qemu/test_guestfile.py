"""The QEMU part of a guest file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from understudy.device import Kind, Mode
from understudy.errors import ConfigError
from understudy.hypervisor import Protection
from understudy_qemu.guestfile import QemuConfig, parse_config

SOURCE = Path("/etc/understudy/guests/web.toml")


def parse(table: dict[str, Any], host: str = "alpha") -> QemuConfig:
    return parse_config(
        {"memory": "64MiB", **table}, name="web", source=SOURCE, protection=Protection(Mode.REMUS), host=host
    )


def test_the_smallest_file() -> None:
    config = parse({})
    assert (config.machine, config.memory_bytes, config.cpus, config.accel) == ("pc", 64 << 20, 1, "auto")
    assert config.devices == ()


def test_devices_are_named_by_position_and_described() -> None:
    config = parse(
        {
            "disk": [
                {"path": "a.qcow2"},
                {"path": "/dev/vg/b", "format": "raw", "bus": "scsi", "subkind": "drbd"},
            ],
            "nic": [{"bridge": "br0", "mac": "52:54:00:AA:00:01"}],
        }
    )
    disk0, disk1, nic0 = config.devices
    assert (disk0.name, disk0.kind, disk0.properties["path"]) == (
        "disk0",
        Kind.DISK,
        "/etc/understudy/guests/a.qcow2",
    )
    assert (disk1.name, disk1.index, disk1.subkind, disk1.properties["format"]) == ("disk1", 1, "drbd", "raw")
    assert (nic0.name, nic0.properties["mac"], nic0.properties["vnet_hdr"]) == (
        "nic0",
        "52:54:00:aa:00:01",
        True,
    )
    assert config.disk("disk1").bus == "scsi"
    assert config.nic("nic0").bridge == "br0"


def test_a_written_name_is_a_label_and_changes_no_device() -> None:
    config = parse({"disk": [{"path": "a", "name": "root"}], "nic": [{"bridge": "b", "name": "nic0"}]})
    assert [device.name for device in config.devices] == ["disk0", "nic0"]


def test_a_mac_is_derived_from_the_names_alone() -> None:
    macs = [parse({"nic": [{"bridge": "br0"}, {"bridge": "br0"}]}, host).nics for host in ("alpha", "beta")]
    assert [nic.mac for nic in macs[0]] == [nic.mac for nic in macs[1]]
    assert macs[0][0].mac != macs[0][1].mac
    assert macs[0][0].mac.startswith("52:54:00:")


def test_taps_differ_between_hosts_and_are_short() -> None:
    taps = {parse({"nic": [{"bridge": "br0"}]}, host).nics[0].tap for host in ("alpha", "beta")}
    assert len(taps) == 2
    assert max(map(len, taps)) <= 15


def test_the_environment_names_another_qemu_only_where_the_file_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNDERSTUDY_QEMU", "/opt/q/bin/qemu-system-x86_64")
    assert parse({}).qemu == "/opt/q/bin/qemu-system-x86_64"
    assert parse({"qemu": "kvm"}).qemu == "kvm"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"memroy": "1GiB"}, r"memroy: unknown key, did you mean 'memory'\?"),
        ({"memory": 5000000}, "memory: 5000000 bytes are no whole pages"),
        ({"machine": "virt"}, "machine: 'virt' is not allowed"),
        ({"accel": "xen"}, r"accel: 'xen' is none of the allowed values.*auto, kvm, tcg"),
        ({"cmdline": "quiet"}, "cmdline: needs a kernel"),
        ({"cpus": 0}, "cpus: 0 is out of range"),
        ({"disk": [{}]}, r"disk\[0\].path: is missing"),
        ({"disk": [{"path": "a", "format": "vmdk"}]}, r"disk\[0\].format: 'vmdk'.*qcow2, raw"),
        ({"disk": [{"path": "a", "size": 1}]}, r"disk\[0\].size: unknown key"),
        ({"disk": [{"path": "a"}, {"path": "./a"}]}, r"disk\[1\].path: .* is another disk"),
        (
            {"disk": [{"path": "a", "name": "disk1"}]},
            r"disk\[0\].name: 'disk1' is the name of another position",
        ),
        ({"disk": [{"path": str(n), "bus": "ide"} for n in range(5)]}, "disk: 5 disks on ide"),
        ({"nic": [{"bridge": "br0"} for _ in range(25)]}, "too many devices"),
        ({"nic": [{"bridge": "a/b"}]}, r"nic\[0\].bridge: 'a/b' is not allowed"),
        ({"nic": [{"bridge": "br0", "mac": "01:00:5e:00:00:01"}]}, r"nic\[0\].mac: .* is a group address"),
        ({"nic": [{"bridge": "br0", "mac": "52:54:00:1:2:3"}]}, r"nic\[0\].mac: .* is not allowed"),
        (
            {
                "nic": [
                    {"bridge": "br0", "mac": "52:54:00:00:00:01"},
                    {"bridge": "br0", "mac": "52:54:00:00:00:01"},
                ]
            },
            r"nic\[1\].mac: .* belongs to another interface",
        ),
        ({"overlays": {"room_rate": 1}}, r"overlays.room_rate: unknown key, did you mean 'room_ratio'\?"),
        ({"arguments": "-S"}, "arguments: is text"),
    ],
)
def test_wrong_keys_are_named_with_what_is_allowed(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        parse(table)
    assert raised.value.source == str(SOURCE)
    assert raised.value.allowed
