"""The tiny guest under a plain QEMU: it boots, keeps its chain on every disk, and obeys."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.testbeds.bed import missing_for_qemu, need
from understudy_qemu.demo.chain import COMMAND_PORT, Greeting, check_disk
from understudy_qemu.demo.lab import Host, Lab
from understudy_qemu.demo.tinyguest import TinyGuest, build_guest

pytestmark = pytest.mark.qemu

DISK_BYTES = 16 << 20
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as s:
    s.sendall(sys.argv[3].encode())
"""


@dataclass
class Booted:
    """A guest that runs with three disks and two interfaces."""

    lab: Lab
    qemu: Process
    disks: list[Path]
    serial: Path

    async def client(self, *options: str) -> Process:
        argv = [sys.executable, "-m", "understudy_qemu.demo.client", "--interval-ms", "2", *options]
        return await self.lab.client.exec(argv, stdout=PIPE)

    async def command(self, word: str) -> None:
        await self.lab.client.run([sys.executable, "-c", SEND, "10.77.0.2", str(COMMAND_PORT), word])


def qemu_argv(guest: TinyGuest, disks: list[Path], networks: int, serial: Path) -> list[str]:
    # 131080 KiB: QEMU 7.2 loses dirty pages under TCG when the size is a multiple of 256 KiB.
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-cpu", "qemu64", "-m", "131080K"]
    argv += ["-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{serial}"]
    ips = [f"10.{77 + n}.0.2/24" for n in range(networks)]
    argv += [
        "-kernel",
        str(guest.kernel),
        "-initrd",
        str(guest.initrd),
        "-append",
        guest.cmdline(ips, draw=16),
    ]
    for n, disk in enumerate(disks):
        argv += ["-drive", f"if=none,id=d{n},file={disk},format=raw", "-device", f"virtio-blk-pci,drive=d{n}"]
    for n in range(networks):
        argv += ["-netdev", f"tap,id=n{n},ifname=tap{n},script=no,downscript=no,vhost=off"]
        argv += ["-device", f"virtio-net-pci,netdev=n{n},mac=52:54:00:77:00:0{n},romfile="]
    return argv


def has_beaten(serial: Path, count: int) -> bool:
    return serial.exists() and f"CTR {count}\n" in serial.read_text(errors="replace")


async def beats(serial: Path, count: int) -> None:
    async with asyncio.timeout(40):
        while not has_beaten(serial, count):  # noqa: ASYNC110 - QEMU writes the file and tells nobody
            await asyncio.sleep(0.05)


@pytest.fixture
async def booted(tmp_path: Path) -> AsyncIterator[Booted]:
    need("qemu", missing_for_qemu())
    guest = await build_guest()
    async with Lab(tmp_path, networks=2) as lab:
        host: Host = lab.hosts["alpha"]
        for n in range(2):
            await host.ip(f"tuntap add dev tap{n} mode tap vnet_hdr", f"link set tap{n} master br{n} up")
        for n in range(3):
            (host.directory / f"disk{n}").write_bytes(bytes(DISK_BYTES))
        inside = [Path(f"/srv/host/disk{n}") for n in range(3)]
        argv = qemu_argv(guest, inside, 2, Path("/srv/host/serial"))
        qemu = await host.exec(argv, stdout=PIPE, stderr=STDOUT)
        booted = Booted(lab, qemu, [host.directory / f"disk{n}" for n in range(3)], host.directory / "serial")
        await beats(booted.serial, 1)
        yield booted


async def test_chain_on_three_disks_over_two_interfaces(booted: Booted) -> None:
    clients = [
        await booted.client("--host", "10.77.0.2", "--count", "200"),
        await booted.client("--host", "10.78.0.2", "--count", "1200", "--window", "4"),
    ]
    outputs = await asyncio.gather(*(client.communicate() for client in clients))
    assert [client.returncode for client in clients] == [0, 0]
    image = [disk.read_bytes() for disk in booted.disks]
    for (out, _), count in zip(outputs, (200, 1200), strict=True):
        rows = [json.loads(line) for line in out.splitlines()]
        greeting = Greeting(**rows[0]["greeting"])
        assert (greeting.disks, greeting.draw, greeting.blocks) == (3, 16, 1024)
        hashes = {row["n"]: row["hash"] for row in rows[1:-1]}
        for number in range(3):
            check = check_disk(image[number], greeting, hashes, number)
            assert (check.newest, check.contiguous, check.acknowledged_lost) == (count, True, 0)
        # A disk is not mistaken for its neighbour.
        assert not check_disk(image[1], greeting, hashes, 0).contiguous


@pytest.mark.parametrize("word", ["poweroff", "reboot"])
async def test_it_ends_by_itself_when_told(booted: Booted, word: str) -> None:
    await booted.command(word)
    async with asyncio.timeout(20):
        assert await booted.qemu.wait() == 0


async def test_the_serial_line_carries_beats_alone(booted: Booted) -> None:
    await beats(booted.serial, 8)
    lines = booted.serial.read_text().splitlines()
    assert lines[:8] == [f"CTR {n}" for n in range(1, 9)]
