"""A real guest under QEMU behind the kernel's plug, in a real kernel that has one: its host dies, its client stays.

The kernel of the bed runs both hosts, in namespaces, and both QEMUs without KVM on its one CPU: everything is slow here
but right. So the dead host's kernel lives on, with the gate in it. Hosts with a kernel each, every bad moment, and the
control without a gate are in test_drbd_stack.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest

from tests.qemu.test_hosts import make_bed
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
