"""The primary's half of block replication: mirror while the guest runs, replicate while it is protected.

::

    open                                   start, the guest stopped
    quorum disk0                           quorum disk0
     +-- image      ==mirror==> nbd         +-- children.0: image
                                            +-- children.N: replication (primary) -> nbd

The mirror job copies the whole disk and then every write, until the swap: the job is ended while no write can come,
and the same NBD client becomes the file of a replication node below the quorum. QEMU's COLO starts, checkpoints and
stops that node by itself; this class watches it and removes it.

The replication node must not be there while the guest runs without COLO: its writes would fail.

Source: QEMU block/replication.c, block/quorum.c, docs/block-replication.txt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from understudy.device import OpenContext, ProtectedDevice, ReplicationMode, Verdict
from understudy.errors import HypervisorError, PeerError, UnderstudyError
from understudy.services import Monitor
from understudy_qemu.disksession import DISKS, block_nodes, finish
from understudy_qemu.monitor import CommandRefused

__all__ = ["PrimaryDisk"]

_log = logging.getLogger(__name__)

_PEER_S = 20.0
_CONNECT_S = 5.0
_POLL_S = 0.1  # how often the mirror is asked how far it is
_SWAP_S = 20.0  # to end the mirror, the guest stopped
_ROOT_CHILD = "children.1"  # where a first child goes on a QEMU that cannot tell its graph


class PrimaryDisk(ProtectedDevice):
    """One disk of the guest on the primary's host.

    Args:
        context: What `Subkind.open` got.
    """

    __slots__ = ("_attached", "_context", "_job", "_nbd", "_node", "_quorum", "_session", "_total_bytes")

    def __init__(self, context: OpenContext) -> None:
        name = context.device.name
        self._context = context
        self._session = context.services.get(DISKS)
        self._quorum = str(context.device.properties.get("node", name))
        self._nbd = f"{name}-nbd"
        self._node = f"{name}-primary"
        self._job = f"{name}-mirror"
        self._attached = False
        self._total_bytes = 0

    @property
    def _monitor(self) -> Monitor:
        return self._session.monitor

    # --- The initial copy ----------------------------------------------------------------------------------------

    async def mirror(self) -> None:
        """Copy the disk to the other host, the guest running, and go on copying every write.

        Raises:
            HypervisorError: The other half does not export, or the copy failed.

        Guarantees:
            Afterwards the other host's image is the same as this one, and stays so until `start`. After a failure or
            cancellation nothing of it is left in QEMU.
        """
        try:
            answer = await self._context.peer.request("export", {}, timeout_s=_PEER_S)
            try:
                host, port, export = str(answer["host"]), int(answer["port"]), str(answer["export"])
            except (KeyError, ValueError) as error:
                raise PeerError(f"the other half's answer to export makes no sense: {answer}") from error
            await self._session.connect(self._nbd, host, port, export, timeout_s=_CONNECT_S)
            await self._copy()
        except BaseException:
            await finish(self._remove())
            raise

    async def _copy(self) -> None:
        bandwidth = self._context.bwlimit_bytes_per_s // self._session.count
        arguments: dict[str, Any] = {
            "job-id": self._job,
            "device": self._quorum,
            "target": self._nbd,
            "sync": "full",
            "filter-node-name": f"{self._job}-filter",
        }
        if bandwidth:
            arguments["speed"] = bandwidth
        names = ("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR")
        async with self._monitor.events(*names) as events:
            await self._monitor.execute("blockdev-mirror", arguments)
            telling = asyncio.create_task(self._tell())
            try:
                async for event in events:
                    if event.data["device"] != self._job:
                        continue
                    if event.name == "BLOCK_JOB_READY":
                        break
                    why = event.data.get("error", event.data.get("operation", "it was ended"))
                    raise HypervisorError(f"the initial copy of {self._context.device.name} failed: {why}")
            finally:
                telling.cancel()
        self._context.progress(self._context.device.name, self._total_bytes, self._total_bytes)

    async def _tell(self) -> None:
        # Progress is also the sign of life that keeps the core from giving the copy up, so it is told only when
        # there is some.
        told = -1
        while True:
            await asyncio.sleep(_POLL_S)
            job = await self._find_job()
            if job is not None and job["offset"] != told:
                told, self._total_bytes = job["offset"], job["len"]
                self._context.progress(self._context.device.name, told, self._total_bytes)

    async def _find_job(self) -> Mapping[str, Any] | None:
        jobs = await self._monitor.execute("query-block-jobs")
        return next((job for job in jobs if job["device"] == self._job), None)

    # --- Replication ---------------------------------------------------------------------------------------------

    async def start(self, side: ReplicationMode) -> None:
        """Swap the mirror for replication; the guest is stopped, so the two images are equal."""
        if side is not ReplicationMode.PRIMARY:
            raise HypervisorError(f"{self._context.device.name} is the primary's half")
        await self._end_mirror(force=False)
        await self._monitor.execute(
            "blockdev-add",
            {"driver": "replication", "node-name": self._node, "mode": "primary", "file": self._nbd},
        )
        await self._monitor.execute("x-blockdev-change", {"parent": self._quorum, "node": self._node})
        self._attached = True
        self._session.forget_faults()

    async def _end_mirror(self, *, force: bool) -> None:
        names = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
        async with self._monitor.events(*names) as events, asyncio.timeout(_SWAP_S):
            if await self._find_job() is None:
                if force:
                    return
                raise HypervisorError(f"the mirror of {self._context.device.name} ended before its time")
            await self._monitor.execute("block-job-cancel", {"device": self._job, "force": force})
            async for event in events:
                if event.data["device"] == self._job:
                    break
            else:
                return
        # Cancelling a job that is ready completes it with both sides equal; anything else left them different.
        if not force and (event.name != "BLOCK_JOB_COMPLETED" or event.data.get("error")):
            why = event.data.get("error", "cancelled")
            raise HypervisorError(f"the mirror of {self._context.device.name} did not end equal: {why}")

    async def postsuspend(self, epoch: int) -> None:  # noqa: ARG002 - the contract's
        """Look before the checkpoint: memory must not go where an earlier write of the guest did not arrive.

        The guest is stopped, so all its writes have ended. Where it does not wait (mode colo), the hangup of the
        connection and the failed flush cut the stream instead, as soon as they are seen.
        """
        await self.error()

    async def error(self) -> None:
        """Raise if a write or flush did not reach the secondary, or the local image failed.

        Raises:
            HypervisorError: With QEMU's words.
        """
        fault = await self._session.fault(self._context.device.name)
        if fault:
            raise HypervisorError(fault)

    def sever(self) -> None:
        """Do nothing here: the domain cuts memory's stream first, and the disks' connections right after it.

        The other way round a checkpoint could still arrive whose disk writes did not.
        """

    async def stop(self, *, failover: bool) -> None:
        """Take the replication node out of the quorum and remove it with its connection.

        Guarantees:
            Afterwards the guest's writes go to the local image alone.
        """
        if failover:
            # A write that waits for a hung peer would hold the change of the graph, and QEMU with it.
            self._session.cut_clients()
        await self._remove()

    async def teardown(self, verdict: Verdict) -> None:
        """Remove the job, the nodes and the connection, whatever of them is there."""
        try:
            await self._remove()
        except UnderstudyError as error:
            # A discarded guest is dead, and its nodes with it; a guest that lives on must have been cleaned.
            if verdict is Verdict.KEEP or isinstance(error, CommandRefused):
                raise
            _log.debug("%s: nothing to remove, its QEMU is gone: %s", self._context.device.name, error)
        finally:
            self._session.forget_client(self._nbd)

    async def _remove(self) -> None:
        if await self._find_job() is not None:
            await self._end_mirror(force=True)
        nodes = await block_nodes(self._monitor)
        if self._node in nodes:
            child = await self._child()
            if child:
                await self._monitor.execute("x-blockdev-change", {"parent": self._quorum, "child": child})
            await self._monitor.execute("blockdev-del", {"node-name": self._node})
        if self._nbd in nodes:
            await self._monitor.execute("blockdev-del", {"node-name": self._nbd})
        self._session.forget_client(self._nbd)
        self._attached = False

    async def _child(self) -> str:
        # Under which name the replication node hangs below the quorum; "" if it does not. A quorum numbers its
        # children in the order they came, so after earlier sessions the number is not always the same.
        if not await self._monitor.supports("x-debug-query-block-graph"):
            return _ROOT_CHILD if self._attached else ""
        graph = await self._monitor.execute("x-debug-query-block-graph")
        ids = {node["name"]: node["id"] for node in graph["nodes"] if node["type"] == "block-driver"}
        wanted = (ids.get(self._quorum), ids.get(self._node))
        names = (edge["name"] for edge in graph["edges"] if (edge["parent"], edge["child"]) == wanted)
        return str(next(names, ""))
