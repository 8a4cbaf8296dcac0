"""Make a guest's QEMU what it was at its birth, after an agent died in the middle of a session.

Only for a guest whose record says ``alone`` on this host: what was held leaves, and the guest runs. Everything that
was not there when QEMU was launched goes: the stream, jobs, exports, filters, character devices, block nodes. Their
order is found by trying: what is in use refuses to go, and is tried again when something else has gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from understudy.errors import HypervisorError
from understudy.services import Monitor
from understudy_qemu.inventory import Inventory
from understudy_qemu.monitor import CommandRefused
from understudy_qemu.running import Qemu

__all__ = ["restore"]

_LEAVE_S = 10.0
_POLL_S = 0.05
_MIGRATING = frozenset({"setup", "active", "device", "pre-switchover", "colo", "cancelling"})
_WAITING = frozenset({"paused", "prelaunch", "postmigrate"})  # stopped by us, not by the guest


async def restore(qemu: Qemu) -> list[str]:
    """Bring a guest whose record says ``alone`` on this host back to what it was at its birth, running.

    Args:
        qemu: The guest's QEMU; its `Launched.born` says what it was.

    Returns:
        What was done, one sentence each; empty if nothing was to be done.

    Raises:
        HypervisorError: Something does not go away, or QEMU is silent.
    """
    done = []
    if await _leave_migration(qemu):
        done.append(f"{qemu.name} was still being copied: the copy was given up")
    if qemu.launched.born:
        gone = await _remove_extras(qemu, Inventory.from_json(qemu.launched.born))
        if gone:
            done.append(f"{qemu.name} still had parts of a session: removed {', '.join(gone)}")
    if await qemu.status() in _WAITING:
        await qemu.monitor.execute("cont")
        done.append(f"{qemu.name} was stopped: it runs again")
    return done


async def _leave_migration(qemu: Qemu) -> bool:
    deadline = time.monotonic() + _LEAVE_S
    began = False
    while True:
        answer = await qemu.monitor.execute("query-migrate")
        status = answer.get("status", "none")
        if status not in _MIGRATING:
            return began
        if time.monotonic() > deadline:
            raise HypervisorError(f"{qemu.name}: the copy of its memory does not end, it is {status}")
        if not began:
            # Cut first: QEMU may be waiting for a peer that is not there, for its memory or for a write. Nobody has
            # duplicates of the disks' sockets any more, so this is the one place where block nodes are yanked: their
            # connections have been quiet or broken for as long as the agent was gone (docs/decisions/0009).
            began = True
            for instance in await qemu.oob.yankable():
                if instance["type"] != "chardev":
                    await _try(qemu.oob.yank, instance)
        await _try(qemu.monitor.execute, "x-colo-lost-heartbeat" if status == "colo" else "migrate_cancel")
        await asyncio.sleep(_POLL_S)


async def _remove_extras(qemu: Qemu, born: Inventory) -> list[str]:
    monitor = qemu.monitor
    for job in await monitor.execute("query-block-jobs"):
        await _try(monitor.execute, "block-job-cancel", {"device": job["device"], "force": True})
    for quorum, child in await _extra_children(monitor):
        await _try(monitor.execute, "x-blockdev-change", {"parent": quorum, "child": child})
    now = await Inventory.take(monitor)
    switches = [(name, False) for name in now.capabilities - born.capabilities]
    switches += [(name, True) for name in born.capabilities - now.capabilities]
    if switches:
        wanted = [{"capability": name, "state": state} for name, state in switches]
        await monitor.execute("migrate-set-capabilities", {"capabilities": wanted})
    deadline = time.monotonic() + _LEAVE_S
    gone: list[str] = []
    while True:
        now = await Inventory.take(monitor)
        removals = [
            *(
                ("block-export-del", {"id": name, "mode": "hard"}, name)
                for name in now.exports - born.exports
            ),
            *(("object-del", {"id": name}, name) for name in now.objects - born.objects),
            *(("chardev-remove", {"id": name}, name) for name in now.chardevs - born.chardevs),
            *(("blockdev-del", {"node-name": name}, name) for name in now.nodes - born.nodes),
        ]
        if not removals:
            return sorted(set(gone))
        refused = ""
        for command, arguments, name in removals:
            try:
                await monitor.execute(command, arguments)
                gone.append(name)
            except CommandRefused as error:
                refused = str(error)
        if time.monotonic() > deadline:
            raise HypervisorError(f"{qemu.name}: parts of a session do not go away: {refused}")
        if refused:
            # A job or an export ends a moment after it was told to.
            await asyncio.sleep(_POLL_S)


async def _extra_children(monitor: Monitor) -> list[tuple[str, str]]:
    # What hangs below a quorum beside its first child, which stays for life: the quorum, and its name for the child.
    graph = await monitor.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    return [
        (names[edge["parent"]], edge["name"])
        for edge in graph["edges"]
        if edge["name"].startswith("children.") and edge["name"] != "children.0"
    ]


async def _try(call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
    try:
        await call(*arguments)
    except CommandRefused:
        return  # not there, or not any more
