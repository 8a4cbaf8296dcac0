"""The actions and conditions that the secondary's table names."""

from __future__ import annotations

from dataclasses import replace

from understudy.arbiter import Record, RecordState
from understudy.session import effects as do
from understudy.session import events as on
from understudy.session.machine import Machine
from understudy.session.rows import Outcome, current, perform

# --- Actions -------------------------------------------------------------------------------------------------------


def prepare(machine: Machine, event: on.Prepare) -> Outcome:
    """Make ready to hold a copy."""
    fresh = replace(machine, session=event.session, peer=event.record.owner, live=True, untouched=True)
    return fresh, (do.PrepareCopy(event.session),)


def recovered(machine: Machine, event: on.Recover) -> Outcome:
    """Take the record and the copy that the agent found."""
    record = event.record
    return replace(
        machine,
        joined=record,
        live=event.live,
        untouched=event.untouched,
        peer=record.owner if record else None,
        session=record.session if record else None,
    ), ()


def note_held(machine: Machine, event: on.StreamCut) -> Outcome:
    """Remember which checkpoint the copy holds; it is final."""
    return replace(machine, loaded=event.loaded), ()


def silent_peer(machine: Machine, _: on.Event) -> Outcome:
    """The primary's silence is a reason to promote."""
    return replace(machine, go=machine.go or "the primary is silent"), ()


def fenced_peer(machine: Machine, _: on.Event) -> Outcome:
    """The confirmed fence of the primary is a reason to promote."""
    return replace(machine, go=machine.go or "the primary is fenced"), ()


def yielding_peer(machine: Machine, _: on.Event) -> Outcome:
    """The primary's own word that its guest is dead is a reason to promote."""
    return replace(machine, go=machine.go or "the primary has lost the guest"), ()


def swap_promoting(machine: Machine, _: on.Event) -> Outcome:
    """Ask for the record that lets this host promote, from exactly the one that names it and its session."""
    return machine.swap(RecordState.PROMOTING, reason=machine.go, forced_by=machine.forced_by)


def swap_alone(machine: Machine, _: on.Event) -> Outcome:
    """Ask for the record that makes this host the owner."""
    return machine.swap(RecordState.ALONE, reason=machine.go, forced_by=machine.forced_by)


def swap_released(machine: Machine, _: on.Event) -> Outcome:
    """Give the promotion up: the old primary may claim the guest."""
    return machine.swap(
        RecordState.RELEASED, reason=machine.cause or "the copy is dead, its disks are untouched"
    )


def make_agree(machine: Machine, _: on.Event) -> Outcome:
    """Bring memory and disks to one checkpoint; from here on the disks change."""
    if machine.joined is None:
        raise AssertionError("a promotion has a record")
    return replace(machine, untouched=False), (do.MakeAgree(machine.joined),)


def open_outlet(machine: Machine, _: on.Event) -> Outcome:
    """Give the guest its way out: the record says ``alone`` and names this host."""
    if machine.joined is None:
        raise AssertionError("an outlet has a record")
    return machine, (do.OpenOutlet(machine.joined),)


def say_nothing_held(machine: Machine, event: on.Event) -> Outcome:
    """Tell the primary that this host holds nothing of the session."""
    session = event.session if isinstance(event, on.Yield) else machine.session
    return machine, (do.TellPeer(on.HoldsNothing(session)),) if session else ()


def note_failure(machine: Machine, event: on.PromotionFailed) -> Outcome:
    """Remember what is left of the copy."""
    return replace(machine, live=not event.dead, untouched=event.untouched), ()


def copy_dead(machine: Machine, _: on.Event) -> Outcome:
    """Note that there is no copy on this host."""
    return replace(machine, live=False), ()


def start_guest(machine: Machine, _: on.Event) -> Outcome:
    """Start the guest from this host's disks: the copy died after they had been made the guest's."""
    if machine.joined is None:
        raise AssertionError("nobody starts a guest without a record")
    return replace(machine, live=True), (do.StartGuest(machine.joined),)


discard = perform(do.KillCopy(), do.RemoveGate())
kill = perform(do.KillCopy())
cut = perform(do.CutStream())

# --- Conditions ----------------------------------------------------------------------------------------------------


def _names_us(machine: Machine, record: Record | None, state: RecordState) -> bool:
    return (
        record is not None
        and record.state is state
        and record.standby == machine.host
        and record.session is not None
        and record.session == machine.session
    )


def names_us(machine: Machine, event: on.Event) -> bool:
    """The record is protected and names this host and its session."""
    return _names_us(machine, current(event), RecordState.PROTECTED)


def is_our_promotion(machine: Machine, event: on.Event) -> bool:
    """The record says that this host promotes its session: an earlier life of its agent asked for it."""
    return _names_us(machine, current(event), RecordState.PROMOTING)


