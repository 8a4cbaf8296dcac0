"""As test_takeover.py, with an HVM guest: the state of its QEMU is in each checkpoint, and loaded at the end."""

from __future__ import annotations

import json
import random

import pytest

from tests.testbeds.rounds import rounds
from tests.testbeds.xen.guests import Nic
from tests.xen.client import CounterClient
from tests.xen.site import Site

pytestmark = [pytest.mark.xen, pytest.mark.timeout(600)]

SEEDS = rounds(1, 5)
BOOT_S = 150.0  # firmware, then Linux, emulated twice
TAKEOVER_S = 90.0
STEP_S = 60.0


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_the_connection_of_an_hvm_guest_survives_the_death_of_its_host(seed: int) -> None:
    async with Site() as site:
        pair = site.pair
        # An emulated card would be a second way out, past the gate: the guest has its driver's interface alone.
        await site.describe("web", kind="hvm", memory_mib=128, nics=(Nic(more=("type=vif",)),))
        await site.ask(pair.alpha, "start", "web")
        async with CounterClient(pair, connect_s=BOOT_S) as client:
            await client.more(5, timeout_s=STEP_S)
            await site.protect(pair.alpha, "web")
            await client.more(random.Random(seed).randrange(5, 40), timeout_s=STEP_S)
            epochs = int((await site.row(pair.alpha))["epoch"])
            assert epochs > 1
            await pair.crash(pair.alpha)
            await client.more(20, timeout_s=TAKEOVER_S)
            client.verify()
            row = await site.row(pair.beta)
            assert (row["role"], row["state"]) == ("primary", "alone"), row
            listed = json.loads((await pair.beta.run("xl", "list", "-l", "web")).output)
            assert listed[0]["config"]["c_info"]["type"] == "hvm"
            model = await pair.beta.run(
                "sh", "-c", "xenstore-read /local/domain/$(xl domid web)/image/device-model-pid"
            )
            assert int(model.output) > 1
