"""The records of a libxc stream that have a body; pages, HVM_CONTEXT and those of PV guests have their own modules.

Every class has ``check``, which looks at the first `head_bytes` of a body (at all of it, if None) and at its length,
and ``unpack``, which reads all of it.

Source: Xen docs/specs/libxc-migration-stream.pandoc; tools/libs/guest/xg_sr_stream_format.h, xg_sr_common_x86.c,
xg_sr_restore_x86_hvm.c; xen/include/public/arch-x86/xen.h (xen_cpuid_leaf_t, xen_msr_entry_t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack
from typing import ClassVar, Final, NamedTuple, Self

from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.errors import BodyError
from understudy_xen.streams.fields import PAIR, Layout, at_least, exactly, zero
from understudy_xen.streams.formats import ByteOrder, LibxcType
from understudy_xen.streams.pages import entries_of

__all__ = ["CpuidLeaf", "CpuidPolicy", "DirtyPfnList", "HvmParams", "MsrEntry", "MsrPolicy", "TscInfo"]

_TSC_INFO: Final = Layout("IIQII")
_PARAM: Final = Layout("QQ")
_CPUID: Final = Layout("6I")
_MSR: Final = Layout("IIQ")
_PFN_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class TscInfo:
    """The guest's time stamp counter: mode, frequency, elapsed time, incarnation."""

    kind: ClassVar = LibxcType.X86_TSC_INFO
    head_bytes: ClassVar[int | None] = _TSC_INFO.size

    mode: int
    khz: int
    elapsed_ns: int
    incarnation: int

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        return (_TSC_INFO.of(byteorder).pack(self.mode, self.khz, self.elapsed_ns, self.incarnation, 0),)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:
        """Raise what is wrong with a body of `length` bytes that begins with `head`."""
        exactly(_TSC_INFO.size, length)
        zero(_TSC_INFO.of(byteorder).unpack_from(head)[4], 20)

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(body, len(body), byteorder)
        return cls(*_TSC_INFO.of(byteorder).unpack_from(body)[:4])


@dataclass(frozen=True, slots=True)
class HvmParams:
    """Parameters of an HVM guest: pairs of index (HVM_PARAM_*) and value."""

    kind: ClassVar = LibxcType.HVM_PARAMS
    head_bytes: ClassVar[int | None] = PAIR.size

    params: tuple[tuple[int, int], ...]

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        entry = _PARAM.of(byteorder)
        return (
            PAIR.of(byteorder).pack(len(self.params), 0),
            b"".join(entry.pack(*pair) for pair in self.params),
        )

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:
        """Raise what is wrong with a body of `length` bytes that begins with `head`."""
        at_least(PAIR.size, length)
        count, reserved = PAIR.of(byteorder).unpack_from(head)
        zero(reserved, 4)
        exactly(PAIR.size + count * _PARAM.size, length)

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(body, len(body), byteorder)
        pairs = _PARAM.of(byteorder).iter_unpack(body[PAIR.size :])
        return cls(tuple((index, value) for index, value in pairs))


class CpuidLeaf(NamedTuple):
    """What CPUID answers to one question."""

    leaf: int
    subleaf: int
    a: int
    b: int
    c: int
    d: int


@dataclass(frozen=True, slots=True)
class CpuidPolicy:
    """What the guest is told by CPUID."""

    kind: ClassVar = LibxcType.X86_CPUID_POLICY
    head_bytes: ClassVar[int | None] = 0

    leaves: tuple[CpuidLeaf, ...]

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        return (b"".join(_CPUID.of(byteorder).pack(*leaf) for leaf in self.leaves),)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:  # noqa: ARG003 - as the others
        """Raise what is wrong with a body of `length` bytes."""
        if not length or length % _CPUID.size:
            raise BodyError(f"the body has {length} bytes", allowed=f"a multiple of {_CPUID.size}, not zero")

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(b"", len(body), byteorder)
        return cls(tuple(CpuidLeaf(*leaf) for leaf in _CPUID.of(byteorder).iter_unpack(body)))


class MsrEntry(NamedTuple):
    """Value of one model specific register; `flags` is reserved."""

    msr: int
    flags: int
    value: int


@dataclass(frozen=True, slots=True)
class MsrPolicy:
    """What the guest is told by model specific registers."""

    kind: ClassVar = LibxcType.X86_MSR_POLICY
    head_bytes: ClassVar[int | None] = 0

    entries: tuple[MsrEntry, ...]

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        return (b"".join(_MSR.of(byteorder).pack(*entry) for entry in self.entries),)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:  # noqa: ARG003 - as the others
        """Raise what is wrong with a body of `length` bytes."""
        if not length or length % _MSR.size:
            raise BodyError(f"the body has {length} bytes", allowed=f"a multiple of {_MSR.size}, not zero")

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(b"", len(body), byteorder)
        return cls(tuple(MsrEntry(*entry) for entry in _MSR.of(byteorder).iter_unpack(body)))


@dataclass(frozen=True, slots=True)
class DirtyPfnList:
    """Pages that a COLO secondary has written to, and wants sent: on the back channel alone."""

    kind: ClassVar = LibxcType.CHECKPOINT_DIRTY_PFN_LIST
    head_bytes: ClassVar[int | None] = 0

    pfns: Sequence[int]

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""
        sign = "<" if byteorder == "little" else ">"
        return (pack(f"{sign}{len(self.pfns)}Q", *self.pfns),)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:  # noqa: ARG003 - as the others
        """Raise what is wrong with a body of `length` bytes."""
        if length % _PFN_BYTES:
            raise BodyError(f"the body has {length} bytes", allowed="a multiple of 8")

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body.

        Raises:
            BodyError: It is wrong.
        """
        cls.check(b"", len(body), byteorder)
        return cls(tuple(entries_of(body, byteorder)))
