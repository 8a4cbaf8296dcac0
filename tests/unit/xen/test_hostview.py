"""What a host has: read from files as the kernel writes them, and from this machine's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from understudy_xen.hostview import (
    Cpu,
    bridge_problem,
    look,
    path_problem,
    script_problem,
    size_bytes,
)
from understudy_xen.libs.errors import NotXen, XenUnavailable

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 15
model\t\t: 107
model name\t: QEMU Virtual CPU version 2.5+
cpu MHz\t\t: 2100.022
flags\t\t: fpu de tsc msr

processor\t: 1
vendor_id\t: Other
"""


def root(tmp_path: Path) -> Path:
    for name in ("proc", "sys/class/net/xenbr0/bridge", "sys/class/net/eth0", "sys/dev/block/147:0"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096 kB\nMemAvailable:     2048 kB\n")
    return tmp_path


def test_a_processor_is_told_and_read_again(tmp_path: Path) -> None:
    cpu = Cpu.read(root(tmp_path))
    assert (cpu.vendor, cpu.family, cpu.model, cpu.tsc_mhz) == ("AuthenticAMD", 15, 107, 2100.022)
    assert cpu.flags == {"fpu", "de", "tsc", "msr"}
    assert Cpu.of(cpu.to_json()) == cpu


def test_a_processor_that_is_not_told(tmp_path: Path) -> None:
    assert Cpu.read(tmp_path) == Cpu("", 0, 0, frozenset(), 0)


def test_this_machines_own_processor() -> None:
    assert Cpu.read().flags


def test_a_host_without_xen_says_why(tmp_path: Path) -> None:
    obstacles: list[XenUnavailable | tuple[str, str]] = [
        NotXen("no Xen runs", "boot it"),
        ("xenstored does not answer", "start it"),
    ]
    view = look("beta", None, ["web"], obstacles, root=root(tmp_path))
    assert view.obstacles == (("no Xen runs", "boot it"), ("xenstored does not answer", "start it"))
    assert (view.version, view.capabilities, view.free_bytes) == (None, None, None)
    assert view.available_bytes == 2048 << 10
    assert view.domains == {"web"}


def test_memory_that_is_not_told(tmp_path: Path) -> None:
    assert look("beta", None, [], [], root=tmp_path).available_bytes is None


def test_a_script_must_be_a_file_that_can_be_run(tmp_path: Path) -> None:
    script = tmp_path / "vif"
    assert script_problem(script) == f"{script} cannot be run: No such file or directory"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o644)
    assert script_problem(script) == f"{script} is not executable"
    script.chmod(0o755)
    assert script_problem(script) == ""
    assert script_problem(tmp_path) == f"{tmp_path} is no file"


@pytest.mark.parametrize(
    ("name", "problem"),
    [("xenbr0", ""), ("eth0", "eth0 is no bridge"), ("br7", "there is no interface br7")],
)
def test_a_bridge(tmp_path: Path, name: str, problem: str) -> None:
    assert bridge_problem(name, root(tmp_path)) == problem


def test_the_loopback_is_no_bridge() -> None:
    assert bridge_problem("lo") == "lo is no bridge"


def test_a_file_as_a_disk(tmp_path: Path) -> None:
    image = tmp_path / "web.img"
    assert size_bytes(image) is None
    assert path_problem(image) == f"{image} cannot be used: No such file or directory"
    image.write_bytes(b"\0" * 4096)
    assert size_bytes(image) == 4096
    assert path_problem(image) == ""
    assert path_problem(tmp_path) == f"{tmp_path} is neither a block device nor a file"
    assert size_bytes(tmp_path) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="a device node can be made by root only")
def test_the_size_of_a_block_device_is_read_without_opening_it(tmp_path: Path) -> None:
    node = tmp_path / "drbd0"
    try:
        os.mknod(node, 0o60660, os.makedev(147, 0))
    except PermissionError:
        pytest.skip("device nodes cannot be made here")
    (root(tmp_path) / "sys/dev/block/147:0/size").write_text("2048\n")
    assert size_bytes(node, tmp_path) == 1 << 20
    assert path_problem(node) == ""
