"""The exhaustive walk: every state that two hosts, an arbiter and a bad network can reach with the session tables.

Breadth first, over the product of both machines, the record, what is in flight, and what each host really has: guest,
gate, copy, disks. Messages may be lost, delayed and reordered; a swap may be applied and its answer lost, or be
applied long after its sender died; a host or only its agent may die at every step, between two effects too, and come
back; suspicion may be wrong; an operator may force.

The guest's output is modelled as history. A *path* is a tuple of (run, epoch): the epochs of run 2 that began at epoch
3 of run 1 are ``((1, 3), (2, n))``. All that ever left a host must lie on one path, whatever the order: that is I2.
Text (reasons, causes) is left out of the states: no condition of the tables looks at it.

What is asserted in every state: I1, I2, no open gate above a running guest without ``alone`` and this owner, no cold
start past a checkpoint that a standby holds, no event that a table has no row for, and that from every state a calm
world brings the guest back to running (or to a stop that an operator chose or must decide).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from understudy.session import TABLES, Tables
from understudy.testing.walk.nature import Nature
from understudy.testing.walk.world import Bounds, Host, Violation, World

__all__ = ["Bounds", "Found", "Violation", "Walked", "walk"]


@dataclass(frozen=True, slots=True)
class Walked:
    """What a walk visited."""

    states: int
    transitions: int
    depth: int
    complete: bool  #: everything within the bounds was visited
    seconds: float
    pairs: frozenset[tuple[str, str]]  #: (state of alpha, state of beta) that occurred


class Found(NamedTuple):
    """How a world was reached first."""

    parent: World | None
    label: str
    depth: int


def walk(bounds: Bounds | None = None, tables: Tables = TABLES) -> Walked:
    """Visit every state within `bounds` and check it.

    Args:
        bounds: How far to go.
        tables: The tables to walk; tests give mutants.

    Raises:
        Violation: A rule was broken; the trace is a shortest one.
    """
    walker = Nature(bounds or Bounds(), tables)
    began = time.monotonic()
    first = walker.first()
    seen: dict[World, Found] = {first: Found(None, "", 0)}
    queue = deque([first])
    transitions = 0
    complete = True
    pairs: set[tuple[str, str]] = set()
    while queue:
        world = queue.popleft()
        here = seen[world]
        pairs.add((_name(world.hosts[0]), _name(world.hosts[1])))
        label = ""
        options = walker.successors(world)
        while True:
            try:
                label, after = next(options)
                after = walker.settle(after)
            except StopIteration:
                break
            except Violation as violation:
                raise Violation(
                    violation.problem, (*_trace(seen, world), f"{walker.doing}: {violation.problem}")
                ) from None
            transitions += 1
            if after not in seen:
                seen[after] = Found(world, label, here.depth + 1)
                queue.append(after)
        if len(seen) > walker.bounds.states:
            complete = False
            break
    depth = max(found.depth for found in seen.values())
    _check_calm(walker, seen)
    return Walked(len(seen), transitions, depth, complete, time.monotonic() - began, frozenset(pairs))


def _trace(seen: dict[World, Found], world: World) -> tuple[str, ...]:
    lines: list[str] = []
    found = seen[world]
    while found.parent is not None:
        lines.append(found.label)
        found = seen[found.parent]
    return tuple(reversed(lines))


def _name(host: Host) -> str:
    if host.machine is None:
        return "agent down" if host.up else "down"
    return f"{host.machine.side.value} {host.machine.state.value}"


def _check_calm(walker: Nature, seen: dict[World, Found]) -> None:
    # From every world, the calm steps alone must lead to one where the guest is served.
    good: set[World] = set()
    for world in seen:
        chain: dict[World, str] = {}
        here: World | None = world
        while here is not None and here not in good and not walker.is_good(here):
            chain[here] = ""
            here = _calm_step(walker, here, chain)
        if here is None:
            raise Violation(
                "the guest is stuck although nothing fails any more",
                (*_trace(seen, world), *filter(None, chain.values())),
            )
        good.update(chain)


def _calm_step(walker: Nature, world: World, chain: dict[World, str]) -> World | None:
    for label, after in walker.calm(world):
        settled = walker.settle(after)
        if settled not in chain:
            chain[world] = label
            return settled
    return None
