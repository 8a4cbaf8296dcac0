"""The world of the walk as values: hosts as they really are, what is in flight, what has left.

Everything is immutable; a step makes a new world. `put` and `emit` are the only ways to change one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, TypeVar

from understudy.arbiter import Record
from understudy.device import Mode, ReplicationMode
from understudy.session import Machine, PrimaryState
from understudy.session import effects as do
from understudy.session import events as on

Path = tuple[tuple[int, int], ...]
NAMES: Final = ("alpha", "beta")
GUEST: Final = "g"


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a walk goes: how often each thing may happen in one history."""

    mode: Mode = Mode.REMUS
    sessions: int = 1  #: protections begun
    epochs: int = 2  #: checkpoints per session
    host_crashes: int = 1
    agent_crashes: int = 0
    forces: int = 0  #: an operator forces
    failures: int = 0  #: promotions, kills and cuts that fail; guests or copies that die by themselves
    unprotects: int = 0
    shutdowns: int = 0
    preferences: int = 0  #: changes of prefer-primary
    prefer_primary: bool = False  #: sessions begin with it
    messages: int = 2  #: words in flight per direction; more are lost
    states: int = 10_000_000  #: the walk ends incomplete here


class Budget(NamedTuple):
    """What is left of the bounds."""

    sessions: int
    host_crashes: int
    agent_crashes: int
    forces: int
    failures: int
    unprotects: int
    shutdowns: int
    preferences: int


class Copy(NamedTuple):
    """What a secondary's hypervisor has."""

    session: str
    loaded: int
    path: Path


class Host(NamedTuple):
    """One host as it really is. `gate` is true while output is held."""

    up: bool
    machine: Machine | None
    todo: tuple[do.Effect, ...] = ()
    answers: frozenset[on.Event] = frozenset()
    reading: bool = False
    copying: str = ""
    running: bool = False
    frozen: bool = False
    gate: bool = False
    path: Path = ()
    disk: Path = ()
    mark: Path = ()
    copy: Copy | None = None
    touched: bool = False
    lives: int = 1

    @property
    def exists(self) -> bool:
        """Whether the guest exists here, running or stopped."""
        return self.running or self.frozen


class Stream(NamedTuple):
    """The checkpoint stream: who sends, and what is on its way."""

    primary: int
    session: str
    epoch: int
    path: Path


class World(NamedTuple):
    """Everything."""

    hosts: tuple[Host, Host]
    record: Record
    swaps: frozenset[tuple[Record | None, Record]]
    words: tuple[tuple[on.Event, ...], tuple[on.Event, ...]]
    stream: Stream | None
    out: Path
    held: Path
    runs: int
    budget: Budget


class Violation(Exception):
    """A rule was broken, or the guest was left stuck.

    Args:
        problem: What is wrong.
        trace: The steps that lead to it, first to last; no shorter way exists.
    """

    def __init__(self, problem: str, trace: tuple[str, ...] = ()) -> None:
        steps = "".join(f"\n  {number:2}. {line}" for number, line in enumerate(trace, 1))
        super().__init__(f"{problem}, after {len(trace)} steps:{steps}" if trace else problem)
        self.problem = problem
        self.trace = trace


def starts(old: Path, new: Path) -> bool:
    """Tell whether the history `old` is the beginning of the history `new`."""
    if not old:
        return True
    if len(old) > len(new) or old[:-1] != new[: len(old) - 1]:
        return False
    (run, epoch), (other, reached) = old[-1], new[len(old) - 1]
    return run == other and epoch <= reached


def next_epoch(path: Path) -> Path:
    """Return the history one epoch further."""
    run, epoch = path[-1]
    return (*path[:-1], (run, epoch + 1))


def put(world: World, me: int, host: Host) -> World:
    """Return the world with one host replaced."""
    return world._replace(hosts=(host, world.hosts[1]) if me == 0 else (world.hosts[0], host))


def emit(world: World, me: int, path: Path) -> World:
    """Let output leave a host; all that ever left must lie on one path."""
    if starts(path, world.out):
        return world
    if not starts(world.out, path):
        raise Violation(f"I2: {NAMES[me]} lets out {path}, but {world.out} has left before")
    return world._replace(out=path)


T = TypeVar("T")


def ordered(items: frozenset[T]) -> Iterable[T]:
    """The same order in every process, whatever the seed of its hashes."""
    return items if len(items) < 2 else sorted(items, key=repr)  # noqa: PLR2004 - nothing to sort


def takes(host: Host) -> bool:
    """Whether the agent takes an event now: not between the effects of one."""
    return not host.todo


def killed(host: Host) -> Host:
    """Return the host with its guest dead; the disks keep what it had written."""
    return host._replace(running=False, frozen=False, disk=disk_of(host), path=(), mark=())


def disk_of(host: Host) -> Path:
    """Return the history that the disks of a host hold."""
    return host.path if host.exists else host.disk


def with_stream(world: World, stream: Stream | None) -> World:
    """Return the world with another checkpoint stream."""
    return world._replace(stream=stream)


def is_secondary(machine: Machine) -> bool:
    """Tell whether a machine is on the side of the copy."""
    return machine.side is ReplicationMode.SECONDARY


def runs_guest(machine: Machine) -> bool:
    """Tell whether a machine believes that a guest runs on its host."""
    return machine.state in {
        PrimaryState.UNPROTECTED,
        PrimaryState.ALONE,
        PrimaryState.SYNCING,
        PrimaryState.PROTECTED,
        PrimaryState.LEAVING,
        PrimaryState.SUSPECT,
    }


def matters(machine: Machine | None, event: on.Event) -> bool:
    """Tell whether an answer can still have an effect on the machine."""
    if machine is None:
        return False
    if isinstance(event, on.Acknowledged):
        return (event.session, event.epoch) == (machine.session, machine.asked)
    attempt = event.record.attempt if isinstance(event, on.Won) else getattr(event, "attempt", None)
    return attempt is None or (machine.pending is not None and machine.pending.attempt == attempt)


def plain(record: Record | None) -> Record | None:
    """Return the record without its text, upon which nothing is decided."""
    return record and replace(record, reason="")


def without_text(machine: Machine) -> Machine:
    """Return the machine without its text, upon which nothing is decided."""
    return replace(
        machine,
        cause="",
        go="go" if machine.go else "",
        acknowledged=0,
        pending=plain(machine.pending),
        joined=plain(machine.joined),
    )


def plain_effect(effect: do.Effect) -> do.Effect:
    """Return the effect without text and marks of repetition that the world does not see."""
    if isinstance(effect, do.Swap):
        desired = replace(effect.desired, reason="")
        return do.Swap(effect.expected, desired, effect.again)
    return do.ReadRecord() if isinstance(effect, do.ReadRecord) else effect


def short(event: on.Event) -> str:
    """Return an event as a word for the trace."""
    record = getattr(event, "record", None)
    tail = f"({record.state.value} {record.generation})" if isinstance(record, Record) else ""
    number = getattr(event, "epoch", getattr(event, "loaded", ""))
    return f"{type(event).__name__}{tail}{f'({number})' if number != '' else ''}"
