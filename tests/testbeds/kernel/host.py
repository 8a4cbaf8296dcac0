"""A kernel of the bed as a host that can be told what to do: commands run inside, from asyncio outside."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from tests.testbeds.host import ROOT, BedHost
from tests.testbeds.kernel.machine import MEMORY_MIB, Machine, Wire
from tests.testbeds.kernel.post import outside

__all__ = ["Kernel"]

BOOT_S: Final = 60.0  # a deadline only; it takes 3 s


class Kernel(BedHost):
    """A booted kernel with an agent inside; see `BedHost`. Made by `boot`."""

    @classmethod
    async def boot(
        cls,
        *,
        hostname: str = "bed",
        memory_mib: int = MEMORY_MIB,
        shared: Iterable[Path] = (),
        disks: Sequence[Path] = (),
        wires: Sequence[Wire] = (),
        env: Mapping[str, str] | None = None,
        timeout_s: float = BOOT_S,
    ) -> Self:
        """Boot a kernel; the arguments are `Machine`'s.

        Args:
            hostname: of the guest.
            memory_mib: of the guest.
            shared: directories that it may write.
            disks: image files that are its block devices ``/dev/ubda`` and so on.
            wires: its interfaces ``vec0`` and so on.
            env: environment of all commands besides the bed's own.
            timeout_s: until the agent inside answers.

        Raises:
            KernelDied: it did not come up.
        """
        machine = Machine(
            [sys.executable, "-m", "tests.testbeds.kernel.agent"],
            cwd=ROOT,
            env=env,
            memory_mib=memory_mib,
            hostname=hostname,
            shared=shared,
            disks=disks,
            wires=wires,
        )
        return await cls(machine, outside(machine.line.fileno(), machine.run)).up(timeout_s)
