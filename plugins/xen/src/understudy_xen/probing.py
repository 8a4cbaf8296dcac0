"""The preflight of a Xen guest, asked of the real host: facts for the other one, and findings of this one.

What is found with what is known is in preflight.py; here it is asked for, from the hypervisor, xenstore and libxl.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from understudy.device import Finding, ReplicationMode, Severity
from understudy.errors import HypervisorError
from understudy_xen import preflight
from understudy_xen.domainconfig import DomainConfig
from understudy_xen.hostview import HostView, look
from understudy_xen.libs.errors import XenUnavailable
from understudy_xen.restorer.client import once
from understudy_xen.toolstack import configuration
from understudy_xen.xenstore import XenStoreError

if TYPE_CHECKING:
    from understudy_xen.guestfile import XenConfig
    from understudy_xen.hypervisor import XenHypervisor
    from understudy_xen.inventory import Domain
    from understudy_xen.libs.xen import Xen

__all__ = ["facts", "probe"]


async def facts(hypervisor: XenHypervisor, config: XenConfig) -> Mapping[str, Any]:
    """Return what the other host must know of a guest on this host, JSON-able.

    Raises:
        HypervisorError: Whether the guest runs here is not known although Xen does, or it runs and libxl does not tell
            its configuration.
    """
    view, domain = await _look(hypervisor, config)
    if view.version is not None and view.obstacles:
        # A guest of which nothing is known must not look like one that does not run.
        raise HypervisorError(view.obstacles[0][0])
    known = DomainConfig.parse(await configuration(domain.domid)) if domain is not None else None
    return await asyncio.to_thread(preflight.facts, view, config, known)


async def probe(
    hypervisor: XenHypervisor, config: XenConfig, *, side: ReplicationMode, peer_facts: Mapping[str, Any]
) -> Sequence[Finding]:
    """Return everything that stands against protecting a guest, or is worth knowing, on this host."""
    view, domain = await _look(hypervisor, config)
    findings = [*preflight.of_host(view)]
    if side is ReplicationMode.SECONDARY:
        if not findings:
            findings += await _of_libxl(view)
        devices = await asyncio.to_thread(preflight.look_at_devices, config, peer_facts)
        findings += preflight.of_place(view, config, peer_facts, devices)
    elif domain is not None:
        try:
            known = DomainConfig.parse(await configuration(domain.domid))
        except HypervisorError as error:
            remedy = "see that the libxl of the running Xen is installed (xl list works)"
            findings.append(
                Finding(Severity.ERROR, f"guest {config.name} on {view.name}", str(error), remedy)
            )
        else:
            findings += preflight.of_guest(view, config, known)
    return findings


async def _look(hypervisor: XenHypervisor, config: XenConfig) -> tuple[HostView, Domain | None]:
    xen: Xen | None = None
    domains: Mapping[str, Domain] = {}
    obstacles: list[XenUnavailable | tuple[str, str]] = []
    try:
        xen = hypervisor.xen
        async with hypervisor.domains() as domains:
            pass
    except XenUnavailable as error:
        obstacles.append(error)
    except XenStoreError as error:
        obstacles.append((str(error), "see that xenstored runs in dom0: systemctl status xenstored"))
    name = hypervisor.here.host
    return await asyncio.to_thread(look, name, xen, [*domains], obstacles), domains.get(config.name)


async def _of_libxl(view: HostView) -> Sequence[Finding]:
    # Without it a copy is lost at the first moment in which it is needed.
    try:
        async with once():
            return ()
    except XenUnavailable as error:
        return (Finding(Severity.ERROR, f"libxl on {view.name}", error.problem, error.remedy),)
    except HypervisorError as error:
        return (Finding(Severity.ERROR, f"libxl on {view.name}", str(error), "see the agent's log"),)
