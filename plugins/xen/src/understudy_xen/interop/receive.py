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
from contextlib import suppress
from typing import Any, Final

from understudy.errors import GuestNotFound, HypervisorError, StateError
from understudy_xen import inventory
from understudy_xen.domainconfig import EVENTS, INCOMING, PRESERVE, DomainConfig
from understudy_xen.interop.remus import BANNER
from understudy_xen.libs import open_xen
from understudy_xen.receiver import Receiver
from understudy_xen.restorer.client import Restorer, once
from understudy_xen.wire import Coding, Hello
from understudy_xen.xenstore import XenStore

__all__ = ["promote", "receive"]

_log = logging.getLogger(__name__)

_CONFIG_S: Final = 60.0
_COPY_S: Final = 86_400.0
_TAKE_S: Final = 60.0
_MAKE_S: Final = 60.0


async def receive(
    source: int, target: int, *, hold_limit_bytes: int, silence_s: float
) -> tuple[str, int, int]:
    """Take a stock sender's stream until it ends.

    Args:
        source: Descriptor that the stream is read from, standard input.
        target: Descriptor that the sender reads, standard output.
        hold_limit_bytes: How much of checkpoints may be held.
        silence_s: After so long without a byte the sender is taken for lost, seconds; 0: never, only its end counts.

    Returns:
        The copy's name, its domain, and how many checkpoints it holds beyond the first copy. It is paused.

    Raises:
        HypervisorError: The stream ended before the first copy was whole, or libxl refused it; nothing is left.
    """
    os.write(target, BANNER)
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    receiver = Receiver(
        _answered(source, silence_s),
        hold_limit_bytes=hold_limit_bytes,
        acknowledged=lambda _: None,
        lost=lost.set_result,
    )
    restorer: Restorer | None = None
    try:
        config = _copy_of(await receiver.config(_CONFIG_S))
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            restorer = await Restorer.start(stream_fd=reading)
        except BaseException:
            os.close(writing)
            raise
        restoring = asyncio.ensure_future(restorer.restore(config.to_json(), checkpointed=True))
        copying = asyncio.ensure_future(receiver.copied(writing, _COPY_S))
        beginning: list[asyncio.Future[Any]] = [restoring, copying]
        await asyncio.wait(beginning, return_when=asyncio.FIRST_COMPLETED)
        if restoring.done():
            copying.cancel()
            restoring.result()
            raise HypervisorError("libxl ended the restore before the first copy was whole")
        await copying
        ending: list[asyncio.Future[Any]] = [restoring, lost]
        await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
        loaded = receiver.cut()
        await receiver.hand_over(_TAKE_S)
        async with asyncio.timeout(_MAKE_S):
            domid = await restoring
        return config.name, domid, loaded
    except BaseException:
        if restorer is not None:
            await restorer.kill()
        raise
    finally:
        if restorer is not None:
            await restorer.close()
        await receiver.close()


async def promote(name: str, *, reason: str) -> int:
    """Make a copy that `receive` left the guest, on an operator's word alone.

    Args:
        name: Of the guest, without `INCOMING`.
        reason: Goes to the log.

    Returns:
        Its domain.

    Raises:
        GuestNotFound: There is no copy of it here.
        StateError: The guest itself runs here.
    """
    with open_xen() as xen:
        async with await XenStore.open() as store:
            copy = await inventory.find(store, xen, name + INCOMING)
            guest = await inventory.find(store, xen, name)
        if copy is None:
            raise GuestNotFound(f"there is no copy {name}{INCOMING} on this host")
        if guest is not None:
            raise StateError(f"{name} itself is on this host (domain {guest.domid}); nothing was changed")
    _log.warning("%s is promoted by force, without a record: %s", copy.name, reason)
    async with once() as libxl:
        await libxl.rename(copy.domid, copy.name, name)
        await libxl.unpause(copy.domid)
    return copy.domid


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
            theirs.shutdown(socket.SHUT_RDWR)

    def drain() -> None:
        with suppress(OSError):
            while theirs.recv(4096):
                pass

    for work in (forward, drain):
        threading.Thread(target=work, name=f"xen: {work.__name__}", daemon=True).start()
    return ours
