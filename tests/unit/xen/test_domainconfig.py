"""A domain's configuration as libxl writes it: what a real one says, and what becomes of it for a copy."""

from __future__ import annotations

import copy
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from understudy.device import Mode
from understudy.hypervisor import Protection
from understudy_xen.domainconfig import EVENTS, ConfigMismatch, DomainConfig
from understudy_xen.guestfile import XenConfig, parse_config
from understudy_xen.libs.domain import DomainType

#: From the preamble of what ``xl save`` of Xen 4.17 wrote.
REAL = Path(__file__).with_name("tiny-pvh.json").read_text()
#: From ``xl list -l`` of Xen 4.17, of a guest with two disks and two interfaces.
WITH_DEVICES = Path(__file__).with_name("web-pvh.json").read_text()
DISK = {"vdev": "xvda", "pdev_path": "/dev/vg/web", "backend": "phy", "format": "raw", "readwrite": 1}
CD = {"vdev": "hdc", "format": "empty", "removable": 1, "is_cdrom": 1}
NIC = {"devid": 0, "mac": "00:16:3E:01:02:03", "bridge": "xenbr0", "ifname": "web0", "script": "vif-bridge"}


def tree(kind: str = "pvh", **more: Any) -> dict[str, Any]:
    """Return the real configuration with more in it."""
    made: dict[str, Any] = json.loads(REAL)
    made["c_info"]["type"] = kind
    made["b_info"] |= more.pop("b_info", {})
    return made | more


def guest(**table: Any) -> XenConfig:
    source = Path("/etc/understudy/guests/web.toml")
    return parse_config(
        {"config": "/etc/xen/web.cfg", **table},
        name="web",
        source=source,
        protection=Protection(Mode.REMUS),
        host="beta",
    )


def test_a_real_one() -> None:
    domain = DomainConfig.parse(REAL)
    assert (domain.name, domain.kind) == ("tiny", DomainType.PVH)
    assert domain.uuid == uuid.UUID("32e2529a-a71d-468c-9256-dca04edc95d9")
    assert (domain.max_memory_bytes, domain.target_memory_bytes) == (4096 << 10, 4096 << 10)
    assert (domain.max_vcpus, domain.tsc_mode) == (1, "native")
    assert (domain.nics, domain.disks, domain.passed_through) == ((), (), ())
    assert not domain.nested
    assert not domain.vnuma
    assert domain.on_events == {
        "on_poweroff": "destroy",
        "on_reboot": "restart",
        "on_watchdog": "destroy",
        "on_crash": "destroy",
        "on_soft_reset": "soft_reset",
    }


def test_a_real_one_with_devices() -> None:
    domain = DomainConfig.parse(WITH_DEVICES)
    assert [(disk.vdev, Path(disk.path).name, disk.backend, disk.format) for disk in domain.disks] == [
        ("xvda", "d0.img", "qdisk", "raw"),
        ("xvdb", "d1.img", "qdisk", "raw"),
    ]
    assert [(disk.read_only, disk.cdrom, disk.driver_domain) for disk in domain.disks] == [
        (False, False, ""),
        (True, False, ""),
    ]
    assert [(nic.devid, nic.mac, nic.bridge, nic.script) for nic in domain.nics] == [
        (0, "00:16:3e:00:00:32", "xenbr0", "vif-understudy"),
        (1, "00:16:3e:00:00:33", "xenbr0", "vif-understudy"),
    ]
    assert [(nic.emulated, nic.driver_domain) for nic in domain.nics] == [(False, ""), (False, "")]
    assert set(domain.on_events.values()) == {"preserve"}
    made = domain.for_copy(guest(disk=[{"vdev": "xvda"}, {"vdev": "xvdb"}], nic=[{}, {"bridge": "br1"}]))
    told, before = json.loads(made.to_json()), json.loads(WITH_DEVICES)
    assert told["nics"][1] == before["nics"][1] | {"bridge": "br1"}
    # libxl writes an invalid number where it leaves the choice to itself.
    assert before["c_info"]["domid"] == 0xFFFFFFFF
    assert "domid" not in told["c_info"]


def test_the_nul_at_its_end_is_no_part_of_it() -> None:
    assert DomainConfig.parse(REAL.encode() + b"\0") == DomainConfig.parse(REAL)


def test_devices() -> None:
    domain = DomainConfig.of(tree(disks=[DISK, CD], nics=[NIC, {"devid": 1, "nictype": "vif"}]))
    disk, cd = domain.disks
    assert (disk.vdev, disk.path, disk.format, disk.backend) == ("xvda", "/dev/vg/web", "raw", "phy")
    assert (disk.read_only, disk.cdrom) == (False, False)
    assert (cd.path, cd.read_only, cd.cdrom) == ("", True, True)
    assert [(nic.devid, nic.mac, nic.bridge) for nic in domain.nics] == [
        (0, "00:16:3e:01:02:03", "xenbr0"),
        (1, "", ""),
    ]


