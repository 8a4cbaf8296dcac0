"""The records of a libxl stream that have a body.

Source: Xen docs/specs/libxl-migration-stream.pandoc; tools/libs/light/libxl_sr_stream_format.h, libxl_dom_save.c
(libxl__restore_emulator_xenstore_data, whose rules for keys these are).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final, Self

from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.errors import BodyError
from understudy_xen.streams.fields import PAIR, at_least
from understudy_xen.streams.formats import ByteOrder, LibxlType

__all__ = ["CheckpointState", "ColoState", "Emulator", "EmulatorContext", "EmulatorXenstoreData"]

_KEY: Final = re.compile(rb"[0-9A-Za-z\-/_@]+")
_EMULATORS: Final = (0, 1, 2)
_STATES: Final = (0, 1, 2, 3)
_STATE_BYTES: Final = 4
_STATE_SPECIFIED_BYTES: Final = 8
_XENSTORE_MOST: Final = 1 << 20


class Emulator(IntEnum):
    """Which device model a record is of."""

    UNKNOWN = 0
    """A stream that was converted from the legacy format does not say."""
    QEMU_TRADITIONAL = 1
    QEMU_UPSTREAM = 2


class ColoState(IntEnum):
    """What a CHECKPOINT_STATE record tells: NEW is the primary's, the others are the secondary's."""

    NEW = 0
    SVM_SUSPENDED = 1
    SVM_READY = 2
    SVM_RESUMED = 3


def _emulator(body: Buffer, byteorder: ByteOrder) -> tuple[Emulator, int]:
    at_least(PAIR.size, len(body))
    emulator, index = PAIR.of(byteorder).unpack_from(body)
    if emulator not in _EMULATORS:
        raise BodyError(
            f"emulator {emulator:#x} is not known", allowed="0 (unknown), 1 (traditional), 2 (upstream)"
        )
    return Emulator(emulator), index


@dataclass(frozen=True, slots=True)
class EmulatorContext:
    """The state of a device model, as it saved it itself: a blob to everybody else."""

    kind: ClassVar = LibxlType.EMULATOR_CONTEXT
    head_bytes: ClassVar[int | None] = 8

    context: Buffer
    emulator: Emulator = Emulator.QEMU_UPSTREAM
    index: int = 0

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        return (PAIR.of(byteorder).pack(self.emulator, self.index), self.context)

    @staticmethod
    def check(head: Buffer, length: int, byteorder: ByteOrder) -> None:  # noqa: ARG004 - as the others
        """Raise what is wrong with a body of `length` bytes that begins with `head`."""
        _emulator(head, byteorder)

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body; the context is a part of it, not a copy.

        Raises:
            BodyError: It is wrong.
        """
        emulator, index = _emulator(body, byteorder)
        return cls(body[8:], emulator, index)


@dataclass(frozen=True, slots=True)
class EmulatorXenstoreData:
    """Xenstore keys of a device model, relative to its place in the store, and their values.

    At most 1 MiB of them is read: libxl sends three short keys for each piece of memory that the device model has.
    """

    kind: ClassVar = LibxlType.EMULATOR_XENSTORE_DATA
    head_bytes: ClassVar[int | None] = _XENSTORE_MOST

    pairs: tuple[tuple[bytes, bytes], ...]
    emulator: Emulator = Emulator.QEMU_UPSTREAM
    index: int = 0

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        strings = b"".join(b"%b\0%b\0" % pair for pair in self.pairs)
        return (PAIR.of(byteorder).pack(self.emulator, self.index), strings)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:
        """Raise what is wrong with a body of `length` bytes that begins with `head`."""
        if length > _XENSTORE_MOST:
            raise BodyError(f"the body has {length} bytes", allowed=f"at most {_XENSTORE_MOST}")
        cls.unpack(memoryview(head), byteorder)

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body.

        Raises:
            BodyError: It is wrong.
        """
        if len(body) > _XENSTORE_MOST:
            raise BodyError(f"the body has {len(body)} bytes", allowed=f"at most {_XENSTORE_MOST}")
        emulator, index = _emulator(body, byteorder)
        if len(body) == PAIR.size:
            return cls((), emulator, index)
        if body[-1]:
            raise BodyError("the last string has no NUL at its end", at=len(body) - 1)
        strings = bytes(body[PAIR.size : -1]).split(b"\0")
        if len(strings) % 2:
            raise BodyError(f"{len(strings)} strings are not pairs of key and value", at=PAIR.size)
        keys = strings[::2]
        for key in keys:
            if not _KEY.fullmatch(key) or key.startswith(b"/"):
                problem = f"{key[:80]!r} is no relative xenstore key"
                raise BodyError(problem, at=PAIR.size, allowed="letters, digits and -/_@, no / in front")
        return cls(tuple(zip(keys, strings[1::2], strict=True)), emulator, index)


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """A word of COLO's conversation.

    Written with libxl's own length of 4 bytes; the 8 of the specification are read as well.
    """

    kind: ClassVar = LibxlType.CHECKPOINT_STATE
    head_bytes: ClassVar[int | None] = _STATE_SPECIFIED_BYTES

    state: ColoState

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        return (self.state.to_bytes(_STATE_BYTES, byteorder),)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:
        """Raise what is wrong with a body of `length` bytes that begins with `head`."""
        if length not in {_STATE_BYTES, _STATE_SPECIFIED_BYTES}:
            raise BodyError(f"the body has {length} bytes", allowed="4 or 8")
        state = int.from_bytes(head[:_STATE_BYTES], byteorder)
        if state not in _STATES:
            raise BodyError(
                f"state {state:#x} is not known", allowed="0 (new), 1 (suspended), 2 (ready), 3 (resumed)"
            )
        if any(head[_STATE_BYTES:]):
            raise BodyError("reserved bytes are not zero", at=_STATE_BYTES, allowed="zero")

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(body, len(body), byteorder)
        return cls(ColoState(int.from_bytes(body[:_STATE_BYTES], byteorder)))
