"""Two kernels on one cable, seen from outside: they talk, one crashes, the other notices, it comes back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest

from tests.testbeds.bed import need
from tests.testbeds.kernel.machine import KernelDied, missing_for_kernel
from tests.testbeds.kernel.pair import Host, Pair

# Says what it got for "ping N" until a second passes without an answer.
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=10) as line:
    open(sys.argv[2] + "/connected", "w").close()
    line.settimeout(1)
    number = 0
    try:
        while True:
            line.sendall(b"%d\\n" % number)
            assert line.recv(100) == b"%d\\n" % number
            number += 1
            if number == 50:
                open(sys.argv[2] + "/talked", "w").close()
    except TimeoutError:
        print("silence after", number)
"""
SERVER = """
import socket
with socket.create_server(("", 7000)) as listening:
    line, _ = listening.accept()
    print(line.getpeername()[0], flush=True)
    while data := line.recv(100):
        line.sendall(data)
"""


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    need("kernel", missing_for_kernel())
    async with Pair(memory_mib=256, mtu=9000, disks_mib=(8,)) as booted:
        yield booted


async def appears(pair: Pair, name: str) -> None:
    async with asyncio.timeout(30):
        while not (pair.common / name).exists():  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.02)


async def listens(host: Host) -> None:
    await host.run("sh", "-c", "until ss -ltnH sport = 7000 | grep -q .; do sleep 0.05; done")


@pytest.mark.timeout(120)
async def test_talk_crash_and_return(pair: Pair) -> None:
    server = asyncio.create_task(pair.alpha.run(sys.executable, "-c", SERVER))
    await listens(pair.alpha)
    client = asyncio.create_task(
        pair.beta.run(sys.executable, "-c", CLIENT, "alpha", pair.common, timeout_s=90)
    )
    await appears(pair, "talked")
    # Frames as large as was asked for.
    assert " mtu 9000 " in (await pair.alpha.run("ip", "link", "show", "vec0")).output
    await pair.alpha.run("busybox", "ping", "-c1", "-W20", "-s8972", "beta")
    await pair.alpha.run("sh", "-c", f"echo kept >{pair.alpha.directory}/file")
    await pair.alpha.run("dd", "if=/dev/zero", "of=/dev/ubda", "bs=4096", "count=1", "oflag=direct")
    await pair.alpha.run("sh", "-c", "echo written | dd of=/dev/ubda conv=fsync bs=4096")

    await pair.crash(pair.alpha)
    with pytest.raises(KernelDied):
        await server
    assert (await client).output.startswith("silence after ")
    assert (await pair.beta.run("hostname")).output == "beta\n"

    await pair.start(pair.alpha)
    assert (await pair.alpha.run("cat", pair.alpha.directory / "file")).output == "kept\n"
    assert (await pair.alpha.run("head", "-n1", "/dev/ubda")).output == "written\n"
    server = asyncio.create_task(pair.alpha.run(sys.executable, "-c", SERVER))
    await listens(pair.alpha)
    (pair.common / "talked").unlink()
    client = asyncio.create_task(
        pair.beta.run(sys.executable, "-c", CLIENT, "alpha", pair.common, timeout_s=90)
    )
    await appears(pair, "talked")
    await pair.crash(pair.beta)
    with pytest.raises(KernelDied):
        await client
    server.cancel()


async def test_hosts_that_do_not_come_up_say_why_and_leave_nothing() -> None:
    need("kernel", missing_for_kernel())
    made = Pair(memory_mib=12)
    with pytest.raises(ExceptionGroup) as caught:
        async with made:
            pytest.fail("it came up")
    assert caught.group_contains(KernelDied, match="(?s)died.*end of its console:.*memory")
    assert not made.root.exists()
