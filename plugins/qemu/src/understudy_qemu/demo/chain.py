"""The hash chain that the tiny guest keeps, computed a second time by whoever talks to it.

The guest's side is ``guest/chain.c``, whose first comment is the definition of the protocol, of the
hash and of the disk blocks. This module imports the standard library alone, because it runs inside
network namespaces as a small process of its own.

Disk block (512 bytes, little endian), at ``(slot * blocks + n % blocks) * 512``:

======  ====  ==========================================
offset  size  field
======  ====  ==========================================
0       8     ``USCHAIN1``
8       8     id of the connection
16      8     n
24      4     disk, 0 is ``vda``
28      4     slot
32      16    hash(n)
48      448   hash(n) repeated
496     16    BLAKE2s-128 of the first 496 bytes
======  ====  ==========================================
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2s

BLOCK_BYTES = 512
WORDS_PORT = 5001  #: where the guest takes words
COMMAND_PORT = 5002  #: where it takes ``ping``, ``poweroff``, ``reboot`` and ``panic``

_MAGIC = b"USCHAIN1"
_BLOCK = struct.Struct("<8sQQII16s448s16s")


class BrokenChain(Exception):
    """Say that the guest's reply does not follow from what it has been told before."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the guest said when the connection was opened.

    Args:
        id: the connection's id, chosen by the client.
        slot: which area of each disk the connection has.
        disks: number of disks.
        blocks: blocks of the area, a ring.
        pages: entries of the table in the guest's RAM, one on each page of 4 KiB.
        draw: every how many words the guest draws a random value, 0 for never.
    """

    id: int
    slot: int
    disks: int
    blocks: int
    pages: int
    draw: int

    @classmethod
    def parse(cls, line: str) -> Greeting:
        """Read the guest's ``HELLO`` line.

        Raises:
            BrokenChain: the line is not one.
        """
        words = line.split()
        keys = ["slot", "disks", "blocks", "pages", "draw"]
        try:
            if words[0] != "HELLO" or words[2::2] != keys:
                raise ValueError(line)
            return cls(int(words[1], 16), *(int(word) for word in words[3::2]))
        except (ValueError, IndexError, TypeError) as error:
            raise BrokenChain(f"no greeting: {line!r}") from error


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of the guest, as it stands on the line."""

    n: int
    draws: int
    draw: bytes  #: 8 bytes if the guest drew for this word, else none
    hash: str  #: 32 hexadecimal digits
    disks: tuple[str, ...]  #: status of each disk, ``ok`` or what is wrong

    @classmethod
    def parse(cls, line: str) -> Reply:
        """Read a reply line.

        Raises:
            BrokenChain: the line is not one.
        """
        try:
            n, draws, draw, digest, disks = line.split()
            return cls(
                int(n),
                int(draws),
                b"" if draw == "-" else bytes.fromhex(draw),
                digest,
                () if disks == "-" else tuple(disks.split(",")),
            )
        except ValueError as error:
            raise BrokenChain(f"no reply: {line!r}") from error


@dataclass(slots=True)
class Chain:
    """The state of one connection's chain as the client knows it."""

    greeting: Greeting
    n: int = 0
    draws: int = 0
    hash: bytes = b""
    _entries: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hash = blake2s(struct.pack("<Q", self.greeting.id), digest_size=16).digest()

    def follow(self, word: str, reply: Reply) -> None:
        """Demand that ``reply`` is the one and only right answer to ``word``, and go on from it.

        Raises:
            BrokenChain: it is not; says whether the sequence, a draw, the hash or a disk is wrong.

        Guarantees:
            The chain has moved by one word if and only if nothing was raised, except for a wrong
            disk, which does not hinder the chain in RAM from going on.
        """
        n = self.n + 1
        if reply.n != n:
            raise BrokenChain(f"word {n} was answered as word {reply.n}")
        due = bool(self.greeting.draw) and n % self.greeting.draw == 0
        if due != bool(reply.draw) or reply.draws != self.draws + due:
            raise BrokenChain(f"word {n}: draw {reply.draws}, expected {self.draws + due}")
        pages = [i % self.greeting.pages for i in struct.unpack("<8H", self.hash)]
        entries = b"".join(self._entries.get(page, bytes(16)) for page in pages)
        data = self.hash + struct.pack("<Q", n) + entries + reply.draw + word.encode()
        expected = blake2s(data, digest_size=16).digest()
        if expected.hex() != reply.hash:
            raise BrokenChain(f"word {n}: hash {reply.hash}, expected {expected.hex()}")
        self.n, self.draws, self.hash = n, reply.draws, expected
        self._entries.update(dict.fromkeys(pages, expected))
        wrong = [f"disk {i}: {s}" for i, s in enumerate(reply.disks) if s != "ok"]
        if len(reply.disks) != self.greeting.disks:
            wrong.append(f"{len(reply.disks)} disks, {self.greeting.disks} at the greeting")
        if wrong:
            raise BrokenChain(f"word {n}: {'; '.join(wrong)}")


@dataclass(frozen=True, slots=True)
class DiskCheck:
    """What one disk holds of one connection's chain.

    Args:
        newest: the newest word on the disk, 0 when there is none.
        contiguous: every word from the oldest that the ring can hold up to ``newest`` is there.
        acknowledged_lost: words that the client got a reply for, that should still be in the ring,
            and that are missing or other than acknowledged.
        problems: what is wrong, in words, the first few.
    """

    newest: int
    contiguous: bool
    acknowledged_lost: int
    problems: tuple[str, ...]


def check_disk(
    image: bytes | memoryview, greeting: Greeting, acknowledged: Mapping[int, str], disk: int
) -> DiskCheck:
    """Check the raw image of a disk against what a client was told.

    Args:
        image: the disk, raw (``qemu-img convert -U -O raw``).
        greeting: of the connection.
        acknowledged: hash by word, of every reply that the client has got.
        disk: which disk, 0 is ``vda``.

    Returns:
        What the disk holds; a sound disk is contiguous with nothing acknowledged lost.
    """
    found: dict[int, str] = {}
    problems: list[str] = []
    for index in range(greeting.blocks):
        start = (greeting.slot * greeting.blocks + index) * BLOCK_BYTES
        raw = bytes(image[start : start + BLOCK_BYTES])
        if len(raw) < BLOCK_BYTES or raw[:8] != _MAGIC:
            continue
        _, owner, n, number, slot, digest, fill, checksum = _BLOCK.unpack(raw)
        if owner != greeting.id:
            continue
        whole = (
            checksum == blake2s(raw[:-16], digest_size=16).digest()
            and fill == digest * 28
            and (number, slot, n % greeting.blocks) == (disk, greeting.slot, index)
        )
        if whole:
            found[n] = digest.hex()
        else:
            problems.append(f"block of word {n} is torn or misplaced")
    newest = max(found, default=0)
    last = max(newest, max(acknowledged, default=0))
    oldest = max(1, newest - greeting.blocks + 1)
    missing = [n for n in range(oldest, newest + 1) if n not in found]
    problems += [f"word {n} is missing below word {newest}" for n in missing]
    strangers = [n for n in found if n < oldest]
    problems += [f"word {n} is older than the ring can hold" for n in strangers]
    due = range(max(1, last - greeting.blocks + 1), last + 1)
    lost = [n for n in due if n in acknowledged and found.get(n) != acknowledged[n]]
    problems += [f"acknowledged word {n} is lost" for n in lost]
    sound = not missing and not strangers and not any("torn" in p for p in problems)
    return DiskCheck(newest, sound, len(lost), tuple(problems[:10]))
