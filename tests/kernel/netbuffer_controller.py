"""A process that holds gates, for tests that stop or kill it: ``python netbuffer_controller.py GUEST``.

It opens and closes the gate of one guest, says ``ready``, and then does what it reads, one word and epoch a line:
``barrier N`` and ``commit N``, each answered by the same line.
"""

from __future__ import annotations

import asyncio
import sys

from tests.kernel.netbuffer_bed import opened


async def main(guest: int) -> None:
    """Serve until the other side hangs up."""
    nic = await opened(guest)
    print("ready", flush=True)  # noqa: T201 - the protocol
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        word, epoch = line.split()
        if word == "barrier":
            await nic.postsuspend(int(epoch))
        else:
            await nic.error()
            await nic.commit(int(epoch))
            counted = nic.counters()
            assert not counted["lost_gate_count"], counted
        print(line.strip(), flush=True)  # noqa: T201 - the protocol


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
