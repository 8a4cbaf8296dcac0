"""Two guests that two hosts protect for each other, one in each direction, when one host dies."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.testbeds.bed import missing_for_qemu, need
from understudy_qemu.demo.chain import check_disk
from understudy_qemu.demo.pair import GUEST, GuestPlan, Pair
from understudy_qemu.demo.talk import Talk
from understudy_qemu.demo.tinyguest import TinyGuest, build_guest

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(150)]

OTHER = "other"
ADDRESS = "10.77.0.3"
#: Of the other guest's image on each host, beside disk0 of the pair's own guest.
IMAGE = 1


def guest_file(guest: TinyGuest) -> str:
    """Return the other guest's file: mode colo on the same network."""
    return "\n".join(
        [
            f'name = "{OTHER}"',
            'hypervisor = "qemu"',
            'machine = "pc"',
            'memory = "128MiB"',
            f'kernel = "{guest.kernel}"',
            f'initrd = "{guest.initrd}"',
            f'cmdline = "{guest.cmdline([f"{ADDRESS}/24"], draw=128)}"',
            "[[disk]]",
            f'path = "/srv/host/disk{IMAGE}.qcow2"',
            "[[nic]]",
            'bridge = "br0"',
            'mac = "52:54:00:77:01:02"',
            "[protection]",
            'mode = "colo"',
            "",
        ]
    )


async def states(pair: Pair, name: str) -> dict[str, tuple[str, str]]:
    """Return role and state of each guest as one host's agent tells them of itself."""
    answer = await pair.command(name, "list")
    return {row["guest"]: (row.get("role"), row["state"]) for row in answer["guests"] if row["host"] == name}


async def sound(pair: Pair, talk: Talk, number: int) -> None:
    """Demand the verdict of a guest's client, and of its disk on beta."""
    assert talk.problems == []
    assert talk.lost_ns is None
    assert talk.greeting is not None
    async with asyncio.timeout(20):
        while True:
            told = dict(talk.acknowledged)
            check = check_disk(await pair.raw_image("beta", number), talk.greeting, told, 0)
            # The image is read while the guest writes to it.
            if not check.problems:
                return
            await asyncio.sleep(0.5)


async def test_two_guests_in_opposite_directions(tmp_path: Path) -> None:
    need("qemu", missing_for_qemu())
    guest = await build_guest()
    text = guest_file(TinyGuest(Path("/srv/host/vmlinuz"), Path("/srv/host/initrd")))
    for name in ("alpha", "beta"):
        files = tmp_path / name / "guests"
        files.mkdir(parents=True)
        (files / f"{OTHER}.toml").write_text(text, encoding="utf-8")
    async with Pair(tmp_path, guest, GuestPlan(disks=1, mode="colo"), heartbeat_limit_ms=2000) as pair:
        image = f"/srv/host/disk{IMAGE}.qcow2"
        await pair.lab.hosts["beta"].run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"])
        await asyncio.gather(
            pair.command("alpha", "start", GUEST),
            pair.command("beta", "start", OTHER),
        )
        talks = [await Talk.begin(pair.lab, timeout_s=60), await Talk.begin(pair.lab, ADDRESS, timeout_s=60)]
        try:
            await asyncio.gather(
                pair.command("alpha", "protect", GUEST),
                pair.command("beta", "protect", OTHER),
            )
            for talk in talks:
                await talk.replies_after(time.monotonic_ns(), 10, 40)
            assert await states(pair, "alpha") == {
                GUEST: ("primary", "protected"),
                OTHER: ("secondary", "standby"),
            }
            assert await states(pair, "beta") == {
                OTHER: ("primary", "protected"),
                GUEST: ("secondary", "standby"),
            }
            await pair.lose("alpha")
            both_alone = dict.fromkeys((GUEST, OTHER), ("primary", "alone"))
            async with asyncio.timeout(60):
                while await states(pair, "beta") != both_alone:  # noqa: ASYNC110 - asked from outside
                    await asyncio.sleep(0.2)
            for number, talk in enumerate(talks):
                await talk.replies_after(time.monotonic_ns(), 10, 40)
                await sound(pair, talk, number)
        finally:
            for talk in talks:
                await talk.end()
