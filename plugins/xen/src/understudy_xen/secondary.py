"""The copy of a guest on the secondary's host: fed with whole checkpoints, and made the guest or destroyed.

libxl restores the copy from a pipe, in a process of its own (understudy_xen.restorer). What is written into the pipe
are whole, acknowledged checkpoints (receiver.py), and the end of the pipe is libxl's takeover: only then it makes the
domain's devices. So a copy has no interface at all before it is promoted, and stays paused until its outlet may open.

A copy is called ``NAME--incoming``. It gets the guest's name when it is whole, as the last step of its promotion: a
domain of that name is the guest, also for an agent that was started later.

Source: tools/libs/light/libxl_create.c (domcreate_stream_done), libxl_stream_read.c, tools/xl/xl_migrate.c of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from understudy.arbiter import Record
from understudy.device import ReplicationMode
from understudy.errors import HypervisorError, StateError
from understudy.group import DeviceGroup
from understudy.hypervisor import DomainEvent, DomainEventKind, SecondaryDomain
from understudy.services import Channels, Services
from understudy_xen.domainconfig import INCOMING, DomainConfig
from understudy_xen.guestfile import XenConfig
from understudy_xen.libs import LibxlFailed, RestorerLost
from understudy_xen.primary import CHANNEL
from understudy_xen.receiver import Held, Receiver
from understudy_xen.restorer.client import Restorer, once

__all__ = ["SecondaryParts", "XenSecondary"]

_log = logging.getLogger(__name__)

# The primary's devices may first copy for days; the engine cancels the wait when the session ends.
_COPY_S: Final = 7 * 86_400.0
_CONFIG_S: Final = 60.0
_TAKE_S: Final = 30.0  # for libxl to take the acknowledged checkpoints
_MAKE_S: Final = 50.0  # for libxl to make the domain's devices; it gives a script 40 s itself


@dataclass(frozen=True, slots=True)
class SecondaryParts:
    """What a session on the secondary is made of.

    `check` raises if there is no place for a copy; `destroy` destroys the domain of a number if it is called like the
    copy or the guest, or, where that is 0, the domain that is called like the copy, and sees it gone; `destroy_unnamed`
    does so with what libxl had not named yet when it was killed; `note` and `forget` keep what a later agent has to
    know of a copy; `is_guest` tells whether a domain has the guest's name, `is_paused` whether it is paused.
    """

    config: XenConfig
    check: Callable[[], Awaitable[None]]
    destroy: Callable[[int], Awaitable[None]]
    destroy_unnamed: Callable[[uuid.UUID], Awaitable[object]]
    note: Callable[[uuid.UUID], Awaitable[None]]
    forget: Callable[[], Awaitable[None]]
    became_guest: Callable[[int, Record], Awaitable[None]]
    is_guest: Callable[[int], Awaitable[bool]]
    is_paused: Callable[[int], bool]


class XenSecondary(SecondaryDomain):
    """A copy of a guest under Xen.

    Args:
        parts: What it is made of.
    """

    def __init__(self, parts: SecondaryParts) -> None:
        self._parts = parts
        self._restorer: Restorer | None = None
        self._receiver: Receiver | None = None
        self._restoring: asyncio.Task[int] | None = None
        self._pipe = -1  # its writing end, until the receiver has it
        self._uuid: uuid.UUID | None = None  # once libxl may have begun to make the domain
        self._domid = 0  # once it is made
        self._severed = False
        self._promoted = False
        self._queue: asyncio.Queue[DomainEvent] = asyncio.Queue()

    @property
    def services(self) -> Services:
        """None: the copy does nothing before it is the guest."""
        return Services()

    @property
    def held(self) -> Held | None:
        """What of checkpoints is held in memory now, ``None`` without a stream."""
        return self._receiver.held if self._receiver is not None else None

    # --- Becoming a copy ---------------------------------------------------------------------------------------------

    async def launch(self, group: DeviceGroup) -> None:  # noqa: ARG002 - a disk is what the guest file names
        """Start the process in which libxl will make the domain; there is none yet.

        Raises:
            HypervisorError: A domain of this name is in the way, or libxl cannot be used here.
        """
        await self._parts.check()
        source, self._pipe = os.pipe2(os.O_CLOEXEC)
        try:
            self._restorer = await Restorer.start(stream_fd=source)
        except BaseException:
            await asyncio.shield(self.discard())
            raise

    async def receive(self, channels: Channels, group: DeviceGroup) -> None:
        """Accept the stream; return when the first copy is with libxl, whole.

        Raises:
            HypervisorError: The stream broke before that, it is not of this guest, libxl refused it, or a domain of
                this name has come in the way.
        """
        if self._restorer is None:
            raise StateError("the copy has not been launched")
        sock = await channels.accept(CHANNEL, timeout_s=_COPY_S)
        if self._severed:
            sock.close()
            raise HypervisorError("the stream was severed before it began")
        receiver = self._receiver = Receiver(
            sock,
            hold_limit_bytes=self._parts.config.hold_limit_bytes,
            acknowledged=self._acknowledged,
            lost=self._lost,
        )
        domain = DomainConfig.parse(await receiver.config(_CONFIG_S))
        if domain.name != self._parts.config.name:
            raise HypervisorError(f"the stream is of {domain.name}, not of {self._parts.config.name}")
        await group.start_all(ReplicationMode.SECONDARY)
        copy = domain.for_copy(self._parts.config)
        if copy.uuid is None:
            raise HypervisorError(f"the configuration of {domain.name} that came with the stream has no UUID")
        # Again: the devices may have copied for days, and what has come meanwhile is not this session's to destroy.
        await self._parts.check()
        self._uuid = copy.uuid
        await self._parts.note(copy.uuid)
        self._restoring = asyncio.get_running_loop().create_task(
            self._restorer.restore(copy.to_json(), checkpointed=True), name=f"xen: restore {copy.name}"
        )
        self._restoring.add_done_callback(self._restored)
        pipe, self._pipe = self._pipe, -1
        copying = asyncio.ensure_future(receiver.copied(pipe, _COPY_S))
        try:
            await asyncio.wait({self._restoring, copying}, return_when=asyncio.FIRST_COMPLETED)
            if self._restoring.done():
                # libxl's own words are the cause; what the stream says then, only follows.
                self._restoring.result()
                raise HypervisorError("libxl ended the restore before the first copy was whole")
            await copying
        finally:
            copying.cancel()

    def _acknowledged(self, count: int) -> None:
        self._queue.put_nowait(DomainEvent(DomainEventKind.CHECKPOINT, count=count))

    def _lost(self, why: str) -> None:
        self._queue.put_nowait(DomainEvent(DomainEventKind.STREAM_LOST, why))

    def _restored(self, restoring: asyncio.Task[int]) -> None:
        # Before it is a domain, the end of the restore is the end of the copy, also once its stream is cut: the swap
        # that comes next must not end with a guest that is nowhere. `_end` takes the restorer before it kills it.
        if restoring.cancelled():
            return
        error = restoring.exception()
        if error is not None and self._restorer is not None:
            self._queue.put_nowait(DomainEvent(DomainEventKind.GONE, f"libxl has lost the copy: {error}"))

    # --- The end of being a copy -------------------------------------------------------------------------------------

    async def sever(self, reason: str) -> int:
        """Cut the stream: from here on nothing is acknowledged.

        Returns:
            How many whole checkpoints the copy holds, the first copy, which nobody may promote, not counted.
        """
        self._severed = True
        if self._receiver is None:
            return 0
        loaded = self._receiver.cut()
        _log.info("%s: severed (%s), %d checkpoints held", self._parts.config.name, reason, loaded)
        return loaded

    async def promote(self, group: DeviceGroup, won: Record) -> None:
        """Have libxl make the domain from the last acknowledged checkpoint, and give it the guest's name; it is paused.

        Raises:
            StateError: The copy holds no checkpoint, or its stream is not severed.
            ExceptionGroup: A device could not take in the last checkpoint, or be stopped; the domain was not made.
            HypervisorError: libxl did not make it, and has destroyed what there was; or it is whole and paused, and
                did not get the name. Then this may be asked again.
        """
        receiver, restorer, restoring = self._receiver, self._restorer, self._restoring
        if (
            receiver is None
            or restorer is None
            or restoring is None
            or not self._severed
            or not receiver.loaded
        ):
            raise StateError(f"this copy holds no whole checkpoint that is final; record: {won}")
        if restoring.done():
            restoring.result()  # raises: the copy is dead, and the disks are not touched
        if group.checkpointed < receiver.loaded:
            # The primary died when this side had acknowledged the memory, and before it said so to the devices.
            await group.do_checkpoint_all(receiver.loaded)
        # libxl opens the disks as soon as its stream ends: by then they are to be the guest's.
        await group.stop_all(failover=True)
        await receiver.hand_over(_TAKE_S)
        try:
            async with asyncio.timeout(_MAKE_S):
                self._domid = await asyncio.shield(restoring)
        except TimeoutError:
            raise HypervisorError(
                f"libxl has not made the domain within {_MAKE_S:g} s after the stream"
            ) from None
        await self._become_guest(restorer)
        self._promoted = True

    async def _become_guest(self, restorer: Restorer) -> None:
        domid, name = self._domid, self._parts.config.name
        try:
            await restorer.rename(domid, f"{name}{INCOMING}", name)
        except (LibxlFailed, RestorerLost) as failed:
            # It may be so already: the answer was lost, or this is asked again.
            if await self._parts.is_guest(domid):
                return
            if isinstance(failed, LibxlFailed):
                raise
            async with once() as libxl:
                await libxl.rename(domid, f"{name}{INCOMING}", name)

    async def open_outlet(self, won: Record) -> None:
        """Let the guest run: its interfaces are on their bridges since it was made, and its drivers announce it."""
        if self._restorer is None or not self._promoted:
            raise StateError("this copy was not promoted")
        # It is asked again after a failure: what was let run already must not be let run twice, libxl refuses that.
        if self._parts.is_paused(self._domid):
            try:
                await self._restorer.unpause(self._domid)
            except RestorerLost:
                async with once() as libxl:
                    await libxl.unpause(self._domid)
        _log.info("%s: domain %d takes over by %s", self._parts.config.name, self._domid, won)
        await self._parts.became_guest(self._domid, won)
        await self._parts.forget()

    async def discard(self) -> None:
        """Kill the restore and destroy the copy. Idempotent; also right when `launch` failed half-way.

        Guarantees:
            A domain that was in the way of the copy is not touched.
        """
        self._severed = True
        await self._end()
        if self._uuid is None:
            return
        # It may have got the guest's name although the answer was lost.
        await self._parts.destroy(self._domid)
        # A domain is made first, and named when some more of it is made.
        await self._parts.destroy_unnamed(self._uuid)
        await self._parts.forget()

    def watch(self) -> AsyncIterator[DomainEvent]:
        """Yield what happens unasked, until `close`."""
        return self._events()

    async def _events(self) -> AsyncIterator[DomainEvent]:
        while True:
            yield await self._queue.get()

    async def close(self) -> None:
        """Let go of this session's handles; a domain that was promoted stays as it is. Idempotent."""
        self._severed = True
        await self._end()

    async def _end(self) -> None:
        # Each takes its turn whatever becomes of the one before: a process that does not die is told of at the end.
        restorer, self._restorer = self._restorer, None
        receiver, self._receiver = self._receiver, None
        restoring, self._restoring = self._restoring, None
        pipe, self._pipe = self._pipe, -1
        try:
            if restorer is not None:
                await restorer.kill()
        finally:
            try:
                if receiver is not None:
                    await receiver.close()
            finally:
                if pipe >= 0:
                    os.close(pipe)
                if restoring is not None:
                    restoring.cancel()
                    await asyncio.wait([restoring])
