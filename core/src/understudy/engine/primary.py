"""The engine of the primary: the host that owns the guest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from understudy.device import ReplicationMode, Verdict
from understudy.engine.driver import Carry, Driver
from understudy.engine.epochs import Epochs
from understudy.engine.pairs import make_group, serve_device
from understudy.engine.stall import unless_stalled
from understudy.errors import (
    GuestNotFound,
    HypervisorError,
    NotReplicating,
    PeerError,
    StateError,
    UnderstudyError,
)
from understudy.hypervisor import DomainEventKind
from understudy.phases import first_failure
from understudy.services import PACE
from understudy.session import PrimaryState
from understudy.session import effects as do
from understudy.session import events as on

if TYPE_CHECKING:
    from understudy.engine.surroundings import Surroundings
    from understudy.group import DeviceGroup
    from understudy.hypervisor import PrimaryDomain
    from understudy.session.machine import Machine

__all__ = ["PrimarySession"]

Json = Mapping[str, Any]

log = logging.getLogger("understudy.engine")


class PrimarySession(Driver):
    """Drives the guest on the host that owns it, protected or not.

    Args:
        machine: Where it starts: a machine of the primary's side.
        surroundings: What it may use.
    """

    def __init__(self, machine: Machine, surroundings: Surroundings) -> None:
        super().__init__(machine, surroundings)
        self.domain: PrimaryDomain | None = None
        self.group: DeviceGroup | None = None
        self.epochs: Epochs | None = None
        self.bwlimit_bytes_per_s = 0  #: for the next initial copy, 0 = that of the configuration
        self._copy: asyncio.Task[None] | None = None
        self._checkpoint: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._replicates = False  # the checkpoint stream was begun; it has to be left
        self._cut = False  # nothing may be acknowledged any more
        self._told = asyncio.Event()  # the secondary has told why the first copy failed

    def effects(self) -> dict[type[do.Effect], Carry]:
        """Return what the primary does for each effect."""
        return {
            do.CloseGate: self._close_gate,
            do.StartCopy: self._start_copy,
            do.AskCheckpoint: self._ask_checkpoint,
            do.ReleaseEpoch: self._release_epoch,
            do.CutStream: self._cut_stream,
            do.ContinueGuest: self._continue_guest,
            do.EndReplication: self._end_replication,
            do.OpenGate: self._open_gate,
            do.StopGuest: self._stop_guest,
            do.KillGuest: self._kill_guest,
            do.RemoveGate: self._remove_gate,
            do.StartGuest: self._start_guest,
        }

    async def close(self) -> None:
        """End the engine; the guest stays as it is. Idempotent."""
        self._cut = True
        await self.end_begun()
        await self._leave()
        self.detach()

    # --- Into protection -----------------------------------------------------------------------------------------

    async def _close_gate(self, effect: do.CloseGate) -> None:
        # The devices are opened by the copy, once their other halves exist; what must hold by the end of the copy is
        # that they hold the output. Here the session's own state begins anew.
        self.failure = None
        if self.group is not None:
            # What cannot be undone at once is repeated; forgotten here, the guest would stay held for ever.
            raise StateError(
                f"guest {self.guest} has not left its last protection wholly; it goes on doing so by itself"
            )
        await self._leave()
        self.detach()
        self._cut = self._replicates = False
        self._told.clear()
        log.info("guest %s: session %s begins", self.guest, effect.session)

    async def _start_copy(self, effect: do.StartCopy) -> None:
        self._copy = self.begin(effect, self._copying(effect))

    async def _copying(self, effect: do.StartCopy) -> None:
        around = self.around
        way = await around.connect(effect.standby, effect.session)
        self.attach(way)
        facts = await around.hypervisor.facts(around.config)
        prepare = {
            "session": effect.session,
            "record": effect.record.to_json(),
            "mode": around.config.protection.mode.value,
            "facts": dict(facts),
        }
        answer = await way.port.request("prepare", prepare, timeout_s=around.limits.prepare_s)
        domain = self.domain = await around.hypervisor.primary(around.config)
        self._watch = asyncio.get_running_loop().create_task(
            self._watching(domain), name=f"{self.guest}: watch"
        )
        group = self.group = await make_group(
            around,
            ReplicationMode.PRIMARY,
            effect.session,
            domain.services.plus((PACE, self)) if domain.paced else domain.services,
            domain.gates,
            way,
            progress=self._progress,
            bwlimit_bytes_per_s=self.bwlimit_bytes_per_s,
        )
        await group.new()
        way.port.notify("receive", {})
        try:
            await unless_stalled(
                lambda progress: domain.replicate(group, way.channels, progress),
                self._progress,
                around.limits.stall_s,
                f"the first copy of {self.guest}",
            )
        except NotReplicating:
            raise
        except UnderstudyError as error:
            await self._ask_whose_failure(error)
            raise
        self._replicates = True
        self.epochs = Epochs(around, effect.session, domain, group, way, frozenset(answer["phases"]))
        self.post(on.CopyRunning(effect.session))

    async def _ask_whose_failure(self, error: UnderstudyError) -> None:
        # A stream that ends says nothing of why. If it was the other host that failed first, it has told so, or will
        # at once: then that is what the user has to know.
        self.failure = self.failure or error
        with suppress(TimeoutError):
            async with asyncio.timeout(self.around.limits.told_s):
                await self._told.wait()

    def told(self, method: str, params: Json) -> None:
        """Take a note of the secondary's engine."""
        if method != "failure":
            super().told(method, params)
        elif self.machine.state is PrimaryState.SYNCING and not self._replicates and not self._told.is_set():
            theirs = PeerError(f"{self.machine.peer}: {params.get('detail')}")
            theirs.__cause__ = self.failure
            self.failure = theirs
            self._told.set()

    def _progress(self, what: str, done_bytes: int, total_bytes: int) -> None:
        self.around.telling.progress(self.guest, what, done_bytes, total_bytes)

    # --- The cycle -----------------------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Have the next checkpoint begin at once. As `understudy.services.Pace.hurry`."""
        if self.epochs is not None:
            self.epochs.hurry()

    async def _ask_checkpoint(self, effect: do.AskCheckpoint) -> None:
        self._checkpoint = self.begin(effect, self._checkpointing(effect.epoch))

    async def _checkpointing(self, epoch: int) -> None:
        epochs = self.epochs
        assert epochs is not None  # noqa: S101 - the tables ask for checkpoints only after the copy
        try:
            gated = await epochs.take(epoch)
        except Exception as error:  # noqa: BLE001 - nothing was acknowledged, whatever it was
            if not self._cut:
                self.failure = self.failure or error
                self.post(on.StreamLost(str(error)))
        else:
            if not self._cut:
                self.post(on.Acknowledged(epochs.session, epoch, gated))

    async def _release_epoch(self, effect: do.ReleaseEpoch) -> None:
        assert self.epochs is not None  # noqa: S101 - as above
        await self.epochs.release(effect.epoch)

    async def _watching(self, domain: PrimaryDomain) -> None:
        async for event in domain.watch():
            kind, detail = event.kind, event.detail
            if kind is DomainEventKind.STREAM_LOST:
                # While the first copy is made its own failure tells of it, and why.
                if self._cut or not self._replicates:
                    continue
                self.post(on.StreamLost(detail))
            elif kind in {DomainEventKind.SHUTDOWN, DomainEventKind.PANIC}:
                self.post(on.GuestShutdown())
            elif kind is DomainEventKind.RESET:
                self.post(on.GuestReset())
            elif kind is DomainEventKind.GONE:
                self.post(on.GuestGone(detail))

    # --- Out of protection ---------------------------------------------------------------------------------------

    async def _cut_stream(self, _: do.CutStream) -> None:
        # After this line nothing that is still on its way counts as an acknowledgement.
        self._cut = True
        if self.group is not None:
            self.group.sever_all()
        async with asyncio.timeout(self.around.limits.cut_s):
            if self.domain is not None:
                await self.domain.sever("the session of this host ends")
        await self._end_copy()

    async def _end_copy(self) -> None:
        # A copy that is being made puts everything back when it is cancelled (PrimaryDomain.replicate, group.new).
        for task in (self._copy, self._checkpoint):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=self.around.limits.end_s)
                if not task.done():
                    raise HypervisorError(
                        f"{task.get_name()} did not end within {self.around.limits.end_s:g} s"
                    )

    async def _continue_guest(self, effect: do.ContinueGuest) -> None:
        try:
            async with asyncio.timeout(self.around.limits.end_s):
                if self.domain is not None and self.group is not None and self._replicates:
                    await self.domain.resume_alone(self.group)
                elif self.group is not None:
                    await self.group.stop_all(failover=True)
        except ExceptionGroup as failed:
            # A device could not be stopped. The guest runs, and what is held of it must not wait for that device: all
            # of them are torn down next, and what fails there is repeated.
            self.failure = self.failure or failed
            detail = str(first_failure(failed))
            log.warning("guest %s: it goes on although: %s", effect.record.guest, detail)
            self.around.telling.event(self.guest, "failed", {"detail": detail})

    async def _end_replication(self, _: do.EndReplication) -> None:
        # The guest is off and its own disks hold everything; only what the gates hold of it is still to leave.
        await self._bounded(lambda domain: domain.retire())

    async def _open_gate(self, _: do.OpenGate) -> None:
        await self._teardown(Verdict.KEEP)

    async def _remove_gate(self, _: do.RemoveGate) -> None:
        await self._teardown(Verdict.DISCARD)

    async def _teardown(self, verdict: Verdict) -> None:
        if self.group is not None:
            await self.group.teardown(verdict)
        await self._leave()

    async def _stop_guest(self, _: do.StopGuest) -> None:
        if self.domain is None:
            # It outlived the agent that protected it; its gate stands, but a fenced guest must not run, either.
            await self._stop_found()
        await self._bounded(lambda domain: domain.freeze())

    async def _stop_found(self) -> None:
        around = self.around
        async with asyncio.timeout(around.limits.end_s):
            try:
                domain = await around.hypervisor.primary(around.config)
            except (StateError, GuestNotFound) as ended:
                log.info("guest %s: nothing to stop: %s", self.guest, ended)
                return
            try:
                await domain.freeze()
            finally:
                await domain.close()

    async def _kill_guest(self, _: do.KillGuest) -> None:
        if self.domain is not None:
            await self._bounded(lambda domain: domain.discard())
        else:
            around = self.around
            async with asyncio.timeout(around.limits.end_s):
                await around.hypervisor.stop(around.config, force=True, timeout_s=around.limits.end_s)

    async def _bounded(self, work: Callable[[PrimaryDomain], Any]) -> None:
        if self.domain is not None:
            async with asyncio.timeout(self.around.limits.end_s):
                await work(self.domain)

    async def _leave(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.wait({watch}, timeout=self.around.limits.end_s)
        domain, self.domain = self.domain, None
        self.group = self.epochs = None
        self._replicates = False
        if domain is not None:
            await domain.close()

    # --- Start ---------------------------------------------------------------------------------------------------

    async def _start_guest(self, effect: do.StartGuest) -> None:
        async with asyncio.timeout(self.around.limits.start_s):
            await self.around.hypervisor.start(self.around.config, effect.record)

    # --- The other host ------------------------------------------------------------------------------------------

    async def serve(self, method: str, params: Json) -> Json:
        """Answer the secondary's engine: requests to this side's halves of the devices."""
        if method == "device" and self.group is not None:
            return await serve_device(self.group, params)
        raise StateError(f"the primary of {self.guest} answers no {method!r} now")
