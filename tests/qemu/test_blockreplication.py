"""The subkind ``block-replication`` keeps the contract, on a model of QEMU's block layer; and its own small rules.

The model knows nodes, jobs, exports and descriptors, nothing of data: whether the data are right is for real processes
to show (test_domains.py, test_replication_driver.py). The sockets between the two halves are real.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from understudy.device import (
    Decline,
    DeviceInfo,
    Kind,
    OpenContext,
    Peer,
    ProbeContext,
    ReplicationMode,
)
from understudy.errors import HypervisorError
from understudy.services import MonitorEvent, Services
from understudy.testing.subkind_kit import CHECKS, SubkindBed, check_subkind, open_context
from understudy_qemu.blockprimary import PrimaryDisk
from understudy_qemu.blockreplication import BLOCK_REPLICATION, BlockReplicationOptions
from understudy_qemu.disksession import DISKS, DiskSession, Replica
from understudy_qemu.guestfile import Disk
from understudy_qemu.images import ImageIdentity, Images
from understudy_qemu.monitor import CommandRefused

PRIMARY, SECONDARY = ReplicationMode.PRIMARY, ReplicationMode.SECONDARY
DISK = "disk0"
SIZE_BYTES = 1 << 20
DEVICE = DeviceInfo(Kind.DISK, DISK, 0, "qemu", properties={"node": DISK, "image_node": f"{DISK}-image"})


class Model:
    """A monitor over a model of QEMU's block layer."""

    def __init__(self, *nodes: str) -> None:
        self.nodes = dict.fromkeys(nodes, "qcow2")
        self.children: dict[str, str] = {}  # of the quorum: name of the child → node
        self.next_child = 1
        self.jobs: dict[str, dict[str, Any]] = {}
        self.exports: set[str] = set()
        self.fds: dict[str, int] = {}
        self.broken = ""
        self.mirror_fails = ""
        self.subscribers: list[tuple[frozenset[str], asyncio.Queue[MonitorEvent]]] = []

    def tell(self, event: str, **data: Any) -> None:
        for names, queue in self.subscribers:
            if event in names:
                queue.put_nowait(MonitorEvent(event, data, 1 << 62))

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        await asyncio.sleep(0)
        handler = getattr(self, "do_" + command.replace("-", "_"))
        answer = handler(arguments or {})
        await asyncio.sleep(0)
        return answer

    def refuse(self, command: str, why: str) -> CommandRefused:
        return CommandRefused(f"{command}: {why}", command, "GenericError", why)

    def do_query_named_block_nodes(self, _: Mapping[str, Any]) -> Any:
        return [{"node-name": name, "drv": driver} for name, driver in self.nodes.items()]

    def do_query_block_jobs(self, _: Mapping[str, Any]) -> Any:
        return list(self.jobs.values())

    def do_query_xen_replication_status(self, _: Mapping[str, Any]) -> Any:
        return {"error": bool(self.broken), "desc": self.broken}

    def do_x_debug_query_block_graph(self, _: Mapping[str, Any]) -> Any:
        ids = {name: number for number, name in enumerate(self.nodes)}
        nodes = [{"id": number, "type": "block-driver", "name": name} for name, number in ids.items()]
        edges = [
            {"parent": ids[DISK], "child": ids[node], "name": name} for name, node in self.children.items()
        ]
        return {"nodes": nodes, "edges": edges}

    def do_blockdev_add(self, options: Mapping[str, Any]) -> None:
        name = options["node-name"]
        if name in self.nodes:
            raise self.refuse("blockdev-add", f"Duplicate nodes with node-name='{name}'")
        if options["driver"] == "nbd" and options["server"]["str"] not in self.fds:
            raise self.refuse("blockdev-add", "no such descriptor")
        self.nodes[name] = options["driver"]

    def do_blockdev_del(self, arguments: Mapping[str, Any]) -> None:
        name = arguments["node-name"]
        if name not in self.nodes:
            raise self.refuse("blockdev-del", f"Failed to find node with node-name='{name}'")
        below = name.endswith("-nbd") and f"{DISK}-primary" in self.nodes
        if (
            below
            or name in self.children.values()
            or any(job["target"] == name for job in self.jobs.values())
        ):
            raise self.refuse("blockdev-del", f"Node {name} is in use")
        del self.nodes[name]
        self.close_fd(f"understudy-{name}")

    def do_blockdev_mirror(self, arguments: Mapping[str, Any]) -> None:
        job = arguments["job-id"]
        self.jobs[job] = {"device": job, "offset": 0, "len": SIZE_BYTES, "target": arguments["target"]}
        if self.mirror_fails:
            del self.jobs[job]
            self.tell("BLOCK_JOB_COMPLETED", device=job, error=self.mirror_fails)
        else:
            self.jobs[job]["offset"] = SIZE_BYTES
            self.tell("BLOCK_JOB_READY", device=job)

    def do_block_job_cancel(self, arguments: Mapping[str, Any]) -> None:
        job = arguments["device"]
        if self.jobs.pop(job, None) is None:
            raise self.refuse("block-job-cancel", f"Block job '{job}' not found")
        self.tell("BLOCK_JOB_CANCELLED" if arguments["force"] else "BLOCK_JOB_COMPLETED", device=job)

    def do_x_blockdev_change(self, arguments: Mapping[str, Any]) -> None:
        if "node" in arguments:
            self.children[f"children.{self.next_child}"] = arguments["node"]
            self.next_child += 1
        elif self.children.pop(arguments["child"], None) is None:
            raise self.refuse("x-blockdev-change", f"does not have child '{arguments['child']}'")

    def do_closefd(self, arguments: Mapping[str, Any]) -> None:
        if arguments["fdname"] not in self.fds:
            raise self.refuse("closefd", f"File descriptor named '{arguments['fdname']}' not found")
        self.close_fd(arguments["fdname"])

    def do_nbd_server_start(self, arguments: Mapping[str, Any]) -> None:
        assert arguments["addr"]["data"]["str"] in self.fds

    def do_block_export_add(self, arguments: Mapping[str, Any]) -> None:
        if arguments["id"] in self.exports:
            raise self.refuse("block-export-add", f"Block export id '{arguments['id']}' is already in use")
        self.exports.add(arguments["id"])

    def do_nbd_server_stop(self, _: Mapping[str, Any]) -> None:
        self.exports.clear()
        self.close_fd("understudy-nbd")

    async def supports(self, command: str, *members: str) -> bool:
        return True

    async def give_fd(self, name: str, fd: int) -> None:
        await asyncio.sleep(0)
        self.close_fd(name)
        self.fds[name] = os.dup(fd)
        await asyncio.sleep(0)

    def close_fd(self, name: str) -> None:
        if name in self.fds:
            os.close(self.fds.pop(name))

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[AsyncIterator[MonitorEvent]]:
        entry = (frozenset(names), asyncio.Queue[MonitorEvent]())
        self.subscribers.append(entry)

        async def read() -> AsyncIterator[MonitorEvent]:
            while True:
                yield await entry[1].get()

        try:
            yield read()
        finally:
            self.subscribers.remove(entry)

    def die(self) -> None:
        """End as a killed process does: nothing of it is left but its files."""
        for name in list(self.fds):
            self.close_fd(name)
        self.nodes.clear()
        self.exports.clear()


