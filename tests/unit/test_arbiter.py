"""The record and the table of changes that the rules of ownership allow."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.arbiter import CHANGES, Record, RecordState, check_change, following
from understudy.errors import ArbiterError, IllegalChange

ALONE = Record("g", 4, RecordState.ALONE, "alpha", None, None, "alpha", "a4")
PROTECTED = following(
    ALONE, state=RecordState.PROTECTED, standby="beta", session="s1", attempt="a5", writer="alpha"
)
PROMOTING = following(PROTECTED, state=RecordState.PROMOTING, writer="beta", attempt="b1")
RELEASED = following(PROMOTING, state=RecordState.RELEASED, writer="beta", attempt="b2")
STOPPED = following(ALONE, state=RecordState.STOPPED, attempt="a6")


def alone(old: Record | None, host: str, **changes: object) -> Record:
    values = {
        "state": RecordState.ALONE,
        "owner": host,
        "writer": host,
        "standby": None,
        "prefer_primary": False,
    }
    return following(old, **(values | {"attempt": "new"} | changes))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (None, alone(None, "alpha", guest="g")),
        (ALONE, alone(ALONE, "alpha")),
        (ALONE, PROTECTED),
        (ALONE, STOPPED),
        (PROTECTED, alone(PROTECTED, "alpha")),
        (PROTECTED, following(PROTECTED, prefer_primary=True, attempt="new")),
        (PROTECTED, PROMOTING),
        (PROMOTING, alone(PROMOTING, "beta")),
        (PROMOTING, RELEASED),
        (PROMOTING, alone(PROMOTING, "alpha", forced_by="mallory")),
        (RELEASED, alone(RELEASED, "alpha")),
        (STOPPED, alone(STOPPED, "alpha")),
        (STOPPED, alone(STOPPED, "beta", forced_by="mallory")),
    ],
)
def test_every_legal_change(old: Record | None, new: Record) -> None:
    change = check_change(old, new)
    assert change.new is new.state


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (ALONE, alone(ALONE, "beta"), "only the owner"),
        (PROTECTED, alone(PROTECTED, "beta"), "only the owner"),
        (PROTECTED, replace(PROMOTING, writer="alpha"), "only the standby"),
        (PROTECTED, replace(PROMOTING, standby="gamma", writer="gamma"), "must stay"),
        (PROTECTED, replace(PROMOTING, session="s2"), "must stay"),
        (PROTECTED, replace(PROMOTING, owner="beta", standby="alpha"), "must stay"),
        (PROTECTED, replace(PROMOTING, generation=9), "generation must become 6"),
        (PROTECTED, replace(PROMOTING, guest="h"), "guest is h"),
        (PROTECTED, replace(PROMOTING, attempt=""), "no attempt"),
        (PROTECTED, replace(PROTECTED, generation=6), "identity"),
        (replace(PROTECTED, prefer_primary=True), PROMOTING, "prefers the primary"),
        (PROMOTING, alone(PROMOTING, "alpha"), "operator's force"),
        (PROMOTING, replace(RELEASED, writer="alpha"), "only the standby"),
        (RELEASED, alone(RELEASED, "beta"), "only the owner"),
        (RELEASED, following(RELEASED, state=RecordState.PROMOTING, attempt="x"), "may become: alone"),
        (STOPPED, alone(STOPPED, "beta"), "force"),
        (ALONE, replace(PROTECTED, standby="alpha"), "same host"),
        (ALONE, replace(PROTECTED, session=None), "must name"),
        (None, PROTECTED, "may become: alone"),
        (ALONE, replace(STOPPED, standby="beta"), "no standby"),
        (PROTECTED, alone(PROTECTED, "alpha", owner="beta"), "owner must be"),
    ],
)
def test_illegal_changes_say_which_condition_is_missing(
    old: Record | None, new: Record, problem: str
) -> None:
    with pytest.raises(IllegalChange, match=problem):
        check_change(old, new)


def test_only_promotion_and_claims_move_a_guest_to_another_host() -> None:
    # Whatever two records of two hosts look like: a running guest changes hands by promoting -> alone alone.
    hosts = ("alpha", "beta")
    records = [
        Record("g", 1, state, owner, standby, "s", writer, "x", forced_by=force)
        for state, owner, standby, writer, force in itertools.product(
            RecordState, hosts, (*hosts, None), hosts, ("", "op")
        )
    ]
    moved = set()
    for old, new in itertools.product(records, records):
        candidate = replace(new, generation=2, attempt="y")
        try:
            check_change(old, candidate)
        except IllegalChange:
            continue
        if candidate.owner != old.owner:
            moved.add(
                (old.state, candidate.state, bool(candidate.forced_by) or candidate.writer == old.standby)
            )
    assert moved == {
        (RecordState.PROMOTING, RecordState.ALONE, True),
        (RecordState.STOPPED, RecordState.ALONE, True),
    }


def test_every_row_of_the_table_can_be_reached() -> None:
    assert len({(c.old, c.new, c.writer, c.forced) for c in CHANGES}) == len(CHANGES)


texts = st.text(max_size=8)
records = st.builds(
    Record,
    guest=texts,
    generation=st.integers(0, 2**40),
    state=st.sampled_from(RecordState),
    owner=texts,
    standby=st.none() | texts,
    session=st.none() | texts,
    writer=texts,
    attempt=texts,
    reason=texts,
    forced_by=texts,
    prefer_primary=st.booleans(),
    written_at=texts,
)


@given(records)
def test_json_round_trip(record: Record) -> None:
    assert Record.from_json(record.to_json()) == record


@given(records, st.sampled_from(sorted(ALONE.to_json())), st.sampled_from([[], {}, 1.5, b""]))
def test_json_that_is_no_record_is_refused(record: Record, key: str, junk: object) -> None:
    broken = record.to_json() | {key: junk}
    with pytest.raises(ArbiterError):
        Record.from_json(broken)
    del broken[key]
    with pytest.raises(ArbiterError):
        Record.from_json(broken)


@given(st.none() | records, records)
def test_check_change_answers_or_raises_its_own_error(old: Record | None, new: Record) -> None:
    try:
        assert check_change(old, new) in CHANGES
    except IllegalChange:
        return  # anything else is a failure
