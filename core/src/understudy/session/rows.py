"""What both tables are written with: actions that every state may use, and functions that make rows."""

from __future__ import annotations

from dataclasses import replace

from understudy.arbiter import Record, RecordState
from understudy.errors import StateError
from understudy.session.effects import Effect, ReadRecord, Report, Swap, TellPeer
from understudy.session.events import (
    Ended,
    Event,
    Failed,
    Force,
    Joined,
    Lost,
    Prepare,
    RecordRead,
    Recover,
    Won,
)
from understudy.session.machine import Action, Branch, Guard, Machine, State

__all__ = [
    "about_swap",
    "answered",
    "ask_again",
    "busy",
    "by_force",
    "current",
    "ended",
    "failed_is",
    "first_cause",
    "go",
    "ignoring",
    "in_promotion",
    "is_dead",
    "is_live",
    "is_mine",
    "is_old",
    "joined",
    "perform",
    "read",
    "read_again",
    "report",
    "settled_stopped",
    "stay",
    "waiting",
    "without_answer",
]

Outcome = tuple[Machine, tuple[Effect, ...]]


def go(to: State, *do: Action, when: Guard | None = None) -> Branch:
    """Return a branch that goes to the state `to`."""
    return Branch(to, do, when)


def stay(*do: Action, when: Guard | None = None) -> Branch:
    """Return a branch that stays in its state."""
    return Branch(None, do, when)


def ignoring(*events: type[Event]) -> dict[type[Event], tuple[Branch, ...]]:
    """Return rows that take `events` without doing anything: they come late, or mean nothing here."""
    return {event: (stay(),) for event in events}


def perform(*effects: Effect) -> Action:
    """Return an action that does fixed things."""

    def act(machine: Machine, _: Event) -> Outcome:
        return machine, effects

    act.__name__ = ", ".join(type(effect).__name__ for effect in effects)
    return act


def report(what: str) -> Action:
    """Return an action that tells people `what`, with the event's own words."""

    def act(machine: Machine, event: Event) -> Outcome:
        return machine, (Report(what, str(getattr(event, "detail", "") or getattr(event, "reason", ""))),)

    act.__name__ = f"report {what}"
    return act


def current(event: Event) -> Record | None:
    """Return the record that an answer of the arbiter, or a word of the other host, tells of."""
    if isinstance(event, Won | Lost | RecordRead | Ended | Joined | Recover | Prepare):
        return event.record
    raise StateError(f"{type(event).__name__} tells of no record")


def joined(machine: Machine, event: Event) -> Outcome:
    """Act upon the record that the arbiter told of; its answer settles the outstanding swap."""
    settles = isinstance(event, Won | Lost)
    return replace(machine, joined=current(event), pending=None if settles else machine.pending), ()


def answered(machine: Machine, _: Event) -> Outcome:
    """Note that the outstanding swap has been answered."""
    return replace(machine, pending=None), ()


def ask_again(machine: Machine, _: Event) -> Outcome:
    """Repeat the outstanding swap as it is; nothing else is done until it is answered."""
    if machine.pending is None:
        raise StateError(f"{machine.guest}: no swap is outstanding")
    return machine, (Swap(machine.joined, machine.pending, again=True),)


def waiting(machine: Machine, _: Event) -> Outcome:
    """Say that the arbiter does not answer."""
    return machine, (Report("waiting-for-arbiter"),)


def read(machine: Machine, _: Event) -> Outcome:
    """Read the record."""
    return machine, (ReadRecord(),)


def read_again(machine: Machine, _: Event) -> Outcome:
    """Read the record once more, after a while."""
    return machine, (ReadRecord(again=True),)


def ended(machine: Machine, _: Event) -> Outcome:
    """Tell the other host which record ended the session."""
    return machine, (TellPeer(Ended(machine.joined)),) if machine.joined is not None else ()


def first_cause(machine: Machine, event: Event) -> Outcome:
    """Keep the first thing that went wrong: it is what people are told."""
    if machine.cause:
        return machine, ()
    name = type(event).__name__
    detail = str(getattr(event, "detail", "") or getattr(event, "reason", ""))
    return replace(machine, cause=f"{name}: {detail}" if detail else name), ()


def by_force(machine: Machine, event: Event) -> Outcome:
    """Note who forces it and why."""
    if not isinstance(event, Force):
        raise StateError(f"{type(event).__name__} is no force")
    return replace(machine, forced_by=event.operator, go=event.reason or "forced"), ()


def without_answer() -> tuple[Branch, ...]:
    """Return the row of `NoAnswer` for a state that may have a swap or a read outstanding."""
    return (stay(waiting, ask_again, when=about_swap), stay(read_again))


def about_swap(_: Machine, event: Event) -> bool:
    """The silence is about the outstanding swap, not about a read."""
    return bool(getattr(event, "attempt", ""))


def is_mine(machine: Machine, event: Event) -> bool:
    """The record says that this host owns the guest and nobody is promoting it."""
    record = current(event)
    return (
        record is not None
        and record.owner == machine.host
        and record.state in {RecordState.ALONE, RecordState.PROTECTED, RecordState.RELEASED}
    )


def settled_stopped(machine: Machine, event: Event) -> bool:
    """The record says that this host's guest was shut down."""
    record = current(event)
    return record is not None and record.owner == machine.host and record.state is RecordState.STOPPED


def in_promotion(_: Machine, event: Event) -> bool:
    """The record says that a promotion is under way."""
    record = current(event)
    return record is not None and record.state is RecordState.PROMOTING


def failed_is(*kinds: type[Effect]) -> Guard:
    """Return the condition that the failed effect is one of `kinds`."""

    def holds(_: Machine, event: Event) -> bool:
        return isinstance(event, Failed) and isinstance(event.effect, kinds)

    holds.__doc__ = "Failed: " + " or ".join(kind.__name__ for kind in kinds) + "."
    return holds


def is_dead(machine: Machine, _: Event) -> bool:
    """There is no guest or copy on this host."""
    return not machine.live


def is_live(machine: Machine, _: Event) -> bool:
    """There is a guest or copy on this host."""
    return machine.live


def busy(machine: Machine, _: Event) -> bool:
    """A swap is outstanding: nothing else is decided before its answer."""
    return machine.pending is not None


def is_old(machine: Machine, event: Event) -> bool:
    """The answer is older than the record this host has joined."""
    record, known = current(event), machine.joined
    return known is not None and (record is None or record.generation < known.generation)
