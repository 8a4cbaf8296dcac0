"""The actions and conditions that the primary's table names."""

from __future__ import annotations

from dataclasses import replace

from understudy.arbiter import RecordState
from understudy.session import effects as do
from understudy.session import events as on
from understudy.session.machine import Machine
from understudy.session.rows import Outcome, current, is_mine, perform

# --- Actions -------------------------------------------------------------------------------------------------------


def begin_session(machine: Machine, event: on.Protect) -> Outcome:
    """Note the new session, then close the gate before anything is copied."""
    fresh = replace(
        machine,
        session=event.session,
        peer=event.standby,
        prefer_primary=event.prefer_primary,
        asked=0,
        acknowledged=0,
        cause="",
    )
    return fresh, (do.CloseGate(event.session),)


def start_copy(machine: Machine, _: on.Event) -> Outcome:
    """Begin the first copy."""
    if machine.session is None or machine.peer is None or machine.joined is None:
        raise AssertionError("a session has an id, a peer and a record")
    return machine, (do.StartCopy(machine.session, machine.peer, machine.joined),)


def ask_checkpoint(machine: Machine, _: on.Event) -> Outcome:
    """Ask for the checkpoint that ends the running epoch."""
    return replace(machine, asked=machine.asked + 1), (do.AskCheckpoint(machine.asked + 1),)


def note_acknowledged(machine: Machine, event: on.Acknowledged) -> Outcome:
    """Remember what the secondary holds."""
    return replace(machine, acknowledged=event.epoch), ()


def release(machine: Machine, event: on.Acknowledged) -> Outcome:
    """Let out what the acknowledged epoch held."""
    return machine, (do.ReleaseEpoch(event.epoch),)


def swap_protected(machine: Machine, _: on.Event) -> Outcome:
    """Ask for the record that lets the standby promote: it names it and the session."""
    return machine.swap(
        RecordState.PROTECTED,
        standby=machine.peer,
        session=machine.session,
        prefer_primary=machine.prefer_primary,
        reason="the first checkpoint is acknowledged",
    )


def swap_alone(machine: Machine, _: on.Event) -> Outcome:
    """Ask for the record that lets this host go on by itself."""
    return machine.swap(
        RecordState.ALONE,
        owner=machine.host,
        reason=machine.go or machine.cause or "this host goes on alone",
        forced_by=machine.forced_by,
    )


def swap_start(machine: Machine, _: on.Event) -> Outcome:
    """Ask for the record that allows the start, a new one even if the record is ours already."""
    return machine.swap(RecordState.ALONE, reason="start")


def swap_stopped(machine: Machine, _: on.Event) -> Outcome:
    """Record that the guest was shut down."""
    return machine.swap(RecordState.STOPPED, reason="the guest was shut down")


def swap_preference(machine: Machine, event: on.Prefer) -> Outcome:
    """Put the operator's choice of who may promote into the record."""
    return replace(machine, prefer_primary=event.primary).swap(
        RecordState.PROTECTED, prefer_primary=event.primary, reason="prefer-primary changed"
    )


def tell_joined(machine: Machine, _: on.Event) -> Outcome:
    """Tell the standby which record names it."""
    return machine, (do.TellPeer(on.Joined(machine.joined)),) if machine.joined else ()


def yield_guest(machine: Machine, _: on.Event) -> Outcome:
    """Tell the standby that it is its turn."""
    session = machine.joined.session if machine.joined else None
    return machine, (do.TellPeer(on.Yield(session)),) if session else ()


def run_on(machine: Machine, _: on.Event) -> Outcome:
    """Let the guest run, then open the gate: the record says ``alone`` and names this host."""
    if machine.joined is None:
        raise AssertionError("nobody runs a guest without a record")
    return machine, (do.ContinueGuest(machine.joined), do.OpenGate())


def start_guest(machine: Machine, _: on.Event) -> Outcome:
    """Start the guest from this host's disks."""
    if machine.joined is None:
        raise AssertionError("nobody starts a guest without a record")
    return replace(machine, live=True, shut=False), (do.StartGuest(machine.joined),)


def stop_guest(machine: Machine, _: on.Event) -> Outcome:
    """Stop the guest behind its closed gate, if there is one."""
    return machine, (do.StopGuest(),) if machine.live else ()


def guest_dead(machine: Machine, _: on.Event) -> Outcome:
    """Note that there is no guest on this host."""
    return replace(machine, live=False), ()


def note_shut(machine: Machine, _: on.Event) -> Outcome:
    """Note that the guest has shut down."""
    return replace(machine, shut=True), ()


