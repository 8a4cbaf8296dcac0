"""Two hosts: a kernel each, one cable between them, and a directory that both see.

A crash is SIGKILL of a kernel's process group: nothing inside runs on, no packet leaves any more, and what its disks
had been given stays. A crashed host can be started again on the same cable and the same disks.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.testbeds.host import Completed
from tests.testbeds.kernel.host import Kernel
from tests.testbeds.kernel.machine import MEMORY_MIB, Wire

__all__ = ["Host", "Pair"]

NAMES: Final = ("alpha", "beta")
BUFFER_BYTES: Final = 1 << 20
FRAME_BYTES: Final = 1 << 16


@dataclass
class Host:
    """One of the two.

    Args:
        name: its hostname, known to both.
        address: of its interface ``vec0``.
        mac: of the same.
        directory: its own, on the host below at the same path; what is in it outlives the kernel. A file is there for
            sure when it has been closed or synced, as with any disk.
        disks: image files in it: ``/dev/ubda`` and so on.
        cable: its end of the cable.
    """

    name: str
    address: str
    mac: str
    directory: Path
    disks: tuple[Path, ...]
    cable: socket.socket
    kernel: Kernel | None = None

    async def run(
        self, *argv: str | Path, check: bool = True, timeout_s: float = 60.0, text: str = ""
    ) -> Completed:
        """Run a command on the host; see `Kernel.run`."""
        if self.kernel is None:
            raise RuntimeError(f"{self.name} is not started")
        return await self.kernel.run(*argv, check=check, timeout_s=timeout_s, text=text)


class Pair:
    """Both hosts. An asynchronous context manager: both are up inside it, and no trace is left after it.

    Args:
        memory_mib: of each kernel.
        mtu: of the cable, bytes.
        disks_mib: sizes of the disks that each host gets.
        env: environment of all commands besides the bed's own.
    """

    def __init__(
        self,
        *,
        memory_mib: int = MEMORY_MIB,
        mtu: int = 1500,
        disks_mib: tuple[int, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._memory_mib, self._mtu, self._env = memory_mib, mtu, dict(env or {})
        self.root = Path(tempfile.mkdtemp(prefix="understudy-pair-"))
        self.common = self.root / "common"  #: seen by both hosts and from outside at the same path
        self.common.mkdir()
        # A datagram is a frame. Kept open here: a host that comes back finds its end of the cable.
        cables = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.alpha, self.beta = (
            self._host(number, name, cable, disks_mib)
            for number, (name, cable) in enumerate(zip(NAMES, cables, strict=True), 1)
        )

    def _host(self, number: int, name: str, cable: socket.socket, disks_mib: tuple[int, ...]) -> Host:
        cable.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        directory = self.root / name
        directory.mkdir()
        disks = tuple(directory / f"disk{each}" for each in range(len(disks_mib)))
        for disk, size_mib in zip(disks, disks_mib, strict=True):
            with disk.open("wb") as image:
                image.truncate(size_mib << 20)
        return Host(name, f"10.9.0.{number}", f"02:00:00:00:00:0{number}", directory, disks, cable)

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.TaskGroup() as booting:
                for host in (self.alpha, self.beta):
                    booting.create_task(self.start(host))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self, host: Host) -> None:
        """Boot a host, or boot it again after its crash, and bring its interface up.

        Raises:
            KernelDied: it did not come up.
            CommandFailed: its interface did not.
        """
        self._swallow(host, yes=False)
        host.kernel = await Kernel.boot(
            hostname=host.name,
            memory_mib=self._memory_mib,
            shared=(self.common, host.directory),
            disks=host.disks,
            wires=[Wire(host.cable, host.mac, self._mtu)],
            env=self._env,
        )
        names = "".join(f"{each.address} {each.name}\n" for each in (self.alpha, self.beta))
        await host.run("sh", "-ec", "cat >>/etc/hosts", text=names)
        await host.run("ip", "address", "add", f"{host.address}/24", "dev", "vec0")
        await host.run("ip", "link", "set", "vec0", "up")

    async def crash(self, host: Host) -> None:
        """Kill a host with everything in it, at once and without a word to anybody.

        Guarantees:
            When this returns the host does nothing any more; what its peer sends goes nowhere.
        """
        if host.kernel is not None:
            kernel, host.kernel = host.kernel, None
            kernel.crash()
            self._swallow(host, yes=True)
            await kernel.close()

    async def close(self) -> None:
        """End both hosts and remove their directories."""
        kernels = [host.kernel for host in (self.alpha, self.beta) if host.kernel is not None]
        try:
            await asyncio.gather(*(kernel.close() for kernel in kernels), return_exceptions=True)
        finally:
            for host in (self.alpha, self.beta):
                self._swallow(host, yes=False)
                host.kernel = None
                host.cable.close()
            shutil.rmtree(self.root, ignore_errors=True)

    def _swallow(self, host: Host, *, yes: bool) -> None:
        # A switch drops what is for a dead port. A full socket would hold up the peer's interface, and a host that
        # comes back would be met by frames of the past.
        loop = asyncio.get_running_loop()
        loop.remove_reader(host.cable.fileno())
        _drain(host.cable)
        if yes:
            loop.add_reader(host.cable.fileno(), _drain, host.cable)


def _drain(cable: socket.socket) -> None:
    with suppress(BlockingIOError):
        while cable.recv(FRAME_BYTES, socket.MSG_DONTWAIT):
            pass
