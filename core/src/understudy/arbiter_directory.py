"""The embedded arbiter: a directory that both hosts see, compare-and-swap by link(2) and O_EXCL alone.

Layout, one directory per guest::

    <root>/g-<encoded name>/
        00000000000000000017.json   generation 17, immutable, complete from its first moment
        00000000000000000018.json   generation 18; the highest generation is the record that counts
        00000000000000000010.floor  generations up to 10 are over, whatever files they have
        tmp-<random>                debris or work in progress; nobody reads it

A swap from generation g writes its record to a temporary file, fsyncs it, and link()s it to the name of generation
g + 1. The file system lets exactly one link of that name succeed; everybody else gets EEXIST and has lost. There is
no lock, no rename over an existing name, and no moment at which a reader can see half a record.

* *An answer that lies.* NFS may repeat a link that had succeeded and report EEXIST. Whoever fails looks at what the
  name holds: a record with its own (writer, session, attempt) is its own win. This also answers repeated swaps.
* *Pruning.* Deleting generation g + 1 would let a very slow swapper link it again. Therefore a floor is linked
  first, only then the old generations are deleted; a swapper looks for a floor after its link, and a link at or below
  it counts for nothing. Generations only grow and the newest is never deleted.
* *Durability.* A record is believed only once its directory entry is on the disk: winners, losers and readers fsync
  the directory before they answer. So a crash of the file server cannot take back what somebody acted upon.
* *Freshness.* A listing is taken while a temporary name is there that was created for it: an NFS client then sees that
  its cached listing is old. Immutable files need no freshness. (Mounts with ``noac`` or ``lookupcache=none`` are best
  all the same; and nothing is ever started on a read alone.)
* *Listings that end early.* QEMU's 9p server with ``multidevs=remap`` gives up a listing with ENOENT when a name goes
  away under it, and the C library takes ENOENT for the end (measured: 338 of 1966 listings were empty beside one
  busy writer). So the kernel is asked without it, and a listing that it gives up, or without its own temporary name,
  is thrown away; and whether there is a later generation than the last one listed is asked by its name.
* *Hanging.* File operations run in threads of their own with a deadline (`understudy.threads`). What one that hangs in
  the kernel does later is what the contract calls a late answer.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from understudy.arbiter import Arbiter, Record, SwapResult
from understudy.errors import ArbiterError, ArbiterUnavailable, ConfigError
from understudy.hookspecs import ArbiterOffer, hookimpl

__all__ = ["DirectoryArbiter", "understudy_arbiters"]

T = TypeVar("T")

KEEP: Final = 256  # generations kept for the history
DEBRIS_AGE_S: Final = 3600.0  # temporary files older than this are removed; harmless if it is wrong
NAME_BYTES: Final = 255  # of one name on every common file system
_DIGITS: Final = 20
_LISTINGS: Final = 16
_LISTING_BYTES: Final = 1 << 15
_DIRENT: Final = struct.Struct(
    "=QqHB"
)  # struct linux_dirent64: inode, offset, length, type; the name follows


class DirectoryArbiter(Arbiter):
    """An arbiter in a directory that all hosts see: a shared file system, or one host's exported one.

    Args:
        path: The directory; created if missing.
        timeout_s: Deadline of every call, seconds.
        keep: How many old generations are kept for the history, at least 2.
    """

    def __init__(self, path: Path, *, timeout_s: float = 5.0, keep: int = KEEP) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._keep = max(2, keep)
        from understudy.threads import TimedThreads  # noqa: PLC0415 - with asyncio, which the command line does without

        self._threads = TimedThreads("arbiter")

    async def read(self, guest: str) -> Record | None:
        """Return the record that counts now; see `Arbiter.read`."""
        return await self._in_thread(lambda: _Guest(self.path, guest).read())

    async def exchange(self, expected: Record | None, desired: Record) -> SwapResult:
        """Carry out a swap; see `Arbiter.swap`."""
        return await self._in_thread(lambda: self._exchange(expected, desired))

    async def history(self, guest: str) -> Sequence[Record]:
        """Return the records kept of a guest, oldest first."""
        return await self._in_thread(lambda: _Guest(self.path, guest).history())

    async def guests(self) -> Sequence[str]:
        """Return the names of all guests that have a record, sorted."""
        return await self._in_thread(self._guests)

    def _exchange(self, expected: Record | None, desired: Record) -> SwapResult:
        guest = _Guest(self.path, desired.guest)
        result = guest.exchange(expected, desired)
        if result.won and result.record is not None and result.record.generation % 16 == 0:
            guest.prune(self._keep)
        return result

    def _guests(self) -> Sequence[str]:
        if not self.path.is_dir():
            return []
        names = sorted(unquote(e.name[2:]) for e in os.scandir(self.path) if e.name.startswith("g-"))
        return [name for name in names if _Guest(self.path, name).read() is not None]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await self._threads.run(work, timeout_s=self.timeout_s)
        except OSError as problem:  # TimeoutError is one
            raise ArbiterUnavailable(f"{self.path}: {problem}") from problem


class _Listing:
    # The names in a guest's directory at one moment.

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.generations = self._numbers("json")
        self.floor = max(self._numbers("floor"), default=0)

    def _numbers(self, kind: str) -> Sequence[int]:
        parts = (name.partition(".") for name in self.names)
        return [int(stem) for stem, _, suffix in parts if suffix == kind and stem.isdecimal()]


class _Now(NamedTuple):
    # What counts now: the newest generation, 0 if there is none, its record, and the floor.
    generation: int
    record: Record | None
    floor: int


class _Guest:
    # The blocking half: one guest's directory. Every method may be killed at any instruction.

    def __init__(self, root: Path, guest: str) -> None:
        self.guest = guest
        name = "g-" + quote(guest, safe="").replace(".", "%2E").replace("~", "%7E")
        if not guest or len(name) > NAME_BYTES:
            raise ArbiterError(
                f"a guest's name must have 1 to {NAME_BYTES - 2} bytes once encoded, got {guest!r}"
            )
        self.path = root / name

    def read(self) -> Record | None:
        if not self.path.is_dir():
            return None
        current = self._now().record
        self._sync()
        return current

    def exchange(self, expected: Record | None, desired: Record) -> SwapResult:
        self.path.mkdir(parents=True, exist_ok=True)
        now = self._now()
        if now.record is not None and now.record.identity == desired.identity:
            self._sync()
            return SwapResult(won=True, record=now.record)
        if not _same(now.record, expected):
            self._sync()
            return SwapResult(won=False, record=now.record)
        written_at = datetime.now(UTC).isoformat(timespec="seconds")
        wanted = replace(desired, generation=now.generation + 1, written_at=written_at)
        now = self._publish(wanted.generation, wanted.to_json())
        if now.record is not None and now.record.identity == desired.identity:
            return SwapResult(won=True, record=now.record)
        mine = self._load(wanted.generation)
        if mine is None or wanted.generation <= now.floor:
            return SwapResult(won=False, record=now.record)
        theirs = Record.from_json(mine)
        if theirs.identity == desired.identity:  # won, and already overtaken by a swap that started from it
            return SwapResult(won=True, record=theirs)
        return SwapResult(won=False, record=now.record)

    def history(self) -> Sequence[Record]:
        if not self.path.is_dir():
            return []
        listing = self._listing()
        records = (self._load(each) for each in sorted(listing.generations) if each > listing.floor)
        return [Record.from_json(data) for data in records if data is not None]

    def prune(self, keep: int) -> None:
        # First the floor, durable; then the files at or below it. Never the newest: keep >= 2.
        listing = self._listing()
        floor = max(listing.generations, default=0) - keep
        if floor <= 0:
            return
        if floor > listing.floor:
            self._link(f"{floor:0{_DIGITS}d}.floor", b"")
            self._sync()
        for name in listing.names:
            stem, _, kind = name.partition(".")
            # A file that an administrator has put there has no number and is nothing of ours.
            number = int(stem) if stem.isdecimal() else floor + 1
            over = (kind == "json" and number <= floor) or (kind == "floor" and number < floor)
            aged = name.startswith("tmp-") and _age_s(self.path / name) > DEBRIS_AGE_S
            if over or aged:
                (self.path / name).unlink(missing_ok=True)

    # --- Names --------------------------------------------------------------------------------------------------

    def _listing(self) -> _Listing:
        for _ in range(_LISTINGS):
            temporary = self._temporary()
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            try:
                names = self._names()
            except FileNotFoundError:
                continue
            finally:
                temporary.unlink(missing_ok=True)
            if temporary.name in names:
                return _Listing(names)
        raise ArbiterUnavailable(f"{self.path}: {_LISTINGS} listings in a row ended before their end")

    def _names(self) -> list[str]:
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return _names_in(handle)
        finally:
            os.close(handle)

    def _now(self) -> _Now:
        listing = self._listing()
        for _ in range(_LISTINGS):
            generation = max(listing.generations, default=0)
            data = self._load(generation) if generation else None
            pruned = generation and data is None  # while we looked, so there is a newer one
            partial = listing.floor and generation <= listing.floor  # the newest is always above
            if pruned or partial:
                listing = self._listing()
                continue
            while (later := self._load(generation + 1)) is not None:
                generation, data = generation + 1, later
            return _Now(generation, None if data is None else Record.from_json(data), listing.floor)
        raise ArbiterUnavailable(
            f"{self.path}: in {_LISTINGS} listings in a row no generation was above the floor, {listing.floor}, and "
            "could be read: the newest always is, so files are missing"
        )

    def _load(self, generation: int) -> Mapping[str, Any] | None:
        try:
            data = json.loads((self.path / _json(generation)).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as problem:
            raise ArbiterError(f"{self.path}: generation {generation} is damaged: {problem}") from problem
        if not isinstance(data, dict):
            raise ArbiterError(f"{self.path}: generation {generation} is damaged: no object")
        return data

    # --- Writing ------------------------------------------------------------------------------------------------

    def _publish(self, generation: int, data: Mapping[str, Any]) -> _Now:
        # Whether it succeeded is not told here: an NFS server's EEXIST may be our own success. Callers look.
        name = _json(generation)
        self._link(name, json.dumps(data, indent=1).encode() + b"\n")
        self._sync()
        now = self._now()
        if generation <= now.floor:  # a hole that a pruner made while we slept: it counts for nothing
            (self.path / name).unlink(missing_ok=True)
        return now

    def _link(self, name: str, content: bytes) -> None:
        while True:
            temporary = self._temporary()
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(handle, view) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            try:
                os.link(temporary, self.path / name)
            except FileExistsError:
                return
            except FileNotFoundError:
                if temporary.exists() or not self.path.is_dir():
                    raise
                continue  # somebody took it for debris; once more
            finally:
                temporary.unlink(missing_ok=True)
            return

    def _temporary(self) -> Path:
        return self.path / f"tmp-{secrets.token_hex(8)}"

    def _sync(self) -> None:
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _names_in(directory: int) -> list[str]:
    # Raises what the kernel says, also ENOENT. Source: getdents64(2); glibc sysdeps/unix/sysv/linux/readdir64.c.
    import ctypes  # noqa: PLC0415 - a part of the start of each command that does without it

    library = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_LISTING_BYTES)
    names = []
    while size := library.getdents64(directory, buffer, _LISTING_BYTES):
        if size < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        at = 0
        while at < size:
            names.append(os.fsdecode(ctypes.string_at(ctypes.addressof(buffer) + at + _DIRENT.size)))
            at += _DIRENT.unpack_from(buffer, at)[2]
    return [name for name in names if name not in {".", ".."}]


def _json(generation: int) -> str:
    return f"{generation:0{_DIGITS}d}.json"


def _same(current: Record | None, expected: Record | None) -> bool:
    if current is None or expected is None:
        return current is expected
    return (current.generation, current.identity) == (expected.generation, expected.identity)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _make(table: Mapping[str, Any], host: str) -> Arbiter:  # noqa: ARG001 - the offer's signature
    known = {"path", "timeout_s"}
    for key in table:
        if key not in known:
            raise ConfigError("agent.toml", f"arbiter.{key}", "unknown key", ", ".join(sorted(known)))
    path = table.get("path")
    if not isinstance(path, str) or not Path(path).is_absolute():
        raise ConfigError("agent.toml", "arbiter.path", f"is {path!r}", "an absolute path that all hosts see")
    timeout_s = table.get("timeout_s", 5.0)
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or timeout_s <= 0:
        raise ConfigError("agent.toml", "arbiter.timeout_s", f"is {timeout_s!r}", "seconds, more than 0")
    return DirectoryArbiter(Path(path), timeout_s=float(timeout_s))


@hookimpl
def understudy_arbiters() -> Iterable[ArbiterOffer]:
    """Offer the embedded arbiter under the name ``directory``."""
    return (ArbiterOffer(name="directory", make=_make),)
