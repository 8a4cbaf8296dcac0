"""A DRBD pair on two kernels: one crashes, the other one takes over, and the first one comes back."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.testbeds.bed import need
from tests.testbeds.kernel.machine import KernelDied, missing_for_kernel
from tests.testbeds.kernel.pair import Host, Pair
from tests.testbeds.rounds import rounds

SCRIPT = Path(__file__).parent / "drbdhost.py"
VOLUME_SECTORS = 8 * 2048
POOL_SECTORS = 64 * 2048
ADOPT = f"""
modprobe -a loop dm-mod dm-thin-pool drbd
dmsetup create pool --table "0 {POOL_SECTORS} thin-pool /dev/ubda /dev/ubdb 128 0 1 skip_block_zeroing"
"""
MAKE = f"""
dmsetup message pool 0 "create_thin 1"
dmsetup create volume --table "0 {VOLUME_SECTORS} thin /dev/mapper/pool 1"
"""
MIRRORED = "until drbdadm dstate r0 | grep -q ^UpToDate/UpToDate; do sleep 0.1; done"


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    need("kernel", missing_for_kernel())
    async with Pair(memory_mib=256, disks_mib=(8, 64)) as booted:
        yield booted


async def script(host: Host, side: str, directory: Path, *, timeout_s: float = 60.0) -> str:
    root = SCRIPT.parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from tests.kernel.drbdhost import main; main()"
    return (await host.run(sys.executable, "-c", code, side, directory, timeout_s=timeout_s)).output


async def sh(host: Host, text: str) -> None:
    await host.run("sh", "-ec", text)


async def appears(pair: Pair, name: str) -> None:
    async with asyncio.timeout(60):
        while not (pair.common / name).exists():  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.02)


async def mirror(pair: Pair) -> None:
    await sh(pair.alpha, "modprobe drbd")
    await sh(pair.beta, ADOPT + MAKE)
    for host in (pair.alpha, pair.beta):
        await script(host, "configure", pair.common)
        await sh(host, "drbdadm create-md --force r0; drbdadm up r0")
    await sh(pair.alpha, "until [ $(drbdadm cstate r0) = Connected ]; do sleep 0.1; done")
    await sh(pair.alpha, f"drbdadm new-current-uuid --clear-bitmap r0; drbdadm primary r0; {MIRRORED}")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(rounds(1, 5)))
async def test_a_crash_a_takeover_and_a_return(pair: Pair, seed: int) -> None:
    await mirror(pair)
    secondary = asyncio.create_task(script(pair.beta, "secondary", pair.common, timeout_s=120))
    await appears(pair, "listening")
    primary = asyncio.create_task(script(pair.alpha, "primary", pair.common, timeout_s=120))
    await appears(pair, "going")
    await asyncio.sleep(random.Random(seed).random())  # anywhere in an epoch
    await pair.crash(pair.alpha)
    with pytest.raises(KernelDied):
        await primary

    await secondary
    taken = json.loads((pair.common / "taken").read_text())
    committed = int((pair.common / "committed").read_text())
    held = taken["held"]
    assert held in {committed, committed + 1}
    assert taken["disk"] == json.loads((pair.common / f"epoch-{held}").read_text())

    # The crashed host boots, brings DRBD up as any does, and becomes a mirror again.
    await pair.start(pair.alpha)
    await script(pair.alpha, "configure", pair.common)
    await sh(pair.alpha, "modprobe drbd; drbdadm up r0")
    await sh(pair.beta, MIRRORED)
    await sh(pair.beta, "[ $(drbdadm role r0) = Primary/Secondary ]; sync")
    ours = json.loads(await script(pair.beta, "read", Path("/dev/drbd0")))
    assert ours != taken["disk"]
    assert json.loads(await script(pair.alpha, "read", Path("/dev/ubda"))) == ours
