"""Every state that two hosts, an arbiter and a bad network can reach; and that breaking any rule is found."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from tests.testbeds.rounds import LONG
from understudy.device import Mode
from understudy.session import TABLES, Machine, PrimaryState, SecondaryState, Tables, holding, owning
from understudy.session import effects as do
from understudy.session import events as on
from understudy.session.machine import changed
from understudy.session.rows import current, go, in_promotion, is_mine, joined, read, read_again, stay
from understudy.testing.walk import Bounds, Violation, Walked, walk

P, S = PrimaryState, SecondaryState
ONE = Bounds(epochs=1, messages=1, host_crashes=0)

SHORT = {
    "calm": replace(ONE, epochs=2),
    "colo": Bounds(mode=Mode.COLO, epochs=1, messages=1, host_crashes=0),
    "host-crash": replace(ONE, host_crashes=1),
    "agent-crash": replace(ONE, agent_crashes=1),
    "force": replace(ONE, forces=1),
    "failure": replace(ONE, failures=1),
    "unprotect": replace(ONE, unprotects=1),
    "shutdown": replace(ONE, shutdowns=1),
    "preference": replace(ONE, preferences=1),
    "prefer-primary": replace(ONE, prefer_primary=True, forces=1),
}
DEEP = {
    "two-sessions": replace(ONE, sessions=2),
    "three-epochs": Bounds(epochs=3, host_crashes=1),
    "colo-crash": Bounds(mode=Mode.COLO, host_crashes=1),
    "two-crashes": replace(ONE, host_crashes=2),
    "host-and-agent": replace(ONE, host_crashes=1, agent_crashes=1),
    "two-agents": replace(ONE, agent_crashes=2),
    "crash-and-force": replace(ONE, host_crashes=1, forces=1),
    "crash-and-failure": replace(ONE, host_crashes=1, failures=1),
    "failure-and-force": replace(ONE, failures=1, forces=1),
    "crash-and-unprotect": replace(ONE, host_crashes=1, unprotects=1),
    "crash-and-shutdown": replace(ONE, host_crashes=1, shutdowns=1),
    "crash-and-preference": replace(ONE, host_crashes=1, preferences=1),
    "there-and-back": replace(ONE, sessions=2, host_crashes=1, states=3_000_000),
}


# The deep ones take minutes each: only with UNDERSTUDY_ROUNDS=long.
WALKS = SHORT | (DEEP if LONG else {})


@functools.cache
def walked(name: str) -> Walked:
    return walk(WALKS[name])


@pytest.mark.parametrize("name", WALKS)
def test_walk(name: str, record_property: Any) -> None:
    result = walked(name)
    assert result.complete or result.states >= WALKS[name].states
    record_property("states", result.states)


def test_the_walk_reaches_every_state_of_both_tables() -> None:
    seen: set[str] = set()
    for name in ("failure", "shutdown"):
        for pair in walked(name).pairs:
            seen.update(pair)
    # A session that is over is handed to a new machine at once; those states are seen only in between.
    passing = {P.DISCARDED, S.DISCARDED, S.ALONE}
    wanted = {f"primary {s.value}" for s in P if s not in passing} | {
        f"secondary {s.value}" for s in S if s not in passing
    }
    assert wanted <= seen


# --- Mutants: each breaks one rule, and the walk must find a way in which that hurts ------------------------------


def _ask_and_release(machine: Machine, event: Any) -> Any:
    machine, effects = owning.ask_checkpoint(machine, event)
    return machine, (*effects, do.ReleaseEpoch(machine.asked))


def _remove_gate_first(machine: Machine, _: Any) -> Any:
    return machine, (do.RemoveGate(), do.KillGuest())


def _guess_held(machine: Machine, _: Any) -> Any:
    return replace(machine, loaded=1, go="silence"), ()


def _always(_: Machine, __: Any) -> bool:
    return True


def _is_alone(machine: Machine, event: Any) -> bool:
    return event.live and is_mine(machine, event)


def _prepared(machine: Machine, event: Any) -> Any:
    machine, effects = holding.prepare(machine, event)
    return replace(machine, joined=current(event)), effects


MUTANTS: dict[str, tuple[Bounds, Tables, str]] = {
    "release before acknowledgement": (
        replace(ONE, epochs=2),
        changed(
            TABLES,
            P.SYNCING,
            on.Acknowledged,
            stay(
                owning.swap_protected, owning.release, _ask_and_release, when=lambda m, _: m.pending is None
            ),
            stay(),
        ),
        "I1",
    ),
    "outlet before the swap": (
        ONE,
        changed(TABLES, S.PROMOTING, on.Promoted, stay(holding.open_outlet, holding.swap_alone)),
        "open gate although",
    ),
    "start on protected": (
        replace(ONE, host_crashes=1),
        changed(TABLES, P.OFF, on.Recover, go(P.ALONE, owning.recovered, owning.start_guest)),
        "open gate although",
    ),
    "cold start without asking the standby": (
        replace(ONE, host_crashes=1),
        changed(TABLES, P.OFF, on.Recover, go(P.RECOVERING, owning.recovered, owning.swap_alone)),
        "cold start although",
    ),
    "swap from a record that does not name the standby": (
        ONE,
        changed(
            changed(TABLES, S.EMPTY, on.Prepare, go(S.SYNCING, _prepared)),
            S.SYNCING,
            on.PeerLost,
            go(S.SUSPECT, holding.silent_peer, holding.swap_promoting),
        ),
        "may not become promoting",
    ),
    "promotion from whatever record counts": (
        ONE,
        changed(TABLES, S.SUSPECT, on.Lost, stay(joined, holding.swap_promoting)),
        "may not become promoting",
    ),
    "gate removed first": (
        replace(ONE, forces=1),
        changed(
            changed(TABLES, P.FENCED, on.RecordRead, go(P.DISCARDED, joined, _remove_gate_first)),
            P.SUSPECT,
            on.Lost,
            go(P.FENCED, joined, owning.stop_guest, read, when=in_promotion),
            go(P.DISCARDED, joined, _remove_gate_first),
        ),
        "removes the gate above a guest",
    ),
    "gate opened without a swap": (
        ONE,
        changed(TABLES, P.PROTECTED, on.StreamLost, go(P.ALONE, owning.cut, owning.run_on)),
        "although the record says",
    ),
    "gate opened before the planned swap": (
        replace(ONE, unprotects=1),
        changed(TABLES, P.PROTECTED, on.Unprotect, go(P.LEAVING, owning.run_on, owning.swap_alone)),
        "although the record says",
    ),
    "silence of the arbiter taken for a yes": (
        ONE,
        changed(TABLES, P.SUSPECT, on.NoAnswer, go(P.ALONE, owning.run_on)),
        "although the record says",
    ),
    "a lost swap taken for won": (
        ONE,
        changed(TABLES, P.SUSPECT, on.Lost, go(P.ALONE, joined, owning.run_on)),
        "although the record says",
    ),
    "promotion with the stream open": (
        ONE,
        changed(TABLES, S.STANDBY, on.PeerLost, go(S.SUSPECT, _guess_held, holding.swap_promoting)),
        "stream is open",
    ),
    "the record that was read believed after a restart": (
        replace(ONE, agent_crashes=1),
        changed(
            TABLES,
            P.OFF,
            on.Recover,
            go(P.ALONE, owning.recovered, owning.run_on, when=_is_alone),
            *TABLES.primary[P.OFF][on.Recover],
        ),
        "although the record says",
    ),
    "a standby that denies what it holds": (
        replace(ONE, host_crashes=1),
        changed(TABLES, S.STANDBY, on.Yield, stay(holding.say_nothing_held)),
        "cold start although",
    ),
    "a claim while the standby promotes": (
        ONE,
        changed(TABLES, P.FENCED, on.RecordRead, go(P.SUSPECT, joined, owning.swap_alone)),
        "only the standby or the owner by an operator's force",
    ),
    "promotion although the record prefers the primary": (
        replace(ONE, prefer_primary=True),
        changed(
            TABLES,
            S.SUSPECT,
            on.StreamCut,
            stay(holding.note_held, holding.swap_promoting, when=lambda m, _: m.joined is not None),
            *TABLES.secondary[S.SUSPECT][on.StreamCut],
        ),
        "prefers the primary",
    ),
    "a fenced guest that nobody looks after": (
        replace(ONE, failures=1),
        changed(TABLES, P.SUSPECT, on.Lost, go(P.FENCED, joined, owning.stop_guest, when=_always)),
        "stuck",
    ),
    "a standby that keeps silent about holding nothing": (
        replace(ONE, host_crashes=2, states=12_000),
        changed(
            changed(TABLES, S.EMPTY, on.Yield, stay()),
            S.EMPTY,
            on.Recover,
            stay(holding.recovered),
        ),
        "stuck",
    ),
    "a suspicion that is forgotten": (
        ONE,
        changed(TABLES, P.PROTECTED, on.StreamLost, stay()),
        "stuck",
    ),
    "a record that is read and not acted upon": (
        replace(ONE, host_crashes=1),
        changed(TABLES, S.SUSPECT, on.RecordRead, stay(read_again)),
        "stuck",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_walk_finds_mutants(name: str) -> None:
    bounds, tables, problem = MUTANTS[name]
    with pytest.raises(Violation, match=problem) as caught:
        walk(bounds, tables)
    assert caught.value.trace
    assert str(len(caught.value.trace)) in str(caught.value)


def test_the_trace_of_a_violation_is_a_shortest_one() -> None:
    bounds, tables, _ = MUTANTS["release before acknowledgement"]
    with pytest.raises(Violation) as caught:
        walk(bounds, tables)
    *steps, last = caught.value.trace
    assert steps == [
        "alpha is asked to protect",
        "beta is told Prepare(alone 1)",
        "alpha's first copy is complete",
        "beta holds checkpoint 1",
        "alpha hears Acknowledged(1)",
        "alpha does ReleaseEpoch",
        "the arbiter makes alpha's swap to protected",
    ]
    assert last.startswith("alpha does ReleaseEpoch: I1: alpha releases")
