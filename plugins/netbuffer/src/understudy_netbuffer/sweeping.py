"""The janitor: gates that outlived their agent.

A gate stays when its agent is killed: closed, the guest mute behind it. It is removed only once a verdict stands
(`understudy.device.Subkind`), by the claims that the kernel keeps, and by the guest's interfaces, for a gate that was
only half made or half removed.
"""

from __future__ import annotations

from collections.abc import Sequence

from understudy.device import Kind, SweepContext, Verdict
from understudy_netbuffer import installation
from understudy_netbuffer.gate import in_thread
from understudy_netbuffer.installation import Claim
from understudy_netbuffer.nic import interface_of

__all__ = ["sweep"]


async def sweep(context: SweepContext) -> Sequence[str]:
    """Remove the gates that a dead agent left of a guest on this host.

    Returns:
        What was done, one sentence each.

    Raises:
        HypervisorError: The kernel refuses.
    """
    stated = [claim for claim in await in_thread(installation.claims) if claim.guest == context.guest]
    gated = {claim.interface for claim in stated}
    unnamed = [
        Claim(context.guest, device.name, interface, "")
        for device in context.devices
        if device.kind is Kind.NIC
        and (interface := interface_of(device.properties))
        and interface not in gated
    ]
    done = []
    for claim in (*stated, *unnamed):
        if removed := await in_thread(installation.remove, claim, context.verdict):
            what = "let out" if context.verdict is Verdict.KEEP else "discarded"
            done.append(
                f"the gate of {claim.interface} was left: what it held was {what}; removed {', '.join(removed)}"
            )
    return done