def recovered(machine: Machine, event: on.Recover) -> Outcome:
    """Take the record and the guest that the agent found."""
    record = event.record
    peer = record.standby if record else None
    session = record.session if record else None
    return replace(machine, joined=record, live=event.live, peer=peer, session=session), ()


# Interfaces down and off their bridges, guest killed and seen dead, gate removed: always in this order.
discard = perform(do.KillGuest(), do.RemoveGate())
cut = perform(do.CutStream())

# --- Conditions ----------------------------------------------------------------------------------------------------


def is_of_session(machine: Machine, event: on.CopyRunning) -> bool:
    """It is about this session."""
    return event.session == machine.session


def is_asked(machine: Machine, event: on.Acknowledged) -> bool:
    """It acknowledges the checkpoint that was asked for."""
    return (event.session, event.epoch) == (machine.session, machine.asked)


def is_first_gated(machine: Machine, event: on.Acknowledged) -> bool:
    """It is the first acknowledgement with the barriers in place."""
    return is_asked(machine, event) and event.gated and machine.pending is None


def is_gated(machine: Machine, event: on.Acknowledged) -> bool:
    """The barriers were in place: what they held may leave."""
    return is_asked(machine, event) and event.gated


def is_shut(machine: Machine, _: on.Event) -> bool:
    """The guest has shut down."""
    return machine.shut and machine.live


def is_mine_and_dead(machine: Machine, event: on.Event) -> bool:
    """The record is ours, the guest is dead."""
    return is_mine(machine, event) and not machine.live


def is_mine_protected_and_dead(machine: Machine, event: on.Event) -> bool:
    """The record is ours and protected, the guest is dead: it is the standby's turn."""
    record = current(event)
    return is_mine_and_dead(machine, event) and record is not None and record.state is RecordState.PROTECTED


def won_protected(_: Machine, event: on.Won) -> bool:
    """The won record says ``protected``: it was sent before this host wanted out."""
    return event.record.state is RecordState.PROTECTED


def won_protected_but_dead(machine: Machine, event: on.Won) -> bool:
    """The won record says ``protected``, and the guest has died since."""
    return won_protected(machine, event) and not machine.live


def not_busy(machine: Machine, _: on.Event) -> bool:
    """No swap is outstanding."""
    return machine.pending is None


def _found(machine: Machine, event: on.Recover, state: RecordState) -> bool:
    record = event.record
    return record is not None and record.owner == machine.host and record.state is state


def found_protected_and_dead(machine: Machine, event: on.Recover) -> bool:
    """The record says ``protected``, the guest is dead."""
    return _found(machine, event, RecordState.PROTECTED) and not event.live


def found_released_and_dead(machine: Machine, event: on.Recover) -> bool:
    """The record says ``released``, the guest is dead."""
    return _found(machine, event, RecordState.RELEASED) and not event.live


def found_promoting(machine: Machine, event: on.Recover) -> bool:
    """The record says ``promoting``: the standby is at it."""
    return _found(machine, event, RecordState.PROMOTING)


def found_stopped(machine: Machine, event: on.Recover) -> bool:
    """The record says ``stopped``."""
    return _found(machine, event, RecordState.STOPPED)


def found_live(machine: Machine, event: on.Recover) -> bool:
    """The guest outlived the agent, and the record is ours."""
    states = (RecordState.ALONE, RecordState.PROTECTED, RecordState.RELEASED)
    return event.live and any(_found(machine, event, state) for state in states)


def found_idle(machine: Machine, event: on.Recover) -> bool:
    """The guest is dead and the record says ``alone``, or there is none: it may be started."""
    return event.record is None or _found(machine, event, RecordState.ALONE)


def is_nobodys(_: Machine, event: on.Event) -> bool:
    """The guest has no record any more."""
    return current(event) is None


def holds_nothing_of_it(machine: Machine, event: on.HoldsNothing) -> bool:
    """It is about the session of the protected record that we joined, and nothing is outstanding."""
    record = machine.joined
    return (
        machine.pending is None
        and record is not None
        and record.state is RecordState.PROTECTED
        and record.session == event.session
    )


def is_about_another(machine: Machine, event: on.HoldsNothing) -> bool:
    """It is about another session."""
    return event.session != machine.session


def is_known(machine: Machine, event: on.Ended) -> bool:
    """It tells of no newer record than ours."""
    return machine.joined is not None and event.record.generation <= machine.joined.generation


def may_force(machine: Machine, _: on.Force) -> bool:
    """Nothing is outstanding, and the record is protected or promoting."""
    return machine.pending is None and (
        machine.joined is not None
        and machine.joined.owner == machine.host
        and machine.joined.state in {RecordState.PROTECTED, RecordState.PROMOTING}
    )
