"""The Xen part of a guest file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from understudy.device import Kind, Mode
from understudy.errors import ConfigError
from understudy.hypervisor import Protection
from understudy_xen.guestfile import Compression, SuspendVia, XenConfig, parse_config, vif_name

SOURCE = Path("/etc/understudy/guests/web.toml")


def parse(table: dict[str, Any]) -> XenConfig:
    return parse_config(
        {"config": "web.cfg", **table},
        name="web",
        source=SOURCE,
        protection=Protection(Mode.REMUS),
        host="alpha",
    )


def test_the_smallest_file() -> None:
    config = parse({})
    assert config.config == Path("/etc/understudy/guests/web.cfg")
    assert (config.hypervisor, config.devices) == ("xen", ())
    assert (config.compression, config.suspend) == (Compression.AUTO, SuspendVia.AUTO)
    assert config.hold_limit_bytes == 1 << 30


def test_devices_are_named_by_position_and_described() -> None:
    config = parse(
        {
            "disk": [
                {"vdev": "xvda", "path": "/dev/drbd0", "subkind": "drbd"},
                {"vdev": "xvdb", "read_only": True},
            ],
            "nic": [{"bridge": "xenbr0", "script": "vif-understudy"}, {}],
        }
    )
    disk0, disk1, nic0, nic1 = config.devices
    assert (disk0.name, disk0.kind, disk0.index, disk0.subkind) == ("disk0", Kind.DISK, 0, "drbd")
    assert disk0.properties == {"vdev": "xvda", "path": "/dev/drbd0", "read_only": False}
    # Where the path is not known, a subkind must not be told one.
    assert disk1.properties == {"vdev": "xvdb", "read_only": True}
    assert nic0.properties == {"vif": "vif*.0", "devid": 0, "bridge": "xenbr0"}
    assert (nic1.name, nic1.kind, nic1.index, nic1.properties["vif"]) == ("nic1", Kind.NIC, 1, "vif*.1")
    assert config.nic("nic0").script == Path("/etc/xen/scripts/vif-understudy")
    assert config.nic("nic1").script is None
    assert config.disk("disk1").path is None


def test_a_script_may_lie_anywhere() -> None:
    assert parse({"nic": [{"script": "/opt/vif"}]}).nic("nic0").script == Path("/opt/vif")


def test_a_written_name_is_a_label() -> None:
    config = parse({"disk": [{"vdev": "xvda", "name": "root"}], "nic": [{"name": "front"}]})
    assert [device.name for device in config.devices] == ["disk0", "nic0"]


def test_the_name_of_an_interface_depends_on_the_domain_that_runs() -> None:
    assert (vif_name(7, 1), vif_name(None, 1)) == ("vif7.1", "vif*.1")


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"config": 1}, "config"),
        ({"compression": "lzo"}, "compression"),
        ({"suspend": "acpi"}, "suspend"),
        ({"hold_limit": "10KiB"}, "hold_limit"),
        ({"memory": "1GiB"}, "memory"),
        ({"disk": [{}]}, "disk[0].vdev"),
        ({"disk": [{"vdev": "/dev/xvda"}]}, "disk[0].vdev"),
        ({"disk": [{"vdev": "xvda"}, {"vdev": "xvda"}]}, "disk[1].vdev"),
        ({"disk": [{"vdev": "xvda", "path": "/a"}, {"vdev": "xvdb", "path": "/a"}]}, "disk[1].path"),
        ({"disk": [{"vdev": "xvda", "format": "raw"}]}, "disk[0].format"),
        ({"disk": [{"vdev": "xvda", "name": "disk1"}]}, "disk[0].name"),
        ({"nic": [{"bridge": "a bridge"}]}, "nic[0].bridge"),
        ({"nic": [{"mac": "00:16:3e:00:00:01"}]}, "nic[0].mac"),
    ],
)
def test_what_is_wrong_is_named(table: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(table)
    assert (raised.value.source, raised.value.key) == (str(SOURCE), key)


def test_the_configuration_of_the_machine_is_required() -> None:
    with pytest.raises(ConfigError, match="config"):
        parse_config({}, name="web", source=SOURCE, protection=Protection(Mode.REMUS), host="alpha")


def test_two_disks_may_leave_their_paths_to_the_domain() -> None:
    assert len(parse({"disk": [{"vdev": "xvda"}, {"vdev": "xvdb"}]}).disks) == 2
