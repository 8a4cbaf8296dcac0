"""Who runs a guest, who may let out its output: two state machines as tables, one for each side.

`step` is pure: a machine and an event in, a machine and effects out. `TABLES` are what the engine executes and what
understudy.testing.walk walks. ``python -m understudy.session`` prints them as diagrams.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from understudy.device import ReplicationMode
from understudy.session import effects, events
from understudy.session.machine import (
    Branch,
    Machine,
    PrimaryState,
    SecondaryState,
    State,
    Table,
    Tables,
)
from understudy.session.machine import step as _step
from understudy.session.primary import PRIMARY
from understudy.session.secondary import SECONDARY

__all__ = [
    "TABLES",
    "Branch",
    "Machine",
    "PrimaryState",
    "SecondaryState",
    "State",
    "Table",
    "Tables",
    "effects",
    "events",
    "owner",
    "standby",
    "step",
    "successor",
]

TABLES: Final = Tables(PRIMARY, SECONDARY)


def step(
    machine: Machine, event: events.Event, tables: Tables = TABLES
) -> tuple[Machine, tuple[effects.Effect, ...]]:
    """Take one event: return the machine afterwards and what must be done, in this order.

    Raises:
        StateError: The event is not possible in this state; nothing was changed.
    """
    return _step(machine, event, tables)


def owner(guest: str, host: str, life: str) -> Machine:
    """Return the machine of the owner's side before it knows anything: `events.Recover` or `events.Start` is next.

    Args:
        guest: The guest's name.
        host: This host's name.
        life: An id that no other life of any agent has: with it, the machine's attempts are unique.
    """
    return Machine(ReplicationMode.PRIMARY, PrimaryState.OFF, host, guest, life)


def standby(guest: str, host: str, life: str) -> Machine:
    """Return the machine of the standby's side before it knows anything: `events.Recover` or `events.Prepare` is next.

    Args:
        guest: The guest's name.
        host: This host's name.
        life: An id that no other life of any agent has.
    """
    return Machine(ReplicationMode.SECONDARY, SecondaryState.EMPTY, host, guest, life)


def successor(machine: Machine) -> Machine:
    """Return the machine that a host goes on with once a session is over, or `machine` itself if it is not.

    A host that has discarded becomes an empty standby; a standby that has been promoted becomes an owner.
    """
    common: dict[str, Any] = {"attempts": machine.attempts}
    if machine.pending is not None:
        return machine
    if machine.state in {PrimaryState.DISCARDED, SecondaryState.DISCARDED}:
        return replace(standby(machine.guest, machine.host, machine.life), **common)
    if machine.state is SecondaryState.ALONE:
        fresh = owner(machine.guest, machine.host, machine.life)
        return replace(fresh, **common, state=PrimaryState.UNPROTECTED, joined=machine.joined, live=True)
    return machine
