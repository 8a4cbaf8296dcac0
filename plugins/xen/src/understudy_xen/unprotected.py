"""The subkinds ``unreplicated`` and ``unbuffered``: devices that an operator leaves as they are, knowing what it costs.

A disk that no plugin replicates, and an interface whose output does not wait for its checkpoint, break the promise that
a takeover is invisible. ``xl remus`` takes such guests with ``-d`` and ``-n``, for tests and for guests that keep
nothing; here the preflight says what would be lost, and `--allow-unsafe` is needed.

Source: tools/xl/xl_migrate.c (``main_remus``): options -d, -n and -F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from understudy.device import (
    Decline,
    Finding,
    Kind,
    Mode,
    OpenContext,
    ProbeContext,
    ProtectedDevice,
    ReplicationMode,
    Severity,
    Subkind,
)
from understudy_xen.guestfile import HYPERVISOR

__all__ = ["UNBUFFERED", "UNREPLICATED"]

_UNBUFFERED_NAME: Final = "unbuffered"
_LAST: Final = 95  # after everything that protects a disk


async def _open_disk(context: OpenContext) -> ProtectedDevice:  # noqa: ARG001 - the signature is the contract
    return ProtectedDevice()


async def _probe_disk(context: ProbeContext) -> Sequence[Finding]:
    # Said once, by the host on which it would matter.
    if context.side is ReplicationMode.PRIMARY:
        return ()
    device = context.device
    subject = f"{device.name} on the secondary"
    path = device.properties.get("path") or "the same path as on the primary"
    if device.properties.get("read_only"):
        problem = f"it is read only and not replicated: {path} has to be the same there as on the primary"
        return (Finding(Severity.NOTE, subject, problem),)
    problem = f"it is not replicated: after a takeover its content is whatever that host has at {path}"
    remedy = 'put it on DRBD on both hosts (subkind = "drbd")'
    return (Finding(Severity.ERROR, subject, problem, remedy, unsafe=True),)


async def _open_nic(context: OpenContext) -> ProtectedDevice | Decline:
    return _declines(context) or ProtectedDevice()


async def _probe_nic(context: ProbeContext) -> Sequence[Finding] | Decline:
    if (no := _declines(context)) is not None:
        return no
    if context.side is ReplicationMode.SECONDARY:
        return ()
    problem = "its output leaves before it is acknowledged: a client may see what the copy does not know"
    remedy = 'set subkind = "netbuffer"'
    return (Finding(Severity.ERROR, context.device.name, problem, remedy, unsafe=True),)


def _declines(context: OpenContext | ProbeContext) -> Decline | None:
    if context.device.subkind == _UNBUFFERED_NAME:
        return None
    return Decline(f'only an interface with subkind = "{_UNBUFFERED_NAME}" goes without a gate')


UNREPLICATED: Final = Subkind(
    name="unreplicated",
    kind=Kind.DISK,
    modes=frozenset({Mode.REMUS}),
    open=_open_disk,
    probe=_probe_disk,
    priority=_LAST,
    hypervisors=frozenset({HYPERVISOR}),
)
UNBUFFERED: Final = Subkind(
    name=_UNBUFFERED_NAME,
    kind=Kind.NIC,
    modes=frozenset({Mode.REMUS}),
    open=_open_nic,
    probe=_probe_nic,
    priority=_LAST,
    hypervisors=frozenset({HYPERVISOR}),
)
