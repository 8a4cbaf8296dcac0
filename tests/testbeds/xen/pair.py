"""Two Xen hosts, a client on the network between them, and a directory that all three see.

A crash is SIGKILL of a host's QEMU: hypervisor, dom0 and guests stop at once, no packet leaves any more, and what the
host wrote to its own root is gone. A crashed host can be started again in the same place.

The directory ``common`` lies on the machine below; dom0 sees it by 9p, without any cache, so that every file operation
of either host is one of the one kernel below. That is what makes it fit to carry the arbiter.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.testbeds.host import ROOT, Completed
from tests.testbeds.xen.host import XenHost
from tests.testbeds.xen.machine import DOM0_MIB, MEMORY_MIB, Plug
from tests.testbeds.xen.network import Namespace, Network

__all__ = ["XenPair", "XenPlace"]

NAMES: Final = ("alpha", "beta")


@dataclass
class XenPlace:
    """One of the two: where a host stands, whether it runs or not.

    Args:
        name: its hostname, known to both.
        plug: its port.
        directory: its own, on the machine below at the same path; outlives the host.
        disks: image files in it: ``/dev/vdc`` and so on; they outlive the host, too.
    """

    name: str
    plug: Plug
    directory: Path
    disks: tuple[Path, ...] = ()
    host: XenHost | None = None

    @property
    def address(self) -> str:
        """Address of dom0."""
        return self.plug.address

    async def run(
        self,
        *argv: str | Path,
        check: bool = True,
        text: str = "",
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> Completed:
        """Run a command in dom0; see `XenHost.run`."""
        if self.host is None:
            raise RuntimeError(f"{self.name} is not started")
        return await self.host.run(*argv, check=check, text=text, cwd=cwd, env=env, timeout_s=timeout_s)


class XenPair:
    """Both hosts and the client. An asynchronous context manager: both are up in it, nothing is left after it.

    Args:
        memory_mib: of each host.
        dom0_mib: of each dom0.
        disks_mib: sizes of the disks that each host has beside its root.
        env: environment of all commands besides the bed's own.
    """

    def __init__(
        self,
        *,
        memory_mib: int = MEMORY_MIB,
        dom0_mib: int = DOM0_MIB,
        disks_mib: tuple[int, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._memory_mib, self._dom0_mib, self._env = memory_mib, dom0_mib, dict(env or {})
        self.root = Path(tempfile.mkdtemp(prefix="understudy-xenpair-"))
        try:
            self.common = self.root / "common"  #: seen by both hosts and from outside at the same path
            self.common.mkdir()
            self.network = Network(len(NAMES))
        except BaseException:
            shutil.rmtree(self.root, ignore_errors=True)
            raise
        self.alpha, self.beta = (self._place(number, name, disks_mib) for number, name in enumerate(NAMES, 1))

    def _place(self, number: int, name: str, disks_mib: tuple[int, ...]) -> XenPlace:
        directory = self.root / name
        directory.mkdir()
        disks = tuple(directory / f"disk{each}" for each in range(len(disks_mib)))
        for disk, size_mib in zip(disks, disks_mib, strict=True):
            with disk.open("wb") as image:
                image.truncate(size_mib << 20)
        return XenPlace(name, Plug(self.network, number), directory, disks)

    @property
    def client(self) -> Namespace:
        """The third machine on the network: a namespace with the address `CLIENT`."""
        return self.network.client

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.TaskGroup() as booting:
                for place in (self.alpha, self.beta):
                    booting.create_task(self.start(place))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self, place: XenPlace) -> None:
        """Boot a host, or boot it again after its crash.

        Raises:
            XenDied: it did not come up.
        """
        place.host = await XenHost.boot(
            hostname=place.name,
            memory_mib=self._memory_mib,
            dom0_mib=self._dom0_mib,
            shared=(self.common, place.directory),
            disks=place.disks,
            plug=place.plug,
            hosts={each.name: each.address for each in (self.alpha, self.beta)},
            env=self._env,
        )

    async def crash(self, place: XenPlace) -> None:
        """Kill a host with everything in it, at once and without a word to anybody.

        Guarantees:
            When this returns neither hypervisor nor guest of it does anything any more.
        """
        if place.host is not None:
            host, place.host = place.host, None
            host.crash()
            await host.close()

    async def close(self) -> None:
        """End both hosts and remove the network and all directories."""
        hosts = [place.host for place in (self.alpha, self.beta) if place.host is not None]
        try:
            await asyncio.gather(*(host.close() for host in hosts), return_exceptions=True)
        finally:
            self.alpha.host = self.beta.host = None
            self.network.close()
            shutil.rmtree(self.root, ignore_errors=True)
