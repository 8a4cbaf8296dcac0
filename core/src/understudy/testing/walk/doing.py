"""What the effects of the tables really do in the world of the walk, and what must hold when they do it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from understudy.arbiter import Record, RecordState, check_change
from understudy.device import ReplicationMode
from understudy.errors import IllegalChange, StateError
from understudy.session import Machine, PrimaryState, Tables, owner, standby, step, successor
from understudy.session import effects as do
from understudy.session import events as on
from understudy.testing.walk.world import (
    GUEST,
    NAMES,
    Bounds,
    Budget,
    Copy,
    Host,
    Violation,
    World,
    emit,
    killed,
    matters,
    next_epoch,
    plain_effect,
    put,
    short,
    starts,
    with_stream,
    without_text,
)

__all__ = ["Doing"]

# --- Effects: what they really do ----------------------------------------------------------------------------------

# Done at once: they only add something in flight, or touch nothing that another host can see.
_AT_ONCE: Final = (
    do.Swap,
    do.ReadRecord,
    do.TellPeer,
    do.AskCheckpoint,
    do.StartCopy,
    do.PrepareCopy,
    do.CloseGate,
    do.Report,
    do.StopGuest,
    do.EndReplication,
)


_LOCAL: Final = (do.KillGuest, do.KillCopy, do.RemoveGate, do.ContinueGuest)


class Doing:
    """What a machine's step and its effects do to the world. Nothing is kept but the tables and what they answered."""

    def __init__(self, bounds: Bounds, tables: Tables) -> None:
        self.bounds = bounds
        self.tables = tables
        self.doing = ""  #: for a violation: what was about to happen
        self._handlers: dict[type[do.Effect], Callable[[World, int, Any, Any], World]] = {
            getattr(do, name): getattr(self, "_do_" + re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower())
            for name in do.__all__
            if name not in {"Effect", "Report", "Word"}
        }
        self._steps: dict[tuple[Machine, on.Event], tuple[Machine, tuple[do.Effect, ...]] | str] = {}

    def first(self) -> World:
        """Return the world in which alpha runs the guest unprotected."""
        record = Record(GUEST, 1, RecordState.ALONE, NAMES[0], None, None, NAMES[0], "alpha1.0")
        running = replace(
            owner(GUEST, NAMES[0], "alpha1"), state=PrimaryState.UNPROTECTED, joined=record, live=True
        )
        alpha = Host(up=True, machine=running, running=True, path=((1, 1),), disk=((1, 1),))
        beta = Host(up=True, machine=standby(GUEST, NAMES[1], "beta1"))
        b = self.bounds
        budget = Budget(
            b.sessions,
            b.host_crashes,
            b.agent_crashes,
            b.forces,
            b.failures,
            b.unprotects,
            b.shutdowns,
            b.preferences,
        )
        return self.settle(World((alpha, beta), record, frozenset(), ((), ()), None, (), (), 1, budget))

    # --- One event at one machine -------------------------------------------------------------------------------

    def take(self, world: World, me: int, event: on.Event) -> World:
        """Have the machine of host `me` take an event, and do at once what can be done at once."""
        host = world.hosts[me]
        assert host.machine is not None  # noqa: S101 - only called for hosts with an agent
        self.doing = f"{NAMES[me]} takes {short(event)}"
        known = self._steps.get((host.machine, event))
        if known is None:
            known = self._step(host.machine, event)
            self._steps[host.machine, event] = known
        if isinstance(known, str):
            raise Violation(known)
        machine, effects = known
        return self.carry_out(put(world, me, host._replace(machine=machine, todo=effects)), me)

    def _step(self, machine: Machine, event: on.Event) -> tuple[Machine, tuple[do.Effect, ...]] | str:
        try:
            after, effects = step(machine, event, self.tables)
        except (StateError, AssertionError) as problem:
            return f"{type(problem).__name__}: {problem}"
        for effect in effects:
            if isinstance(effect, do.Swap):
                try:
                    check_change(effect.expected, effect.desired)
                except IllegalChange as problem:
                    return str(problem)
        return without_text(after), tuple(
            plain_effect(effect) for effect in effects if not isinstance(effect, do.Report)
        )

    def carry_out(self, world: World, me: int) -> World:
        """Do what can be done at once; stop before an effect that others may interleave with."""
        at_once = _AT_ONCE if self.interleaved(world) else _AT_ONCE + _LOCAL
        while world.hosts[me].todo and isinstance(world.hosts[me].todo[0], at_once):
            world = self.effect(world, me)
        host = world.hosts[me]
        if host.machine is not None and not host.todo:
            after = successor(host.machine)
            if after is not host.machine:
                # Whoever goes on begins anew: what is still under way was asked by the machine before it.
                fresh = host._replace(machine=after, answers=frozenset(), reading=False, copying="")
                world = put(world, me, fresh)
        return world

    def interleaved(self, world: World) -> bool:
        """Whether it matters when an effect is done that nobody else can see: only if its agent can still fail."""
        return bool(world.budget.agent_crashes or world.budget.failures)

    def effect(self, world: World, me: int) -> World:
        """Do the first effect that host `me` has to do."""
        host = world.hosts[me]
        effect, host = host.todo[0], host._replace(todo=host.todo[1:])
        world = put(world, me, host)
        self.doing = f"{NAMES[me]} does {type(effect).__name__}"
        return self._handlers[type(effect)](world, me, host, effect)

    # --- Each effect ----------------------------------------------------------------------------------------------

    def _do_swap(self, world: World, me: int, host: Host, effect: do.Swap) -> World:
        old, new, other = effect.expected, effect.desired, world.hosts[1 - me].copy
        cold = not host.exists and not effect.again and not new.forced_by and new.owner == NAMES[me]
        out = old is not None and (old.state, new.state) == (RecordState.PROTECTED, RecordState.ALONE)
        holds = other is not None and other.loaded and old is not None and other.session == old.session
        if cold and out and holds:
            raise Violation(f"{NAMES[me]} wants a cold start although {NAMES[1 - me]} holds {other}")
        return world._replace(swaps=world.swaps | {(effect.expected, effect.desired)})

    def _do_read_record(self, world: World, me: int, host: Host, _: do.ReadRecord) -> World:
        return put(world, me, host._replace(reading=True))

    def _do_tell_peer(self, world: World, me: int, _: Host, effect: do.TellPeer) -> World:
        assert isinstance(effect.word, on.Event)  # noqa: S101
        return self.send(world, me, effect.word)

    def send(self, world: World, me: int, word: on.Event) -> World:
        """Put a word on its way to the other host; beyond the bound the oldest is lost."""
        queue = tuple(w for w in world.words[1 - me] if w != word)
        queue = (*queue, word)[-self.bounds.messages :]
        words = (queue, world.words[1]) if me == 1 else (world.words[0], queue)
        return world._replace(words=words)

    def _do_ask_checkpoint(self, world: World, me: int, host: Host, effect: do.AskCheckpoint) -> World:
        stream = world.stream
        if stream is None or stream.primary != me or effect.epoch > self.bounds.epochs or not host.running:
            return world  # it will never be acknowledged
        world = world._replace(stream=stream._replace(epoch=effect.epoch, path=host.path))
        return put(world, me, host._replace(mark=host.path, path=next_epoch(host.path)))

    def _do_start_copy(self, world: World, me: int, host: Host, effect: do.StartCopy) -> World:
        world = put(world, me, host._replace(copying=effect.session))
        return self.send(world, me, on.Prepare(effect.session, effect.record))

    def _do_prepare_copy(self, world: World, me: int, host: Host, effect: do.PrepareCopy) -> World:
        return put(world, me, host._replace(copy=Copy(effect.session, 0, ()), touched=False))

    def _do_close_gate(self, world: World, me: int, host: Host, _: do.CloseGate) -> World:
        return put(world, me, host._replace(gate=True))

    def _do_stop_guest(self, world: World, me: int, host: Host, _: do.StopGuest) -> World:
        return put(world, me, host._replace(running=False, frozen=host.exists))

    def _do_end_replication(self, world: World, *_: object) -> World:
        return world

    def _do_shutdown_guest(self, world: World, *_: object) -> World:
        return world

    def _do_release_epoch(self, world: World, me: int, host: Host, _: do.ReleaseEpoch) -> World:
        if not host.exists:
            return world  # its gate is gone with it
        mine = world.record.state is RecordState.ALONE and world.record.owner == NAMES[me]
        if not mine and not starts(host.mark, world.held):
            raise Violation(f"I1: {NAMES[me]} releases {host.mark} but the secondary holds {world.held}")
        return emit(world, me, host.mark)

    def _do_open_gate(self, world: World, me: int, host: Host, _: do.OpenGate) -> World:
        if not host.gate:
            return world
        if world.record.state is not RecordState.ALONE or world.record.owner != NAMES[me]:
            raise Violation(f"{NAMES[me]} opens its gate although the record says {world.record}")
        world = put(world, me, host._replace(gate=False))
        return emit(world, me, host.path) if host.exists else world

    def _do_open_outlet(self, world: World, me: int, host: Host, _: do.OpenOutlet) -> World:
        return put(world, me, host._replace(gate=False, running=host.exists, frozen=False))

    def _do_continue_guest(self, world: World, me: int, host: Host, _: do.ContinueGuest) -> World:
        return put(world, me, host._replace(running=host.exists, frozen=False))

    def _do_start_guest(self, world: World, me: int, host: Host, _: do.StartGuest) -> World:
        if host.exists:
            raise Violation(f"{NAMES[me]} starts the guest a second time")
        path = (*host.disk, (world.runs + 1, 1))
        world = world._replace(runs=world.runs + 1)
        return put(world, me, host._replace(running=True, gate=False, path=path, disk=path))

    def _do_kill_guest(self, world: World, me: int, host: Host, _: do.KillGuest) -> World:
        return put(world, me, killed(host))

    def _do_kill_copy(self, world: World, me: int, host: Host, _: do.KillCopy) -> World:
        return with_stream(put(world, me, killed(host)._replace(copy=None)), None)

    def _do_remove_gate(self, world: World, me: int, host: Host, _: do.RemoveGate) -> World:
        if host.exists:
            raise Violation(f"{NAMES[me]} removes the gate above a guest that still exists")
        return put(world, me, host._replace(gate=False))

    def _do_cut_stream(self, world: World, me: int, host: Host, _: do.CutStream) -> World:
        machine = host.machine
        if machine is not None and machine.side is ReplicationMode.SECONDARY:
            loaded = host.copy.loaded if host.copy else 0
            world = put(
                world, me, host._replace(answers=host.answers | {on.StreamCut(machine.session, loaded)})
            )
        else:
            world = put(world, me, host._replace(copying=""))
        return world._replace(stream=None)

    def _do_make_agree(self, world: World, me: int, host: Host, effect: do.MakeAgree) -> World:
        if effect.won.state is not RecordState.PROMOTING or effect.won.standby != NAMES[me]:
            raise Violation(f"{NAMES[me]} promotes with {effect.won}")
        if host.copy is None or not host.copy.loaded:
            if host.exists:
                return put(world, me, host._replace(answers=host.answers | {on.Promoted()}))
            gone = on.PromotionFailed(dead=True, untouched=not host.touched)
            return put(world, me, host._replace(answers=host.answers | {gone}))
        if world.stream is not None and world.stream.primary != me:
            raise Violation(f"{NAMES[me]} promotes while its stream is open")
        path = (*host.copy.path, (world.runs + 1, 1))
        host = host._replace(
            running=True,
            gate=True,
            path=path,
            disk=path,
            copy=None,
            touched=True,
            answers=host.answers | {on.Promoted()},
        )
        return put(world, me, host)._replace(runs=world.runs + 1)

    # --- What must hold in every world ---------------------------------------------------------------------------

    def settle(self, world: World) -> World:
        """Let out what open gates let out, check the rules, and drop what can have no effect any more."""
        for me in (0, 1):
            host = world.hosts[me]
            if host.running and not host.gate:
                record = world.record
                if record.state is not RecordState.ALONE or record.owner != NAMES[me]:
                    raise Violation(
                        f"{NAMES[me]} runs the guest with an open gate although the record says {record}"
                    )
                world = emit(world, me, host.path)
            if host.answers and not all(matters(host.machine, event) for event in host.answers):
                kept = frozenset(event for event in host.answers if matters(host.machine, event))
                world = put(world, me, world.hosts[me]._replace(answers=kept))
        if not world.swaps:
            return world
        dead = {pair for pair in world.swaps if self._is_over(world, *pair)}
        return world._replace(swaps=world.swaps - dead) if dead else world

    def _is_over(self, world: World, expected: Record | None, desired: Record) -> bool:
        machine = world.hosts[NAMES.index(desired.writer)].machine
        waits = (
            machine is not None and machine.pending is not None and machine.pending.attempt == desired.attempt
        )
        behind = expected is not None and world.record.generation > expected.generation
        return behind and not waits
