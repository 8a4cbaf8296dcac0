"""The secondary's filter-rewriter: replaced by a fresh one at every checkpoint, kept for good after a failover.

The copy answers a client's SYN with a sequence number of its own; filter-rewriter learns the difference to the
primary's from the handshake and applies it from then on. At a checkpoint the copy becomes equal to the primary, so
QEMU sets all differences to 0, but it does not forget which handshakes are under way: when the client's ACK of such a
handshake comes after the checkpoint, the difference is computed from 0 instead of the copy's number, and is garbage
until the next checkpoint. The copy never answers on this connection, the primary's answers are held meanwhile, and if
the primary dies in that time the connection is lost. A rewriter that has seen nothing does right in every case: it
leaves the numbers of all connections as they are, which is what a copy equal to the primary needs.

So a fresh rewriter takes over at the cut, when nothing is on its way to the copy and the copy is stopped. The old one
is only switched off, because until the checkpoint is loaded it is the one that knows: a failover before that switches
back.

After a failover the rewriter stays: connections opened since the last checkpoint need their difference for as long as
they live, and QEMU tells nobody whether there are any. With none it is passive by itself and costs a table lookup.

Source: QEMU net/filter-rewriter.c (colo_rewriter_handle_event, reset_seq_offset, handle_primary_tcp_pkt).
"""

from __future__ import annotations

from understudy_colo_proxy.chain import Link, existing

__all__ = ["REWRITER", "Rewriters"]

REWRITER = "filter-rewriter"  #: its type in QOM


class Rewriters:
    """The rewriters of one NIC of a copy.

    Args:
        link: The NIC.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._number = 0
        self._current = ""
        self._retired = ""  # switched off at the last cut, gone when that checkpoint is loaded
        self.renewed_count = 0  #: how often a fresh one took over

    async def begin(self) -> None:
        """Make the first one."""
        self._current = await self._make()

    async def renew(self) -> None:
        """Let a fresh one take over; nothing may be on its way to or from the copy, which is stopped."""
        await self._forget()
        fresh = await self._make()
        await self._link.switch(self._current, on=False)
        self._retired, self._current = self._current, fresh
        self.renewed_count += 1

    async def settle(self, *, loaded: bool) -> None:
        """Keep the one that fits what the copy holds, and no other.

        Args:
            loaded: Whether the copy has loaded a checkpoint since `renew`.
        """
        if self._retired and not loaded:
            await self._link.switch(self._retired, on=True)
            self._current, self._retired = self._retired, self._current
        await self._forget()

    async def _make(self) -> str:
        # A number that no rewriter of this NIC has, whoever made it.
        taken, _ = await existing(self._link) if not self._number else ({}, [])
        while True:
            self._number += 1
            part = f"rewriter-{self._number}"
            if part not in taken:
                break
        await self._link.add_filter(REWRITER, part, queue="all")
        return part

    async def _forget(self) -> None:
        if self._retired:
            retired, self._retired = self._retired, ""
            await self._link.delete(retired)
