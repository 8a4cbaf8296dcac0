"""The subkind ``colo-proxy``: a NIC in mode colo, under QEMU."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Final

from understudy.device import (
    Decline,
    DeviceInfo,
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
from understudy.errors import HypervisorError
from understudy.services import MONITOR, Monitor, Services
from understudy_colo_proxy.options import ColoProxyOptions
from understudy_colo_proxy.primary import PrimaryNic
from understudy_colo_proxy.secondary import SecondaryNic

__all__ = ["COLO_PROXY", "NAME"]

NAME: Final = "colo-proxy"
_NEEDED: Final = (
    "colo-compare",
    "filter-buffer",
    "filter-mirror",
    "filter-redirector",
    "filter-rewriter",
    "iothread",
)


def _declines(device: DeviceInfo, services: Services) -> Decline | None:
    if not services.has(MONITOR):
        return Decline(f"{device.hypervisor} offers no QMP monitor")
    missing = [key for key in ("netdev", "tap") if not device.properties.get(key)]
    if missing:
        return Decline(f"{device.hypervisor} does not tell its {' and '.join(missing)}")
    return None


async def _open(context: OpenContext) -> ProtectedDevice | Decline:
    if (no := _declines(context.device, context.services)) is not None:
        return no
    if context.side is ReplicationMode.PRIMARY:
        return await PrimaryNic.open(context)
    return SecondaryNic(context)


async def _probe(context: ProbeContext) -> Sequence[Finding] | Decline:
    if (no := _declines(context.device, context.services)) is not None:
        return no
    subject = f"{context.device.name} on the {context.side.value}"
    options: ColoProxyOptions = context.options or ColoProxyOptions()
    findings = _of_properties(subject, context.device)
    if context.side is ReplicationMode.PRIMARY:
        findings += _of_uncompared(subject, options)
    findings += await _of_monitor(subject, context.services.get(MONITOR))
    return findings


def _of_properties(subject: str, device: DeviceInfo) -> list[Finding]:
    findings = []
    if device.properties.get("vhost"):
        problem = "its packets go through vhost in the kernel, past QEMU's filters."
        findings.append(Finding(Severity.ERROR, subject, problem, "start the guest with vhost=off"))
    if int(device.properties.get("queues", 1)) > 1:
        problem = "it has several queues, which QEMU's filters do not support."
        findings.append(Finding(Severity.ERROR, subject, problem, "start the guest with queues=1"))
    return findings


def _of_uncompared(subject: str, options: ColoProxyOptions) -> list[Finding]:
    if options.uncompared_ipv6 == "allow":
        problem = "what is neither IPv4 nor ARP leaves uncompared: a client may see what the copy never said."
        return [Finding(Severity.WARNING, subject, problem, 'set uncompared_ipv6 = "drop"')]
    if shutil.which("tc") is None:
        problem = "tc is missing, so that nothing can drop what cannot be compared (IPv6)."
        remedy = 'install the package iproute2, or set uncompared_ipv6 = "allow", which is unsafe'
        return [Finding(Severity.ERROR, subject, problem, remedy)]
    problem = (
        "what is neither IPv4 nor ARP is dropped while the guest is protected, because it cannot be compared."
    )
    return [Finding(Severity.NOTE, subject, problem)]


async def _of_monitor(subject: str, monitor: Monitor) -> list[Finding]:
    # Asked of the schema, so that it can be told on a host where the guest does not run.
    try:
        missing = [kind for kind in _NEEDED if not await monitor.supports("object-add", f"qom-type.{kind}")]
    except HypervisorError:
        return []  # it does not run or does not answer, which its hypervisor tells by itself
    if not missing:
        return []
    problem = f"this QEMU has no {', '.join(missing)}."
    return [Finding(Severity.ERROR, subject, problem, "use a QEMU that was built with --enable-colo-proxy")]


COLO_PROXY: Final = Subkind(
    name=NAME,
    kind=Kind.NIC,
    modes=frozenset({Mode.COLO}),
    open=_open,
    probe=_probe,
    priority=40,
    options=ColoProxyOptions,
)
