"""hotplug/vif-understudy under a real libxl, with a real netback, xenstore and iproute2.

tests/hotplug/test_vif_understudy.py has the failures, over fakes that are to behave as what is here.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hotplug.scripts import Ended, Fault, Scripts
from tests.testbeds.xen.guests import Nic, tiny

pytestmark = [pytest.mark.xen(inside=True), pytest.mark.timeout(240)]

SCRIPT = "vif-understudy"
ADDRESS = "fe:ff:ff:ff:ff:ff"
GUEST = "vifs"


def told(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def create(tmp_path: Path, name: str, bridge: str) -> subprocess.CompletedProcess[str]:
    """Create a guest of 4 MB, paused; its interface is there and its driver is not."""
    configuration = tmp_path / "guest.cfg"
    configuration.write_text(tiny(name, vif=[str(Nic(bridge=bridge))]))
    command = ("xl", "create", "-p", "-e", str(configuration))
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@dataclass
class Vif:
    """A guest's interface, and its script."""

    domid: int
    scripts: Scripts

    @property
    def name(self) -> str:
        return f"vif{self.domid}.0"

    @property
    def backend(self) -> str:
        return f"backend/vif/{self.domid}/0"

    def run(self, action: str, **fault: Any) -> Ended:
        return self.scripts.run(
            SCRIPT, action, "type_if=vif", env={"XENBUS_PATH": self.backend, "vif": self.name}, **fault
        )

    def says(self, key: str) -> str:
        return told("xenstore-read", f"{self.backend}/{key}")

    def keep(self, key: str, value: str) -> None:
        """Write a key; xenstore-write(1) takes a backslash for the start of an escape."""
        told("xenstore-write", f"{self.backend}/{key}", value.replace("\\", "\\\\"))


def link(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(told("ip", "-json", "link", "show", "dev", name))[0]
    return found


def is_connected(name: str, bridge: str = "xenbr0") -> bool:
    shown = link(name)
    return (shown.get("master"), shown["address"], "UP" in shown["flags"]) == (bridge, ADDRESS, True)


def is_cut_off(name: str) -> bool:
    return "master" not in link(name) and "UP" not in link(name)["flags"]


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vif]:
    directory = tmp_path_factory.mktemp("vif")
    created = create(directory, GUEST, "xenbr0")
    assert created.returncode == 0, created.stderr
    try:
        yield Vif(int(told("xl", "domid", GUEST)), Scripts(directory, None, {}))
    finally:
        told("xl", "destroy", GUEST)


@pytest.fixture
def vif(domain: Vif) -> Iterator[Vif]:
    """The guest's interface, as libxl left it; told anew whatever a test has said of it."""
    yield domain
    for key in ("vifname", "mtu", "hotplug-error"):
        subprocess.run(
            ["xenstore-rm", f"{domain.backend}/{key}"], check=False, capture_output=True, timeout=60
        )
    domain.keep("bridge", "xenbr0")
    assert (domain.run("online").status, is_connected(domain.name)) == (0, True)


def test_libxl_runs_it_and_believes_it(vif: Vif) -> None:
    assert vif.says("script") == f"/etc/xen/scripts/{SCRIPT}"
    assert vif.says("hotplug-status") == "connected"
    assert is_connected(vif.name)
    assert told("xenstore-read", f"/local/domain/{vif.domid}/device/vif/0/mtu") == "1500"
    # By hand, on what is there: the same, twice.
    for _ in range(2):
        ended = vif.run("online")
        assert (ended.status, ended.stderr) == (0, "")
        assert [call.split()[0] for call in ended.calls] == ["xenstore-ls", "ip", "xenstore-write"]
        assert is_connected(vif.name)
    for _ in range(2):
        assert (vif.run("offline").status, is_cut_off(vif.name)) == (0, True)


def test_a_renamed_interface_is_found_by_its_backend(vif: Vif) -> None:
    told("ip", "link", "add", "taken0", "type", "dummy")
    told("ip", "link", "set", "taken0", "up")
    try:
        assert vif.run("offline").status == 0  # of one that is up, no kernel before 6.2 changes the name
        vif.keep("vifname", "taken0")
        refused = vif.run("online")
        assert refused.status == 1
        assert "as taken0: RTNETLINK answers: File exists" in vif.says("hotplug-error")
        assert (vif.says("hotplug-status"), is_cut_off(vif.name)) == ("error", True)
        assert vif.run("offline").status == 0
        assert "UP" in link("taken0")["flags"]
    finally:
        told("ip", "link", "delete", "taken0")
    vif.keep("vifname", "web0")
    for _ in range(2):
        ended = vif.run("online")
        assert (ended.status, ended.stderr, is_connected("web0")) == (0, "", True)
    assert (vif.run("offline").status, is_cut_off("web0")) == (0, True)
    vif.keep("vifname", vif.name)
    assert (vif.run("online").status, is_connected(vif.name)) == (0, True)


def test_the_mtu_is_its_own_or_the_bridges(vif: Vif) -> None:
    told("ip", "link", "add", "jumbo0", "mtu", "9000", "type", "bridge")
    try:
        vif.keep("bridge", "jumbo0")
        for mtu, becomes in (("", 9000), ("4000", 4000)):
            if mtu:
                vif.keep("mtu", mtu)
            assert vif.run("online").status == 0
            assert (link(vif.name)["mtu"], is_connected(vif.name, "jumbo0")) == (becomes, True)
            assert told("xenstore-read", f"/local/domain/{vif.domid}/device/vif/0/mtu") == str(becomes)
        vif.keep("mtu", "99999999")
        ended = vif.run("online")
        assert (ended.status, is_connected(vif.name, "jumbo0")) == (0, True)
        assert "does not take an mtu of 99999999" in ended.stderr
    finally:
        told("ip", "link", "delete", "jumbo0")


def test_what_xenstore_says_is_a_name_and_nothing_else(vif: Vif) -> None:
    for value in (
        'x"; touch canary; "',
        "$(touch canary)",
        'xenbr0"',
        'xenbr0\nbridge = "xenbr0',
        "xenbr0\\",
        "up",
    ):
        vif.keep("bridge", value)
        ended = vif.run("online")
        assert (ended.status, vif.says("hotplug-status"), is_cut_off(vif.name)) == (1, "error", True), value
        assert "is wrong: Device does not exist" in ended.stderr, value
    assert not Path("canary").exists()


@pytest.mark.parametrize("fault", [Fault.REFUSES, Fault.LIES, Fault.KILLED], ids=lambda fault: fault.name)
def test_whatever_fails_libxls_next_step_takes_it_off(vif: Vif, fault: Fault) -> None:
    assert (vif.run("offline").status, is_cut_off(vif.name)) == (0, True)
    for at in (1, 2, 3):
        ended = vif.run("online", fault=fault, at=at)
        if fault is Fault.KILLED:
            assert ended.status == -9
        elif at != 2:  # the second is tried again, without the mtu
            assert (ended.status, is_cut_off(vif.name)) == (1, True)
        assert (vif.run("offline").status, is_cut_off(vif.name)) == (0, True)


def test_a_bridge_that_is_missing_costs_the_domain_and_is_told(tmp_path: Path) -> None:
    created = create(tmp_path, "bridgeless", "none0")
    assert created.returncode != 0
    assert "vif-understudy: cannot put vif" in created.stderr
    assert "script: cannot put vif" in created.stderr
    assert "bridgeless" not in told("xl", "list")
