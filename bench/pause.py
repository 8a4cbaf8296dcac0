"""How long a guest stands still for one checkpoint: with our socket, and with QEMU's own ``tcp:`` migration.

Two pairs of the same guest side by side: one protected by this project's domains, one by nothing but commands to
QEMU. Checkpoints of both are asked for in the same way (``stop``, then a write of ``x-checkpoint-delay``) and in
turns; the pause is what QEMU's own STOP and RESUME events say. No network, one disk, both under TCG.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bare import NEVER_MS, Qmp, checkpoint_ms
from bench.figures import Figure, ratio
from tests.qemu.pair import SIZE_BYTES, Host, Session
from understudy.device import Mode
from understudy_qemu.accel import Accel
from understudy_qemu.guestfile import Disk
from understudy_qemu.machine import ImageDrive, command_line, environment, file_node, image_nodes, quorum_node

__all__ = ["measure"]

_CHECKPOINTS = 120
_BETWEEN_S = 0.03  # the guest runs
_LOOPBACK = "127.0.0.1"


def measure(checkpoints: int = _CHECKPOINTS) -> list[Figure]:
    """Take checkpoints of both kinds in turns.

    Args:
        checkpoints: How many of each.
    """
    with tempfile.TemporaryDirectory(prefix="understudy-bench-", dir="/var/tmp") as place:
        return asyncio.run(_measure(Path(place), checkpoints))


async def _measure(root: Path, checkpoints: int) -> list[Figure]:
    alpha, beta = (Host(name, root / name, Accel.TCG, 1) for name in ("alpha", "beta"))
    session: Session | None = None
    ours, theirs = [], []
    with ExitStack() as stack:
        try:
            await alpha.start()
            session = Session(alpha, beta, mode=Mode.REMUS)
            await session.protect()
            plain = await _Plain.begin(root, stack)
            for _ in range(checkpoints):
                [made] = await session.ack()
                ours.append((made.resumed_ns - made.stopped_ns) / 1e6)
                await asyncio.sleep(_BETWEEN_S)
                theirs.append(await asyncio.to_thread(plain.checkpoint_ms))
                await asyncio.sleep(_BETWEEN_S)
        finally:
            for host in (alpha, beta):
                await host.kill()
            if session is not None:
                await session.close()
    pause, tcp = Figure("pause_ms", ours), Figure("plain_tcp_pause_ms", theirs)
    return [pause, tcp, ratio("pause_vs_plain_tcp_ratio", pause, tcp, aim=0.3)]


@dataclass(frozen=True, slots=True)
class _Copy:
    # The disk of a copy: the document's graph.
    disk: Disk
    directory: Path

    @property
    def top_node(self) -> str:
        return self.disk.name

    def blockdevs(self) -> Sequence[Mapping[str, Any]]:
        hidden = self._overlay("hidden") | {"backing": f"{self.disk.name}-image"}
        active = self._overlay("active") | {"backing": hidden}
        replication = {"driver": "replication", "node-name": "childs0", "mode": "secondary", "file": active}
        replication["top-id"] = self.disk.name
        return (*image_nodes(self.disk), {**quorum_node(self.disk.name, ""), "children": [replication]})

    def _overlay(self, name: str) -> dict[str, Any]:
        path = self.directory / f"{name}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE_BYTES)], check=True)
        return {"driver": "qcow2", "node-name": name, "file": file_node(path, f"{name}-file")}


class _Plain:
    # A guest under COLO, over ``tcp:``, by commands alone.

    def __init__(self, primary: Qmp, secondary: Qmp) -> None:
        self._primary = primary
        self._secondary = secondary

    @classmethod
    async def begin(cls, root: Path, stack: ExitStack) -> _Plain:
        monitors: list[Qmp] = []
        for name in ("plain-alpha", "plain-beta"):
            host = Host(name, root / name, Accel.TCG, 1)
            disk = host.config.disks[0]
            for directory in (host.paths.runtime, host.paths.state):
                directory.mkdir(parents=True)
            host.make_images()
            copy = bool(monitors)
            drive = _Copy(disk, host.root) if copy else ImageDrive(disk)
            line = command_line(
                host.config, host.paths, accel=host.accel, drives={disk.name: drive}, taps={}, incoming=copy
            )
            monitors.append(_run(line, environment(await host.preload()), host.paths.qmp, stack))
            if not copy:
                monitors[0].execute("cont")
                await host.counts_on(1)
        plain = cls(*monitors)
        await asyncio.to_thread(plain._protect)
        return plain

    def _protect(self) -> None:
        # Source: QEMU docs/COLO-FT.txt.
        primary, secondary = self._primary, self._secondary
        nbd, migration = _free_ports(2)
        colo = {"capabilities": [{"capability": name, "state": True} for name in ("x-colo", "events")]}
        for monitor in (primary, secondary):
            monitor.execute("migrate-set-capabilities", colo)
        stream = f"tcp:{_LOOPBACK}:{migration}"
        secondary.execute("migrate-incoming", {"uri": stream})
        server = {"type": "inet", "data": {"host": _LOOPBACK, "port": str(nbd)}}
        secondary.execute("nbd-server-start", {"addr": server})
        export = {"type": "nbd", "id": "e0", "node-name": "disk0-image", "name": "disk0", "writable": True}
        secondary.execute("block-export-add", export)
        mirror = {"device": "disk0", "job-id": "resync", "target": f"nbd://{_LOOPBACK}:{nbd}/disk0"}
        mirror |= {"mode": "existing", "format": "raw", "sync": "full"}
        primary.execute("drive-mirror", mirror)
        primary.event_ns("BLOCK_JOB_READY")
        primary.execute("stop")
        primary.execute("block-job-cancel", {"device": "resync"})
        primary.event_ns("BLOCK_JOB_COMPLETED")
        client: dict[str, Any] = {"driver": "nbd", "export": "disk0"}
        client |= {"server": {"type": "inet", "host": _LOOPBACK, "port": str(nbd)}}
        node = {"driver": "replication", "node-name": "replication0", "mode": "primary", "file": client}
        primary.execute("blockdev-add", node)
        primary.execute("x-blockdev-change", {"parent": "disk0", "node": "replication0"})
        primary.execute("migrate-set-parameters", {"x-checkpoint-delay": NEVER_MS, "max-bandwidth": 1 << 40})
        primary.execute("migrate", {"uri": stream})
        primary.event_ns("RESUME")
        self.checkpoint_ms()  # the first one is not like the others

    def checkpoint_ms(self) -> float:
        """Take one checkpoint; return how long the guest stood still."""
        return checkpoint_ms(self._primary)


def _run(line: Sequence[str], variables: Mapping[str, str], monitor: Path, stack: ExitStack) -> Qmp:
    process = subprocess.Popen(line, env=variables, stdin=subprocess.DEVNULL)
    stack.callback(_end, process)
    qmp = Qmp(monitor)
    stack.callback(qmp.close)
    return qmp


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((_LOOPBACK, 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in sockets]
