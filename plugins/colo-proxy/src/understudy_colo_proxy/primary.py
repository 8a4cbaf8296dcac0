"""The primary's half of a NIC: mirror what comes, hold what goes until the copy has said the same."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from understudy.device import OpenContext, Peer, ProtectedDevice, ReplicationMode, Verdict
from understudy.errors import HypervisorError, MonitorSilent
from understudy.services import MONITOR
from understudy_colo_proxy import wires
from understudy_colo_proxy.chain import Link, add_chardev, check_chardevs, remove
from understudy_colo_proxy.options import ColoProxyOptions
from understudy_colo_proxy.pace import Pacer, pacer_of
from understudy_colo_proxy.rewriter import REWRITER
from understudy_colo_proxy.uncompared import UncomparedFilter

__all__ = ["PrimaryNic"]

_log = logging.getLogger(__name__)

_CONNECT_S: Final = 10.0
_READY_S: Final = 20.0  # until the copy's chain is complete, the guest being stopped
_CUT_S: Final = 2.0
# The gate opens at the first: from then on the guest's packets go out directly. The comparison lets go of what it
# holds when it is removed, and that leaves by the last of the redirectors.
_REMOVAL: Final = ("redirect-out", "compare", "redirect-in", "mirror", "hold", "iothread")
_LOOK_S: Final = 5.0
_DROP_EVENT: Final = "colo_compare_drop_packet"
# Should the agent die while it holds the guest's input, QEMU lets it go in batches of this period. Microseconds.
_HOLD_US: Final = 200_000
_MESSAGE_BYTES: Final = 4 + len("DO_CHECKPOINT")


class PrimaryNic(ProtectedDevice):
    """One NIC of a running guest. Make one with `open`.

    Args:
        context: As `open` of the subkind got it.
    """

    __slots__ = (
        "_context",
        "_dropped_packets",
        "_from_secondary",
        "_link",
        "_look_at",
        "_mismatch",
        "_mismatch_bytes",
        "_options",
        "_output",
        "_pacer",
        "_released",
        "_started",
        "_to_secondary",
        "_uncompared",
    )

    def __init__(self, context: OpenContext) -> None:
        properties = context.device.properties
        monitor = context.services.get(MONITOR)
        self._context = context
        self._options: ColoProxyOptions = context.options or ColoProxyOptions()
        self._link = Link(monitor, properties["netdev"], bool(properties.get("vnet_hdr")))
        self._uncompared = (
            UncomparedFilter(properties["tap"]) if self._options.uncompared_ipv6 == "drop" else None
        )
        self._pacer: Pacer = pacer_of(
            context.guest, context.session, monitor, self._options.checkpoint_delay_ms
        )
        self._to_secondary: socket.socket | None = None
        self._from_secondary: socket.socket | None = None
        self._output: socket.socket | None = None  # the end that the comparison reads
        self._released: socket.socket | None = None  # the end from which what it let go is read
        self._mismatch: socket.socket | None = None
        self._mismatch_bytes = 0
        self._started = False
        self._look_at = 0.0
        self._dropped_packets = 0

    @classmethod
    async def open(cls, context: OpenContext) -> PrimaryNic:
        """Connect to the other half and make what carries no traffic yet.

        Guarantees:
            The guest's traffic is as before. After a failure or cancellation nothing is left.
        """
        nic = cls(context)
        try:
            # What an agent that died left of an earlier session; the guest is unprotected, or we would not be here.
            await remove(nic._link, _REMOVAL, {}, keep=(REWRITER,))
            await nic._connect()
            await nic._wire()
        except BaseException:
            await asyncio.shield(nic._undo())
            raise
        return nic

    async def _connect(self) -> None:
        listener = wires.Listener(self._context.local_address)
        accepting = asyncio.create_task(listener.accept(2), name="the other half's connections")
        try:
            asked = {"port": listener.port, "token": listener.token}
            await self._context.peer.request("connect", asked, timeout_s=_CONNECT_S)
            async with asyncio.timeout(_CONNECT_S):
                self._to_secondary, self._from_secondary = await accepting
        except TimeoutError:
            raise HypervisorError("the other half has not connected to this one") from None
        finally:
            await _end(accepting)
            listener.close()
            if self._to_secondary is None and not accepting.cancelled() and accepting.exception() is None:
                wires.shut(*accepting.result())

    async def _wire(self) -> None:
        assert self._to_secondary is not None  # noqa: S101 - as _connect left it
        assert self._from_secondary is not None  # noqa: S101 - as above
        await add_chardev(self._link, "to-secondary", self._to_secondary)
        await add_chardev(self._link, "from-secondary", self._from_secondary)
        self._output = await self._pair("output", "output-read")
        self._released = await self._pair("released", "released-read")
        ours, theirs = wires.local_pair()
        self._mismatch = ours
        with theirs:
            await add_chardev(self._link, "mismatch", theirs)
        await self._link.add("iothread", "iothread")

    async def _pair(self, write: str, read: str) -> socket.socket:
        # Both ends go to QEMU; of the one that is read we keep a duplicate, to see when it is empty.
        ends = wires.local_pair()
        try:
            await add_chardev(self._link, write, ends[0])
            await add_chardev(self._link, read, ends[1])
        except BaseException:
            ends[1].close()
            raise
        finally:
            ends[0].close()
        return ends[1]

    # --- Into protection ---------------------------------------------------------------------------------------------

    async def start(self, side: ReplicationMode) -> None:  # noqa: ARG002 - it is always the primary
        """Close the gate; the guest is stopped.

        Guarantees:
            Afterwards nothing that the guest sends leaves but what the copy has said, too, or a checkpoint contains;
            ARP excepted.
        """
        self._started = True
        # At the same time, because the guest is stopped.
        ready = asyncio.create_task(_ask_ready(self._context.peer), name="the other half's chain")
        try:
            if self._uncompared is not None:
                await self._uncompared.install()
            await ready
        finally:
            await _end(ready)
        link, options = self._link, self._options
        # Before everything else, also before the rewriter of a guest that was a secondary once.
        await link.add_filter(
            "filter-buffer", "hold", queue="tx", interval=_HOLD_US, status="off", position="head"
        )
        await link.add_filter("filter-mirror", "mirror", queue="tx", outdev=link.id("to-secondary"))
        await link.add_filter("filter-redirector", "redirect-in", queue="rx", indev=link.id("released-read"))
        await link.add(
            "colo-compare",
            "compare",
            primary_in=link.id("output-read"),
            secondary_in=link.id("from-secondary"),
            outdev=link.id("released"),
            notify_dev=link.id("mismatch"),
            iothread=link.id("iothread"),
            vnet_hdr_support=link.vnet_hdr,
            compare_timeout=options.compare_timeout_ms,
            expired_scan_cycle=options.expired_scan_cycle_ms,
            max_queue_size=options.max_queue_size_packets,
        )
        await link.add_filter("filter-redirector", "redirect-out", queue="rx", outdev=link.id("output"))
        await self._tell_drops(on=True)
        assert self._mismatch is not None  # noqa: S101 - open made it
        asyncio.get_running_loop().add_reader(self._mismatch, self._differ)
        await self._pacer.join(self)

    async def _tell_drops(self, *, on: bool) -> None:
        # QEMU counts nowhere what a full queue drops, but it can write a line to its log for each.
        arguments = {"name": _DROP_EVENT, "enable": on, "ignore-unavailable": True}
        with suppress(HypervisorError):
            await self._link.monitor.execute("trace-event-set-state", arguments)

    def _differ(self) -> None:
        # colo-compare writes one message for every difference it finds, and for every packet that became too old.
        assert self._mismatch is not None  # noqa: S101 - it has a reader only as long as it is there
        try:
            text = self._mismatch.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            text = b""
        if not text:
            asyncio.get_running_loop().remove_reader(self._mismatch)  # QEMU is gone
            return
        self._mismatch_bytes += len(text)
        self._pacer.ask()

    # --- What the pacer asks -----------------------------------------------------------------------------------------

    async def hold(self, *, on: bool) -> None:
        """Hold what comes for the guest, or let it go."""
        await self._link.switch("hold", on=on)

    def on_the_way(self) -> int:
        """Return how many mirrored bytes the secondary's host has not confirmed."""
        return wires.unsent(self._to_secondary) if self._to_secondary is not None else 0

    async def cut(self) -> bool:
        """Have the other half stop the copy and take a fresh rewriter; tells whether it did."""
        answer = await self._context.peer.request("cut", {}, timeout_s=_CUT_S)
        return bool(answer.get("clean"))

    # --- While protected ---------------------------------------------------------------------------------------------

    async def error(self) -> None:
        """Raise if the chain is broken: what is mirrored or compared would be incomplete from then on."""
        self._pacer.check()
        if not wires.established(self._wires()):
            raise HypervisorError("the connection to the other half is lost")
        await check_chardevs(self._link, "to-secondary", "from-secondary", "output", "released", "mismatch")
        await self._look_at_filter()

    async def _look_at_filter(self) -> None:
        # Now and then, because it takes a process: an administrator may have cleaned the interface.
        now = asyncio.get_running_loop().time()
        if self._uncompared is None or now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        if not await self._uncompared.installed():
            raise HypervisorError(f"somebody has removed the filter from {self._uncompared.interface}")
        self._dropped_packets = await self._uncompared.dropped_packets()

    def counters(self) -> Mapping[str, int | float]:
        """Return what is known of the comparison; those of checkpoints are of the guest, equal for all its NICs."""
        return {
            "mismatch_count": self._mismatch_bytes // _MESSAGE_BYTES,
            "asked_checkpoint_count": self._pacer.asked_count,
            "delay_checkpoint_count": self._pacer.delay_count,
            "unclean_checkpoint_count": self._pacer.unclean_count,
            "cut_ms": round(self._pacer.cut_ms, 3),
            "uncompared_dropped_packets": self._dropped_packets,
            "uncompared_allowed_count": int(self._uncompared is None),
        }

    # --- Out of protection -------------------------------------------------------------------------------------------

    def sever(self) -> None:
        """Cut the connections to the other half: nothing it says counts any more, and QEMU waits for it nowhere."""
        for sock in self._wires():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    async def stop(self, *, failover: bool) -> None:  # noqa: ARG002 - the gate stays as it is in both cases
        """End the checkpoints; the gate stays closed, and the guest hears what is sent to it."""
        self.sever()
        await self._pacer.leave(self)
        with suppress(HypervisorError):
            await self.hold(on=False)

    async def teardown(self, verdict: Verdict) -> None:
        """Open the gate, what is held first (KEEP), or leave it closed for good (DISCARD).

        With DISCARD the guest is dead, or dies with its gate closed: nothing is removed from a QEMU that answers.
        """
        self.sever()
        await self._pacer.leave(self)
        try:
            if verdict is Verdict.KEEP:
                await self._open_gate()
            elif not await self._alive() and self._uncompared is not None:
                await self._uncompared.remove()
        finally:
            self._close()

    async def _open_gate(self) -> None:
        waits = {}
        if self._output is not None and self._released is not None:
            waits = {"compare": self._output, "redirect-in": self._released}
        if self._started:
            await self._tell_drops(on=False)
        try:
            await remove(self._link, _REMOVAL, waits, keep=(REWRITER,))
        except MonitorSilent:
            raise
        except HypervisorError:
            if await self._alive():
                raise
            # The guest's QEMU has ended, and all of it with it.
        if self._started and self._uncompared is not None:
            await self._uncompared.remove()

    async def _alive(self) -> bool:
        try:
            await self._link.monitor.execute("query-status", timeout_s=2.0)
        except MonitorSilent:
            return True
        except HypervisorError:
            return False
        return True

    async def _undo(self) -> None:
        self.sever()
        with suppress(HypervisorError):
            await remove(self._link, _REMOVAL, {}, keep=(REWRITER,))
        self._close()

    def _close(self) -> None:
        if self._mismatch is not None:
            asyncio.get_running_loop().remove_reader(self._mismatch)
        for sock in (*self._wires(), self._output, self._released, self._mismatch):
            if sock is not None:
                sock.close()
        self._to_secondary = self._from_secondary = self._output = self._released = self._mismatch = None

    def _wires(self) -> list[socket.socket]:
        return [sock for sock in (self._to_secondary, self._from_secondary) if sock is not None]


async def _ask_ready(peer: Peer) -> None:
    await peer.request("ready", {}, timeout_s=_READY_S)


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
