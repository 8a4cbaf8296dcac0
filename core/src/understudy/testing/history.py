"""What simulated guests do, and the network that remembers what left which host, and judges it.

A simulated guest counts. With every count it may draw a random number, which goes into a running digest of all that
it ever drew; the pair is its whole memory (`Memory`), is written to all of its disks, and is what it sends. Two guests
that went on from one checkpoint apart from each other have different digests: a diverging history cannot hide.

The network knows which history every packet belongs to. It keeps what left, by whom and when, and notes every packet
that broke an invariant:

* I1: a packet let out by a commit, or by comparison, that the secondary could not explain at that moment.
* I2: a packet of another history than those that left before it.
* Ownership: a packet let out without an acknowledgement although the record does not say ``alone`` for that host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["BORN", "Left", "Memory", "SimulatedNetwork"]


class Memory(NamedTuple):
    """All that a simulated guest remembers; also what it writes to its disks, and what a packet shows of it."""

    number: int  #: how often it counted since it was made
    digest: int  #: of everything it drew, in order
    parent: int = 0  #: the digest before

    def after(self, draw: int) -> Memory:
        """Return the memory after one more count.

        Args:
            draw: What the guest drew, 0 for nothing.
        """
        return Memory(self.number + 1, hash((self.digest, self.number, draw)), self.digest)


BORN = Memory(0, 1)  #: the memory of every guest at its first start


@dataclass(frozen=True, slots=True)
class Left:
    """One packet that left a host."""

    at_s: float  #: the event loop's time
    host: str
    guest: str
    epoch: int | None  #: the acknowledged epoch that let it out; ``None``: its way was open
    packet: Memory


class SimulatedNetwork:
    """Where the guests' packets go.

    Args:
        may_open: Tells whether the record says ``alone`` for (guest, host) now; ``None``: not judged.
        judging: Whether packets are remembered and judged; off, they are only counted.
    """

    def __init__(self, may_open: Callable[[str, str], bool] | None = None, *, judging: bool = True) -> None:
        self.may_open = may_open
        self.judging = judging
        self.log: list[Left] = []
        self.violations: list[str] = []
        self.left = 0  #: number of packets that left
        self.announced: list[tuple[str, str]] = []  #: (guest, host) of every announcement
        self._parents: dict[str, dict[int, Memory]] = {}  # per guest, digest → what it belongs to
        self._path: dict[str, dict[int, int]] = {}  # per guest, count → digest, of the history that left
        self._top: dict[str, int] = {}
        self._held: dict[
            tuple[str, str], Memory
        ] = {}  # (guest, session) → the checkpoint that its copy holds
        self._produced: dict[tuple[str, str], dict[int, int]] = {}  # what a running copy has produced since

    # --- What guests and copies tell -----------------------------------------------------------------------------

    def born(self, guest: str, memory: Memory) -> None:
        """Note a new state of a guest, before anything shows it."""
        if self.judging:
            self._parents.setdefault(guest, {})[memory.digest] = memory

    def held(self, guest: str, session: str, memory: Memory) -> None:
        """Note that the session's copy holds a whole checkpoint."""
        if self.judging:
            self._held[guest, session] = memory
            self._produced.pop((guest, session), None)

    def produced(self, guest: str, session: str, memory: Memory) -> None:
        """Note that the session's running copy has produced this output."""
        if self.judging:
            self._produced.setdefault((guest, session), {})[memory.number] = memory.digest

    # --- What leaves ---------------------------------------------------------------------------------------------

    def open_send(self, host: str, guest: str, packet: Memory) -> None:
        """Let a packet out of a host because its way is open."""
        self.left += 1
        if not self.judging:
            return
        if self.may_open is not None and not self.may_open(guest, host):
            self.accuse(
                f"{host} lets {guest}'s packet {packet.number} out, but the record does not say it may"
            )
        self._leave(host, guest, packet, None)

    def release(self, host: str, guest: str, packet: Memory, session: str, epoch: int) -> None:
        """Let a packet out of a host because the secondary has acknowledged what explains it."""
        self.left += 1
        if not self.judging:
            return
        held = self._held.get((guest, session))
        same = self._produced.get((guest, session), {}).get(packet.number) == packet.digest
        if not same and (held is None or packet.number > held.number):
            self.accuse(
                f"I1: {host} lets {guest}'s packet {packet.number} out for epoch {epoch} of session {session}, "
                f"but the secondary holds {held}"
            )
        self._leave(host, guest, packet, epoch)

    def announce(self, host: str, guest: str) -> None:
        """Tell the network that the guest is at this host now."""
        self.announced.append((guest, host))

    def accuse(self, what: str) -> None:
        """Note a violation."""
        self.violations.append(f"{_now():.4f}: {what}")

    def check(self) -> None:
        """Raise if anything was violated.

        Raises:
            AssertionError: All violations, in the order of time.
        """
        if self.violations:
            raise AssertionError("\n".join(self.violations))

    def highest(self, guest: str) -> int:
        """Return the highest count that ever left, 0 if nothing did."""
        return self._top.get(guest, 0)

    def _leave(self, host: str, guest: str, packet: Memory, epoch: int | None) -> None:
        self.log.append(Left(_now(), host, guest, epoch, packet))
        path = self._path.setdefault(guest, {})
        top = self._top.get(guest, 0)
        if packet.number <= top:
            # Between two packets that left, the path is filled: whatever comes late must lie on it.
            if path.get(packet.number, packet.digest) != packet.digest:
                self.accuse(f"I2: {host} lets {guest}'s packet {packet.number} of another history out")
            return
        parents = self._parents.get(guest, {})
        line = [packet]
        while line[-1].number > max(top, 1) and line[-1].parent in parents:
            line.append(parents[line[-1].parent])
        if top and (line[-1].number != top or line[-1].digest != path[top]):
            self.accuse(
                f"I2: {host} lets {guest}'s packet {packet.number} out, which does not continue packet {top}"
            )
            return
        path.update({memory.number: memory.digest for memory in line})
        self._top[guest] = packet.number


def _now() -> float:
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return 0.0
