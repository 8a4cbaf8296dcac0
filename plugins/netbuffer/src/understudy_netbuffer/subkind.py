"""The subkind ``netbuffer``: a NIC in mode remus, behind a gate in the kernel, under any hypervisor."""

from __future__ import annotations

import asyncio
import socket
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
from understudy_netbuffer.nic import INTERFACE_KEYS, BufferedNic, interface_of
from understudy_netbuffer.options import NetbufferOptions
from understudy_netbuffer.parts import missing_parts
from understudy_netbuffer.sweeping import sweep

__all__ = ["NAME", "NETBUFFER"]

NAME: Final = "netbuffer"
_AUTO: Final = "auto"


async def _open(context: OpenContext) -> ProtectedDevice | Decline:
    if (no := await _declines(context)) is not None:
        return no
    if context.side is ReplicationMode.SECONDARY:
        # The copy's interface has no way out at all before its promotion.
        return ProtectedDevice()
    return await BufferedNic.open(context)


async def _declines(context: OpenContext | ProbeContext) -> Decline | None:
    device = context.device
    if not interface_of(device.properties):
        keys = ", ".join(INTERFACE_KEYS)
        return Decline(f"{device.hypervisor} tells no interface on the host's side (any of {keys})")
    missing = await asyncio.to_thread(missing_parts)
    # Who asks for it by name gets the kernel's own words; otherwise another subkind may be asked.
    if missing and device.subkind == _AUTO:
        return Decline(f"this host's kernel lacks {', '.join(missing)}")
    return None


async def _probe(context: ProbeContext) -> Sequence[Finding] | Decline:
    if (no := await _declines(context)) is not None:
        return no
    subject = f"{context.device.name} on the {context.side.value}"
    if missing := await asyncio.to_thread(missing_parts):
        problem = f"the kernel lacks {', '.join(missing)}."
        remedy = "install a kernel with these modules (Debian's have them) on both hosts"
        return (Finding(Severity.ERROR, subject, problem, remedy),)
    if context.side is ReplicationMode.PRIMARY:
        return await asyncio.to_thread(_of_interface, subject, interface_of(context.device.properties))
    return ()


def _of_interface(subject: str, interface: str) -> Sequence[Finding]:
    try:
        socket.if_nametoindex(interface)
    except OSError:
        problem = f"there is no interface {interface}."
        return (Finding(Severity.ERROR, subject, problem, "start the guest on this host"),)
    return ()


NETBUFFER: Final = Subkind(
    name=NAME,
    kind=Kind.NIC,
    modes=frozenset({Mode.REMUS}),
    open=_open,
    probe=_probe,
    priority=40,
    options=NetbufferOptions,
    needs=frozenset({Gate.POSTSUSPEND}),
    sweep=sweep,
)
