"""The state machine of a session: one value per side, changed by `step` alone.

Two rules. Everything that decides what a host does with a guest is in the tables (primary.py, secondary.py) and in
the guards that they name; nothing else decides. And nothing here does I/O or knows a clock: what shall be done is
returned as values.

Theory of operation. A machine knows the record that its host last joined, and at most one swap that is still without
an answer. It never forgets that swap, never sends another before it is answered, and repeats it as it is. Everything
that may be let out of the host is let out in one of three ways: `ReleaseEpoch` after an acknowledgement, and
`OpenGate` or `OpenOutlet` after a swap to ``alone`` that this machine won. A pair of state and event that the table
does not have is an error that changes nothing.

The engine (understudy.engine) executes these very tables; understudy.testing.walk visits every state that two hosts,
an arbiter and a lossy link can reach with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from understudy.arbiter import Record, RecordState, following
from understudy.device import ReplicationMode
from understudy.errors import StateError
from understudy.session.effects import Effect, Swap
from understudy.session.events import Event, Lost, NoAnswer, Won

__all__ = [
    "Action",
    "Branch",
    "Guard",
    "Machine",
    "PrimaryState",
    "SecondaryState",
    "State",
    "Table",
    "Tables",
    "changed",
    "step",
]


class PrimaryState(Enum):
    """Where the owner of a guest stands."""

    OFF = "off"  #: the guest does not run here
    STARTING = "starting"  #: the swap that allows its start is on its way
    UNPROTECTED = "unprotected"  #: it runs here, output open, record ``alone``
    SYNCING = "syncing"  #: the copy is being made, up to the swap to ``protected``
    PROTECTED = "protected"  #: output is held until acknowledged
    LEAVING = "leaving"  #: a planned end: the swap to ``alone`` is on its way, protection goes on
    SUSPECT = (
        "suspect"  #: acknowledgements are missing: the stream is cut, the swap to ``alone`` is on its way
    )
    ALONE = "alone"  #: as unprotected, but the protection was lost
    FENCED = (
        "fenced"  #: the standby promotes: the guest is stopped, its gate closed, until the record decides
    )
    RECOVERING = "recovering"  #: the guest is dead here and the record protected: it is the standby's turn
    STOPPING = "stopping"  #: the guest has shut down, the swap to ``stopped`` is on its way
    DISCARDED = "discarded"  #: another host owns the guest; nothing of it is left here


class SecondaryState(Enum):
    """Where the holder of a copy stands."""

    EMPTY = "empty"  #: no copy
    SYNCING = "syncing"  #: a copy is being made; the record does not name this host yet
    STANDBY = "standby"  #: the record names this host and its session: it may promote
    SUSPECT = (
        "suspect"  #: the stream is cut, nothing more is acknowledged; waits for a reason and for the record
    )
    PROMOTING = "promoting"  #: the record says so; memory and disks are being made to agree
    KEPT = "kept"  #: the promotion failed half-way; the copy and its disks wait for an operator
    RELEASING = "releasing"  #: the promotion failed, nothing is lost: the swap to ``released`` is on its way
    ALONE = "alone"  #: the guest runs here and this host owns it; the session is over
    DISCARDED = "discarded"  #: nothing of the copy is left


State = PrimaryState | SecondaryState


@dataclass(frozen=True, slots=True)
class Machine:
    """One side of a session."""

    side: ReplicationMode
    state: State
    host: str  #: name of this host
    guest: str
    life: str  #: id of this agent's life; with `attempts` it makes every attempt unique
    peer: str | None = None  #: name of the other host
    session: str | None = None
    joined: Record | None = None  #: the record this host acts upon
    pending: Record | None = None  #: what the outstanding swap wants in the place of `joined`
    attempts: int = 0  #: swaps begun in this life
    asked: int = 0  #: primary: the epoch whose checkpoint was asked for
    acknowledged: int = 0  #: primary: the last checkpoint that the secondary holds
    live: bool = False  #: a guest, or a copy, exists on this host
    loaded: int | None = None  #: secondary: checkpoints the copy holds, once the stream is cut
    go: str = ""  #: secondary: the reason to promote; empty: none yet
    forced_by: str = ""  #: the operator who forced it
    untouched: bool = True  #: secondary: no promotion has begun to change the disks
    prefer_primary: bool = False  #: what the operator wants in the record
    shut: bool = False  #: the guest has shut down, or shall
    cause: str = ""  #: the first thing that went wrong

    def __hash__(self) -> int:
        # Of what differs most; walks hash millions of machines.
        generation = self.joined.generation if self.joined else 0
        return hash(
            (self.life, self.attempts, self.asked, generation, self.pending is None, self.live, self.loaded)
        )

    def swap(self, state: RecordState, **fields: Any) -> tuple[Machine, tuple[Effect, ...]]:
        """Begin a swap from the joined record to `state`.

        Args:
            state: State of the record wanted.
            fields: Further fields of the record; those of the joined one stay otherwise.
        """
        if self.pending is not None:
            raise StateError(f"{self.guest}: a swap is still without an answer: {self.pending}")
        attempts = self.attempts + 1
        values: dict[str, Any] = {"writer": self.host, "attempt": f"{self.life}.{attempts}"} | fields
        if state in {RecordState.ALONE, RecordState.STOPPED}:
            values |= {"owner": self.host, "standby": None, "prefer_primary": False}
        if self.joined is None:
            values["guest"] = self.guest
        desired = following(self.joined, state=state, **values)
        machine = replace(self, attempts=attempts, pending=desired)
        return machine, (Swap(self.joined, desired),)


Guard = Callable[[Machine, Any], bool]
Action = Callable[[Machine, Any], tuple[Machine, tuple[Effect, ...]]]


@dataclass(frozen=True, slots=True)
class Branch:
    """One arrow of the diagram: if `when` holds, do `do` and go to `to`."""

    to: State | None  #: ``None``: stay
    do: tuple[Action, ...] = ()
    when: Guard | None = None  #: ``None``: always


Table = Mapping[State, Mapping[type[Event], tuple[Branch, ...]]]


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of both sides; tests make mutants of them."""

    primary: Table
    secondary: Table

    def of(self, side: ReplicationMode) -> Table:
        """Return the table of one side."""
        return self.primary if side is ReplicationMode.PRIMARY else self.secondary


