"""An agent's part of a session that is killed in its midst: ``python -m tests.xen.dying_agent STREAM DIRECTORY COUNT``.

It takes the stream's bytes from the file STREAM, says ``held`` when COUNT checkpoints after the first copy are
acknowledged, and then waits for its end.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.xen.played import STEP_S, Played, Primary, hypervisor_of, until


async def _main(stream: bytes, directory: Path, count: int) -> None:
    async with Played(hypervisor_of(directory), directory) as played:
        primary = Primary(stream)
        await played.receive(primary)
        await until(lambda: len(primary.acks) > count, f"{count} checkpoints after the first copy")
        sys.stdout.write("held\n")
        sys.stdout.flush()
        await asyncio.sleep(STEP_S)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3])))