class QuickImages(Images):
    """Images without ``qemu-img``: a file is an image of the right size."""

    async def _run(self, *arguments: str, timeout_s: float | None = None) -> bytes:
        await asyncio.sleep(0)
        if arguments[0] == "create":
            os.close(os.open(arguments[-2], os.O_CREAT | os.O_WRONLY))
            return b""
        return json.dumps({"format": "qcow2", "virtual-size": SIZE_BYTES}).encode()


class Bed(SubkindBed):
    """One disk of a guest."""

    subkind = BLOCK_REPLICATION

    def __init__(self, root: Path) -> None:
        self.overlays = root / "overlays"
        self.overlays.mkdir(parents=True, exist_ok=True)
        images = QuickImages("no-qemu-img", root)
        disk = Disk(DISK, root / "image.qcow2", "qcow2", "virtio", "none", "", "auto")
        wanted = Replica(disk, SIZE_BYTES, ImageIdentity("id-1", "contract", DISK, 1, PRIMARY))
        self.qemu = {PRIMARY: Model(DISK, f"{DISK}-image"), SECONDARY: Model()}
        self.disks = {
            PRIMARY: DiskSession(1),
            SECONDARY: DiskSession(1, replicas={DISK: wanted}, images=images),
        }
        self.promoted = False

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        made = open_context(
            DEVICE,
            side,
            peer,
            services=Services((DISKS, self.disks[side])),
            options=BlockReplicationOptions(),
            directory=self.overlays,
        )
        return replace(made, local_address="127.0.0.1", peer_address="127.0.0.1")

    async def before(self, step: str, side: ReplicationMode, epoch: int) -> None:
        if step == "failover" and side is SECONDARY:
            # QEMU has committed by the time the disks are torn down.
            self.promoted = True
        elif step == "teardown" and side is SECONDARY and not self.promoted:
            self.qemu[SECONDARY].die()

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        qemu = self.qemu[side]
        files = [path.name for path in self.overlays.iterdir()] if side is SECONDARY else []
        return [
            *files,
            *(node for node in qemu.nodes if node != DISK),
            *qemu.jobs,
            *qemu.children,
            *qemu.exports,
        ]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    @asynccontextmanager
    async def made() -> AsyncIterator[Bed]:
        bed = Bed(tmp_path)
        for side in ReplicationMode:
            await bed.disks[side].attach(bed.qemu[side])
        try:
            yield bed
        finally:
            for side in ReplicationMode:
                await bed.disks[side].close()
                bed.qemu[side].die()

    return made


