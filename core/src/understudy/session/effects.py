"""What a session wants done: the outputs of its state machines, as frozen values that the engine carries out.

The engine carries out the effects of one step in their order, each with a deadline, and takes no further event before
the last one. `StartCopy`, `PrepareCopy`, `AskCheckpoint`, `MakeAgree`, `Swap` and `ReadRecord` are
only begun and answer with an event later. An effect that fails ends its step: what follows is not done, and
`understudy.session.events.Failed` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from understudy.arbiter import Record

__all__ = [
    "AskCheckpoint",
    "CloseGate",
    "ContinueGuest",
    "CutStream",
    "Effect",
    "EndReplication",
    "KillCopy",
    "KillGuest",
    "MakeAgree",
    "OpenGate",
    "OpenOutlet",
    "PrepareCopy",
    "ReadRecord",
    "ReleaseEpoch",
    "RemoveGate",
    "Report",
    "StartCopy",
    "StartGuest",
    "StopGuest",
    "Swap",
    "TellPeer",
    "Word",
]


class Effect:
    """Something to be done."""

    __slots__ = ()


class Word:
    """Something that one side tells the other."""

    __slots__ = ()


# --- The gate ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CloseGate(Effect):
    """Open the devices of this side: what the guest sends is held from the end of the first copy at the latest."""

    session: str


@dataclass(frozen=True, slots=True)
class ReleaseEpoch(Effect):
    """Commit: let out what the guest sent up to the end of this epoch, on both sides."""

    epoch: int


@dataclass(frozen=True, slots=True)
class OpenGate(Effect):
    """Tear the devices down with the verdict KEEP: what is held leaves, and nothing is held any more."""


@dataclass(frozen=True, slots=True)
class RemoveGate(Effect):
    """Tear the devices down with the verdict DISCARD; only below a guest that was seen dead."""


# --- The guest on the primary --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartCopy(Effect):
    """Have the other host prepare, copy disks and memory, begin the checkpoint stream. Answers `CopyRunning`."""

    session: str
    standby: str
    record: Record


@dataclass(frozen=True, slots=True)
class AskCheckpoint(Effect):
    """Take the checkpoint that ends this epoch, when its time has come. Answers `Acknowledged` or `StreamLost`."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ContinueGuest(Effect):
    """Leave replication and let the guest run; its output is still held."""

    record: Record  #: won, state ``alone``, this host its owner


@dataclass(frozen=True, slots=True)
class EndReplication(Effect):
    """Leave replication; the guest has shut down and stays so."""


@dataclass(frozen=True, slots=True)
class StopGuest(Effect):
    """Stop the guest behind its closed gate: it is fenced."""


@dataclass(frozen=True, slots=True)
class StartGuest(Effect):
    """Start the guest from this host's disks, output open."""

    record: Record  #: won, state ``alone``, this host its owner


@dataclass(frozen=True, slots=True)
class KillGuest(Effect):
    """Bring the interfaces down and off their bridges, then kill the guest and see it dead."""


# --- The copy on the secondary -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrepareCopy(Effect):
    """Open the devices, launch the copy, receive the stream. Its interfaces have no way out."""

    session: str


@dataclass(frozen=True, slots=True)
class CutStream(Effect):
    """Make further acknowledgements impossible, before anything else is asked of the hypervisor.

    In colo mode this cuts the compare channels too. The secondary answers `StreamCut`.
    """


@dataclass(frozen=True, slots=True)
class MakeAgree(Effect):
    """Bring memory and disks of the copy to one checkpoint. Answers `Promoted` or `PromotionFailed`."""

    won: Record  #: state ``promoting``, this host its standby: the proof that it may


@dataclass(frozen=True, slots=True)
class OpenOutlet(Effect):
    """Connect the guest's interfaces, announce its addresses, let it run."""

    won: Record  #: state ``alone``, this host its owner


@dataclass(frozen=True, slots=True)
class KillCopy(Effect):
    """Kill the copy and see it dead."""


# --- Others --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Swap(Effect):
    """Ask the arbiter for this change. Answers `Won`, `Lost` or `NoAnswer`; at most one is outstanding."""

    expected: Record | None
    desired: Record
    again: bool = False  #: a repeat after silence: wait a little first


@dataclass(frozen=True, slots=True)
class ReadRecord(Effect):
    """Read the guest's record. Answers `RecordRead` or `NoAnswer`."""

    again: bool = False  #: it was read before and did not decide: wait a little first


@dataclass(frozen=True, slots=True)
class TellPeer(Effect):
    """Send a word to the other host, if it can be reached; nothing depends on its arrival."""

    word: Word


@dataclass(frozen=True, slots=True)
class Report(Effect):
    """Tell people and observers."""

    what: str  #: a word for programs, e.g. ``"protected"``
    detail: str = ""