def changed(tables: Tables, state: State, event: type[Event], *branches: Branch) -> Tables:
    """Return the tables with one row replaced: a mutant, for tests that prove that the row matters.

    Args:
        tables: The tables to start from; they are not changed.
        state: The state of the row, which says the side too.
        event: The event of the row.
        branches: The new branches of the row.
    """
    primary = isinstance(state, PrimaryState)
    table = tables.primary if primary else tables.secondary
    row = {**table[state], event: branches}
    mutant = MappingProxyType({**table, state: row})
    return replace(tables, primary=mutant) if primary else replace(tables, secondary=mutant)


def step(machine: Machine, event: Event, tables: Tables) -> tuple[Machine, tuple[Effect, ...]]:
    """Take one event.

    Args:
        machine: The machine as it is; it is not changed.
        event: What happened.
        tables: The tables to use.

    Returns:
        The machine as it is afterwards, and what the engine must do, in this order.

    Raises:
        StateError: The state has no row for the event, or no branch of the row fits.
    """
    if _is_stale(machine, event):
        return machine, ()
    for branch in tables.of(machine.side)[machine.state].get(type(event), ()):
        if branch.when is None or branch.when(machine, event):
            target = machine.state if branch.to is None else branch.to
            effects: list[Effect] = []
            for action in branch.do:
                machine, more = action(machine, event)
                effects.extend(more)
            return replace(machine, state=target), tuple(effects)
    raise StateError(
        f"guest {machine.guest}: {type(event).__name__} is not possible while the {machine.side.value} "
        f"is {machine.state.value}"
    )


def _is_stale(machine: Machine, event: Event) -> bool:
    # An answer to a swap that has been answered already says nothing new, whatever the state.
    attempt: str | None = None
    if isinstance(event, Won):
        attempt = event.record.attempt
    elif isinstance(event, Lost) or (isinstance(event, NoAnswer) and event.attempt):
        attempt = event.attempt
    return attempt is not None and (machine.pending is None or machine.pending.attempt != attempt)
