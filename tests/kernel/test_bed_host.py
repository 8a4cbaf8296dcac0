"""A kernel that is told from outside what to do. These tests run outside: they boot their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.testbeds.bed import need
from tests.testbeds.host import CommandFailed
from tests.testbeds.kernel.host import Kernel
from tests.testbeds.kernel.machine import KernelDied, missing_for_kernel
from tests.testbeds.machine import running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
async def kernel(shared: Path) -> AsyncIterator[Kernel]:
    need("kernel", missing_for_kernel())
    async with await Kernel.boot(hostname="here", memory_mib=256, shared=[shared]) as booted:
        yield booted


async def test_commands(kernel: Kernel, shared: Path) -> None:
    done = await kernel.run("sh", "-c", "hostname; cat; echo $X >&2", text="read this", env={"X": "y"})
    assert (done.status, done.output, done.errors) == (0, "here\nread this", "y\n")
    # A message of any size, both ways.
    text = "0123456789abcdef" * 40_000
    assert (await kernel.run("cat", text=text)).output == text
    with pytest.raises(CommandFailed, match="ended with 3 and said:\nno"):
        await kernel.run("sh", "-c", "echo no; exit 3")
    assert (await kernel.run("false", check=False)).status == 1
    assert (await kernel.run("/no/such/program", check=False)).status == 127
    # The shared directory is the same on both sides, the rest is not.
    await kernel.run(
        "sh", "-c", f"echo inside >{shared}/from-inside; echo lost >{Path(__file__).parent}/lost"
    )
    assert (shared / "from-inside").read_text() == "inside\n"
    assert not (Path(__file__).parent / "lost").exists()


async def test_several_at_once_and_one_too_long(kernel: Kernel) -> None:
    with pytest.raises(TimeoutError, match="'sleep 3600' inside the bed did not end within"):
        await kernel.run("sleep", "3600", timeout_s=0.2)
    cancelled = asyncio.create_task(kernel.run("sleep", "3601"))
    texts = await asyncio.gather(*(kernel.run("echo", str(number)) for number in range(8)))
    assert [each.output for each in texts] == [f"{number}\n" for number in range(8)]
    cancelled.cancel()
    await kernel.run("sh", "-c", "while pidof sleep; do :; done")


async def test_a_crash(kernel: Kernel) -> None:
    waiting = asyncio.create_task(kernel.run("sleep", "3600"))
    await kernel.run("true")
    group = kernel.machine.pid
    assert running(group)
    kernel.crash()
    with pytest.raises(KernelDied):
        await waiting
    with pytest.raises(KernelDied, match="is dead"):
        await kernel.run("true")
    assert running(group) == []