def is_our_lost_promotion(machine: Machine, event: on.RecordRead) -> bool:
    """The record says that this host promotes: an earlier life asked for it, but its copy is gone, disks untouched."""
    return _found(machine, event, RecordState.PROMOTING) and machine.untouched and not machine.live


def is_ours_alone(machine: Machine, event: on.Event) -> bool:
    """The record says ``alone`` and names this host: an earlier life of its agent asked for it."""
    record = current(event)
    return record is not None and record.state is RecordState.ALONE and record.owner == machine.host


def is_newer(machine: Machine, event: on.Joined) -> bool:
    """The record names this host and its session and is newer than the one joined; nothing is outstanding."""
    known = machine.joined
    newer = known is None or event.record.generation > known.generation
    return names_us(machine, event) and newer and machine.pending is None


def _may(machine: Machine, record: Record | None) -> bool:
    return record is not None and (not record.prefer_primary or bool(machine.forced_by))


def may_promote(machine: Machine, event: on.Event) -> bool:
    """The stream is cut, there is a reason to promote, and the record names this host and lets it."""
    ready = bool(machine.loaded) and bool(machine.go) and names_us(machine, event)
    return ready and _may(machine, current(event))


def _is_ready(machine: Machine) -> bool:
    free = bool(machine.loaded) and machine.pending is None
    return free and _names_us(machine, machine.joined, RecordState.PROTECTED)


def is_ready(machine: Machine, _: on.Event) -> bool:
    """The stream is cut, nothing is outstanding, and the record joined names this host and lets it promote."""
    return _is_ready(machine) and _may(machine, machine.joined)


def is_ready_by_force(machine: Machine, _: on.Event) -> bool:
    """The stream is cut, nothing is outstanding, and the record joined names this host."""
    return _is_ready(machine)


def is_other_cut(machine: Machine, event: on.StreamCut) -> bool:
    """It is about another session."""
    return event.session != machine.session


def holds_and_may(machine: Machine, event: on.StreamCut) -> bool:
    """The copy holds a checkpoint, there is a reason to promote, and the record joined lets this host."""
    return bool(machine.go) and is_ready(replace(machine, loaded=event.loaded), event)


def holds(_: Machine, event: on.StreamCut) -> bool:
    """The copy holds a checkpoint."""
    return event.loaded > 0


def is_known(machine: Machine, event: on.Ended) -> bool:
    """It tells of no newer record than ours."""
    return machine.joined is not None and event.record.generation <= machine.joined.generation


def is_of_another(machine: Machine, event: on.Ended) -> bool:
    """It is about another session, or says nothing that ends this one."""
    return is_known(machine, event) or event.record.state in {RecordState.PROTECTED, RecordState.PROMOTING}


def is_for_us(machine: Machine, event: on.Yield) -> bool:
    """It is about this session."""
    return event.session == machine.session


def is_not_for_us(machine: Machine, event: on.Yield) -> bool:
    """It is about another session."""
    return event.session != machine.session


def both_hold(_: Machine, event: on.PromotionFailed) -> bool:
    """The copy was seen dead and its disks are untouched."""
    return event.dead and event.untouched


def _found(machine: Machine, event: on.Recover | on.RecordRead, state: RecordState) -> bool:
    record = event.record
    return record is not None and record.state is state and record.standby == machine.host


def found_copy(machine: Machine, event: on.Recover) -> bool:
    """The copy outlived the agent, and the record is protected and names this host."""
    return _found(machine, event, RecordState.PROTECTED) and event.live and event.untouched


def found_nothing(machine: Machine, event: on.Recover) -> bool:
    """The record is protected and names this host, but there is no copy."""
    return _found(machine, event, RecordState.PROTECTED) and event.untouched


def found_promotion(machine: Machine, event: on.Recover) -> bool:
    """The record says that this host promotes; the copy exists and no disk was changed yet."""
    return _found(machine, event, RecordState.PROMOTING) and event.live and event.untouched


def found_dead_promotion(machine: Machine, event: on.Recover) -> bool:
    """The record says that this host promotes; the copy is gone and no disk was changed yet."""
    return _found(machine, event, RecordState.PROMOTING) and event.untouched


def found_touched(machine: Machine, event: on.Recover) -> bool:
    """A promotion had begun to change the disks and its record does not say how it ended."""
    return _found(machine, event, RecordState.PROMOTING)


def is_repeat(machine: Machine, event: on.Prepare) -> bool:
    """It is about this session, or older than the record joined."""
    known = machine.joined
    return event.session == machine.session or (
        known is not None and event.record.generation <= known.generation
    )
