"""The preflight of a Xen guest: each finding by what causes it, and nothing where nothing is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from understudy.device import Finding, Mode, Severity
from understudy.hypervisor import Protection
from understudy_xen.domainconfig import EVENTS, DomainConfig
from understudy_xen.guestfile import XenConfig, parse_config
from understudy_xen.hostview import Cpu, HostView
from understudy_xen.libs.versions import XenVersion
from understudy_xen.libs.xen import Capabilities
from understudy_xen.preflight import (
    Devices,
    facts,
    look_at_devices,
    memory_bytes,
    of_guest,
    of_host,
    of_place,
)

REAL: dict[str, Any] = json.loads(Path(__file__).with_name("tiny-pvh.json").read_text())
PRESERVED = dict.fromkeys(EVENTS, "preserve")
NIC = {"devid": 0, "mac": "00:16:3e:01:02:03", "bridge": "xenbr0", "script": "vif-bridge"}
DISK = {"vdev": "xvda", "pdev_path": "/dev/vg/web", "format": "raw", "readwrite": 1}
CPU = Cpu("AuthenticAMD", 15, 107, frozenset({"fpu", "sse4_2"}), 2100.0)
# What Debian's Xen 4.17 tells on a machine of 2 GiB, with nearly all of one left.
CAPABILITIES = Capabilities(
    hvm=True,
    pv=True,
    hap=True,
    shadow=False,
    directio=False,
    total_pages=1 << 19,
    free_pages=(1 << 18) + 16,
    outstanding_pages=16,
)
HERE = HostView(
    name="beta",
    obstacles=(),
    version=XenVersion(4, 17),
    capabilities=CAPABILITIES,
    domains=frozenset({"Domain-0"}),
    cpu=CPU,
    available_bytes=2 << 30,
)
FINE = Devices(scripts={"nic0": ""}, bridges={"nic0": ""}, paths={"disk0": ""}, sizes={"disk0": 1 << 30})


def domain(kind: str = "pvh", build: dict[str, Any] | None = None, **more: Any) -> DomainConfig:
    tree: dict[str, Any] = json.loads(json.dumps(REAL))
    tree["c_info"]["type"] = kind
    tree["b_info"] |= build or {}
    return DomainConfig.of(tree | PRESERVED | {"nics": [NIC], "disks": [DISK]} | more)


def guest(**more: Any) -> XenConfig:
    table = {"config": "/etc/xen/web.cfg", "nic": [{}], "disk": [{"vdev": "xvda"}]}
    return parse_config(
        table | more,
        name="web",
        source=Path("/etc/understudy/guests/web.toml"),
        protection=Protection(Mode.REMUS),
        host="beta",
    )


def peer(**more: Any) -> dict[str, Any]:
    told = dict(facts(replace(HERE, name="alpha"), guest(), domain()))
    told["disks"]["disk0"]["size_bytes"] = 1 << 30
    over_the_link: dict[str, Any] = json.loads(json.dumps(told))
    return over_the_link | more


def one(found: Iterable[Finding]) -> Finding:
    (finding,) = found
    assert finding.remedy
    return finding


def place(view: HostView = HERE, config: XenConfig | None = None, **more: Any) -> list[Finding]:
    told, devices = more.pop("peer", None) or peer(), more.pop("devices", FINE)
    assert not more
    return list(of_place(view, config or guest(), told, devices))


# --- Nothing is wrong ------------------------------------------------------------------------------------------------


def test_a_pair_that_fits() -> None:
    assert list(of_host(HERE)) == []
    assert list(of_guest(HERE, guest(), domain())) == []
    assert place() == []


def test_what_the_other_host_is_told() -> None:
    told = peer()
    assert (told["host"], told["xen"], told["cpu"]) == ("alpha", "4.17", CPU.to_json())
    assert told["guest"] == {
        "kind": "pvh",
        "max_memory_bytes": 4 << 20,
        "max_vcpus": 1,
        "video_memory_bytes": 0,
        "hap": True,
        "tsc_mode": "native",
    }
    assert told["nics"] == {"nic0": {"bridge": "xenbr0", "script": "vif-bridge"}}
    assert told["disks"]["disk0"]["path"] == "/dev/vg/web"


def test_what_is_told_where_it_does_not_run() -> None:
    told = facts(replace(HERE, version=None), guest(), None)
    assert (told["xen"], told["guest"], told["nics"], told["disks"]) == (None, None, {}, {})


def test_the_size_of_a_primarys_disk(tmp_path: Path) -> None:
    image = tmp_path / "web.img"
    image.write_bytes(b"\0" * 8192)
    config = guest(disk=[{"vdev": "xvda", "path": str(image)}])
    told = facts(HERE, config, domain())["disks"]["disk0"]
    assert told == {"path": str(image), "format": "raw", "size_bytes": 8192}


# --- The host --------------------------------------------------------------------------------------------------------


def test_whatever_stands_against_using_xen_is_said() -> None:
    view = replace(HERE, obstacles=(("no Xen runs", "boot it"), ("no xenstored", "start it")))
    assert [(str(each.severity.value), each.subject, each.problem) for each in of_host(view)] == [
        ("error", "Xen on beta", "no Xen runs"),
        ("error", "Xen on beta", "no xenstored"),
    ]


def test_a_host_of_which_nothing_is_known_adds_nothing_of_its_own() -> None:
    view = replace(HERE, version=None, capabilities=None, available_bytes=None)
    assert list(of_guest(view, guest(), domain("pv"))) == []
    assert place(view) == []


# --- The guest -------------------------------------------------------------------------------------------------------


def test_a_pv_guest_without_shadow_paging() -> None:
    found = one(of_guest(HERE, guest(), domain("pv")))
    assert found.severity is Severity.ERROR
    assert not found.unsafe
    assert found.problem == (
        "a PV guest needs log-dirty by shadow paging, which this Xen was built without; PVH and HVM guests work"
    )
    shadow = replace(HERE, capabilities=replace(CAPABILITIES, shadow=True))
    assert list(of_guest(shadow, guest(), domain("pv"))) == []


def test_a_machine_without_any_way_to_find_dirty_pages() -> None:
    neither = replace(HERE, capabilities=replace(CAPABILITIES, hap=False))
    assert "neither hardware assisted nor shadow paging" in one(of_guest(neither, guest(), domain())).problem


def test_a_domain_that_is_ended_or_renewed_behind_our_back() -> None:
    found = one(of_guest(HERE, guest(), domain(on_reboot="restart", on_crash="destroy")))
    assert found.severity is Severity.ERROR
    assert '(on_reboot = "restart", on_crash = "destroy")' in found.problem
    assert 'on_reboot = "preserve"; on_crash = "preserve"' in found.remedy


def test_what_happens_to_few_guests_is_a_warning() -> None:
    found = one(of_guest(HERE, guest(), domain(on_soft_reset="soft_reset")))
    assert found.severity is Severity.WARNING
    assert "on_soft_reset" in found.problem


@pytest.mark.parametrize(
    ("build", "more", "words"),
    [
        ({}, {"pcidevs": [{"bus": 1}]}, r"devices of its host by itself \(pcidevs\)"),
        ({"vnuma_nodes": [{}]}, {}, "virtual NUMA topology"),
        ({"nested_hvm": "True"}, {}, "may run a hypervisor itself"),
        ({"device_model_stubdomain": "True"}, {}, "device model runs in a domain of its own"),
        ({}, {"nics": [NIC | {"backend_domname": "net"}]}, "the domain net serves it"),
        ({}, {"disks": [DISK | {"backend_domid": 3}]}, "the domain 3 serves it"),
        ({}, {"nics": []}, r"nics of its domain are 0, .* describes 1"),
        ({}, {"disks": [DISK | {"vdev": "xvdb"}]}, r"disks\[0\].vdev of its domain is xvdb"),
    ],
)
def test_what_cannot_be_taken_along(build: dict[str, Any], more: dict[str, Any], words: str) -> None:
    found = one(of_guest(HERE, guest(), domain("pvh", build, **more)))
    assert (found.severity, found.unsafe) == (Severity.ERROR, False)
    assert re.search(words, found.problem)


def test_an_emulated_card_goes_past_the_gate() -> None:
    found = one(of_guest(HERE, guest(), domain("hvm")))
    assert (found.severity, found.unsafe, found.subject) == (Severity.ERROR, True, "nic0 on beta")
    assert "vifD.0-emu does not pass the gate" in found.problem
    assert list(of_guest(HERE, guest(), domain("hvm", nics=[NIC | {"nictype": "vif"}]))) == []
    # Whoever wants no gate need not be told that something goes past it.
    assert list(of_guest(HERE, guest(nic=[{"subkind": "unbuffered"}]), domain("hvm"))) == []


# --- The place of the copy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["web", "web--incoming"])
def test_the_name_is_taken(name: str) -> None:
    found = one(place(replace(HERE, domains=frozenset({"Domain-0", name}))))
    assert found.severity is Severity.ERROR
    assert f"a domain of the name {name} exists here" in found.problem


@pytest.mark.parametrize(
    ("devices", "subject", "words"),
    [
        (
            replace(FINE, scripts={"nic0": "X is not executable"}),
            "nic0",
            "its hotplug script X is not executable",
        ),
        (replace(FINE, bridges={"nic0": "br7 is no bridge"}), "nic0", "br7 is no bridge"),
        (replace(FINE, paths={"disk0": "X cannot be used"}), "disk0", "X cannot be used"),
        (replace(FINE, sizes={"disk0": 1024}), "disk0", "it has 1024 bytes, the primary's has 1073741824"),
    ],
)
def test_a_device_that_the_copy_would_not_have(devices: Devices, subject: str, words: str) -> None:
    found = one(place(devices=devices))
    assert (found.severity, found.subject) == (Severity.ERROR, f"{subject} on beta")
    assert words in found.problem


@pytest.mark.parametrize(
    ("theirs", "ours"), [({"format": "qcow2"}, 1024), ({"size_bytes": None}, 1024), ({}, None), ({}, 1 << 31)]
)
def test_sizes_that_say_nothing(theirs: dict[str, Any], ours: int | None) -> None:
    told = peer()
    told["disks"]["disk0"] |= theirs
    assert place(peer=told, devices=replace(FINE, sizes={"disk0": ours})) == []


def test_too_little_memory_for_the_copy() -> None:
    told = peer()
    told["guest"]["max_memory_bytes"] = 1 << 30
    found = one(place(peer=told))
    assert found.severity is Severity.ERROR
    # 1 GiB, a page for each MiB of it, a MiB for the processor, and a MiB of slack.
    assert "has 1024 MiB of free memory, a copy of the guest needs 1030 MiB" in found.problem


def test_memory_as_libxl_counts_it() -> None:
    guest_facts = peer()["guest"] | {"max_memory_bytes": 128 << 20, "max_vcpus": 2}
    pages = 128 * 256 + 128 + 512 + 256
    assert memory_bytes(guest_facts) == pages * 4096
    assert memory_bytes(guest_facts | {"hap": False}) == (pages + 128) * 4096
    assert memory_bytes(guest_facts | {"kind": "pv"}) == (pages - 128) * 4096
    assert memory_bytes(guest_facts | {"video_memory_bytes": 8 << 20}) == pages * 4096 + (8 << 20)


def test_held_checkpoints_that_dom0_has_no_memory_for() -> None:
    found = one(place(replace(HERE, available_bytes=512 << 20)))
    assert found.severity is Severity.WARNING
    assert "up to 1024 MiB may be held here, and dom0 has 512 MiB available" in found.problem
    assert place(replace(HERE, available_bytes=512 << 20), guest(hold_limit="256MiB")) == []


@pytest.mark.parametrize(
    ("theirs", "severity", "words"),
    [
        ("4.20", Severity.ERROR, "it is 4.17, older than the primary's 4.20"),
        ("4.14", Severity.WARNING, "it is 4.17, newer than the primary's 4.14"),
    ],
)
def test_versions_that_differ(theirs: str, severity: Severity, words: str) -> None:
    found = one(place(peer=peer(xen=theirs)))
    assert (found.severity, found.subject) == (severity, "Xen on beta")
    assert words in found.problem


@pytest.mark.parametrize("theirs", [None, "4.17", "unstable"])
def test_versions_that_say_nothing(theirs: str | None) -> None:
    assert place(peer=peer(xen=theirs)) == []


def test_processors_that_differ() -> None:
    intel = one(place(replace(HERE, cpu=replace(CPU, vendor="GenuineIntel", flags=frozenset()))))
    assert intel.severity is Severity.ERROR
    assert "it is of GenuineIntel, that of alpha of AuthenticAMD" in intel.problem
    lacking = one(place(replace(HERE, cpu=replace(CPU, flags=frozenset({"fpu"})))))
    assert lacking.severity is Severity.WARNING
    assert "cannot run here (sse4_2)" in lacking.problem
    richer = replace(CPU, flags=CPU.flags | {"avx512f"})
    assert place(replace(HERE, cpu=richer)) == []


def test_a_counter_of_another_frequency_matters_where_the_guest_reads_it_itself() -> None:
    faster = replace(HERE, cpu=replace(CPU, tsc_mhz=2400.0))
    found = one(place(faster))
    assert found.severity is Severity.WARNING
    assert "runs at 2400 MHz, that of alpha at 2100 MHz" in found.problem
    told = peer()
    told["guest"]["tsc_mode"] = "default"
    assert place(faster, peer=told) == []


# --- What is looked at -----------------------------------------------------------------------------------------------


def test_the_guest_file_goes_before_what_the_primary_tells(tmp_path: Path) -> None:
    (tmp_path / "sys/class/net/br1/bridge").mkdir(parents=True)
    script, image = tmp_path / "vif-understudy", tmp_path / "web.img"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    image.write_bytes(b"\0" * 512)
    config = guest(
        nic=[{"bridge": "br1", "script": str(script)}], disk=[{"vdev": "xvda", "path": str(image)}]
    )
    found = look_at_devices(config, peer(), root=tmp_path)
    assert found == Devices({"nic0": ""}, {"nic0": ""}, {"disk0": ""}, {"disk0": 512})


def test_what_the_guest_file_leaves_out_is_the_primarys(tmp_path: Path) -> None:
    told = peer(nics={"nic0": {"bridge": "br9", "script": str(tmp_path / "vif-bridge")}})
    found = look_at_devices(guest(), told, root=tmp_path)
    assert found.bridges == {"nic0": "there is no interface br9"}
    assert str(tmp_path / "vif-bridge") in found.scripts["nic0"]
    assert "/dev/vg/web" in found.paths["disk0"]


def test_what_nobody_says_is_libxls_default(tmp_path: Path) -> None:
    found = look_at_devices(guest(), {}, root=tmp_path)
    assert found.bridges == {"nic0": "there is no interface xenbr0"}
    assert "/etc/xen/scripts/vif-bridge" in found.scripts["nic0"] or found.scripts["nic0"] == ""
    assert found.paths == {}


def test_a_script_of_another_kind_has_a_bridge_of_its_own() -> None:
    told = peer(nics={"nic0": {"bridge": "ovsbr0", "script": "/etc/xen/scripts/vif-openvswitch"}})
    assert look_at_devices(guest(), told).bridges == {}
