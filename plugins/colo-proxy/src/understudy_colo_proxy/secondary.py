"""The secondary's half of a NIC: feed the copy what the primary got, hand back what the copy says.

The copy's tap is on no bridge until the promotion (its hypervisor sees to that): what it says goes to the primary's
comparison and nowhere else.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from understudy.device import OpenContext, ProtectedDevice, ReplicationMode, Verdict
from understudy.errors import HypervisorError
from understudy.services import MONITOR
from understudy_colo_proxy import wires
from understudy_colo_proxy.chain import Link, add_chardev, check_chardevs, remove
from understudy_colo_proxy.rewriter import REWRITER, Rewriters

__all__ = ["SecondaryNic"]

_CONNECT_S: Final = 8.0
_READY_S: Final = 18.0
_DRAIN_S: Final = 1.0
_REMOVAL: Final = ("redirect-out", "redirect-in")


class SecondaryNic(ProtectedDevice):
    """One NIC of a copy.

    Args:
        context: As `open` of the subkind got it.
    """

    __slots__ = (
        "_context",
        "_follower",
        "_link",
        "_loaded",
        "_ready",
        "_rewriters",
        "_torn_down",
        "_wires",
    )

    def __init__(self, context: OpenContext) -> None:
        properties = context.device.properties
        self._context = context
        self._link = Link(
            context.services.get(MONITOR), properties["netdev"], bool(properties.get("vnet_hdr"))
        )
        self._rewriters = Rewriters(self._link)
        self._wires: list[socket.socket] = []
        self._ready = asyncio.Event()
        self._loaded = True  # whether the copy has loaded a checkpoint since the last cut
        self._follower: asyncio.Task[None] | None = None
        self._torn_down = False

    async def serve(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer the primary's half: ``connect``, ``ready`` and ``cut``."""
        if method == "connect":
            await self._connect(int(params["port"]), str(params["token"]))
            return {}
        if method == "ready":
            async with asyncio.timeout(_READY_S):
                await self._ready.wait()
            return {}
        if method == "cut":
            return {"clean": await self._cut()}
        return await super().serve(method, params)

    async def _connect(self, port: int, token: str) -> None:
        if self._wires:
            raise HypervisorError("the other half is connected already")
        async with asyncio.timeout(_CONNECT_S):
            made = await wires.connect(self._context.peer_address, port, token, 2)
        if self._torn_down:
            wires.shut(*made)
            raise HypervisorError("this half is torn down")
        self._wires = made

    async def start(self, side: ReplicationMode) -> None:  # noqa: ARG002 - it is always the secondary
        """Make the chain; the copy waits for its memory and says nothing yet."""
        if not self._wires:
            raise HypervisorError("the other half has not asked to connect")
        from_primary, to_primary = self._wires
        link = self._link
        await add_chardev(link, "from-primary", from_primary)
        await add_chardev(link, "to-primary", to_primary)
        await link.add_filter("filter-redirector", "redirect-in", queue="tx", indev=link.id("from-primary"))
        await link.add_filter("filter-redirector", "redirect-out", queue="rx", outdev=link.id("to-primary"))
        await self._rewriters.begin()
        following = asyncio.Event()
        self._follower = asyncio.create_task(self._follow(following), name="checkpoints of the copy")
        await following.wait()
        self._ready.set()

    async def _follow(self, following: asyncio.Event) -> None:
        # A RESUME before COLO's end says that a checkpoint is loaded; after it, that the copy takes over.
        try:
            async with self._link.monitor.events("RESUME", "COLO_EXIT") as events:
                following.set()
                async for event in events:
                    if event.name == "COLO_EXIT":
                        break
                    self._loaded = True
        except HypervisorError:
            pass  # the copy's QEMU is gone, and nothing of this is needed any more
        finally:
            following.set()

    async def _cut(self) -> bool:
        # The primary holds what comes for the guest, and has seen that all it mirrored is on this host.
        if not self._ready.is_set() or not self._wires:
            return False
        if not await wires.drained(lambda: wires.unread(self._wires[0]), _DRAIN_S):
            return False
        await self._link.monitor.execute("stop")
        self._loaded = False
        await self._rewriters.renew()
        return True

    async def error(self) -> None:
        """Raise if the chain is broken: the copy would miss what the guest got."""
        if not wires.established(self._wires):
            raise HypervisorError("the connection to the other half is lost")
        await check_chardevs(self._link, "from-primary", "to-primary")

    def counters(self) -> Mapping[str, int | float]:
        """Return how often a fresh rewriter took over."""
        return {"renewed_rewriter_count": self._rewriters.renewed_count}

    def sever(self) -> None:
        """Cut the connections to the other half: nothing that the copy says lets anything out over there any more."""
        for sock in self._wires:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    async def stop(self, *, failover: bool) -> None:
        """Cut the chain; at a failover keep the rewriter that fits what the copy holds.

        The redirectors are passed by from now on (QEMU switches them off at a failover); `teardown` removes them.

        Guarantees:
            Nothing that the copy says from now on lets anything out on the primary's host.
        """
        self.sever()
        if failover:
            await asyncio.sleep(0)  # the follower has seen what came before COLO's end
            await self._rewriters.settle(loaded=self._loaded)

    async def teardown(self, verdict: Verdict) -> None:
        """Remove what is left of the chain; with KEEP the rewriter stays, because open connections may need it."""
        self._torn_down = True
        self.sever()
        try:
            if verdict is Verdict.KEEP and self._ready.is_set():
                await remove(self._link, _REMOVAL, {}, keep=(REWRITER,))
        finally:
            if self._follower is not None:
                self._follower.cancel()
                with suppress(asyncio.CancelledError):
                    await self._follower
            for sock in self._wires:
                sock.close()
            self._wires = []
