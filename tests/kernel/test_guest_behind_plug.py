"""A real guest under QEMU behind the kernel's plug, in a real kernel that has one: its host dies, its client stays.

The kernel of the bed runs both hosts, in namespaces, and both QEMUs without KVM on its one CPU: everything is slow here
but right. The control has the same guest, disks and checkpoints, and nothing that holds its output.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.qemu.guestnet import GuestNet
from tests.qemu.test_controls import HeldHost, HeldSession, held, lose_primary
from tests.qemu.test_hosts import make_bed
from tests.testbeds.bed import missing_for_qemu, need
from understudy.device import OpenContext, ProtectedDevice, Subkind
from understudy_netbuffer.subkind import NETBUFFER
from understudy_qemu.accel import Accel
from understudy_qemu.demo.tinyguest import build_guest


def build() -> None:
    """Build the guest where there is a network to get its kernel from."""
    asyncio.run(build_guest())


pytestmark = [
    pytest.mark.kernel(memory_mib=1500, outside=build),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

# With two emulated guests on one CPU an agent may well be silent for two seconds.
HEARTBEAT_LIMIT_MS = 4000
PERIOD_MS = 200


class FreeHost(HeldHost):
    """A host whose guest's output is held by whatever subkind is there."""

    subkind = "auto"
    boot_s = 90.0
    patience_s = 60


async def _hold_nothing(_: OpenContext) -> ProtectedDevice:
    return ProtectedDevice()


NOTHING = replace(NETBUFFER, name="nothing", open=_hold_nothing, sweep=None)


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[GuestNet]:
    need("qemu", missing_for_qemu())
    made = GuestNet(tmp_path, await build_guest(), Accel.TCG)
    try:
        made.make()
        yield made
    finally:
        await made.close()


@pytest.mark.parametrize("gate", [NETBUFFER, NOTHING], ids=["plug", "nothing"])
async def test_what_was_sent_after_the_last_checkpoint(bed: GuestNet, gate: Subkind) -> None:
    session, client = await held(bed, HeldSession, FreeHost, gate)
    if gate is NETBUFFER:
        # No checkpoint is taken: the guest answers, and nobody hears it.
        with pytest.raises(TimeoutError):
            await client.replies(3, timeout_s=3.0)
        await lose_primary(session)
        await client.replies(5, timeout_s=60.0)
        await client.kept()
    else:
        await client.replies(3, timeout_s=60.0)
        await lose_primary(session)
        with pytest.raises(AssertionError):
            await client.kept()
    assert isinstance(session.beta, FreeHost)
    await session.beta.quit()
    for check in session.beta.judged(client):
        assert bool(check.acknowledged_lost) is (gate is NOTHING), check


async def test_the_primarys_host_dies() -> None:
    # Not below /run, where the bed's temporary files are: each host has one of its own.
    root = Path(tempfile.mkdtemp(prefix="understudy-pair-", dir="/var/tmp"))
    async with make_bed(
        root, heartbeat_limit_ms=HEARTBEAT_LIMIT_MS, mode="remus", disks=2, period_ms=PERIOD_MS
    ) as bed:
        await bed.protect()
        alpha, beta = (bed.pair.lab.hosts[name] for name in ("alpha", "beta"))
        assert "qdisc plug" in (await alpha.run(["tc", "qdisc", "show"])).stdout
        await bed.goes_on(replies=5)
        await bed.pair.lose("alpha")
        await bed.becomes("beta", state="alone")
        await bed.goes_on(replies=5)
        await bed.sound_on("beta")
        assert "qdisc plug" not in (await beta.run(["tc", "qdisc", "show"])).stdout
        # What the dead host's kernel had of the gate is taken away when its agent looks after the guest it had.
        await bed.pair.bring_back("alpha")
        async with asyncio.timeout(60):
            while "qdisc plug" in (await alpha.run(["tc", "qdisc", "show"])).stdout:  # noqa: ASYNC110 - a kernel tells nobody
                await asyncio.sleep(0.5)
