"""A host's interfaces, on a real kernel in a network namespace of the tests' own; one that does not answer, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testbeds.bed import need
from understudy.errors import HypervisorError
from understudy.interfaces import in_thread, interface_exists, is_bridge, open_way_out

# The place of a lock in the kernel that nobody lets go: a FIFO that nobody opens for writing.
HANGS_AND_ENDS = """
import asyncio, os, sys
from understudy import interfaces
from understudy.errors import HypervisorError

interfaces.DEADLINE_S = 0.1
interfaces.index_of = lambda name: os.open(sys.argv[1], os.O_RDONLY)

async def main():
    for _ in range(6):
        try:
            await interfaces.close_way_out("tap0")
        except HypervisorError as error:
            print(error)

asyncio.run(main())
"""

# Each line printed is one of `show`: the bridge that it is on, and whether it is up.
OPENS_AND_CLOSES = """
import asyncio, json, subprocess
from understudy import interfaces
from understudy.errors import HypervisorError

def link(name):
    told = subprocess.run(("ip", "-json", "link", "show", name), check=True, stdout=subprocess.PIPE)
    return json.loads(told.stdout)[0]

def show(name):
    print(link(name).get("master", "-"), "up" if "UP" in link(name)["flags"] else "down")

async def main():
    ip = lambda *words: subprocess.run(("ip", "link", *words), check=True)
    ip("add", "bridge0", "type", "bridge")
    ip("add", "bridge1", "type", "bridge")
    ip("add", "guest0", "type", "veth", "peer", "name", "wire0")
    print(await interfaces.is_bridge("bridge0"), await interfaces.is_bridge("guest0"))
    show("guest0")
    for bridge in ("bridge0", "bridge0", "bridge1"):
        await interfaces.open_way_out("guest0", bridge)
        show("guest0")
    for _ in range(2):
        await interfaces.close_way_out("guest0")
        show("guest0")
    try:
        await interfaces.open_way_out("guest0", "wire0")
    except HypervisorError as error:
        print(error)
    show("guest0")
    await interfaces.in_thread("set", interfaces.set_address, "guest0", bytes.fromhex("fe0000000001"))
    print(link("guest0")["address"])
    for _ in range(2):
        print(await interfaces.in_thread("remove", interfaces.remove_interface, "guest0"))
    await interfaces.close_way_out("guest0")
    print(await interfaces.interface_exists("guest0"))

asyncio.run(main())
"""


def run(*words: str) -> list[str]:
    ended = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_kernel_that_does_not_answer_is_told_and_does_not_hold_up_the_end_of_the_agent(
    tmp_path: Path,
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    told = run(sys.executable, "-c", HANGS_AND_ENDS, str(fifo))
    words = "cannot take tap0 off its bridge: the kernel does not answer"
    assert told[0] == f"{words} (no answer within 0.1 s)"
    assert told[-1] == f"{words} (4 earlier calls still hang)"


def test_a_way_out_is_opened_and_closed_whatever_it_was_before() -> None:
    namespace = ("unshare", "--map-root-user", "--net")
    tried = subprocess.run((*namespace, "ip", "link"), capture_output=True, check=False)
    need("qemu", [] if tried.returncode == 0 else ["user namespaces and iproute2"])
    assert run(*namespace, sys.executable, "-c", OPENS_AND_CLOSES) == [
        "True False",
        "- down",
        "bridge0 up",
        "bridge0 up",
        "bridge1 up",
        "- down",
        "- down",
        "cannot put guest0 on wire0: wire0 is no bridge",
        "- down",
        "fe:00:00:00:00:01",
        "True",
        "False",
        "False",
    ]


async def test_what_is_not_there_is_told_by_its_name() -> None:
    assert await interface_exists("lo")
    assert not await is_bridge("lo")
    assert not await interface_exists("nowhere0")
    assert not await is_bridge("nowhere0")
    with pytest.raises(HypervisorError, match=r"^cannot put lo on nowhere0: there is no interface nowhere0$"):
        await open_way_out("lo", "nowhere0")


async def test_a_refusal_of_the_kernel_is_told_with_what_was_attempted() -> None:
    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    with pytest.raises(HypervisorError, match=r"^cannot move a mountain: Operation not permitted$"):
        await in_thread("move a mountain", refuse)