@pytest.mark.parametrize(
    ("kind", "nictype", "emulated"),
    [
        ("hvm", None, True),
        ("hvm", "vif_ioemu", True),
        ("hvm", "vif", False),
        ("pvh", None, False),
        ("pv", "vif", False),
    ],
)
def test_which_interfaces_have_a_second_way_out(kind: str, nictype: str | None, emulated: bool) -> None:
    nic = NIC | ({"nictype": nictype} if nictype else {})
    assert DomainConfig.of(tree(kind, nics=[nic])).nics[0].emulated is emulated


def test_what_cannot_be_taken_along_is_seen() -> None:
    domain = DomainConfig.of(
        tree(pcidevs=[{"bus": 1}], b_info={"vnuma_nodes": [{}], "nested_hvm": "True", "irqs": [5]})
    )
    assert domain.passed_through == ("pcidevs", "irqs")
    assert domain.vnuma
    assert domain.nested
    assert not DomainConfig.of(tree(b_info={"nested_hvm": "False"})).nested
    assert DomainConfig.of(tree("hvm", b_info={"type.hvm": {"nested_hvm": "True"}})).nested


def test_who_serves_a_device() -> None:
    nics = [NIC, NIC | {"backend_domid": 0}, NIC | {"backend_domid": 3}, NIC | {"backend_domname": "net"}]
    domain = DomainConfig.of(tree(nics=nics, disks=[DISK | {"backend_domname": "storage"}]))
    assert [nic.driver_domain for nic in domain.nics] == ["", "", "3", "net"]
    assert domain.disks[0].driver_domain == "storage"
    assert DomainConfig.of(tree("hvm", b_info={"device_model_stubdomain": "True"})).stubdomain
    assert not domain.stubdomain


def test_a_copys_configuration_is_this_hosts() -> None:
    whole = tree(disks=[DISK, CD], nics=[NIC, NIC | {"devid": 1}], unheard_of={"kept": [1]})
    before = copy.deepcopy(whole)
    config = guest(
        disk=[{"vdev": "xvda", "path": "/dev/drbd0"}, {"vdev": "hdc", "read_only": True}],
        nic=[{"bridge": "br1", "script": "vif-understudy"}, {}],
    )
    made = DomainConfig.of(whole).for_copy(config)
    told = json.loads(made.to_json())
    assert whole == before
    assert (made.name, told["c_info"]["name"]) == ("web--incoming", "web--incoming")
    assert [disk.get("pdev_path") for disk in told["disks"]] == ["/dev/drbd0", None]
    assert told["nics"] == [
        {
            "devid": 0,
            "mac": "00:16:3E:01:02:03",
            "bridge": "br1",
            "script": "/etc/xen/scripts/vif-understudy",
        },
        {"devid": 1, "mac": "00:16:3E:01:02:03", "bridge": "xenbr0", "script": "vif-bridge"},
    ]
    assert {event: told[event] for event in EVENTS} == dict.fromkeys(EVENTS, "preserve")
    assert told["unheard_of"] == {"kept": [1]}
    assert told["b_info"] == before["b_info"]
    assert told["c_info"]["uuid"] == before["c_info"]["uuid"]


@pytest.mark.parametrize(
    ("table", "where", "words"),
    [
        ({"disk": [{"vdev": "xvda"}]}, "nics", "are 1, /etc/understudy/guests/web.toml describes 0"),
        ({"nic": [{}]}, "disks", "are 1, .* describes 0"),
        ({"nic": [{}], "disk": [{"vdev": "xvdb"}]}, "disks[0].vdev", "is xvda, .* calls disk0 xvdb"),
        ({"nic": [{}], "disk": [{"vdev": "xvda", "read_only": True}]}, "disks[0]", "may be written to"),
    ],
)
def test_a_guest_file_that_describes_another_domain(table: dict[str, Any], where: str, words: str) -> None:
    domain = DomainConfig.of(tree(disks=[DISK], nics=[NIC]))
    with pytest.raises(ConfigMismatch, match=words) as raised:
        domain.for_copy(guest(**table))
    assert raised.value.where == where
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{", "as a whole"),
        ("[]", "as a whole"),
        ("{}", "c_info"),
        ('{"c_info": {}, "b_info": {}}', "c_info.type"),
        ('{"c_info": {"type": "xen"}, "b_info": {}}', "c_info.type"),
        ('{"c_info": {"type": "pvh"}, "b_info": {}}', "b_info.max_memkb"),
        ('{"c_info": {"type": "pvh"}, "b_info": {"max_memkb": "1"}}', "b_info.max_memkb"),
        ('{"c_info": {"type": "pvh"}, "b_info": {"max_memkb": 1}}', "c_info.name"),
        (json.dumps(tree(nics={})), ""),
        (json.dumps(tree(nics=["vif"])), "nics"),
        (json.dumps(tree(disks=[{}])), "disks[0].vdev"),
        (json.dumps(tree(nics=[{"devid": "0"}])), "nics[0].devid"),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_place(text: str, where: str) -> None:
    if not where:  # an empty list may be written in any way
        assert DomainConfig.parse(text).nics == ()
        return
    with pytest.raises(ConfigMismatch) as raised:
        DomainConfig.parse(text)
    assert raised.value.where == where
