"""The subkind ``filter-buffer``: a NIC in mode remus where the kernel has no plug qdisc.

QEMU holds what the guest sends, and nf_tables keeps shut what QEMU might let out by itself; heldnic.py says what that
guarantees and what it does not. A gate that is wholly in the kernel (``netbuffer``) is better: where both could claim
an interface, that one is asked first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
)
from understudy.services import MONITOR, PACE
from understudy_qemu.egressblock import EgressBlock, missing_for_block
from understudy_qemu.heldnic import QUEUE_PACKETS, FilterBufferOptions, HeldNic

__all__ = ["FILTER_BUFFER", "NAME", "FilterBufferOptions"]

NAME: Final = "filter-buffer"
_AUTO: Final = "auto"


async def _open(context: OpenContext) -> ProtectedDevice | Decline:
    device = context.device
    if not context.services.has(MONITOR):
        return Decline("its hypervisor offers no QEMU monitor")
    # Who asks for it by name gets the kernel's own words; otherwise another subkind may be asked.
    if device.subkind == _AUTO and (missing := await missing_for_block()):
        return Decline(missing)
    if context.side is ReplicationMode.SECONDARY:
        # The copy's interface has no way out at all before its promotion.
        return ProtectedDevice()
    block = EgressBlock(str(device.properties["tap"]))
    try:
        await block.install()
    except BaseException:
        await asyncio.shield(block.remove())
        raise
    return HeldNic(
        device.name,
        str(device.properties["netdev"]),
        context.services.get(MONITOR),
        block,
        context.options or FilterBufferOptions(),
        context.services.get(PACE) if context.services.has(PACE) else None,
    )


async def _probe(context: ProbeContext) -> Sequence[Finding] | Decline:
    device = context.device
    if device.hypervisor != "qemu":
        return Decline(f"{device.hypervisor} is not QEMU")
    subject = f"{device.name} on the {context.side.value}'s host"
    if missing := await missing_for_block():
        if device.subkind == _AUTO:
            return Decline(missing)
        remedy = (
            "install nftables, and a kernel with CONFIG_NF_TABLES_NETDEV (Debian's has it), on both hosts"
        )
        return (Finding(Severity.ERROR, subject, f"{missing}.", remedy),)
    return (
        Finding(
            Severity.WARNING,
            subject,
            "filter-buffer is the weaker gate: QEMU holds the output, and the kernel's block behind it, which closes "
            "by itself, is open for a moment at every commit, when nobody else may tell QEMU to let go of it; and QEMU "
            f"drops packets when an epoch has more than {QUEUE_PACKETS}, which is told afterwards.",
            "use the subkind netbuffer, with a kernel that has sch_plug, where that matters",
        ),
    )


FILTER_BUFFER: Final = Subkind(
    name=NAME,
    kind=Kind.NIC,
    modes=frozenset({Mode.REMUS}),
    open=_open,
    probe=_probe,
    priority=60,
    options=FilterBufferOptions,
    needs=frozenset({Gate.POSTSUSPEND}),
    hypervisors=frozenset({"qemu"}),
)
