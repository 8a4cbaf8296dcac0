"""A Xen host that can be told what to do: commands run in dom0, from asyncio outside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Self

from tests.testbeds.host import BedHost
from tests.testbeds.post import Post
from tests.testbeds.xen.checkout import packed
from tests.testbeds.xen.image import image
from tests.testbeds.xen.machine import DOM0_MIB, MEMORY_MIB, Plug, XenMachine

__all__ = ["BOOT_S", "XenHost"]

BOOT_S: Final = 300.0  # a deadline only; it takes 10 s on an idle machine
AGENT: Final = ("python3", "-m", "tests.testbeds.xen.agent")


class XenHost(BedHost):
    """A booted host with an agent in dom0; see `BedHost`. Made by `boot`."""

    @classmethod
    async def boot(
        cls,
        *,
        hostname: str = "bed",
        memory_mib: int = MEMORY_MIB,
        dom0_mib: int = DOM0_MIB,
        shared: Iterable[Path] = (),
        disks: Iterable[Path] = (),
        plug: Plug | None = None,
        hosts: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = BOOT_S,
    ) -> Self:
        """Boot a host; the arguments are `XenMachine`'s.

        Args:
            hostname: of dom0.
            memory_mib: of the host.
            dom0_mib: of dom0.
            shared: directories that it sees at the same path.
            disks: image files that are its ``/dev/vdc`` and so on.
            plug: its place in a network.
            hosts: names and addresses that it knows.
            env: environment of all commands besides the bed's own.
            timeout_s: until the agent answers and the toolstack works, once the image is there.

        Raises:
            XenDied: it did not come up.
            NotBuilt: its image could not be built.
        """
        built = await asyncio.to_thread(image)
        checkout = await asyncio.to_thread(packed)
        # In this thread: QEMU dies with the thread that starts it.
        machine = XenMachine(
            built,
            checkout,
            AGENT,
            env=env,
            memory_mib=memory_mib,
            dom0_mib=dom0_mib,
            hostname=hostname,
            shared=shared,
            disks=disks,
            plug=plug,
            hosts=hosts,
        )
        return await cls(machine, Post(machine.line.fileno())).up(timeout_s)
