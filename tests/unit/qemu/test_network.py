"""The kernel's network from the agent's point of view: what does not answer holds nobody up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# The place of a lock in the kernel that nobody lets go: a FIFO that nobody opens for writing.
HANGS_AND_ENDS = """
import asyncio, os, sys
from understudy.errors import HypervisorError
from understudy_qemu import network

network.DEADLINE_S = 0.1
network._index = lambda name: os.open(sys.argv[1], os.O_RDONLY)

async def main():
    for _ in range(6):
        try:
            await network.close_way_out("tap0")
        except HypervisorError as error:
            print(error)

asyncio.run(main())
"""


def test_a_kernel_that_does_not_answer_is_told_and_does_not_hold_up_the_end_of_the_agent(
    tmp_path: Path,
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ended = subprocess.run(
        [sys.executable, "-c", HANGS_AND_ENDS, str(fifo)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    told = ended.stdout.splitlines()
    words = "cannot take tap0 off its bridge: the kernel does not answer"
    assert told[0] == f"{words} (no answer within 0.1 s)"
    assert told[-1] == f"{words} (4 earlier calls still hang)"
