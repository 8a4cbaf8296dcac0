"""A receiver for ``xl remus``: the stock sender's stream, held until whole, with libxl's faults kept away from it.

A sender of xl has no record at any arbiter, so nobody can say whose guest it is when the stream ends: the copy is then
left paused, and an operator decides (`promote`). What the receiver holds back until it is whole is the same as in a
protected session; the sender gets no answers, it expects none.

Source: tools/xl/xl_migrate.c (migrate_receive) of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from understudy.errors import GuestNotFound, HypervisorError, StateError
from understudy_xen import copies, inventory, toolstack
from understudy_xen.domainconfig import EVENTS, INCOMING, PRESERVE, DomainConfig
from understudy_xen.hostview import bridge_problem, path_problem, script_problem
from understudy_xen.interop.ending import Outcome, whole
from understudy_xen.interop.remus import BANNER
from understudy_xen.inventory import Domain
from understudy_xen.libs import open_xen
from understudy_xen.receiver import Receiver
from understudy_xen.restorer.client import Restorer, once
from understudy_xen.savers import restored_by
from understudy_xen.wire import Coding, Hello
from understudy_xen.xenstore import XenStore

__all__ = ["promote", "receive"]

_log = logging.getLogger(__name__)

_CONFIG_S: Final = 60.0
_COPY_S: Final = 86_400.0
_TAKE_S: Final = 60.0
_MAKE_S: Final = 60.0
_WORDS_S: Final = 1.0
#: libxl's defaults. Source: tools/libs/light/libxl_nic.c (libxl__device_nic_setdefault), docs/misc/xl-network-config.
_SCRIPTS: Final = Path("/etc/xen/scripts")
_DEFAULT_SCRIPT: Final = "vif-bridge"
_DEFAULT_BRIDGE: Final = "xenbr0"


async def receive(
    source: int,
    target: int,
    outcome: Outcome,
    *,
    hold_limit_bytes: int,
    silence_s: float,
    copied: Callable[[str], None] = lambda _: None,
) -> tuple[str, int, int]:
    """Take a stock sender's stream until it ends.

    Args:
        source: Descriptor that the stream is read from, standard input.
        target: Descriptor that the sender reads, standard output.
        outcome: Kept true.
        hold_limit_bytes: How much of checkpoints may be held.
        silence_s: After so long without a byte the sender is taken for lost, seconds; 0: never, only its end counts.
        copied: Told the copy's name when the first copy is whole: from then on a checkpoint is held until it is.

    Returns:
        The copy's name, its domain, and how many checkpoints it holds beyond the first copy. It is paused.

    Raises:
        HypervisorError: There is no place for the copy, or the stream ended before the first copy was whole, or libxl
            refused it.

    Guarantees:
        When this raises, or is cancelled before the stream has ended, nothing is left of the copy; `outcome` says if
        that failed. Cancelled later, it first makes the domain, and leaves it.
    """
    os.write(target, BANNER)
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    receiver = Receiver(
        _answered(source, silence_s),
        hold_limit_bytes=hold_limit_bytes,
        acknowledged=lambda _: None,
        lost=lost.set_result,
    )
    config: DomainConfig | None = None
    restorer: Restorer | None = None
    try:
        config = _copy_of(await receiver.config(_CONFIG_S))
        await _need_place(config)
        # It is not the copy that an agent may once have had, and is none of the janitor's.
        await copies.forget(config.name.removesuffix(INCOMING))
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            restorer = await Restorer.start(stream_fd=reading)
        except BaseException:
            os.close(writing)
            raise
        restoring = asyncio.ensure_future(restorer.restore(config.to_json(), checkpointed=True))
        copying = asyncio.ensure_future(receiver.copied(writing, _COPY_S))
        for task in (restoring, copying):
            task.add_done_callback(_heard)
        await _first(restoring, copying)
        if not restoring.done() and copying.exception() is not None:
            await _said(restoring)
        if restoring.done():
            copying.cancel()
            restoring.result()
            raise HypervisorError("libxl ended the restore before the first copy was whole")
        await copying
        copied(config.name)
        await _first(restoring, lost)
        _log.info("%s: %s", config.name, lost.result() if lost.done() else "libxl has ended the restore")
        loaded = receiver.cut()
        # The sender may be dead, and this the only copy: who is impatient now must not cost it.
        domid = await whole(_taken_over(receiver, restoring, config.name, outcome))
        return config.name, domid, loaded
    except BaseException:
        if restorer is not None and not outcome.good:
            outcome.said = (
                f"a part of {config.name if config else 'a copy'} may be left: see xl list, and destroy it"
            )
            await whole(_undo(restorer, config))
            outcome.said = "nothing is left of the copy"
        raise
    finally:
        await whole(_closed(restorer, receiver))


async def _closed(restorer: Restorer | None, receiver: Receiver) -> None:
    try:
        if restorer is not None:
            await restorer.close()
    finally:
        await receiver.close()


async def _taken_over(receiver: Receiver, restoring: asyncio.Future[int], name: str, outcome: Outcome) -> int:
    # The stream is cut: libxl is to take what is held, and to make the domain of it.
    if restoring.done():
        restoring.result()  # raises: libxl has ended
    try:
        await receiver.hand_over(_TAKE_S)
    except HypervisorError:
        await _said(restoring)
        raise
    try:
        async with asyncio.timeout(_MAKE_S):
            domid = await restoring
    except TimeoutError:
        raise HypervisorError(f"libxl has not made the domain within {_MAKE_S:g} s") from None
    outcome.said = (
        f"{name} (domain {domid}) holds the first copy and {receiver.loaded} checkpoints; it is paused. If the guest "
        f"is dead on the other host: understudy xen promote {name.removesuffix(INCOMING)} --force --reason TEXT"
    )
    outcome.good = True
    return domid


async def _said(restoring: asyncio.Future[int]) -> None:
    # If libxl has ended, its own words are the cause. They may come a little later than the end of its pipe.
    await asyncio.wait({restoring}, timeout=_WORDS_S)
    if restoring.done():
        restoring.result()


async def _first(*ends: asyncio.Future[Any]) -> None:
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)


def _heard(ended: asyncio.Future[Any]) -> None:
    # Of two that fail one is told of; the other one's error is its consequence.
    if not ended.cancelled():
        ended.exception()


async def _need_place(copy: DomainConfig) -> None:
    # What would fail only at the end of the stream, when libxl makes the devices, and would cost the copy then.
    problems = []
    with open_xen() as xen:
        async with await XenStore.open() as store:
            if await inventory.find(store, xen, copy.name) is not None:
                problems.append(f"there is a domain {copy.name} already; destroy it if nobody needs it")
    for nic in copy.nics:
        script = _SCRIPTS / (nic.script or _DEFAULT_SCRIPT)
        problems += [script_problem(script), bridge_problem(nic.bridge or _DEFAULT_BRIDGE)]
    problems += [path_problem(Path(disk.path)) for disk in copy.disks if disk.path and not disk.cdrom]
    if found := [problem for problem in dict.fromkeys(problems) if problem]:
        raise HypervisorError(f"there is no place for {copy.name} on this host: {'; '.join(found)}")


async def _undo(restorer: Restorer, copy: DomainConfig | None) -> None:
    await restorer.kill()
    if copy is None:
        return
    # By its name, which nobody else had when this began: its UUID is the guest's, who may be on this host, too. But the
    # guest has a name.
    with open_xen() as xen:
        async with await XenStore.open() as store:
            made = await inventory.find(store, xen, copy.name)
        if made is not None:
            await toolstack.destroy(xen, made.domid)
        if copy.uuid is not None:
            await toolstack.destroy_unnamed(xen, copy.uuid)


async def promote(name: str, outcome: Outcome, *, reason: str) -> int:
    """Make a copy that `receive` left the guest, on an operator's word alone.

    Args:
        name: Of the guest, without `INCOMING`.
        outcome: Kept true.
        reason: Goes to the log.

    Returns:
        Its domain.

    Raises:
        GuestNotFound: There is no copy of it here.
        StateError: The guest itself runs here, or the copy is an agent's, or is not whole yet.

    Guarantees:
        What has begun is brought to its end, also if the caller is cancelled.
    """
    with open_xen() as xen:
        async with await XenStore.open() as store:
            copy = await inventory.find(store, xen, name + INCOMING)
            guest = await inventory.find(store, xen, name)
        if copy is None:
            raise GuestNotFound(f"there is no copy {name}{INCOMING} on this host")
        if guest is not None:
            raise StateError(f"{name} itself is on this host (domain {guest.domid}); nothing was changed")
        if copy.uuid in await copies.noted(name):
            raise StateError(
                f"an agent of this host has made {copy.name}, and the guest's record says who may go on with it: see "
                f"understudy status {name}; nothing was changed"
            )
        if helper := restored_by(copy.domid):
            raise StateError(
                f"{copy.name} is still being received (libxl-save-helper, pid {helper}); nothing was changed"
            )
    _log.warning("%s is promoted by force, without a record: %s", copy.name, reason)
    await whole(_let_run(copy, name, outcome))
    return copy.domid


async def _let_run(copy: Domain, name: str, outcome: Outcome) -> None:
    async with once() as libxl:
        outcome.said = f"domain {copy.domid} is paused, and called {name} or still {copy.name}"
        await libxl.rename(copy.domid, copy.name, name)
        outcome.said = f"domain {copy.domid} is called {name}, and may be paused yet: xl unpause {name}"
        await libxl.unpause(copy.domid)
        outcome.said = f"{name} runs (domain {copy.domid})"
        outcome.good = True


def _copy_of(config: bytes) -> DomainConfig:
    tree = json.loads(config)
    domain = DomainConfig.of(tree)
    tree["c_info"]["name"] = domain.name + INCOMING
    tree["c_info"].pop("domid", None)
    return DomainConfig.of(tree | dict.fromkeys(EVENTS, PRESERVE))


def _answered(source: int, silence_s: float) -> socket.socket:
    # What an agent's stream begins with and the answers that it expects: a stock sender has neither.
    ours, theirs = socket.socketpair()
    theirs.sendall(Hello(Coding.PLAIN).encode())

    def forward() -> None:
        import select  # noqa: PLC0415 - of this thread alone

        with suppress(OSError):
            while True:
                if silence_s and not select.select([source], [], [], silence_s)[0]:
                    _log.warning("the sender has been silent for %g s: taken for lost", silence_s)
                    break
                data = os.read(source, 1 << 20)
                if not data:
                    break
                theirs.sendall(data)
        with suppress(OSError):
            theirs.shutdown(socket.SHUT_WR)  # what was sent is still to be answered
        draining.join()
        theirs.close()

    def drain() -> None:
        with suppress(OSError):
            while theirs.recv(4096):
                pass

    draining = threading.Thread(target=drain, name="xen: drain", daemon=True)
    draining.start()
    threading.Thread(target=forward, name="xen: forward", daemon=True).start()
    return ours
