"""The arbiter: who may run a guest is decided by one atomic compare-and-swap on the guest's record.

The rules, and why they need no clock, are in docs/explanation/session.md. This module holds what every arbiter
shares: the `Record`, the table of changes that the rules of ownership allow (`check_change`), and the contract
(`Arbiter`) that an arbiter plugin implements. Nothing here does I/O.

Theory of operation. A swap names the record it starts from and the record it wants. The arbiter replaces the one by
the other if nothing happened in between, and every success raises the generation by one. The writer marks its record
with (writer, session, attempt): a swap whose answer was lost is sent again as it is, and the arbiter recognises it
instead of refusing it. Nothing follows from silence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, NamedTuple

from understudy.errors import ArbiterError, IllegalChange

__all__ = [
    "CHANGES",
    "Arbiter",
    "Change",
    "Record",
    "RecordState",
    "SwapResult",
    "Writer",
    "check_change",
    "following",
]


class RecordState(Enum):
    """What the record says about a guest."""

    ALONE = "alone"  #: the owner runs it, or may start it; its output is open
    PROTECTED = "protected"  #: the owner runs it behind a closed gate, the standby may promote
    PROMOTING = "promoting"  #: the standby is turning its copy into the guest; nobody lets anything new out
    RELEASED = "released"  #: the standby gave its promotion up; the owner may claim the guest
    STOPPED = "stopped"  #: the guest was shut down; the owner may start it again


@dataclass(frozen=True, slots=True)
class Record:
    """What the arbiter keeps per guest. Immutable: a change is a new record with the next generation."""

    guest: str
    generation: int  #: the fencing token, from 1; assigned by the arbiter when a swap wins
    state: RecordState
    owner: str  #: name of the host that runs the guest, ran it last, or may claim it
    standby: str | None  #: name of the host that may promote, or is promoting; ``None`` if there is none
    session: str | None  #: id of the protection session that this record belongs to
    writer: str  #: name of the host whose swap made this record
    attempt: str  #: id of that swap, never used twice by one host
    reason: str = ""  #: why, one sentence for the history
    forced_by: str = ""  #: name of the operator who forced it; empty: nobody did
    prefer_primary: bool = False  #: the standby must not promote unless an operator forces it
    written_at: str = ""  #: ISO 8601, for people; never used for a decision

    def __hash__(self) -> int:
        # Of what differs between records; walks of the session tables hash millions of them.
        return hash((self.generation, self.attempt))

    @property
    def identity(self) -> tuple[str, str | None, str]:
        """(writer, session, attempt): what makes a repeated swap recognisable."""
        return (self.writer, self.session, self.attempt)

    def __str__(self) -> str:
        standby = f", standby {self.standby}" if self.standby else ""
        return f"{self.guest}: generation {self.generation}, {self.state.value}, owner {self.owner}{standby}"

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON-able object; `from_json` is its inverse."""
        return {
            "guest": self.guest,
            "generation": self.generation,
            "state": self.state.value,
            "owner": self.owner,
            "standby": self.standby,
            "session": self.session,
            "writer": self.writer,
            "attempt": self.attempt,
            "reason": self.reason,
            "forced_by": self.forced_by,
            "prefer_primary": self.prefer_primary,
            "written_at": self.written_at,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Make a record from what `to_json` returned; keys it does not know are ignored.

        Raises:
            ArbiterError: A key is missing or has the wrong type.
        """
        optional = {"standby", "session"}
        values: dict[str, Any] = {}
        try:
            for name, kind in _FIELDS.items():
                value = data[name]
                if not (isinstance(value, kind) or (value is None and name in optional)):
                    raise TypeError(f"{name} is {value!r}")
                values[name] = value
            values["state"] = RecordState(values["state"])
        except (KeyError, TypeError, ValueError) as problem:
            raise ArbiterError(f"this is no record: {problem}") from problem
        return cls(**values)


_FIELDS: Final[Mapping[str, type]] = {
    "guest": str,
    "generation": int,
    "state": str,
    "owner": str,
    "standby": str,
    "session": str,
    "writer": str,
    "attempt": str,
    "reason": str,
    "forced_by": str,
    "prefer_primary": bool,
    "written_at": str,
}


class SwapResult(NamedTuple):
    """The answer to a swap."""

    won: bool  #: whether the record that counts now is the one that was wanted
    record: Record | None  #: the record that counts now: the new one if won, else whatever is there instead


class Writer(Enum):
    """Who makes a change, seen from the record it starts from."""

    OWNER = "owner"
    STANDBY = "standby"
    ANYONE = "anyone"


@dataclass(frozen=True, slots=True)
class Change:
    """One kind of change that the rules allow."""

    old: RecordState | None  #: ``None``: the guest has no record yet
    new: RecordState
    writer: Writer
    rule: str  #: what the change is
    forced: bool = False  #: only with an operator's name in `Record.forced_by`


_S = RecordState

#: Every legal change. What is not in this table is refused before the arbiter hears of it.
CHANGES: Final[tuple[Change, ...]] = (
    Change(None, _S.ALONE, Writer.ANYONE, "a new guest is taken by the host that starts it"),
    Change(_S.ALONE, _S.ALONE, Writer.OWNER, "the owner starts it, or proves that it owns it"),
    Change(_S.ALONE, _S.PROTECTED, Writer.OWNER, "into protection, naming standby and session"),
    Change(_S.ALONE, _S.STOPPED, Writer.OWNER, "the guest was shut down"),
    Change(_S.PROTECTED, _S.PROTECTED, Writer.OWNER, "the owner changes options of the protection"),
    Change(_S.PROTECTED, _S.ALONE, Writer.OWNER, "out of protection, planned or not"),
    Change(_S.PROTECTED, _S.PROMOTING, Writer.STANDBY, "the standby that is named takes over"),
    Change(_S.PROMOTING, _S.ALONE, Writer.STANDBY, "the promotion is complete"),
    Change(_S.PROMOTING, _S.RELEASED, Writer.STANDBY, "the promotion failed, the copy is dead"),
    Change(
        _S.PROMOTING, _S.ALONE, Writer.OWNER, "an operator gives the copy up for the old primary", forced=True
    ),
    Change(_S.RELEASED, _S.ALONE, Writer.OWNER, "the old primary claims the guest"),
    Change(_S.STOPPED, _S.ALONE, Writer.OWNER, "the guest is started again"),
    Change(_S.STOPPED, _S.ALONE, Writer.ANYONE, "an operator moves a stopped guest", forced=True),
)


def check_change(old: Record | None, new: Record) -> Change:
    """Return the rule that allows `new` to follow `old`.

    Args:
        old: The record that the swapper last joined, ``None`` if the guest has none.
        new: The record that it wants.

    Raises:
        IllegalChange: No rule allows it; the text says which condition is missing.
    """
    start = None if old is None else old.state
    rows = [change for change in CHANGES if change.old is start and change.new is new.state]
    was = "a guest without a record" if old is None else f"{old}"
    if not rows:
        allowed = ", ".join(c.new.value for c in CHANGES if c.old is start)
        raise IllegalChange(f"{was}: may not become {new.state.value} (may become: {allowed})")
    for complain in _CONDITIONS:
        problem = complain(old, new)
        if problem:
            raise IllegalChange(f"{was}: may not become {new.state.value} by {new.writer}: {problem}")
    for change in rows:
        if _is_by(change.writer, old, new) and (new.forced_by or not change.forced):
            return change
    who = " or ".join(f"the {c.writer.value}" + (" by an operator's force" if c.forced else "") for c in rows)
    raise IllegalChange(f"{was}: only {who} may make it {new.state.value}, not {new.writer}")


def _is_by(who: Writer, old: Record | None, new: Record) -> bool:
    if who is Writer.ANYONE or old is None:
        return True
    return new.writer == (old.owner if who is Writer.OWNER else old.standby)


# Each condition returns what is wrong in words, or "" if it holds.


def _same_guest(old: Record | None, new: Record) -> str:
    return f"the guest is {new.guest}" if old is not None and old.guest != new.guest else ""


def _next_generation(old: Record | None, new: Record) -> str:
    if old is None or new.generation == old.generation + 1:
        return ""
    return f"the generation must become {old.generation + 1}, not {new.generation}"


def _named_attempt(old: Record | None, new: Record) -> str:
    if not (new.writer and new.attempt):
        return "it names no writer or no attempt"
    return "it has the identity of the record it replaces" if old and old.identity == new.identity else ""


def _parties(old: Record | None, new: Record) -> str:
    # Alone and stopped name one host. Protected and what follows from it name both and the session, and keep them.
    single = new.state in {_S.ALONE, _S.STOPPED}
    kept = old is not None and old.state is not _S.ALONE
    wrong = {
        "no standby may be named": single and new.standby is not None,
        "the owner must be its writer": single and new.owner != new.writer,
        "prefer-primary belongs to a protection": single and new.prefer_primary,
        "it must name the standby and the session": not single and not (new.session and new.standby),
        "owner and standby are the same host": not single and new.standby == new.owner,
        "the owner must stay": not single and old is not None and new.owner != old.owner,
        "standby and session must stay": not single
        and kept
        and old is not None
        and (new.standby, new.session) != (old.standby, old.session),
    }
    return next((problem for problem, is_so in wrong.items() if is_so), "")


def _right_to_promote(old: Record | None, new: Record) -> str:
    if new.state is _S.PROMOTING and old is not None and old.prefer_primary and not new.forced_by:
        return "the record prefers the primary, only an operator may force it"
    return ""


_CONDITIONS: Final[tuple[Callable[[Record | None, Record], str], ...]] = (
    _same_guest,
    _next_generation,
    _named_attempt,
    _parties,
    _right_to_promote,
)


class Arbiter(ABC):
    """The third party that both hosts ask. One object per agent; all methods may run concurrently.

    An implementation provides `read`, `exchange`, `history`, `guests` and `close`; callers use `swap`.
    Every method either answers or raises `ArbiterUnavailable` within its own deadline, also when the service hangs.
    """

    @abstractmethod
    async def read(self, guest: str) -> Record | None:
        """Return the record that counts now, ``None`` if the guest has none.

        Raises:
            ArbiterUnavailable: No answer in time.

        Guarantees:
            Linearizable: it is at least as new as every answer given to anybody before the call.
        """

    async def swap(self, expected: Record | None, desired: Record) -> SwapResult:
        """Replace `expected` by `desired` if it still is the record that counts.

        Args:
            expected: Exactly the record that the caller last joined, ``None`` for a guest without one.
            desired: The record wanted. Its generation is one more than that of `expected`; for a guest without a
                record it is ignored and assigned by the arbiter.

        Returns:
            Won with the new record, also when an earlier attempt of the same identity had won; else lost with the
            record that counts.

        Raises:
            IllegalChange: The rules forbid the change; the arbiter was not asked.
            ArbiterUnavailable: No answer. The swap may or may not have been made, or may be made later: repeat it as
                it is, and do nothing else, until the generation has moved.
        """
        check_change(expected, desired)
        return await self.exchange(expected, desired)

    @abstractmethod
    async def exchange(self, expected: Record | None, desired: Record) -> SwapResult:
        """Carry out `swap`, whose change has been checked."""

    @abstractmethod
    async def history(self, guest: str) -> Sequence[Record]:
        """Return the records kept of a guest, oldest first, the one that counts last; old ones may be gone."""

    @abstractmethod
    async def guests(self) -> Sequence[str]:
        """Return the names of all guests that have a record, sorted."""

    async def close(self) -> None:  # noqa: B027 - most arbiters have nothing to close
        """Let go of connections. Idempotent."""


def following(old: Record | None, **changes: Any) -> Record:
    """Return the record that follows `old` with `changes`, its generation raised, its marks of force cleared.

    Args:
        old: The record to replace; ``None`` needs all fields in `changes` but the generation.
        changes: Fields of `Record`.
    """
    if old is None:
        return Record(**{"generation": 1, "standby": None, "session": None, **changes})
    fresh: dict[str, Any] = {
        "generation": old.generation + 1,
        "forced_by": "",
        "reason": "",
        "written_at": "",
    }
    return replace(old, **(fresh | changes))
