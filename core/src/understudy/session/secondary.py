"""The table of the secondary: the host that holds the copy of a guest.

    empty -> syncing -> standby -> suspect -> promoting -> alone (on its host), or discarded

The stream is cut before anything is asked of the arbiter: from then on nothing can be acknowledged, so that the
primary cannot let anything new out, and the checkpoint that the copy holds is final.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from understudy.session import effects as do
from understudy.session import events as on
from understudy.session.holding import (
    both_hold,
    copy_dead,
    cut,
    discard,
    fenced_peer,
    found_copy,
    found_dead_promotion,
    found_nothing,
    found_promotion,
    found_touched,
    holds,
    holds_and_may,
    is_for_us,
    is_newer,
    is_not_for_us,
    is_of_another,
    is_other_cut,
    is_our_lost_promotion,
    is_our_promotion,
    is_ours_alone,
    is_ready,
    is_ready_by_force,
    is_repeat,
    kill,
    make_agree,
    may_promote,
    names_us,
    note_failure,
    note_held,
    open_outlet,
    prepare,
    recovered,
    say_nothing_held,
    silent_peer,
    start_guest,
    swap_alone,
    swap_promoting,
    swap_released,
    yielding_peer,
)
from understudy.session.machine import SecondaryState, Table
from understudy.session.rows import (
    answered,
    ask_again,
    busy,
    by_force,
    ended,
    failed_is,
    first_cause,
    go,
    ignoring,
    is_dead,
    is_live,
    is_old,
    joined,
    perform,
    read,
    read_again,
    report,
    stay,
    without_answer,
)

__all__ = ["SECONDARY"]

S = SecondaryState

# --- Rows that several states share --------------------------------------------------------------------------------

GIVE_UP: Final = (go(S.DISCARDED, first_cause, discard, copy_dead, say_nothing_held, report("copy-lost")),)
SUSPICION: Final = (go(S.SUSPECT, first_cause, silent_peer, cut, report("suspect")),)
FENCE: Final = (go(S.SUSPECT, first_cause, fenced_peer, cut, report("suspect")),)
YIELDED: Final = (
    go(S.SUSPECT, first_cause, yielding_peer, cut, report("suspect"), when=is_for_us),
    stay(say_nothing_held),
)
ENDED: Final = (
    stay(when=is_of_another),
    go(S.DISCARDED, answered, discard, copy_dead, report("discarded")),
)
NEWER_SESSION: Final = (
    stay(when=is_repeat),
    go(S.DISCARDED, answered, discard, copy_dead, report("discarded")),
)

# What the record says while the copy waits with its stream cut.
LOOKED: Final = (
    go(S.DISCARDED, joined, discard, say_nothing_held, when=is_dead),
    stay(joined, swap_promoting, when=may_promote),
    stay(joined, read_again, when=names_us),
    go(S.PROMOTING, joined, make_agree, when=is_our_promotion),
    go(S.DISCARDED, joined, discard, copy_dead, say_nothing_held, report("discarded")),
)
# The record says `alone` and it is ours: what is here is the guest.
OWNED: Final = (
    go(S.ALONE, joined, discard, start_guest, report("started"), when=is_dead),
    # It runs and has a way out: that is the end of the takeover. What it needs no more is cleaned up afterwards.
    go(S.ALONE, joined, open_outlet, report("promoted"), perform(do.OpenGate())),
)

IGNORED: Final = ignoring(on.Acknowledged, on.CopyRunning, on.GuestReset, on.GuestShutdown)
SETTLED: Final = ignoring(on.FenceConfirmed, on.Joined, on.PeerLost, on.Prepare, on.StreamCut, on.StreamLost)

# --- The table -----------------------------------------------------------------------------------------------------

SECONDARY: Final[Table] = MappingProxyType(
    {
        S.EMPTY: {
            on.Prepare: (go(S.SYNCING, prepare, report("syncing")),),
            on.Recover: (
                go(S.SUSPECT, recovered, cut, report("adopted"), when=found_copy),
                stay(recovered, say_nothing_held, when=found_nothing),
                go(S.PROMOTING, recovered, cut, when=found_promotion),
                go(S.RELEASING, recovered, swap_released, when=found_dead_promotion),
                go(S.KEPT, recovered, report("kept"), read, when=found_touched),
                go(S.DISCARDED, recovered, discard, copy_dead),
            ),
            on.Yield: (stay(say_nothing_held, read),),
            on.Joined: (stay(read),),
            on.RecordRead: (go(S.RELEASING, joined, swap_released, when=is_our_lost_promotion), stay()),
            **IGNORED,
            **ignoring(
                on.Ended,
                on.Failed,
                on.FenceConfirmed,
                on.GuestGone,
                on.NoAnswer,
                on.PeerLost,
                on.StreamCut,
                on.StreamLost,
            ),
        },
        S.SYNCING: {
            on.Joined: (go(S.STANDBY, joined, report("standby"), when=is_newer), stay()),
            on.PeerLost: SUSPICION,
            on.FenceConfirmed: FENCE,
            on.Yield: YIELDED,
            on.StreamLost: (go(S.SUSPECT, first_cause, cut, report("suspect")),),
            on.Ended: ENDED,
            on.Prepare: NEWER_SESSION,
            on.Failed: GIVE_UP,
            on.GuestGone: GIVE_UP,
            **IGNORED,
            **ignoring(on.NoAnswer, on.RecordRead, on.StreamCut),
        },
        S.STANDBY: {
            on.Joined: (stay(joined, when=is_newer), stay()),
            on.PeerLost: SUSPICION,
            on.FenceConfirmed: FENCE,
            on.Yield: YIELDED,
            on.Force: (go(S.SUSPECT, first_cause, by_force, cut, report("suspect")),),
            on.StreamLost: (go(S.SUSPECT, first_cause, cut, report("suspect")),),
            on.Ended: ENDED,
            on.Prepare: NEWER_SESSION,
            on.Failed: (stay(report("failed")),),
            on.GuestGone: GIVE_UP,
            **IGNORED,
            **ignoring(on.NoAnswer, on.RecordRead, on.StreamCut),
        },
        S.SUSPECT: {
            on.StreamCut: (
                stay(when=is_other_cut),
                stay(note_held, swap_promoting, when=holds_and_may),
                stay(note_held, read, when=holds),
                *GIVE_UP,
            ),
            on.PeerLost: (stay(silent_peer, swap_promoting, when=is_ready), stay(silent_peer)),
            on.FenceConfirmed: (stay(fenced_peer, swap_promoting, when=is_ready), stay(fenced_peer)),
            on.Yield: (
                stay(say_nothing_held, when=is_not_for_us),
                stay(yielding_peer, swap_promoting, when=is_ready),
                stay(yielding_peer),
            ),
            on.Force: (stay(by_force, swap_promoting, when=is_ready_by_force), stay(by_force)),
            on.RecordRead: (stay(when=busy), stay(read_again, when=is_old), *LOOKED),
            on.Won: (
                go(S.RELEASING, joined, swap_released, when=is_dead),
                go(S.PROMOTING, joined, make_agree, report("promoting")),
            ),
            on.Lost: LOOKED,
            on.NoAnswer: without_answer(),
            on.Joined: (stay(joined, when=is_newer), stay()),
            on.Ended: ENDED,
            on.Prepare: NEWER_SESSION,
            on.Failed: (
                stay(report("failed"), ask_again, when=busy),
                stay(report("failed"), read_again, when=failed_is(do.ReadRecord)),
                *GIVE_UP,
            ),
            on.GuestGone: (stay(first_cause, copy_dead, when=busy), *GIVE_UP),
            **IGNORED,
            **ignoring(on.StreamLost),
        },
        S.PROMOTING: {
            on.StreamCut: (
                stay(when=is_other_cut),
                stay(note_held, make_agree, when=holds),
                go(S.RELEASING, note_held, kill, copy_dead, swap_released),
            ),
            on.Promoted: (stay(swap_alone),),
            on.PromotionFailed: (
                go(S.RELEASING, first_cause, note_failure, swap_released, when=both_hold),
                go(S.KEPT, first_cause, note_failure, report("kept"), read),
            ),
            on.Won: OWNED,
            on.Lost: (
                stay(joined, swap_alone, when=is_ours_alone),
                go(S.DISCARDED, joined, discard, copy_dead, report("discarded")),
            ),
            on.NoAnswer: without_answer(),
            on.GuestGone: (stay(first_cause, copy_dead),),
            on.Failed: (
                go(S.RELEASING, first_cause, kill, copy_dead, swap_released, when=failed_is(do.CutStream)),
                stay(report("failed"), ask_again, when=busy),
                stay(report("failed")),
            ),
            **IGNORED,
            **ignoring(on.Ended, on.FenceConfirmed, on.Force, on.Joined, on.PeerLost, on.Prepare),
            **ignoring(on.RecordRead, on.StreamLost, on.Yield),
        },
        S.KEPT: {
            on.Force: (
                stay(when=busy),
                go(S.PROMOTING, by_force, make_agree, when=is_live),
                stay(by_force, swap_alone),
            ),
            on.RecordRead: (
                stay(when=busy),
                stay(read_again, when=is_old),
                stay(joined, read_again, when=is_our_promotion),
                stay(joined, swap_alone, when=is_ours_alone),
                go(S.DISCARDED, joined, discard, copy_dead, report("discarded")),
            ),
            on.Won: OWNED,
            on.Lost: (
                stay(joined, read_again, when=is_our_promotion),
                stay(joined, swap_alone, when=is_ours_alone),
                go(S.DISCARDED, joined, discard, copy_dead, report("discarded")),
            ),
            on.NoAnswer: without_answer(),
            on.GuestGone: (stay(copy_dead),),
            on.Failed: (stay(report("failed"), ask_again, when=busy), stay(report("failed"), read_again)),
            **IGNORED,
            **SETTLED,
            **ignoring(on.Ended, on.Yield),
        },
        S.RELEASING: {
            on.Won: (go(S.DISCARDED, joined, discard, ended, report("released")),),
            on.Lost: (go(S.DISCARDED, joined, discard, report("discarded")),),
            on.NoAnswer: without_answer(),
            on.Failed: (stay(report("failed"), kill, ask_again),),
            **IGNORED,
            **SETTLED,
            **ignoring(on.Ended, on.GuestGone, on.RecordRead, on.Yield),
        },
        S.ALONE: {
            on.Failed: (
                stay(report("failed"), open_outlet, perform(do.OpenGate()), when=failed_is(do.OpenOutlet)),
                stay(report("failed"), perform(do.OpenGate()), when=failed_is(do.OpenGate)),
                stay(report("failed"), discard, start_guest, when=failed_is(do.KillCopy, do.RemoveGate)),
                stay(report("failed"), start_guest, when=failed_is(do.StartGuest)),
                stay(report("failed")),
            ),
            **IGNORED,
            **SETTLED,
            **ignoring(on.Ended, on.GuestGone, on.NoAnswer, on.RecordRead, on.Yield),
        },
        S.DISCARDED: {
            on.Yield: (stay(say_nothing_held),),
            on.Failed: (
                stay(report("failed"), discard, when=failed_is(do.KillCopy)),
                stay(report("failed"), perform(do.RemoveGate()), when=failed_is(do.RemoveGate)),
                stay(report("failed")),
            ),
            **IGNORED,
            **SETTLED,
            **ignoring(on.Ended, on.GuestGone, on.NoAnswer, on.RecordRead),
        },
    }
)