async def break_it(bed: SubkindBed) -> None:
    assert isinstance(bed, Bed)
    bed.qemu[PRIMARY].broken = "I/O error occurred"


async def test_it_keeps_the_contract(make: Any) -> None:
    ran = await check_subkind(make, broken=break_it)
    assert set(CHECKS) - set(ran) == {"output-commit"}


class Answering:
    """A peer whose other half exports at a port where somebody listens."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def request(self, method: str, params: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        return {"host": "127.0.0.1", "port": self.port, "export": "s/disk0"}


async def test_a_failed_copy_leaves_nothing(make: Any) -> None:
    async with make() as bed:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            peer = Answering(listener.getsockname()[1])
            bed.qemu[PRIMARY].mirror_fails = "No space left on device"
            with pytest.raises(HypervisorError, match="initial copy of disk0 failed: No space left"):
                await BLOCK_REPLICATION.open(bed.context(PRIMARY, peer))
        assert set(bed.qemu[PRIMARY].nodes) == {DISK, f"{DISK}-image"}
        assert not bed.disks[PRIMARY].clients


async def test_nobody_listens(make: Any) -> None:
    async with make() as bed:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with pytest.raises(
            HypervisorError, match=f"no connection to the disk export at 127.0.0.1 port {port}"
        ):
            await BLOCK_REPLICATION.open(bed.context(PRIMARY, Answering(port)))
        assert set(bed.qemu[PRIMARY].nodes) == {DISK, f"{DISK}-image"}


async def test_the_child_is_found_whatever_its_number(make: Any) -> None:
    """Earlier sessions have used numbers up; another child than ours is never taken out."""
    async with make() as bed:
        qemu = bed.qemu[PRIMARY]
        qemu.next_child = 7
        qemu.children["children.0"] = f"{DISK}-image"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            context = bed.context(PRIMARY, Answering(listener.getsockname()[1]))
            disk = await BLOCK_REPLICATION.open(context)
            assert isinstance(disk, PrimaryDisk)
            await disk.start(PRIMARY)
            assert qemu.children["children.7"] == f"{DISK}-primary"
            await disk.stop(failover=True)
        assert qemu.children == {"children.0": f"{DISK}-image"}


async def test_a_hangup_is_told_at_once(make: Any) -> None:
    async with make() as bed:
        told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        bed.disks[PRIMARY].lost = told.set_result
        with socket.create_server(("127.0.0.1", 0)) as listener:
            context = bed.context(PRIMARY, Answering(listener.getsockname()[1]))
            disk = await BLOCK_REPLICATION.open(context)
            assert isinstance(disk, PrimaryDisk)
            await disk.start(PRIMARY)
            far, _ = listener.accept()
            far.close()
            assert "closed its connection" in await asyncio.wait_for(told, 5)
        with pytest.raises(HypervisorError, match="closed its connection"):
            await disk.postsuspend(1)
        with suppress(HypervisorError):
            await disk.stop(failover=True)


async def test_no_room_for_overlays(make: Any) -> None:
    async with make() as bed:
        bed.disks[SECONDARY]._room_ratio = 1e12
        with pytest.raises(HypervisorError, match=r"bytes free, the overlays .* need .*room_ratio"):
            await BLOCK_REPLICATION.open(bed.context(SECONDARY, Answering(0)))
        assert not await bed.traces(SECONDARY)


async def test_it_declines_what_is_not_qemus(make: Any) -> None:
    async with make() as bed:
        context = replace(bed.context(PRIMARY, Answering(0)), services=Services())
        assert isinstance(await BLOCK_REPLICATION.open(context), Decline)
        other = replace(DEVICE, hypervisor="other")
        services = Services()
        probe = ProbeContext("g", other, PRIMARY, context.mode, None, services, bed.overlays)
        assert isinstance(await BLOCK_REPLICATION.probe(probe), Decline)


@pytest.mark.parametrize("delay_ms", [0, 4, 3_600_001])
def test_delays_out_of_range(delay_ms: int) -> None:
    with pytest.raises(ValueError, match="checkpoint_delay_ms"):
        BlockReplicationOptions(checkpoint_delay_ms=delay_ms)
