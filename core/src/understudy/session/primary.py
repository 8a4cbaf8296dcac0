"""The table of the primary: the host that owns a guest.

    unprotected -> syncing -> protected -> suspect -> alone, or fenced

Read a row as: in this state, on this event, the first branch whose condition holds. The order of actions in a branch
is the order in which the engine does them.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from understudy.session import effects as do
from understudy.session import events as on
from understudy.session.machine import Branch, PrimaryState, Table
from understudy.session.owning import (
    ask_checkpoint,
    begin_session,
    cut,
    discard,
    found_idle,
    found_live,
    found_promoting,
    found_protected_and_dead,
    found_released_and_dead,
    found_stopped,
    guest_dead,
    holds_nothing_of_it,
    is_about_another,
    is_asked,
    is_first_gated,
    is_gated,
    is_known,
    is_mine_and_dead,
    is_mine_protected_and_dead,
    is_nobodys,
    is_of_session,
    is_shut,
    may_force,
    not_busy,
    note_acknowledged,
    note_shut,
    recovered,
    release,
    run_on,
    start_copy,
    start_guest,
    stop_guest,
    swap_alone,
    swap_preference,
    swap_protected,
    swap_start,
    swap_stopped,
    tell_joined,
    won_protected,
    won_protected_but_dead,
    yield_guest,
)
from understudy.session.rows import (
    ask_again,
    busy,
    by_force,
    ended,
    failed_is,
    first_cause,
    go,
    ignoring,
    in_promotion,
    is_live,
    is_mine,
    is_old,
    joined,
    perform,
    read,
    read_again,
    report,
    settled_stopped,
    stay,
    without_answer,
)

__all__ = ["PRIMARY"]

S = PrimaryState

# --- Rows that several states share --------------------------------------------------------------------------------

# The record is not what the swap started from: look whose turn it is.
LOST: Final = (
    go(S.OFF, joined, discard, guest_dead, when=settled_stopped),
    go(S.RECOVERING, joined, yield_guest, read, when=is_mine_protected_and_dead),
    go(S.RECOVERING, joined, swap_alone, when=is_mine_and_dead),
    go(S.SUSPECT, joined, swap_alone, cut, when=is_mine),
    go(S.FENCED, joined, first_cause, stop_guest, report("fenced"), read, when=in_promotion),
    go(S.FENCED, joined, first_cause, stop_guest, report("no-record"), read, when=is_nobodys),
    go(S.DISCARDED, joined, discard, guest_dead, report("discarded")),
)

# A poll of the record while this host waits. Nothing is decided while a swap is outstanding, or on an old answer.
POLLED: Final = (
    stay(when=busy),
    stay(read_again, when=is_old),
    go(S.OFF, joined, discard, guest_dead, when=settled_stopped),
    go(S.RECOVERING, joined, yield_guest, read_again, when=is_mine_protected_and_dead),
    go(S.RECOVERING, joined, swap_alone, when=is_mine_and_dead),
    go(S.SUSPECT, joined, swap_alone, cut, when=is_mine),
    go(S.FENCED, joined, yield_guest, read_again, when=in_promotion),
    stay(read_again, when=is_nobodys),
    go(S.DISCARDED, joined, discard, guest_dead, report("discarded")),
)


# The swap succeeded: go on with what this host has.
def won(to: PrimaryState) -> tuple[Branch, ...]:
    """Return the row of `Won` for a state that leaves protection towards `to`."""
    return (
        go(S.RECOVERING, joined, yield_guest, read, when=won_protected_but_dead),
        go(S.LEAVING if to is S.UNPROTECTED else S.SUSPECT, joined, swap_alone, when=won_protected),
        go(
            S.STOPPING,
            joined,
            cut,
            perform(do.EndReplication(), do.OpenGate()),
            ended,
            swap_stopped,
            when=is_shut,
        ),
        go(to, joined, cut, run_on, ended, report(to.value), when=is_live),
        go(S.ALONE, joined, start_guest, report("started")),
    )


RUNNING: Final = {
    on.Protect: (go(S.SYNCING, begin_session, start_copy, report("syncing")),),
    on.GuestShutdown: (go(S.STOPPING, note_shut, swap_stopped),),
    on.GuestGone: (go(S.OFF, guest_dead, first_cause, discard, report("guest-gone")),),
    on.Failed: (
        go(S.OFF, guest_dead, first_cause, discard, report("start-failed"), when=failed_is(do.StartGuest)),
        # What failed cut off the rest of its row: the other host is told first, whatever fails again here.
        stay(report("failed"), ended, run_on, when=failed_is(do.CutStream, do.ContinueGuest)),
        stay(report("failed"), ended, perform(do.OpenGate()), when=failed_is(do.OpenGate)),
        stay(report("failed")),
    ),
    **ignoring(
        on.Acknowledged,
        on.CopyRunning,
        on.Ended,
        on.GuestReset,
        on.HoldsNothing,
        on.NoAnswer,
        on.PeerLost,
        on.RecordRead,
        on.StreamLost,
        on.FenceConfirmed,
    ),
}

# What may come late, or says nothing to a host that only waits for the record.
IGNORED: Final = ignoring(
    on.Acknowledged,
    on.CopyRunning,
    on.FenceConfirmed,
    on.GuestReset,
    on.PeerLost,
    on.StreamLost,
    on.Unprotect,
)

# Out of syncing before any swap was sent: the record still says `alone`.
ABORT: Final = (
    go(S.SUSPECT, first_cause, cut, report("suspect"), when=busy),
    go(S.UNPROTECTED, first_cause, cut, run_on, ended, report("not-protected")),
)
SUSPICION: Final = (
    go(S.SUSPECT, first_cause, cut, report("suspect"), when=busy),
    go(S.SUSPECT, first_cause, swap_alone, cut, report("suspect")),
)
ACKNOWLEDGED: Final = (
    stay(note_acknowledged, release, ask_checkpoint, when=is_gated),
    stay(note_acknowledged, ask_checkpoint, when=is_asked),
    stay(),
)
GONE: Final = (stay(guest_dead, first_cause, discard, report("guest-gone")),)

# --- The table -----------------------------------------------------------------------------------------------------

PRIMARY: Final[Table] = MappingProxyType(
    {
        S.OFF: {
            on.Start: (go(S.STARTING, swap_start),),
            on.Recover: (
                go(S.RECOVERING, recovered, yield_guest, read, when=found_protected_and_dead),
                go(S.RECOVERING, recovered, swap_alone, when=found_released_and_dead),
                go(S.SUSPECT, recovered, swap_alone, cut, when=found_live),
                go(S.FENCED, recovered, stop_guest, read, when=found_promoting),
                stay(recovered, discard, guest_dead, when=found_stopped),
                stay(recovered, when=found_idle),
                go(S.DISCARDED, recovered, discard, guest_dead),
            ),
            on.Failed: (
                stay(report("failed"), discard, when=failed_is(do.KillGuest)),
                stay(report("failed"), perform(do.RemoveGate()), when=failed_is(do.RemoveGate)),
                stay(report("failed")),
            ),
            **IGNORED,
            **ignoring(on.Ended, on.GuestGone, on.GuestShutdown, on.HoldsNothing, on.NoAnswer, on.RecordRead),
        },
        S.STARTING: {
            on.Won: (go(S.UNPROTECTED, joined, start_guest, report("started")),),
            on.Lost: LOST,
            on.NoAnswer: without_answer(),
            on.Failed: (stay(report("failed"), ask_again),),
            **IGNORED,
            **ignoring(on.Ended, on.GuestGone, on.GuestShutdown, on.HoldsNothing, on.RecordRead),
        },
        S.UNPROTECTED: RUNNING,
        S.SYNCING: {
            on.CopyRunning: (stay(ask_checkpoint, when=is_of_session), stay()),
            on.Acknowledged: (
                stay(note_acknowledged, swap_protected, release, ask_checkpoint, when=is_first_gated),
                *ACKNOWLEDGED,
            ),
            on.Won: (go(S.PROTECTED, joined, tell_joined, report("protected")),),
            on.Lost: LOST,
            on.NoAnswer: without_answer(),
            on.StreamLost: ABORT,
            on.PeerLost: ABORT,
            on.Failed: (go(S.SUSPECT, first_cause, ask_again, cut, report("suspect"), when=busy), *ABORT),
            on.HoldsNothing: (
                stay(when=is_about_another),
                *ABORT,
            ),
            on.Unprotect: (
                go(S.LEAVING, when=busy),
                go(S.UNPROTECTED, cut, run_on, ended, report("unprotected")),
            ),
            on.GuestShutdown: (
                go(S.LEAVING, note_shut, when=busy),
                go(
                    S.STOPPING,
                    note_shut,
                    cut,
                    perform(do.EndReplication(), do.OpenGate()),
                    ended,
                    swap_stopped,
                ),
            ),
            on.GuestGone: (
                go(S.SUSPECT, guest_dead, first_cause, cut, discard, report("guest-gone"), when=busy),
                go(S.OFF, guest_dead, first_cause, cut, discard, ended, report("guest-gone")),
            ),
            **ignoring(on.Ended, on.FenceConfirmed, on.GuestReset, on.RecordRead),
        },
        S.PROTECTED: {
            on.Acknowledged: ACKNOWLEDGED,
            on.StreamLost: SUSPICION,
            on.PeerLost: SUSPICION,
            on.Failed: (
                go(S.SUSPECT, first_cause, ask_again, cut, report("suspect"), when=busy),
                *SUSPICION,
            ),
            on.HoldsNothing: (
                stay(when=is_about_another),
                *SUSPICION,
            ),
            on.Ended: (
                stay(when=is_known),
                *SUSPICION,
            ),
            on.Unprotect: (go(S.LEAVING, when=busy), go(S.LEAVING, swap_alone)),
            on.Prefer: (stay(swap_preference, when=not_busy),),
            on.Won: (stay(joined, tell_joined),),
            on.Lost: LOST,
            on.NoAnswer: (stay(ask_again),),
            on.GuestShutdown: (go(S.LEAVING, note_shut, when=busy), go(S.LEAVING, note_shut, swap_alone)),
            on.GuestReset: (stay(report("guest-reset")),),
            on.GuestGone: (
                go(S.SUSPECT, guest_dead, first_cause, cut, discard, report("guest-gone"), when=busy),
                go(
                    S.RECOVERING,
                    guest_dead,
                    first_cause,
                    cut,
                    discard,
                    yield_guest,
                    report("guest-gone"),
                    read,
                ),
            ),
            **ignoring(on.CopyRunning, on.FenceConfirmed, on.RecordRead),
        },
        S.LEAVING: {
            on.Acknowledged: ACKNOWLEDGED,
            on.Won: won(S.UNPROTECTED),
            on.Lost: LOST,
            on.NoAnswer: without_answer(),
            on.StreamLost: (go(S.SUSPECT, first_cause, cut),),
            on.PeerLost: (go(S.SUSPECT, first_cause, cut),),
            on.Failed: (go(S.SUSPECT, first_cause, ask_again, cut),),
            on.GuestShutdown: (stay(note_shut),),
            on.GuestGone: GONE,
            **ignoring(
                on.CopyRunning,
                on.Ended,
                on.FenceConfirmed,
                on.GuestReset,
                on.HoldsNothing,
                on.RecordRead,
                on.Unprotect,
            ),
        },
        S.SUSPECT: {
            on.Won: won(S.ALONE),
            on.Lost: LOST,
            on.NoAnswer: without_answer(),
            on.GuestShutdown: (stay(note_shut),),
            on.GuestGone: GONE,
            on.Failed: (
                stay(report("failed"), discard, ask_again, when=failed_is(do.KillGuest)),
                stay(report("failed"), ask_again),
            ),
            **IGNORED,
            **ignoring(on.Ended, on.HoldsNothing, on.RecordRead),
        },
        S.ALONE: RUNNING,
        S.FENCED: {
            on.RecordRead: POLLED,
            on.Won: won(S.ALONE),
            on.Lost: LOST,
            on.NoAnswer: without_answer(),
            on.Force: (stay(by_force, swap_alone, when=may_force),),
            on.Ended: (stay(when=busy), stay(read)),
            on.GuestShutdown: (stay(note_shut),),
            on.GuestGone: GONE,
            on.Failed: (
                stay(report("failed"), discard, read_again, when=failed_is(do.KillGuest)),
                stay(report("failed"), stop_guest, read_again, when=failed_is(do.StopGuest)),
                stay(report("failed"), ask_again, when=failed_is(do.Swap)),
                stay(report("failed"), read_again),
            ),
            **IGNORED,
            **ignoring(on.HoldsNothing),
        },
        S.RECOVERING: {
            on.RecordRead: POLLED,
            on.HoldsNothing: (stay(swap_alone, when=holds_nothing_of_it), stay()),
            on.Force: (stay(by_force, swap_alone, when=may_force),),
            on.Won: won(S.ALONE),
            on.Lost: LOST,
            on.NoAnswer: without_answer(),
            on.Ended: (stay(when=busy), stay(read)),
            on.Failed: (
                stay(report("failed"), ask_again, when=failed_is(do.Swap)),
                stay(report("failed"), discard, read_again),
            ),
            **IGNORED,
            **ignoring(on.GuestGone, on.GuestShutdown),
        },
        S.STOPPING: {
            on.Won: (go(S.OFF, joined, discard, guest_dead, report("stopped")),),
            on.Lost: LOST,
            on.NoAnswer: without_answer(),
            on.Failed: (stay(report("failed"), ask_again),),
            **IGNORED,
            **ignoring(on.Ended, on.GuestGone, on.GuestShutdown, on.HoldsNothing, on.RecordRead),
        },
        S.DISCARDED: {
            on.Failed: (
                stay(report("failed"), discard, when=failed_is(do.KillGuest)),
                stay(report("failed"), perform(do.RemoveGate()), when=failed_is(do.RemoveGate)),
                stay(report("failed")),
            ),
            **IGNORED,
            **ignoring(on.Ended, on.GuestGone, on.GuestShutdown, on.HoldsNothing, on.NoAnswer, on.RecordRead),
        },
    }
)
