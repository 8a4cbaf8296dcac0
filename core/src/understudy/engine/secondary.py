"""The engine of the secondary: the host that holds the copy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from understudy.arbiter import Record
from understudy.device import ReplicationMode, Verdict
from understudy.engine.driver import Carry, Driver
from understudy.engine.pairs import make_group, serve_device
from understudy.errors import HypervisorError, PeerError, StateError
from understudy.hypervisor import DomainEventKind, GuestState
from understudy.phases import first_failure, in_words
from understudy.session import effects as do
from understudy.session import events as on

if TYPE_CHECKING:
    from understudy.engine.surroundings import Surroundings, Way
    from understudy.group import DeviceGroup
    from understudy.hypervisor import SecondaryDomain
    from understudy.session.machine import Machine

__all__ = ["SecondarySession"]

Json = Mapping[str, Any]

log = logging.getLogger("understudy.engine")

# Phases of an epoch that the primary may ask this side's devices for.
_PHASES = ("postsuspend", "checkpoint", "postresume", "error", "commit")


class SecondarySession(Driver):
    """Drives the copy of a guest on the host that holds it.

    Args:
        machine: Where it starts: a machine of the secondary's side.
        surroundings: What it may use.
    """

    def __init__(self, machine: Machine, surroundings: Surroundings) -> None:
        super().__init__(machine, surroundings)
        self.domain: SecondaryDomain | None = None
        self.group: DeviceGroup | None = None
        self.loaded = 0  #: checkpoints that the copy has loaded, as far as it told
        # The requests to prepare that wait for their copy: by session, the primary's facts and what to answer with.
        self._asked: dict[str, tuple[Json, asyncio.Future[None]]] = {}
        self._receive = asyncio.Event()
        self._copy: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._cut = False

    def effects(self) -> dict[type[do.Effect], Carry]:
        """Return what the secondary does for each effect."""
        return {
            do.PrepareCopy: self._prepare_copy,
            do.CutStream: self._cut_stream,
            do.MakeAgree: self._make_agree,
            do.OpenOutlet: self._open_outlet,
            do.KillCopy: self._kill_copy,
            do.OpenGate: self._open_gate,
            do.RemoveGate: self._remove_gate,
            do.StartGuest: self._start_guest,
        }

    async def close(self) -> None:
        """End the engine; the copy stays as it is. Idempotent."""
        self._cut = True
        await self.end_begun()
        await self._leave()
        self.detach()

    # --- The other host ------------------------------------------------------------------------------------------

    async def serve(self, method: str, params: Json) -> Json:
        """Answer the primary's engine."""
        if method == "prepare":
            return await self._prepare(params)
        group = self.group
        if method == "device" and group is not None:
            return await serve_device(group, params)
        if method == "phase" and group is not None:
            return await self._phase(group, str(params.get("phase")), int(params.get("epoch", 0)))
        raise StateError(f"the secondary of {self.guest} answers no {method!r} now")

    def told(self, method: str, params: Json) -> None:
        """Take a note of the primary's engine."""
        if method == "receive":
            self._receive.set()
        else:
            super().told(method, params)

    def fail(self, effect: do.Effect, error: BaseException) -> None:
        """Note a failure, and tell the primary why this side ends."""
        super().fail(effect, error)
        if self.way is not None:
            self.way.port.notify("failure", {"detail": in_words(first_failure(error))})

    async def _prepare(self, params: Json) -> Json:
        try:
            record = Record.from_json(params["record"])
            session, mode, facts = str(params["session"]), str(params["mode"]), dict(params["facts"])
        except KeyError as missing:
            raise PeerError(f"the request to prepare lacks {missing}") from missing
        ours = self.around.config.protection.mode.value
        if mode != ours:
            raise StateError(
                f"guest {self.guest} is to be protected in mode {mode}, its file here says {ours}"
            )
        if session in self._asked:
            raise StateError(f"the copy of {self.guest} for session {session} is being prepared already")
        ready = asyncio.get_running_loop().create_future()
        self._asked[session] = facts, ready
        try:
            await self.ask(on.Prepare(session, record))
            if self.machine.session != session:
                raise StateError(
                    f"guest {self.guest} takes no new copy here while it is {self.machine.state.value}"
                )
            await ready
        finally:
            del self._asked[session]
        assert self.group is not None  # noqa: S101 - that is what ready means
        return {"phases": [phase for phase in _PHASES if self.group.has(phase)]}

    async def _phase(self, group: DeviceGroup, phase: str, epoch: int) -> Json:
        # Nothing is acknowledged any more once the stream is cut, whatever the devices would say.
        if self._cut:
            raise StateError(f"the secondary of {self.guest} has cut the stream")
        match phase:
            case "postsuspend":
                await group.postsuspend(epoch)
            case "checkpoint":
                await group.do_checkpoint_all(epoch)
            case "postresume":
                await group.postresume(epoch)
            case "error":
                await group.get_error_all()
            case "commit":
                await group.commit(epoch)
            case _:
                raise PeerError(f"there is no phase {phase!r} on the secondary")
        return {}

    # --- The copy ------------------------------------------------------------------------------------------------

    async def _prepare_copy(self, effect: do.PrepareCopy) -> None:
        self._cut = False
        self.failure = None
        self._copy = self.begin(effect, self._copying(effect))
        if self.way is not None and self.way.port.lost is not None:
            # It was lost between the request and now, and meant nothing then.
            self.post(on.PeerLost(str(self.way.port.lost)))

    async def _copying(self, effect: do.PrepareCopy) -> None:
        facts, ready = self._asked.get(effect.session, ({}, None))
        way = self.way
        try:
            if way is None or ready is None:
                raise StateError(f"nobody asked this host for a copy of {self.guest}")
            around = self.around
            domain = self.domain = await around.hypervisor.secondary(around.config, facts)
            mode = around.config.protection.mode
            gates = around.hypervisor.modes.get(mode, frozenset())
            group = await make_group(
                around, ReplicationMode.SECONDARY, effect.session, domain.services, gates, way
            )
            self.group = group
            await group.new()
            await domain.launch(group)
            self._watch = asyncio.get_running_loop().create_task(
                self._watching(domain), name=f"{self.guest}: watch"
            )
        except BaseException as error:
            if ready is not None and not ready.done():
                # The primary is told the cause itself; its request fails with it.
                ready.set_exception(
                    error if isinstance(error, Exception) else HypervisorError("it was ended")
                )
            raise
        ready.set_result(None)
        await self._receive.wait()
        await domain.receive(way.channels, group)

    async def _watching(self, domain: SecondaryDomain) -> None:
        async for event in domain.watch():
            # What the copy does by itself (shutdown, reboot) decides nothing: it only speculates.
            if event.kind is DomainEventKind.CHECKPOINT:
                self.loaded = event.count
            elif event.kind is DomainEventKind.STREAM_LOST and not self._cut:
                self.post(on.StreamLost(event.detail))
            elif event.kind is DomainEventKind.GONE:
                self.post(on.GuestGone(event.detail))

    async def _cut_stream(self, _: do.CutStream) -> None:
        self._cut = True
        if self.group is not None:
            self.group.sever_all()
        loaded = 0
        if self.domain is not None:
            async with asyncio.timeout(self.around.limits.cut_s):
                loaded = await self.domain.sever("the session of this host ends")
        await self._end_copy()
        self.post(on.StreamCut(self.machine.session, loaded))

    async def _end_copy(self) -> None:
        copy = self._copy
        if copy is not None and not copy.done():
            copy.cancel()
            await asyncio.wait({copy}, timeout=self.around.limits.end_s)
            if not copy.done():
                raise HypervisorError(f"{copy.get_name()} did not end within {self.around.limits.end_s:g} s")

    async def _make_agree(self, effect: do.MakeAgree) -> None:
        self.begin(effect, self._promoting(effect))

    async def _promoting(self, effect: do.MakeAgree) -> None:
        if self.domain is None or self.group is None:
            # Forced by an operator in a later life of the agent than the one that began: see `_open_outlet`.
            around = self.around
            if await around.hypervisor.state(around.config) is not GuestState.ABSENT:
                self.post(on.Promoted())
            else:
                detail = "the copy is gone"
                self.post(on.PromotionFailed(dead=True, untouched=False, detail=detail))
            return
        try:
            async with asyncio.timeout(self.around.limits.promote_s):
                await self.domain.promote(self.group, effect.won)
        except Exception as error:  # noqa: BLE001 - the copy is kept for an operator, whatever it was
            self.failure = self.failure or error
            # How far QEMU or a device came nobody can say any more: neither dead nor untouched is claimed.
            self.post(on.PromotionFailed(dead=False, untouched=False, detail=str(error)))
        else:
            self.post(on.Promoted())

    async def _open_outlet(self, effect: do.OpenOutlet) -> None:
        around = self.around
        async with asyncio.timeout(around.limits.end_s):
            if self.domain is not None and self.group is not None:
                await self.domain.open_outlet(effect.won)
                return
            # An earlier life of this agent made it the guest: what that life began is finished by the janitor.
            await around.hypervisor.sweep(around.config, effect.won)
            if await around.hypervisor.state(around.config) is not GuestState.RUNNING:
                raise HypervisorError(f"the promotion of {self.guest} was cut short and cannot be finished")

    async def _kill_copy(self, _: do.KillCopy) -> None:
        self._cut = True
        await self._end_copy()
        if self.domain is not None:
            async with asyncio.timeout(self.around.limits.end_s):
                await self.domain.discard()

    async def _start_guest(self, effect: do.StartGuest) -> None:
        # The copy died after its disks had been made the guest's: it starts from them.
        async with asyncio.timeout(self.around.limits.start_s):
            await self.around.hypervisor.start(self.around.config, effect.record)

    async def _open_gate(self, _: do.OpenGate) -> None:
        await self._teardown(Verdict.KEEP)

    async def _remove_gate(self, _: do.RemoveGate) -> None:
        await self._teardown(Verdict.DISCARD)

    async def _teardown(self, verdict: Verdict) -> None:
        if self.group is not None:
            await self.group.teardown(verdict)
        await self._leave()

    async def _leave(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.wait({watch}, timeout=self.around.limits.end_s)
        domain, self.domain = self.domain, None
        self.group = None
        self._receive.clear()
        if domain is not None:
            await domain.close()

    def attach(self, way: Way) -> None:
        """Use `way` for the session that the primary is about to ask for."""
        self._receive.clear()
        super().attach(way)
