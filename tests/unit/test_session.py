"""The session machines event by event: what the walk, which sees all states, does not spell out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from understudy.arbiter import Record, RecordState, following
from understudy.device import ReplicationMode
from understudy.errors import StateError
from understudy.session import (
    TABLES,
    Machine,
    PrimaryState,
    SecondaryState,
    owner,
    standby,
    step,
    successor,
)
from understudy.session import effects as do
from understudy.session import events as on

P, S = PrimaryState, SecondaryState
ALONE = Record("g", 1, RecordState.ALONE, "alpha", None, None, "alpha", "x")
PROTECTED = following(ALONE, state=RecordState.PROTECTED, standby="beta", session="s", attempt="y")


def run(machine: Machine, *events: on.Event) -> tuple[Machine, Sequence[do.Effect]]:
    effects: Sequence[do.Effect] = ()
    for event in events:
        machine, effects = step(machine, event)
    return machine, effects


def won(machine: Machine) -> on.Won:
    assert machine.pending is not None
    return on.Won(machine.pending)


def kinds(effects: Sequence[do.Effect]) -> list[type[do.Effect]]:
    return [type(effect) for effect in effects if not isinstance(effect, do.Report)]


def running() -> Machine:
    machine, _ = run(owner("g", "alpha", "life"), on.Start())
    return run(machine, won(machine))[0]


def protected() -> Machine:
    machine, _ = run(running(), on.Protect("s", "beta"), on.CopyRunning("s"), on.Acknowledged("s", 1))
    return run(machine, won(machine))[0]


def holding(record: Record = PROTECTED) -> Machine:
    machine = standby("g", "beta", "life")
    return run(machine, on.Prepare("s", ALONE), on.Joined(record))[0]


# --- The primary -----------------------------------------------------------------------------------------------------


def test_a_guest_is_started_only_after_the_swap() -> None:
    machine, effects = run(owner("g", "alpha", "life"), on.Start())
    assert kinds(effects) == [do.Swap]
    machine, effects = run(machine, won(machine))
    assert machine.state is P.UNPROTECTED
    assert effects[0] == do.StartGuest(machine.joined) if machine.joined else False


def test_into_protection() -> None:
    machine, effects = run(running(), on.Protect("s", "beta"))
    assert kinds(effects) == [do.CloseGate, do.StartCopy]
    machine, effects = run(machine, on.CopyRunning("s"))
    assert effects == (do.AskCheckpoint(1),)
    machine, effects = run(machine, on.Acknowledged("s", 1))
    assert kinds(effects) == [do.Swap, do.ReleaseEpoch, do.AskCheckpoint]
    assert machine.state is P.SYNCING
    assert machine.pending is not None
    assert (machine.pending.standby, machine.pending.session) == ("beta", "s")
    machine, effects = run(machine, won(machine))
    assert machine.state is P.PROTECTED
    assert effects[0] == do.TellPeer(on.Joined(machine.joined)) if machine.joined else False


def test_a_checkpoint_without_barriers_releases_nothing_and_protects_nothing() -> None:
    machine, _ = run(running(), on.Protect("s", "beta"), on.CopyRunning("s"))
    machine, effects = run(machine, on.Acknowledged("s", 1, gated=False))
    assert effects == (do.AskCheckpoint(2),)
    assert machine.pending is None
    machine, effects = run(machine, on.Acknowledged("s", 2))
    assert kinds(effects) == [do.Swap, do.ReleaseEpoch, do.AskCheckpoint]
    machine, effects = run(machine, won(machine), on.Acknowledged("s", 3, gated=False))
    assert effects == (do.AskCheckpoint(4),)
    machine, effects = run(machine, on.Acknowledged("s", 4))
    assert effects == (do.ReleaseEpoch(4), do.AskCheckpoint(5))


@pytest.mark.parametrize("late", [on.Acknowledged("s", 1), on.Acknowledged("t", 2), on.CopyRunning("s")])
def test_late_and_foreign_acknowledgements_do_nothing(late: on.Event) -> None:
    machine = protected()
    assert step(machine, late) == (machine, ())


def test_while_the_swap_into_protection_is_on_its_way_epochs_go_on() -> None:
    machine, _ = run(running(), on.Protect("s", "beta"), on.CopyRunning("s"), on.Acknowledged("s", 1))
    machine, effects = run(machine, on.Acknowledged("s", 2))
    assert effects == (do.ReleaseEpoch(2), do.AskCheckpoint(3))
    assert machine.state is P.SYNCING


def test_silence_of_the_arbiter_repeats_the_same_swap() -> None:
    machine, effects = run(protected(), on.StreamLost("gone"))
    (first,) = (effect for effect in effects if isinstance(effect, do.Swap))
    for _ in range(3):
        assert machine.pending is not None
        machine, effects = run(machine, on.NoAnswer(machine.pending.attempt))
        assert do.Swap(first.expected, first.desired, again=True) in effects
        assert machine.state is P.SUSPECT
    machine, effects = run(machine, won(machine))
    assert kinds(effects) == [do.CutStream, do.ContinueGuest, do.OpenGate, do.TellPeer]
    assert machine.state is P.ALONE


def test_nothing_is_released_while_suspect() -> None:
    machine, effects = run(protected(), on.PeerLost(), on.Acknowledged("s", 2))
    assert effects == ()
    assert machine.state is P.SUSPECT


@pytest.mark.parametrize("state", [P.SUSPECT, P.LEAVING])
def test_fenced_until_the_record_decides(state: PrimaryState) -> None:
    event = on.PeerLost("silent") if state is P.SUSPECT else on.Unprotect("asked")
    machine, _ = run(protected(), event)
    assert machine.state is state
    assert machine.pending is not None
    assert machine.joined is not None
    theirs = following(machine.joined, state=RecordState.PROMOTING, writer="beta", attempt="b")
    machine, effects = run(machine, on.Lost(machine.pending.attempt, theirs))
    assert machine.state is P.FENCED
    assert kinds(effects) == [do.StopGuest, do.ReadRecord]
    machine, effects = run(machine, on.RecordRead(theirs))
    assert machine.state is P.FENCED
    released = following(theirs, state=RecordState.RELEASED, writer="beta", attempt="c")
    claiming, effects = run(machine, on.RecordRead(released))
    assert kinds(effects) == [do.Swap, do.CutStream]
    claimed, effects = run(claiming, won(claiming))
    assert claimed.state is P.ALONE
    assert do.OpenGate in kinds(effects)
    alone = following(theirs, state=RecordState.ALONE, writer="beta", owner="beta", standby=None, attempt="d")
    machine, effects = run(machine, on.RecordRead(alone))
    assert machine.state is P.DISCARDED
    assert kinds(effects) == [do.KillGuest, do.RemoveGate]


def test_the_first_cause_is_kept() -> None:
    machine, _ = run(protected(), on.StreamLost("reset by peer"), on.GuestGone("later"))
    assert machine.cause == "StreamLost: reset by peer"
    assert machine.pending is not None
    assert machine.pending.reason == "StreamLost: reset by peer"


def test_a_shutdown_goes_through_alone_to_stopped() -> None:
    machine, effects = run(protected(), on.GuestShutdown())
    assert machine.state is P.LEAVING
    assert kinds(effects) == [do.Swap]
    machine, effects = run(machine, won(machine))
    assert kinds(effects) == [do.CutStream, do.EndReplication, do.OpenGate, do.TellPeer, do.Swap]
    assert machine.pending is not None
    assert machine.pending.state is RecordState.STOPPED
    machine, effects = run(machine, won(machine))
    assert machine.state is P.OFF
    assert kinds(effects) == [do.KillGuest, do.RemoveGate]


def test_a_reboot_is_nobodys_business() -> None:
    machine = protected()
    after, effects = step(machine, on.GuestReset())
    assert after == machine
    assert kinds(effects) == []


def test_a_host_that_comes_back_and_finds_protected_starts_nothing() -> None:
    machine, effects = run(owner("g", "alpha", "2"), on.Recover(PROTECTED, live=False))
    assert machine.state is P.RECOVERING
    assert kinds(effects) == [do.TellPeer, do.ReadRecord]
    same, effects = run(machine, on.RecordRead(PROTECTED))
    assert do.TellPeer(on.Yield("s")) in effects
    assert run(same, on.HoldsNothing("another session"))[1] == ()
    cold, effects = run(same, on.HoldsNothing("s"))
    assert kinds(effects) == [do.Swap]
    cold, effects = run(cold, won(cold))
    assert kinds(effects) == [do.StartGuest]
    forced, effects = run(same, on.Force("ann", "the standby burnt down"))
    assert forced.pending is not None
    assert forced.pending.forced_by == "ann"
    assert forced.pending.reason == "the standby burnt down"


def test_the_preference_is_put_into_the_record_by_a_swap() -> None:
    machine, effects = run(protected(), on.Prefer(primary=True))
    assert kinds(effects) == [do.Swap]
    assert machine.pending is not None
    assert machine.pending.prefer_primary
    machine, effects = run(machine, won(machine))
    assert machine.state is P.PROTECTED
    assert kinds(effects) == [do.TellPeer]
    with pytest.raises(StateError, match="Prefer is not possible"):
        run(running(), on.Prefer(primary=True))


# --- The secondary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (on.PeerLost(), "the primary is silent"),
        (on.FenceConfirmed(), "the primary is fenced"),
        (on.Yield("s"), "the primary has lost the guest"),
        (on.Force("ann", "maintenance"), "maintenance"),
    ],
)
def test_promotion_step_by_step(event: on.Event, reason: str) -> None:
    machine, effects = run(holding(), event)
    assert machine.state is S.SUSPECT
    assert kinds(effects) == [do.CutStream]
    machine, effects = run(machine, on.StreamCut("s", 4))
    (swap,) = (effect for effect in effects if isinstance(effect, do.Swap))
    assert swap.expected == PROTECTED
    assert swap.desired.reason == reason
    assert swap.desired.forced_by == ("ann" if isinstance(event, on.Force) else "")
    machine, effects = run(machine, won(machine))
    assert effects[0] == do.MakeAgree(swap.desired)
    machine, effects = run(machine, on.Promoted())
    assert kinds(effects) == [do.Swap]
    machine, effects = run(machine, won(machine))
    assert machine.state is S.ALONE
    assert kinds(effects) == [do.OpenOutlet, do.OpenGate]
    heir = successor(machine)
    assert (heir.side, heir.state, heir.live) == (ReplicationMode.PRIMARY, P.UNPROTECTED, True)
    assert heir.joined == machine.joined
    assert heir.attempts == machine.attempts


def test_a_lost_stream_alone_is_no_reason() -> None:
    machine, effects = run(holding(), on.StreamLost("eof"), on.StreamCut("s", 4))
    assert kinds(effects) == [do.ReadRecord]
    machine, effects = run(machine, on.RecordRead(PROTECTED))
    assert effects == (do.ReadRecord(again=True),)
    machine, effects = run(machine, on.PeerLost())
    assert kinds(effects) == [do.Swap]


def test_a_copy_without_a_checkpoint_is_given_up() -> None:
    machine, effects = run(holding(), on.PeerLost(), on.StreamCut("s", 0))
    assert machine.state is S.DISCARDED
    assert kinds(effects) == [do.KillCopy, do.RemoveGate, do.TellPeer]
    assert do.TellPeer(on.HoldsNothing("s")) in effects
    assert successor(machine).state is S.EMPTY


def test_a_standby_that_the_record_does_not_prefer_waits_for_an_operator() -> None:
    machine, effects = run(
        holding(replace(PROTECTED, prefer_primary=True)), on.PeerLost(), on.StreamCut("s", 2)
    )
    assert kinds(effects) == [do.ReadRecord]
    machine, effects = run(machine, on.Force("bob", "the primary is gone"))
    assert kinds(effects) == [do.Swap]


@pytest.mark.parametrize(
    "record",
    [
        following(PROTECTED, state=RecordState.ALONE, standby=None, attempt="z"),
        following(PROTECTED, state=RecordState.PROTECTED, session="later", attempt="z"),
        following(PROTECTED, state=RecordState.PROTECTED, standby="gamma", attempt="z"),
        following(PROTECTED, state=RecordState.STOPPED, standby=None, attempt="z"),
        None,
    ],
)
def test_a_standby_that_the_record_does_not_name_discards(record: Record | None) -> None:
    machine, _ = run(holding(), on.PeerLost(), on.StreamCut("s", 4))
    assert machine.pending is not None
    machine, effects = run(machine, on.Lost(machine.pending.attempt, record))
    assert machine.state is S.DISCARDED
    assert kinds(effects)[:2] == [do.KillCopy, do.RemoveGate]


def test_a_failed_promotion_is_released_only_if_dead_and_untouched() -> None:
    promoting, _ = run(holding(), on.PeerLost(), on.StreamCut("s", 4))
    promoting, _ = run(promoting, won(promoting))
    machine, effects = run(promoting, on.PromotionFailed(dead=True, untouched=True, detail="no memory"))
    assert machine.state is S.RELEASING
    assert kinds(effects) == [do.Swap]
    machine, effects = run(machine, won(machine))
    assert machine.state is S.DISCARDED
    for dead, untouched in ((True, False), (False, True), (False, False)):
        machine, effects = run(promoting, on.PromotionFailed(dead, untouched))
        assert machine.state is S.KEPT
        assert do.Swap not in kinds(effects)


def test_the_copys_own_shutdown_and_reboot_are_ignored() -> None:
    machine = holding()
    assert step(machine, on.GuestShutdown()) == (machine, ())
    assert step(machine, on.GuestReset()) == (machine, ())


# --- Both ------------------------------------------------------------------------------------------------------------


def test_an_impossible_pair_raises_and_changes_nothing() -> None:
    machine = running()
    before = replace(machine)
    with pytest.raises(StateError, match="Promoted is not possible while the primary is unprotected"):
        step(machine, on.Promoted())
    assert machine == before


def test_every_state_takes_what_can_always_happen() -> None:
    # Whatever comes late, from the arbiter or the network, finds a row in every state.
    late: dict[ReplicationMode, tuple[type[on.Event], ...]] = {
        ReplicationMode.PRIMARY: (on.PeerLost, on.StreamLost, on.Acknowledged, on.CopyRunning, on.Failed),
        ReplicationMode.SECONDARY: (on.PeerLost, on.StreamLost, on.StreamCut, on.Failed, on.GuestGone),
    }
    words = {
        ReplicationMode.PRIMARY: (on.Ended, on.HoldsNothing),
        ReplicationMode.SECONDARY: (on.Prepare, on.Joined, on.Ended, on.Yield),
    }
    for side in ReplicationMode:
        for state, row in TABLES.of(side).items():
            for event in (*late[side], *words[side]):
                assert event in row, f"{side.value} {state.value} has no row for {event.__name__}"


def test_every_row_ends_with_a_branch_that_always_fits_or_is_a_command() -> None:
    conditional = {
        (state, event)
        for side in ReplicationMode
        for state, row in TABLES.of(side).items()
        for event, branches in row.items()
        if branches[-1].when is not None
    }
    assert conditional == {
        (P.PROTECTED, on.Prefer),
        (P.FENCED, on.Force),
        (P.RECOVERING, on.Force),
    }


def test_a_swap_never_overtakes_another() -> None:
    machine, _ = run(protected(), on.PeerLost())
    with pytest.raises(StateError, match="still without an answer"):
        machine.swap(RecordState.ALONE)


def test_an_answer_that_was_had_before_says_nothing() -> None:
    machine, _ = run(protected(), on.PeerLost())
    late = won(machine)
    machine, _ = run(machine, late)
    assert step(machine, late) == (machine, ())
    assert step(machine, on.Lost(late.record.attempt, None)) == (machine, ())
    assert step(machine, on.NoAnswer(late.record.attempt)) == (machine, ())


def test_attempts_are_never_used_twice() -> None:
    attempts = set()
    machine = running()
    for number in range(3):
        session = f"s{number}"
        machine, _ = run(
            machine, on.Protect(session, "beta"), on.CopyRunning(session), on.Acknowledged(session, 1)
        )
        machine, _ = run(machine, won(machine), on.Unprotect())
        assert machine.pending is not None
        attempts.add(machine.pending.attempt)
        machine, _ = run(machine, won(machine))
    assert len(attempts) == 3


def test_what_asks_the_arbiter_is_repeated_when_it_fails_by_itself() -> None:
    # A bug or a damaged record: not silence, and still no reason to give a guest or a copy up.
    suspect, _ = run(protected(), on.PeerLost())
    assert suspect.pending is not None
    assert suspect.joined is not None
    swap = do.Swap(suspect.joined, suspect.pending)
    again = replace(swap, again=True)
    assert again in run(suspect, on.Failed(swap))[1]
    theirs = following(suspect.joined, state=RecordState.PROMOTING, writer="beta", attempt="b")
    fenced, _ = run(suspect, on.Lost(suspect.pending.attempt, theirs))
    assert do.ReadRecord(again=True) in run(fenced, on.Failed(do.ReadRecord()))[1]
    forced, _ = run(fenced, on.Force("ann", "the standby burnt down"))
    assert do.Swap in kinds(run(forced, on.Failed(swap))[1])
    waiting, _ = run(holding(), on.StreamLost(), on.StreamCut("s", 3))
    after, effects = run(waiting, on.Failed(do.ReadRecord()))
    assert after.state is S.SUSPECT
    assert do.ReadRecord(again=True) in effects
    promoting, _ = run(waiting, on.PeerLost())
    after, effects = run(promoting, on.Failed(swap))
    assert after.state is S.SUSPECT
    assert do.Swap in kinds(effects)
