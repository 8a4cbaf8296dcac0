"""What the disks of one guest share during one session, on one host: the NBD server, the watch for faults, the cut.

QEMU has one NBD server and one global answer to whether replication failed, however many disks there are. The domain
makes one `DiskSession` and offers it to the disk subkinds as the service `DISKS`.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from understudy.device import ReplicationMode
from understudy.errors import HypervisorError, UnderstudyError
from understudy.services import Monitor, MonitorEvent, ServiceKey
from understudy_qemu.cutting import cut_accepted
from understudy_qemu.guestfile import Disk
from understudy_qemu.images import ImageIdentity, Images, free_bytes
from understudy_qemu.monitor import CommandRefused

__all__ = ["DISKS", "DiskSession", "Replica", "block_nodes", "finish"]

_log = logging.getLogger(__name__)

_FD_NAME = "understudy-nbd"
_SWAP_FIRST_S = 0.001  # the arbiter is asked before QEMU, which may keep the processors busy
_FINISH_S = 20.0
_ANSWER_S = 4.0  # a little less than the core grants to the question
_FAULTS = ("QUORUM_REPORT_BAD", "BLOCK_IO_ERROR", "BLOCK_JOB_ERROR", "BLOCK_EXPORT_DELETED")


@dataclass(frozen=True, slots=True)
class Replica:
    """What one disk of the secondary is to become."""

    disk: Disk  #: as this host's guest file has it
    size_bytes: int  #: of the primary's disk, as the guest sees it
    identity: ImageIdentity  #: of the primary's image


class DiskSession:
    """The shared part of all disks of one guest on one side.

    Args:
        count: How many disks there are, for sharing a bandwidth.
        replicas: What this side's disks are to become, by device name; on the secondary.
        images: This host's images; on the secondary.
        overlay_directory: Where the guest file wants the overlays, ``None`` for the agent's choice.
        room_ratio: Free room that must be there for overlays, as a part of all disks' sizes.
        overwrite: The secondary's images may be overwritten whatever they hold.
    """

    def __init__(
        self,
        count: int,
        *,
        replicas: Mapping[str, Replica] = MappingProxyType({}),
        images: Images | None = None,
        overlay_directory: Path | None = None,
        room_ratio: float = 0.0,
        overwrite: bool = False,
    ) -> None:
        self.count = max(1, count)
        self.replicas = replicas
        self.overlay_directory = overlay_directory
        self._images = images
        self._room_ratio = room_ratio
        self._overwrite = overwrite
        #: Called at once with the reason when a disk does not replicate any more.
        self.lost: Callable[[str], object] = _log.debug
        self._clients: dict[str, socket.socket] = {}  # our duplicates of NBD clients' sockets, by node name
        self._hangups: dict[str, select.epoll] = {}  # tells when one of them is closed by the other host
        self._monitor: Monitor | None = None
        self._listener: asyncio.Task[None] | None = None
        self._faults: dict[str, str] = {}  # node, export or job → what happened first
        self._since_ns = time.time_ns()
        self._server = asyncio.Lock()
        self._port = 0
        self._stopping: asyncio.Task[None] | None = None
        self._cut = False  # no client reaches its server any more
        self._asking: asyncio.Future[str] | None = None

    @property
    def monitor(self) -> Monitor:
        """The guest's monitor.

        Raises:
            HypervisorError: There is none yet: the copy has not been launched.
        """
        if self._monitor is None:
            raise HypervisorError("the guest's QEMU has not been started yet")
        return self._monitor

    async def attach(self, monitor: Monitor) -> None:
        """Work on this QEMU from now on, and listen for its faults."""
        await self._deafen()
        self._monitor = monitor
        ready = asyncio.Event()
        self._listener = asyncio.create_task(self._listen(monitor, ready), name="faults of disks")
        await ready.wait()

    async def close(self) -> None:
        """Stop listening and let go of our duplicates of sockets; QEMU stays as it is. Idempotent."""
        for node in self.clients:
            self.forget_client(node)
        await self._deafen()
        if self._stopping is not None:
            self._stopping.cancel()
            await asyncio.wait({self._stopping})

    async def _deafen(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener
            self._listener = None

    # --- The images of the secondary ---------------------------------------------------------------------------------

    def replica(self, device: str) -> Replica:
        """Return what a disk of the secondary is to become.

        Raises:
            HypervisorError: The primary told nothing about it.
        """
        try:
            return self.replicas[device]
        except KeyError:
            raise HypervisorError(f"the primary told nothing about {device}") from None

    async def prepare_image(self, device: str) -> None:
        """Make an image ready to be overwritten; as `Images.prepare_replica`."""
        wanted = self.replica(device)
        disk = wanted.disk
        await self._own_images().prepare_replica(
            disk.path, disk.format, wanted.size_bytes, wanted.identity, overwrite=self._overwrite
        )

    async def create_overlay(self, path: Path, size_bytes: int) -> None:
        """Make an empty qcow2 overlay.

        Raises:
            HypervisorError: Too little room for the overlays of all disks, or ``qemu-img`` failed.
        """
        room = int(self._room_ratio * sum(replica.size_bytes for replica in self.replicas.values()))
        free = free_bytes(path.parent)
        if free < room:
            raise HypervisorError(
                f"{path.parent} has {free} bytes free, the overlays of the copy's disks need {room} "
                f"(overlays.room_ratio = {self._room_ratio:g})"
            )
        await self._own_images().create(path, "qcow2", size_bytes)

    def own_images(self, generation: int) -> None:
        """Write down that this host's images are the guest's from now on.

        Args:
            generation: Of the record by which this host became the owner.
        """
        for replica in self.replicas.values():
            mine = replace(replica.identity, generation=generation, role=ReplicationMode.PRIMARY)
            self._own_images().write_identity(replica.disk.path, mine)

    def _own_images(self) -> Images:
        if self._images is None:
            raise HypervisorError("this side's images are not to be made")
        return self._images

    # --- Faults ------------------------------------------------------------------------------------------------------

    async def fault(self, device: str) -> str:
        """Return what went wrong with a disk or with the replication of any disk, ``""`` if nothing did.

        The primary's replication filter swallows write errors, so the guest and the quorum never see them; the
        driver remembers them and tells when asked. A failed flush is not swallowed and makes an event.

        Args:
            device: Name of the disk, e.g. ``"disk0"``.

        Source: QEMU block/replication.c, replication_return_value and replication_get_error.
        """
        for node, what in self._faults.items():
            if node == device or node.startswith(f"{device}-"):
                return what
        return await self.status()

    async def status(self) -> str:
        """Return what QEMU says of the replication of all disks, ``""`` if it goes well."""
        if self._asking is None:
            # All disks ask at the same moment, and QEMU's answer is about all of them: one question is enough.
            self._asking = asyncio.ensure_future(self._ask())
            self._asking.add_done_callback(self._asked)
        return await asyncio.shield(self._asking)

    def forget_faults(self) -> None:
        """Begin anew: what happened before replication started is no fault of it.

        QEMU holds some events back for up to a second, so an old one may still come; its own time tells.
        """
        self._faults = {node: what for node, what in self._faults.items() if node in self._clients}
        self._since_ns = time.time_ns()

    async def _ask(self) -> str:
        asking = asyncio.ensure_future(
            self.monitor.execute("query-xen-replication-status", timeout_s=2 * _ANSWER_S)
        )
        try:
            done, _ = await asyncio.wait({asking}, timeout=_ANSWER_S)
            if not done:
                # QEMU stops the guest and waits for its writes, which wait for a peer that hangs.
                self.lost("QEMU does not answer: its disks wait for the other host")
            answer = await asking
        finally:
            asking.cancel()
        return (
            f"QEMU's replication failed: {answer.get('desc', 'no reason given')}" if answer["error"] else ""
        )

    def _asked(self, future: asyncio.Future[str]) -> None:
        self._asking = None
        if not future.cancelled():
            future.exception()  # whoever waits gets it; nobody may be waiting any more

    async def _listen(self, monitor: Monitor, ready: asyncio.Event) -> None:
        try:
            async with monitor.events(*_FAULTS) as events:
                ready.set()
                async for event in events:
                    self._note(event)
        except UnderstudyError as error:
            # The domain's own subscription tells that the monitor is gone.
            _log.debug("no more faults of disks: %s", error)
        finally:
            ready.set()

    def _note(self, event: MonitorEvent) -> None:
        if event.host_ns < self._since_ns:
            return
        data = event.data
        match event.name:
            case "QUORUM_REPORT_BAD":
                node, what = (
                    data["node-name"],
                    f"a {data['type']} failed: {data.get('error', 'no reason given')}",
                )
            case "BLOCK_IO_ERROR":
                node, what = (
                    data.get("node-name", ""),
                    f"a {data['operation']} failed: {data.get('reason', '')}",
                )
            case "BLOCK_JOB_ERROR":
                node, what = data["device"], f"its job failed on a {data['operation']}"
            case _:
                node, what = data["id"], "its export is gone"
        self._fault(str(node), what)

    def _fault(self, node: str, what: str) -> None:
        if node not in self._faults:
            self._faults[node] = f"{node}: {what}"
            self.lost(self._faults[node])

    # --- The NBD clients of the primary ------------------------------------------------------------------------------

    @property
    def clients(self) -> frozenset[str]:
        """Node names of the NBD clients."""
        return frozenset(self._clients)

    async def connect(self, node: str, host: str, port: int, export: str, *, timeout_s: float) -> None:
        """Make an NBD client node over a socket of ours, so that QEMU's main loop never waits for a dead host.

        Args:
            node: Name of the new node.
            host: Numeric address of the server.
            port: Its TCP port.
            export: Name of the export.
            timeout_s: Deadline for the connection, and for the handshake, seconds.

        Raises:
            HypervisorError: No connection, or QEMU refused.

        Guarantees:
            After a failure nothing is left, unless QEMU is silent.
        """
        sock = await _connected(host, port, timeout_s)
        name = f"understudy-{node}"
        # Before QEMU has it: a cut that comes in the middle of this must find it, or QEMU would hang in the handshake.
        self._clients[node] = sock
        try:
            if self._cut:
                raise HypervisorError(
                    f"no connection to the disk export at {host} port {port} any more: it is cut"
                )
            await self.monitor.give_fd(name, sock.fileno())
            # A server that falls silent in the handshake would hold QEMU's main loop: cut it off before that.
            alarm = asyncio.get_running_loop().call_later(timeout_s, _shut, sock)
            try:
                server = {"type": "fd", "str": name}
                options = {"driver": "nbd", "node-name": node, "server": server, "export": export}
                await self.monitor.execute("blockdev-add", options, timeout_s=2 * timeout_s)
            finally:
                alarm.cancel()
            self._watch_for_hangup(node, sock)
        except BaseException:
            # Also when this was cancelled: QEMU may be in the handshake, and only the cut ends its waiting.
            _shut(sock)
            self.forget_client(node)
            # QEMU keeps a descriptor that it was given and never used.
            await finish(self.monitor.execute("closefd", {"fdname": name}), expected=CommandRefused)
            raise

    def cut_clients(self) -> None:
        """Cut all NBD clients off their server at once; needs no monitor.

        Guarantees:
            Their I/O fails from now on, and no other client is let in.
        """
        self._cut = True
        for node, sock in self._clients.items():
            self._ignore_hangup(node)
            _shut(sock)

    def forget_client(self, node: str) -> None:
        """Let go of our duplicate of a client's socket. Idempotent."""
        self._ignore_hangup(node)
        sock = self._clients.pop(node, None)
        if sock is not None:
            sock.close()

    def _watch_for_hangup(self, node: str, sock: socket.socket) -> None:
        # QEMU reads the socket; of us, the kernel only tells that the other host has closed it. QEMU itself says
        # nothing, and from that moment on the writes of the guest are lost to the secondary.
        hangup = select.epoll()
        hangup.register(sock, select.EPOLLRDHUP)
        self._hangups[node] = hangup
        asyncio.get_running_loop().add_reader(hangup.fileno(), self._hung_up, node)

    def _hung_up(self, node: str) -> None:
        self._ignore_hangup(node)
        self._fault(node, "the other host closed its connection")

    def _ignore_hangup(self, node: str) -> None:
        hangup = self._hangups.pop(node, None)
        if hangup is not None:
            asyncio.get_running_loop().remove_reader(hangup.fileno())
            hangup.close()

    # --- The NBD server of the secondary -----------------------------------------------------------------------------

    async def export(self, name: str, node: str, export_id: str, address: str) -> Mapping[str, Any]:
        """Export a block node, starting the one server of this QEMU if it does not run.

        The listening socket is ours, bound to a port that the kernel chose, and handed to QEMU: no other program
        can take the port in between.

        Args:
            name: The export's name for the client.
            node: The node to export, writable.
            export_id: QEMU's id of the export.
            address: Numeric address of this host to listen on.

        Returns:
            ``host``, ``port`` and ``export`` for the client.

        Raises:
            HypervisorError: QEMU refused.
            OSError: The address is none of this host's.
        """
        async with self._server:
            if not self._port:
                self._port = await self._serve(address)
            if await self.monitor.supports("block-export-add", "type.nbd"):
                arguments = {
                    "type": "nbd",
                    "id": export_id,
                    "node-name": node,
                    "name": name,
                    "writable": True,
                }
                await self.monitor.execute("block-export-add", arguments)
            else:
                await self.monitor.execute("nbd-server-add", {"device": node, "name": name, "writable": True})
        return {"host": address, "port": self._port, "export": name}

    def cut_server(self, pid: int) -> None:
        """Cut the primary off the NBD server at once, whatever QEMU is doing; needs no monitor.

        Args:
            pid: QEMU's process.
        """
        if self._port:
            try:
                cut_accepted(pid, self._port)
            except OSError as error:
                _log.warning("the primary's connections to the disks could not be cut: %s", error)

    def begin_stop(self) -> None:
        """Begin what `stop_server` does; that waits for it, and asks QEMU again if it failed."""

        async def stop() -> None:
            await asyncio.sleep(_SWAP_FIRST_S)
            with suppress(HypervisorError):
                await self.stop_server()

        self._stopping = self._stopping or asyncio.create_task(stop(), name="stop of the NBD server")

    async def stop_server(self) -> None:
        """Stop the NBD server with all its exports: nothing of the primary reaches the images any more. Idempotent.

        Raises:
            HypervisorError: QEMU refused or is silent.
        """
        async with self._server:
            if self._port:
                await self.monitor.execute("nbd-server-stop")
                self._port = 0

    async def _serve(self, address: str) -> int:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=64) as listener:
            await self.monitor.give_fd(_FD_NAME, listener.fileno())
            await self.monitor.execute(
                "nbd-server-start", {"addr": {"type": "fd", "data": {"str": _FD_NAME}}}
            )
            port: int = listener.getsockname()[1]
        return port


DISKS: ServiceKey[DiskSession] = ServiceKey("qemu-disks")


async def block_nodes(monitor: Monitor) -> Mapping[str, str]:
    """Return the drivers of all block nodes of a QEMU by the nodes' names."""
    answer = await monitor.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node["drv"] for node in answer}


async def finish(work: Coroutine[Any, Any, object], *, expected: type[Exception] | None = None) -> None:
    """Clean up after a failure or cancellation, which is on its way up: what fails here is only logged.

    Args:
        work: What is to be done; brought to its end within a deadline, also when the caller is cancelled again.
        expected: A failure that means that there was nothing to do.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait_for(asyncio.shield(task), _FINISH_S)
    except Exception as error:  # noqa: BLE001 - the first cause is what counts
        if expected is None or not isinstance(error, expected):
            _log.warning("cleaning up after a failed step of block replication: %s", error)


async def _connected(host: str, port: int, timeout_s: float) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, TimeoutError) as error:
        sock.close()
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror
        raise HypervisorError(f"no connection to the disk export at {host} port {port}: {why}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
