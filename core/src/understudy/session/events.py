"""What may happen to a session: the inputs of its state machines, as frozen values.

Words from the other host (`Prepare`, `Joined`, `Ended`, `Yield`, `HoldsNothing`) are events too: one side sends them
with the effect `TellPeer`, the other side's machine takes them. They may be lost, late or out of order.
"""

from __future__ import annotations

from dataclasses import dataclass

from understudy.arbiter import Record
from understudy.session.effects import Effect, Word

__all__ = [
    "Acknowledged",
    "CopyRunning",
    "Ended",
    "Event",
    "Failed",
    "FenceConfirmed",
    "Force",
    "GuestGone",
    "GuestReset",
    "GuestShutdown",
    "HoldsNothing",
    "Joined",
    "Lost",
    "NoAnswer",
    "PeerLost",
    "Prefer",
    "Prepare",
    "Promoted",
    "PromotionFailed",
    "Protect",
    "RecordRead",
    "Recover",
    "Start",
    "StreamCut",
    "StreamLost",
    "Unprotect",
    "Won",
    "Yield",
]


class Event:
    """Something that happened."""

    __slots__ = ()


# --- What the operator, or the agent on his behalf, asks for ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start(Event):
    """Start the guest on this host."""


@dataclass(frozen=True, slots=True)
class Protect(Event):
    """Protect the running guest."""

    session: str  #: a new id, never used before
    standby: str  #: name of the host that shall hold the copy
    prefer_primary: bool = False


@dataclass(frozen=True, slots=True)
class Unprotect(Event):
    """End the protection; the guest stays here."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Prefer(Event):
    """Change who may promote while the guest is protected."""

    primary: bool


@dataclass(frozen=True, slots=True)
class Force(Event):
    """An operator forces this host to go on with the guest."""

    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class Recover(Event):
    """The agent has started and found this record, and perhaps a guest or copy that outlived its predecessor."""

    record: Record | None
    live: bool  #: the guest, or the copy with its checkpoint, exists on this host and can be adopted
    untouched: bool = True  #: no promotion has begun to change this host's disks


# --- What the hypervisor and the devices tell ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CopyRunning(Event):
    """The first copy is complete: the guest runs behind the closed gate and checkpoints can be asked for."""

    session: str  #: the session it was made for


@dataclass(frozen=True, slots=True)
class Acknowledged(Event):
    """The secondary holds all of this checkpoint, disks included."""

    session: str
    epoch: int
    gated: bool = True  #: the barriers of the epoch were in place before it


@dataclass(frozen=True, slots=True)
class StreamLost(Event):
    """The checkpoint stream broke, or the checkpoint that was asked for failed or came too late."""

    detail: str = ""


@dataclass(frozen=True, slots=True)
class StreamCut(Event):
    """Secondary: nothing more can be acknowledged, and it is known which checkpoint the copy holds."""

    session: str | None
    loaded: int  #: number of whole checkpoints loaded, final


@dataclass(frozen=True, slots=True)
class Promoted(Event):
    """Memory and disks of the copy are at one checkpoint; it is the guest, without an outlet yet."""


@dataclass(frozen=True, slots=True)
class PromotionFailed(Event):
    """The copy could not be made the guest."""

    dead: bool  #: the copy was seen dead
    untouched: bool  #: its disks were not changed
    detail: str = ""


@dataclass(frozen=True, slots=True)
class GuestShutdown(Event):
    """The guest on the primary has shut itself down; it is preserved, stopped."""


@dataclass(frozen=True, slots=True)
class GuestReset(Event):
    """The guest on the primary has rebooted; it runs on, behind the same gate."""


@dataclass(frozen=True, slots=True)
class GuestGone(Event):
    """The guest's, or the copy's, process is dead or silent for good."""

    detail: str = ""


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """An effect failed; those after it in the same step were not carried out."""

    effect: Effect
    detail: str = ""


# --- What the arbiter answers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Won(Event):
    """The swap of this attempt succeeded."""

    record: Record


@dataclass(frozen=True, slots=True)
class Lost(Event):
    """The swap of this attempt did not succeed and never will."""

    attempt: str
    record: Record | None  #: the record that counts instead


@dataclass(frozen=True, slots=True)
class NoAnswer(Event):
    """The arbiter did not answer; ``attempt`` is that of the swap, ``""`` for a read."""

    attempt: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RecordRead(Event):
    """The arbiter answered a read."""

    record: Record | None


# --- What is known about the other host ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerLost(Event):
    """The other host has been silent for longer than its limit."""

    detail: str = ""


@dataclass(frozen=True, slots=True)
class FenceConfirmed(Event):
    """A fencing device confirmed that the other host is off."""

    detail: str = ""


# --- What the other host says --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepare(Event, Word):
    """Primary to secondary: make ready to hold a copy."""

    session: str
    record: Record  #: the primary's record, state ``alone``


@dataclass(frozen=True, slots=True)
class Joined(Event, Word):
    """Primary to secondary: the record now says ``protected``; you may promote from it."""

    record: Record


@dataclass(frozen=True, slots=True)
class Ended(Event, Word):
    """Either way: this record ends the session; discard, or look at it."""

    record: Record


@dataclass(frozen=True, slots=True)
class Yield(Event, Word):
    """Primary to secondary: I do not have the guest any more. Go on, or say that you hold nothing."""

    session: str


@dataclass(frozen=True, slots=True)
class HoldsNothing(Event, Word):
    """Secondary to primary: of this session I hold no checkpoint and never shall."""

    session: str
