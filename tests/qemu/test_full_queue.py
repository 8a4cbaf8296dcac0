"""More packets in one epoch than QEMU's queue takes: QEMU says nothing, the session does."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from contextlib import suppress

import pytest

from tests.qemu.guestnet import GuestNet
from tests.qemu.test_controls import HeldSession, bed, held
from understudy.errors import DeviceError
from understudy_qemu.heldnic import QUEUE_PACKETS

__all__ = ["bed"]

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(150)]

# Asks the guest for an echo, as fast as it can answer, until its standard input ends.
ECHOES = """
import select, socket, struct, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
echo = struct.pack("!BBHHH", 8, 0, 0xF7FE, 0, 1)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    for _ in range(20):
        sock.sendto(echo, ("10.77.0.2", 0))
"""


async def flood(bed: GuestNet, seconds: float) -> None:
    argv = ("ip", "netns", "exec", bed.namespace, sys.executable, "-c", ECHOES)
    process = await asyncio.create_subprocess_exec(*argv, stdin=PIPE)
    try:
        await asyncio.sleep(seconds)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(10):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_an_epoch_that_may_have_lost_packets_ends_the_protection(bed: GuestNet) -> None:
    session, _ = await held(bed, HeldSession)
    released, seconds = 0.0, 2.0
    async with asyncio.timeout(100):
        while released < QUEUE_PACKETS:
            await flood(bed, seconds)
            await session.ack()
            counters = session.p_group.counters()
            released = counters["nic0.released_packets"]
            assert counters["nic0.full_epoch_count"] == (released >= QUEUE_PACKETS)
            seconds *= 2
    assert released == QUEUE_PACKETS, "QEMU has dropped what came after these"
    with pytest.raises(ExceptionGroup) as told:
        await session.ack()
    [error] = told.value.exceptions
    assert isinstance(error, DeviceError)
    assert "queue of 10000 packets was full" in str(error)
