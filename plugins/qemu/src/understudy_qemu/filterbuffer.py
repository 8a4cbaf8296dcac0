"""NIC subkind ``filter-buffer``: hold what a guest sends until its checkpoint is acknowledged, inside QEMU alone.

For mode remus. Two of QEMU's filter-buffer objects stand between the guest and its tap::

    guest → <nic>-epoch → <nic>-ended → tap

``<nic>-epoch`` takes in what the guest sends. While the guest is stopped at the end of an epoch, it is switched off and
on again, which moves its packets to ``<nic>-ended``. When the secondary has acknowledged that epoch, ``<nic>-ended`` is
switched off and on again, which lets them out; what the guest has sent since waits in ``<nic>-epoch``.

It is weaker than a gate in the kernel, which is why nobody gets it without asking for it by name:

* The objects need an interval, after which they let packets out by themselves: it is set to more than an hour of the
  guest's running time, the longest that fits into its 32 bits of microseconds, and every switch begins it anew. A
  guest whose agent hangs for longer than that, while the other host takes over, would be seen twice.
* A queue takes 10000 packets, and QEMU does not tell when it drops one; a guest that sends more in one epoch loses
  packets, as on a busy network.

Source: Cully et al., Remus (NSDI 2008), section 4.4; QEMU net/filter-buffer.c, net/filter.c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from understudy.device import (
    Decline,
    Finding,
    Gate,
    Kind,
    Mode,
    OpenContext,
    ProbeContext,
    ProtectedDevice,
    ReplicationMode,
    Severity,
    Subkind,
    Verdict,
)
from understudy.errors import HypervisorError
from understudy.services import MONITOR, Monitor

__all__ = ["FILTER_BUFFER", "NAME", "HeldNic"]

NAME: Final = "filter-buffer"
_INTERVAL_US: Final = 4_000_000_000
_NEWEST: Final = "epoch"
_ENDED: Final = "ended"


class HeldNic(ProtectedDevice):
    """An interface of the primary whose output is held.

    Args:
        name: Of the device; the objects' names begin with it.
        netdev: QEMU's name of the interface's backend.
        monitor: Of the guest.
    """

    __slots__ = ("_ended_epoch", "_monitor", "_name", "_netdev", "_open", "_released")

    def __init__(self, name: str, netdev: str, monitor: Monitor) -> None:
        self._name = name
        self._netdev = netdev
        self._monitor = monitor
        self._ended_epoch = 0  # the newest epoch that <nic>-ended holds anything of
        self._released = 0
        self._open = False  # <nic>-ended may have been left switched off

    async def start(self, side: ReplicationMode) -> None:  # noqa: ARG002 - made for the primary alone
        """Begin to hold; the guest is stopped.

        Raises:
            HypervisorError: QEMU refuses.
        """
        # A filter that is added later sees the guest's packets earlier.
        for which in (_ENDED, _NEWEST):
            await self._monitor.execute(
                "object-add",
                {
                    "qom-type": "filter-buffer",
                    "id": self._id(which),
                    "netdev": self._netdev,
                    "queue": "rx",
                    "interval": _INTERVAL_US,
                },
            )

    async def postsuspend(self, epoch: int) -> None:
        """Put what was sent in `epoch` apart from what will be sent; the guest is stopped."""
        if self._open:
            await self._switch(_ENDED, "on")
            self._open = False
        self._ended_epoch = epoch
        await self._pass_on(_NEWEST)

    async def commit(self, epoch: int) -> None:
        """Let out what was sent up to the end of `epoch`.

        Guarantees:
            Nothing of a later epoch leaves: if one has been put apart already, all waits for its commit.
        """
        if self._ended_epoch == epoch:
            # Cancelled or failed between its two halves, it would be open when the next epoch is put apart.
            self._open = True
            await self._pass_on(_ENDED)
            self._open = False
            self._released = epoch

    async def teardown(self, verdict: Verdict) -> None:
        """Let out what is held and hold no more (KEEP), or leave it to die with its guest (DISCARD).

        Guarantees:
            With DISCARD nothing is let out: the objects stay, closed, for as long as QEMU lives.
        """
        if verdict is Verdict.KEEP:
            for which in (_NEWEST, _ENDED):
                # Not there: it was never made, as after a failure half-way.
                with suppress(HypervisorError):
                    await self._monitor.execute("object-del", {"id": self._id(which)})
            await self._see_gone()

    def counters(self) -> Mapping[str, int | float]:
        """Return the newest epoch whose output has left."""
        return {"released_epoch": self._released}

    async def _pass_on(self, which: str) -> None:
        for status in ("off", "on"):
            await self._switch(which, status)

    async def _switch(self, which: str, status: str) -> None:
        arguments = {"path": f"/objects/{self._id(which)}", "property": "status", "value": status}
        await self._monitor.execute("qom-set", arguments)

    async def _see_gone(self) -> None:
        left = {item["name"] for item in await self._monitor.execute("qom-list", {"path": "/objects"})}
        held = sorted(left & {self._id(_NEWEST), self._id(_ENDED)})
        if held:
            raise HypervisorError(
                f"{self._name}: QEMU did not remove {', '.join(held)}; output is still held"
            )

    def _id(self, which: str) -> str:
        return f"{self._name}-{which}"


_UNASKED: Final = (
    "it opens by itself when its agent hangs for over an hour and drops packets untold when an epoch has over 10000, "
    f'so it has to be asked for by name (subkind = "{NAME}")'
)


async def _open(context: OpenContext) -> ProtectedDevice | Decline:
    if context.device.subkind != NAME:
        return Decline(_UNASKED)
    if not context.services.has(MONITOR):
        return Decline("its hypervisor offers no QEMU monitor")
    if context.side is ReplicationMode.SECONDARY:
        # The copy's interface has no way out at all before its promotion.
        return ProtectedDevice()
    netdev = str(context.device.properties["netdev"])
    return HeldNic(context.device.name, netdev, context.services.get(MONITOR))


async def _probe(context: ProbeContext) -> Sequence[Finding] | Decline:
    if context.device.hypervisor != "qemu":
        return Decline(f"{context.device.hypervisor} is not QEMU")
    if context.device.subkind != NAME:
        return Decline(_UNASKED)
    subject = f"{context.device.name} on the {context.side.value}'s host"
    return (
        Finding(
            Severity.WARNING,
            subject,
            "filter-buffer is no fail-stop gate: it opens by itself after an hour of the guest's running time without "
            "its agent, and drops packets untold beyond 10000 in one epoch",
            "protect in mode colo with colo-proxy where that matters",
        ),
    )


FILTER_BUFFER: Final = Subkind(
    name=NAME,
    kind=Kind.NIC,
    modes=frozenset({Mode.REMUS}),
    open=_open,
    probe=_probe,
    needs=frozenset({Gate.POSTSUSPEND}),
    hypervisors=frozenset({"qemu"}),
)
