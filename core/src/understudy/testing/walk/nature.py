"""What can happen next in the world of the walk: deliveries, answers, suspicion, operators, crashes and returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from understudy.arbiter import RecordState
from understudy.device import Mode, ReplicationMode
from understudy.session import Machine, PrimaryState, SecondaryState, owner, standby
from understudy.session import effects as do
from understudy.session import events as on
from understudy.testing.walk.doing import Doing
from understudy.testing.walk.world import (
    GUEST,
    NAMES,
    Host,
    Stream,
    World,
    disk_of,
    emit,
    is_secondary,
    killed,
    ordered,
    put,
    runs_guest,
    short,
    takes,
    with_stream,
)

__all__ = ["Nature"]

_TO_SECONDARY: Final = (on.Prepare, on.Joined, on.Ended, on.Yield)
_TO_PRIMARY: Final = (on.Ended, on.HoldsNothing)
_FORCED_OWNERS: Final = {PrimaryState.FENCED, PrimaryState.RECOVERING}
_FORCEABLE: Final = _FORCED_OWNERS | {SecondaryState.STANDBY, SecondaryState.SUSPECT, SecondaryState.KEPT}


class Nature(Doing):
    """Every method takes a world and yields the worlds that may follow, each with a line for the trace."""

    # --- The next worlds -----------------------------------------------------------------------------------------

    def successors(self, world: World) -> Iterator[tuple[str, World]]:
        """All that can happen next, calm things first."""
        for me in (0, 1):
            yield from self._inside(world, me)
        yield from self._arbiter(world)
        for me in (0, 1):
            yield from self._network(world, me)
            yield from self._operator(world, me)
            yield from self._suspicion(world, me)
            yield from self._returns(world, me)
            yield from self._disasters(world, me)

    def calm(self, world: World) -> Iterator[tuple[str, World]]:
        """What happens in a world without faults, delays and operators."""
        for me in (0, 1):
            yield from self._returns(world, me)
            yield from self._inside(world, me)
        yield from self._arbiter(world, calm=True)
        for me in (0, 1):
            yield from self._network(world, me)
        for me in (0, 1):
            yield from self._suspicion(world, me, calm=True)

    def _inside(self, world: World, me: int) -> Iterator[tuple[str, World]]:
        host = world.hosts[me]
        if host.machine is None:
            return
        if host.todo:
            done = self.carry_out(self.effect(world, me), me)
            yield f"{NAMES[me]} does {type(host.todo[0]).__name__}", done
            return
        for event in ordered(host.answers):
            taken = put(world, me, host._replace(answers=host.answers - {event}))
            yield f"{NAMES[me]} hears {short(event)}", self.take(taken, me, event)

    def _arbiter(self, world: World, *, calm: bool = False) -> Iterator[tuple[str, World]]:
        for me in (0, 1):
            host = world.hosts[me]
            if host.reading and host.machine is not None:
                answers = host.answers | {on.RecordRead(world.record)}
                yield (
                    f"the arbiter reads {world.record.state.value} to {NAMES[me]}",
                    put(world, me, host._replace(reading=False, answers=answers)),
                )
        for expected, desired in ordered(world.swaps):
            me = NAMES.index(desired.writer)
            machine = world.hosts[me].machine
            waits = (
                machine is not None
                and machine.pending is not None
                and machine.pending.attempt == desired.attempt
            )
            wins = world.record == expected
            after = world._replace(record=desired) if wins else world
            what = f"{desired.writer}'s swap to {desired.state.value}"
            if waits and machine is not None:
                same = after.record.identity == desired.identity
                answer = on.Won(after.record) if same else on.Lost(desired.attempt, after.record)
                host = after.hosts[me]
                told = put(after, me, host._replace(answers=host.answers | {answer}))
                told = told._replace(swaps=world.swaps - {(expected, desired)})
                yield f"the arbiter {'makes' if same else 'refuses'} {what}", told
                if wins and not calm:
                    yield f"the arbiter makes {what}, the answer is lost", after
                if not calm and takes(world.hosts[me]):
                    yield (
                        f"{desired.writer} waits in vain",
                        self.take(world, me, on.NoAnswer(desired.attempt)),
                    )
            elif wins:
                yield (
                    f"the arbiter makes the late {what}",
                    after._replace(swaps=world.swaps - {(expected, desired)}),
                )

    def _network(self, world: World, me: int) -> Iterator[tuple[str, World]]:
        host, stream = world.hosts[me], world.stream
        if host.machine is not None and takes(host):
            for word in world.words[me]:
                rest = tuple(w for w in world.words[me] if w != word)
                words = (rest, world.words[1]) if me == 0 else (world.words[0], rest)
                fitting = isinstance(word, _TO_SECONDARY if is_secondary(host.machine) else _TO_PRIMARY)
                after = world._replace(words=words)
                if fitting:
                    yield f"{NAMES[me]} is told {short(word)}", self.take(after, me, word)
        other = world.hosts[1 - me]
        ready = (
            other.copy is not None
            and other.up
            and other.copy.session == host.copying
            and not other.copy.loaded
        )
        if host.copying and ready and host.machine is not None and takes(host) and host.running:
            after = put(world, me, host._replace(copying=""))
            after = after._replace(stream=Stream(me, host.copying, 0, ()))
            yield f"{NAMES[me]}'s first copy is complete", self.take(after, me, on.CopyRunning(host.copying))
        if stream is not None and stream.primary == me and stream.epoch and other.copy is not None:
            copy = other.copy._replace(loaded=stream.epoch, path=stream.path)
            after = put(world, 1 - me, other._replace(copy=copy))
            after = after._replace(stream=stream._replace(epoch=0, path=()), held=stream.path)
            if host.machine is not None:
                answers = host.answers | {on.Acknowledged(stream.session, stream.epoch)}
                after = put(after, me, host._replace(answers=answers))
            yield f"{NAMES[1 - me]} holds checkpoint {stream.epoch}", after
        if (
            self.bounds.mode is Mode.COLO
            and stream is not None
            and (stream.primary, stream.epoch) == (me, 0)
            and other.copy is not None
            and other.copy.loaded
            and host.running
            and other.copy.path != host.path
        ):
            after = put(world, 1 - me, other._replace(copy=other.copy._replace(path=host.path)))
            yield "both sent the same: it leaves", emit(after._replace(held=host.path), me, host.path)

    def _operator(self, world: World, me: int) -> Iterator[tuple[str, World]]:
        host, budget, who = world.hosts[me], world.budget, NAMES[me]
        machine = host.machine
        if machine is None or not takes(host):
            return
        free = machine.state in {PrimaryState.UNPROTECTED, PrimaryState.ALONE}
        if budget.sessions and free and host.running:
            session = f"s{self.bounds.sessions - budget.sessions + 1}"
            event = on.Protect(session, NAMES[1 - me], self.bounds.prefer_primary)
            after = world._replace(budget=budget._replace(sessions=budget.sessions - 1))
            yield f"{who} is asked to protect", self.take(after, me, event)
        if budget.unprotects and machine.state in {PrimaryState.SYNCING, PrimaryState.PROTECTED}:
            after = world._replace(budget=budget._replace(unprotects=budget.unprotects - 1))
            yield f"{who} is asked to unprotect", self.take(after, me, on.Unprotect())
        if budget.preferences and machine.state is PrimaryState.PROTECTED and machine.pending is None:
            after = world._replace(budget=budget._replace(preferences=budget.preferences - 1))
            event_ = on.Prefer(primary=not machine.prefer_primary)
            yield f"{who} is asked to change its preference", self.take(after, me, event_)
        forceable = machine.state in _FORCEABLE and (
            machine.state not in _FORCED_OWNERS or machine.pending is None
        )
        if budget.forces and forceable and not machine.forced_by:
            after = world._replace(budget=budget._replace(forces=budget.forces - 1))
            yield f"an operator forces {who}", self.take(after, me, on.Force("op", "because"))
        if machine.state is PrimaryState.OFF and machine.joined is not None and self._may_start(machine):
            yield f"{who} is asked to start the guest", self.take(world, me, on.Start())

    def _may_start(self, machine: Machine) -> bool:
        states = (RecordState.ALONE, RecordState.STOPPED)
        return (
            machine.joined is not None
            and machine.joined.owner == machine.host
            and machine.joined.state in states
        )

    def _suspicion(self, world: World, me: int, *, calm: bool = False) -> Iterator[tuple[str, World]]:
        host, who = world.hosts[me], NAMES[me]
        machine = host.machine
        if machine is None or not takes(host):
            return
        watching = machine.state in {
            PrimaryState.SYNCING,
            PrimaryState.PROTECTED,
            PrimaryState.LEAVING,
            SecondaryState.SYNCING,
            SecondaryState.STANDBY,
        }
        # A first copy that never comes ends at its deadline.
        if watching and (not calm or world.stream is None):
            yield f"{who} loses the stream", self.take(world, me, on.StreamLost())
        waiting = machine.state is SecondaryState.SUSPECT and not machine.go
        down = not world.hosts[1 - me].up
        if (watching or waiting) and not calm:
            yield f"{who} suspects {NAMES[1 - me]}", self.take(world, me, on.PeerLost())
        if down and is_secondary(machine) and (watching or waiting) and not calm:
            yield f"{who} sees the fence confirmed", self.take(world, me, on.FenceConfirmed())

    def _returns(self, world: World, me: int) -> Iterator[tuple[str, World]]:
        host = world.hosts[me]
        if host.machine is not None:
            return
        record, name = world.record, NAMES[me]
        life = f"{name}{host.lives + 1}"
        named = record.standby == name and record.owner != name
        copy = host.copy is not None and host.copy.loaded > 0
        machine = standby(GUEST, name, life) if named or not host.exists else owner(GUEST, name, life)
        if record.owner == name:
            machine = owner(GUEST, name, life)
        live = host.exists if machine.side is ReplicationMode.PRIMARY else host.exists or copy
        # A copy that holds no checkpoint is not adopted: the janitor removes it.
        cleaned = host if copy else host._replace(copy=None)
        after = put(world, me, cleaned._replace(up=True, machine=machine, lives=host.lives + 1))
        if host.copy is not None and not copy:
            after = after._replace(stream=None)
        yield (
            f"{name} is back and reads {record.state.value}",
            self.take(after, me, on.Recover(record, live=live, untouched=not host.touched)),
        )

    def _disasters(self, world: World, me: int) -> Iterator[tuple[str, World]]:
        host, budget, who = world.hosts[me], world.budget, NAMES[me]
        if not host.up:
            return
        if budget.host_crashes:
            after = world._replace(budget=budget._replace(host_crashes=budget.host_crashes - 1))
            dead = Host(up=False, machine=None, disk=disk_of(host), touched=host.touched, lives=host.lives)
            involved = world.stream is not None and (world.stream.primary == me or host.copy is not None)
            after = with_stream(put(after, me, dead), world.stream if not involved else None)
            yield f"{who} dies", after
        if host.machine is None:
            return
        if budget.agent_crashes:
            after = world._replace(budget=budget._replace(agent_crashes=budget.agent_crashes - 1))
            alive = host._replace(machine=None, todo=(), answers=frozenset(), reading=False, copying="")
            yield f"{who}'s agent dies", put(after, me, alive)
        if budget.failures:
            less = world._replace(budget=budget._replace(failures=budget.failures - 1))
            yield from self._failures(less, me)
        if budget.shutdowns and host.running and takes(host) and runs_guest(host.machine):
            after = world._replace(budget=budget._replace(shutdowns=budget.shutdowns - 1))
            halted = host._replace(running=False, frozen=True)
            yield f"{who}'s guest shuts down", self.take(put(after, me, halted), me, on.GuestShutdown())

    def _failures(self, world: World, me: int) -> Iterator[tuple[str, World]]:
        host, who = world.hosts[me], NAMES[me]
        assert host.machine is not None  # noqa: S101
        if host.todo:
            effect = host.todo[0]
            failing = put(world, me, host._replace(todo=()))
            if isinstance(effect, do.MakeAgree):
                bad = on.PromotionFailed(dead=True, untouched=True)
                dead = killed(host)._replace(todo=host.todo[1:], copy=None)
                yield (
                    f"{who}'s promotion fails early",
                    put(world, me, dead._replace(answers=host.answers | {bad})),
                )
                worse = on.PromotionFailed(dead=False, untouched=False)
                touched = host._replace(todo=host.todo[1:], touched=True, answers=host.answers | {worse})
                yield f"{who}'s promotion fails half-way", put(world, me, touched)
            else:
                yield f"{who}'s {type(effect).__name__} fails", self.take(failing, me, on.Failed(effect))
            return
        if not takes(host):
            return
        if host.exists and (runs_guest(host.machine) or host.machine.state is PrimaryState.FENCED):
            gone = put(world, me, killed(host))
            if world.stream is not None and world.stream.primary == me:
                gone = gone._replace(stream=None)
            yield f"{who}'s guest process dies", self.take(gone, me, on.GuestGone())
        if host.copy is not None and is_secondary(host.machine):
            gone = with_stream(put(world, me, host._replace(copy=None)), None)
            yield f"{who}'s copy dies", self.take(gone, me, on.GuestGone())

    def is_good(self, world: World) -> bool:
        """The guest is served, or off because somebody chose so, or an operator is asked."""
        return world.record.state is RecordState.STOPPED or any(
            host.machine is not None and not host.todo and self._is_served(world, host, host.machine)
            for host in world.hosts
        )

    def _is_served(self, world: World, host: Host, machine: Machine) -> bool:
        protected = machine.state is PrimaryState.PROTECTED and world.stream is not None
        asked = machine.state is PrimaryState.RECOVERING and world.record.prefer_primary
        return (
            machine.state is SecondaryState.KEPT
            or (host.running and (protected or not host.gate))
            or (machine.state is PrimaryState.OFF and self._may_start(machine))
            or asked
        )
