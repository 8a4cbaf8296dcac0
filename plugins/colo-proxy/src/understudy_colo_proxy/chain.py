"""What one NIC's chain is made of inside QEMU, on either side; made and removed through the monitor.

::

    primary    client → tap → [hold] → [mirror ─────────────► secondary] → guest
               guest → [redirect-out → compare ⇐ secondary's output] → [redirect-in] → tap → client
    secondary  primary's mirror → [redirect-in] → [rewriter] → copy
               copy → [rewriter] → [redirect-out ─────────────► primary's compare]

Filters are walked in the order of QEMU's list for what goes to the guest, and against it for what comes from it. A
guest that was a secondary once still has a rewriter, first in the list: it lives on (see rewriter.py), and all that is
added stands behind it, so that the mirror and the comparison see the numbers that the guest itself uses.

Every id begins with ``understudy-``; whoever finds such an object in a QEMU that no session protects may remove it.

Source: QEMU docs/COLO-FT.txt; net/filter-mirror.c, net/filter-buffer.c, net/colo-compare.c; qapi/qom.json.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from understudy.errors import HypervisorError
from understudy.services import Monitor
from understudy_colo_proxy.wires import drained, unread

__all__ = ["Link", "add_chardev", "check_chardevs", "existing", "prefix_of", "remove"]

Json = Mapping[str, Any]

_DRAIN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Link:
    """The NIC that a chain hangs on, and how to talk about it."""

    monitor: Monitor
    netdev: str  #: QEMU's id of the backend
    vnet_hdr: bool  #: whether packets carry a virtio-net header

    def id(self, part: str) -> str:
        """Return the QEMU id of a part of this NIC's chain."""
        return prefix_of(self.netdev) + part

    async def add(self, kind: str, part: str, /, **properties: Any) -> None:
        """Make an object; `properties` with ``_`` as QOM has them."""
        await self.monitor.execute("object-add", {"qom-type": kind, "id": self.id(part), **properties})

    async def add_filter(self, kind: str, part: str, /, **properties: Any) -> None:
        """Make a filter on this NIC, the last of its list unless `properties` say where."""
        if kind != "filter-buffer":
            properties["vnet_hdr_support"] = self.vnet_hdr
        await self.add(kind, part, netdev=self.netdev, **properties)

    async def switch(self, part: str, *, on: bool) -> None:
        """Let a filter work, or let packets pass it by."""
        await self.monitor.execute(
            "qom-set",
            {"path": f"/objects/{self.id(part)}", "property": "status", "value": "on" if on else "off"},
        )

    async def delete(self, part: str) -> None:
        """Remove an object."""
        await self.monitor.execute("object-del", {"id": self.id(part)})


def prefix_of(netdev: str) -> str:
    """Return what every id of this NIC's chain begins with."""
    return f"understudy-colo-{netdev}-"


async def add_chardev(link: Link, part: str, sock: socket.socket) -> None:
    """Hand `sock` to QEMU as a chardev; we keep our own duplicate.

    A connected descriptor has all that colo-compare asks of a chardev (it never has to reconnect here: a chain whose
    connection broke is at its end).

    Guarantees:
        After a failure QEMU holds no descriptor of it.
    """
    name = link.id(part)
    try:
        await link.monitor.give_fd(name, sock.fileno())
        data = {"addr": {"type": "fd", "data": {"str": name}}, "server": False}
        await link.monitor.execute("chardev-add", {"id": name, "backend": {"type": "socket", "data": data}})
    except BaseException:
        with suppress(HypervisorError):
            await link.monitor.execute("closefd", {"fdname": name})
        raise


async def check_chardevs(link: Link, *parts: str) -> None:
    """Raise if QEMU has lost the connection behind one of these chardevs; its duplicate here may stand all the same.

    Raises:
        HypervisorError: It has, or does not answer.
    """
    answer = await link.monitor.execute("query-chardev")
    connected = {
        str(entry["label"]) for entry in answer if not str(entry["filename"]).startswith("disconnected")
    }
    for part in parts:
        if link.id(part) not in connected:
            raise HypervisorError(f"QEMU has lost the connection {link.id(part)}")


async def existing(link: Link) -> tuple[dict[str, str], list[str]]:
    """Return the objects of this chain that QEMU has now (part: type), and its chardevs (parts)."""
    prefix = prefix_of(link.netdev)
    objects = {
        str(entry["name"]).removeprefix(prefix): str(entry["type"]).removeprefix("child<").removesuffix(">")
        for entry in await link.monitor.execute("qom-list", {"path": "/objects"})
        if str(entry["name"]).startswith(prefix)
    }
    chardevs = [
        str(entry["label"]).removeprefix(prefix)
        for entry in await link.monitor.execute("query-chardev")
        if str(entry["label"]).startswith(prefix)
    ]
    return objects, chardevs


async def remove(
    link: Link, order: Sequence[str], waits: Mapping[str, socket.socket], keep: Sequence[str] = ()
) -> None:
    """Remove what there is of a chain, in part or whole.

    Args:
        link: The NIC.
        order: The parts in the order of removal; parts that are not named go last.
        waits: Before a part is removed, this socket is given a moment to be read empty.
        keep: Types of objects that stay.

    Raises:
        HypervisorError: Something could not be removed; the rest was.
    """
    objects, chardevs = await existing(link)
    wanted = [part for part, kind in objects.items() if kind not in keep]
    first: HypervisorError | None = None
    for part in sorted(wanted, key=lambda part: order.index(part) if part in order else len(order)):
        if part in waits:
            await drained(lambda sock=waits[part]: unread(sock), _DRAIN_S)  # type: ignore[misc]
        try:
            await link.delete(part)
        except HypervisorError as error:
            first = first or error
    for part in chardevs:
        try:
            await link.monitor.execute("chardev-remove", {"id": link.id(part)})
        except HypervisorError as error:
            first = first or error
    if first is not None:
        raise first
