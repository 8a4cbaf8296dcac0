"""The janitor: what a dead agent left of a guest on this host, decided by the record alone.

A domain that is the guest although the record gives it to another host, and a copy that an agent has made and nobody
will ever promote, are discarded: interfaces down and off their bridges, then destroyed. A guest whose record says that
it is ``alone`` here runs: one that was left suspended in the middle of a checkpoint, or paused by a fence, goes on, and
one that was asked to suspend is told to forget it, or resumed when it does; one that an administrator has paused stays
so. One whose record is undecided stays as it is, with whatever gates stand above it.

Log-dirty mode needs nothing: libxc turns it off when its process ends in peace, and turns it on anew if it was left on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from understudy.arbiter import Record, RecordState
from understudy_xen import copies, devicemodel, toolstack
from understudy_xen.claim import ClaimTaken, claimed
from understudy_xen.libs.suspending import withdraw
from understudy_xen.pauses import Pauses, StoredPauses
from understudy_xen.restorer.client import once
from understudy_xen.savers import saved_by
from understudy_xen.xenstore import BlockingStore, XenStore

if TYPE_CHECKING:
    from understudy_xen.guestfile import XenConfig
    from understudy_xen.hypervisor import XenHypervisor
    from understudy_xen.inventory import Domain

__all__ = ["sweep"]


async def sweep(hypervisor: XenHypervisor, config: XenConfig, record: Record | None) -> Sequence[str]:
    """Clean what a dead agent left of a guest on this host.

    Args:
        hypervisor: This host's.
        config: The guest.
        record: The guest's record, ``None`` if there is none.

    Returns:
        What was done, one sentence each.
    """
    host = hypervisor.here.host
    done = []
    promoting = record is not None and record.state is RecordState.PROMOTING and record.standby == host
    copy = await hypervisor.own_copy(config)
    if copy is not None and promoting:
        done.append(
            f"a copy of {config.name} was being promoted on {host}: {copy.name} is kept for an operator"
        )
    else:
        if copy is not None:
            # It holds no more than libxl was given before the agent died, and who counts that is gone.
            await hypervisor.discard(copy)
            done.append(f"a copy of {config.name} was left on {host}: discarded")
        unnamed = [await hypervisor.destroy_unnamed(known) for known in await copies.noted(config.name)]
        if any(unnamed):
            done.append(f"a copy of {config.name} was left half-made on {host}: discarded")
        await copies.forget(config.name)
    domain = await hypervisor.find(config)
    done += _removed_states(hypervisor, domain)
    if domain is None or record is None:
        return done
    if record.state is RecordState.ALONE and record.owner == host:
        return done + await _run_on(hypervisor, domain, record)
    if promoting or (record.owner == host and record.state is not RecordState.STOPPED):
        return done
    await hypervisor.discard(domain)
    why = "after it was stopped" if record.owner == host else f"although the record says: {record}"
    return [*done, f"{config.name} ran on {host} {why}: discarded"]


def _removed_states(hypervisor: XenHypervisor, domain: Domain | None) -> list[str]:
    # States of devices that were being read when an agent was killed: the guest's, and those of domains that are gone.
    done = []
    for domid in devicemodel.left_states():
        if (domain is not None and domid == domain.domid) or hypervisor.xen.domain(domid) is None:
            with suppress(ClaimTaken), claimed(domid):
                devicemodel.remove_state(domid)
                done.append(f"a state of the devices of domain {domid} lay about: removed")
    return done


async def _run_on(hypervisor: XenHypervisor, domain: Domain, record: Record) -> list[str]:
    done = []
    if saver := saved_by(domain.domid):
        if domain.info.suspended:
            done.append(
                f"{domain.name} is suspended while another toolstack saves it (pid {saver}): left as it is"
            )
    elif domain.info.suspended:
        try:
            await hypervisor.resume(domain.domid)
            done.append(f"{domain.name} was left suspended in the middle of a checkpoint: resumed")
        except ClaimTaken as taken:
            done.append(f"{domain.name} is suspended: {taken}")
    elif await asyncio.to_thread(_withdrawn, domain.domid):
        done.append(f"{domain.name} was asked to suspend, and had not taken that up: withdrawn")
    else:
        # It may have taken up what a dead agent has asked.
        hypervisor.late.expect(domain.domid)
    if await _unpaused(hypervisor, domain.domid):
        done.append(f"{domain.name} was left paused: it runs")
    await hypervisor.mark(domain.domid, record)
    return done


def _withdrawn(domid: int) -> bool:
    # What somebody who is alive has asked for is his matter.
    with suppress(ClaimTaken), claimed(domid), BlockingStore() as store:
        return withdraw(store, domid)
    return False


async def _unpaused(hypervisor: XenHypervisor, domid: int) -> bool:
    # What an agent has paused, and what libxl has restored but nobody has let run. What an administrator has paused
    # stays so.
    info = hypervisor.xen.domain(domid)
    if info is None or not info.paused:
        return False
    notes = StoredPauses(domid)
    if await notes.read():
        await Pauses(hypervisor.xen, domid, notes).end()
        return True
    async with await XenStore.open() as store:
        if await toolstack.is_known(store, domid):
            return False
    async with once() as libxl:
        await libxl.unpause(domid)
    return True
