"""The files that a pair of hosts starts from are ones that the core and the hypervisor read."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.config import read_config
from understudy.device import Mode
from understudy.guestfile import read_guest
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair
from understudy_qemu.demo.tinyguest import TinyGuest
from understudy_qemu.guestfile import parse_config

GUEST_FILES = TinyGuest(Path("/srv/host/vmlinuz"), Path("/srv/host/initrd"))


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_the_agent_file_is_read(name: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path, GUEST_FILES, heartbeat_limit_ms=700)
    path = tmp_path / "agent.toml"
    path.write_text(pair.agent_file(name), encoding="utf-8")
    config = read_config(path)
    other = {"alpha": "beta", "beta": "alpha"}[name]
    assert config.host == name
    assert config.address == pair.lab.hosts[name].address
    assert {peer.name: peer.address for peer in config.peers.values()} == {
        other: pair.lab.hosts[other].address
    }
    assert config.directories.guests == Path("/srv/host/guests")
    assert (config.arbiter_kind, config.arbiter_options["path"]) == ("directory", "/srv/arbiter")
    assert config.limits.heartbeat_limit_ms == 700


@pytest.mark.parametrize("mode", ["remus", "colo"])
def test_the_guest_file_is_read(mode: str, tmp_path: Path) -> None:
    plan = GuestPlan(disks=3, nics=2, mode=mode, period_ms=40, draw=9)
    path = tmp_path / f"{GUEST}.toml"
    path.write_text(plan.guest_file(GUEST_FILES), encoding="utf-8")
    file = read_guest(path, "alpha", ["alpha", "beta"])
    assert file.mode is Mode(mode)
    config = parse_config(file.rest, name=file.name, source=path, protection=file.protection, host="alpha")
    assert [disk.name for disk in config.disks] == ["disk0", "disk1", "disk2"]
    assert [nic.bridge for nic in config.nics] == ["br0", "br1"]
    assert "understudy.ip=10.77.0.2/24,10.78.0.2/24" in config.cmdline
    assert "understudy.draw=9" in config.cmdline
    if mode == "remus":
        assert file.protection.interval_options["period_ms"] == 40


def test_a_trace_is_read_line_by_line(tmp_path: Path) -> None:
    pair = Pair(tmp_path, GUEST_FILES)
    directory = pair.lab.hosts["alpha"].directory
    assert pair.trace("alpha") == ([], 0)
    directory.mkdir(parents=True)
    trace = directory / "trace.jsonl"
    trace.write_text('{"t_ns": 1}\n{"t_n', encoding="utf-8")
    rows, offset = pair.trace("alpha")
    assert rows == [{"t_ns": 1}]
    trace.write_text('{"t_ns": 1}\n{"t_ns": 2}\n', encoding="utf-8")
    assert pair.trace("alpha", offset)[0] == [{"t_ns": 2}]
