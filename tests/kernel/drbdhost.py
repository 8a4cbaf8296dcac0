"""One host of a DRBD pair in a kernel of its own: the half of a disk, driven as an engine would.

Run as ``drbdhost.py SIDE DIRECTORY``; the other host's half is reached over TCP, one JSON object a line. What it
writes, the primary notes in DIRECTORY before each checkpoint; the secondary says there what it took over.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.testbeds.kernel.whole import write_whole
from understudy.device import DeviceInfo, Kind, OpenContext, Peer, ProtectedDevice, ReplicationMode, Verdict
from understudy.testing.subkind_kit import open_context
from understudy_drbd.subkind import DRBD

ADDRESS = ("10.9.0.2", 7000)
DEVICE = Path("/dev/drbd0")
BLOCK_BYTES = 4096
BLOCKS = 7 * 256
SILENCE_S = 2.0
EPOCHS = 12

CONFIGURATION = """
global { usage-count no; }
common {
  net { protocol C; ping-int 1; ping-timeout 5; timeout 10; connect-int 1; }
  disk { resync-rate 200M; c-plan-ahead 0; }
}
resource r0 { device minor 0; meta-disk internal;
  on alpha { disk /dev/ubda; address 10.9.0.1:7788; }
  on beta { disk /dev/mapper/volume; address 10.9.0.2:7788; } }
"""


def context(side: ReplicationMode, peer: Peer) -> OpenContext:
    return open_context(
        DeviceInfo(Kind.DISK, "disk0", 0, "sim", properties={"path": str(DEVICE)}), side, peer
    )


class Line:
    """The way to the other half."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.turn = asyncio.Lock()

    async def request(self, method: str, params: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        async with self.turn, asyncio.timeout(timeout_s):
            self.writer.write(json.dumps([method, dict(params)]).encode() + b"\n")
            answer = json.loads(await self.reader.readline())
        assert isinstance(answer, dict)
        return answer


async def opened(side: ReplicationMode, peer: Peer) -> ProtectedDevice:
    device = await DRBD.open(context(side, peer))
    assert isinstance(device, ProtectedDevice), device
    await device.start(side)
    return device


def write(chance: random.Random, count: int) -> dict[str, str]:
    """Write random blocks; return what was written."""
    written = {}
    fd = os.open(DEVICE, os.O_RDWR)
    try:
        for _ in range(count):
            block, text = chance.randrange(BLOCKS), f"{chance.random():.12f}"
            os.pwrite(fd, text.encode().ljust(BLOCK_BYTES, b"\1"), block * BLOCK_BYTES)
            written[str(block)] = text
        os.fsync(fd)
    finally:
        os.close(fd)
    return written


def read(device: Path) -> dict[str, str]:
    """Return what is on a device, but for blocks of zeros."""
    data = device.read_bytes()[: BLOCKS * BLOCK_BYTES]
    blocks = (data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES))
    return {str(n): block.rstrip(b"\1").decode() for n, block in enumerate(blocks) if block.strip(b"\0")}


async def primary(directory: Path) -> None:
    chance = random.Random(1)
    line = Line(*await asyncio.open_connection(*ADDRESS))
    device = await opened(ReplicationMode.PRIMARY, line)
    expected: dict[str, str] = {}
    for epoch in range(1, 1000):
        expected |= await asyncio.to_thread(write, chance, 4)
        (directory / f"epoch-{epoch}").write_text(json.dumps(expected))
        await device.postsuspend(epoch)
        await line.request("checkpoint", {"epoch": epoch}, timeout_s=10)
        await device.error()
        write_whole(directory / "committed", str(epoch))
        await line.request("commit", {"epoch": epoch}, timeout_s=10)
        await device.commit(epoch)
        if epoch == EPOCHS:
            (directory / "going").touch()


async def secondary(directory: Path) -> None:
    lost = asyncio.Event()
    held = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal held
        try:
            while True:
                async with asyncio.timeout(SILENCE_S + 20 * (held == 0)):
                    method, params = json.loads(await reader.readline())
                answer: Mapping[str, Any] = {}
                if method == "checkpoint":
                    await device.checkpoint(params["epoch"])
                    await device.error()
                    held = params["epoch"]
                elif method == "commit":
                    await device.commit(params["epoch"])
                else:
                    answer = await device.serve(method, params)
                writer.write(json.dumps(dict(answer)).encode() + b"\n")
        except (TimeoutError, ValueError, OSError):
            lost.set()

    class Nobody:
        async def request(
            self, method: str, params: Mapping[str, Any], *, timeout_s: float
        ) -> Mapping[str, Any]:
            raise AssertionError(method)

    device = await opened(ReplicationMode.SECONDARY, Nobody())
    async with await asyncio.start_server(talk, *ADDRESS):
        (directory / "listening").touch()
        await lost.wait()
        device.sever()
        await device.stop(failover=True)
    taken = await asyncio.to_thread(read, DEVICE)
    (directory / "taken").write_text(json.dumps({"held": held, "disk": taken}))
    await asyncio.to_thread(write, random.Random(2), 8)
    await device.teardown(Verdict.KEEP)
    os.sync()


def main() -> None:
    side, directory = sys.argv[1], Path(sys.argv[2])
    if side == "configure":
        Path("/etc/drbd.conf").write_text(CONFIGURATION)
    elif side == "read":
        sys.stdout.write(json.dumps(read(directory)))
    else:
        asyncio.run({"primary": primary, "secondary": secondary}[side](directory))


if __name__ == "__main__":
    main()
