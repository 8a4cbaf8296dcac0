"""HVM_CONTEXT: what Xen itself knows of a guest, as a chain of entries.

The stream's specification calls it a blob of Xen's; its outer form is a part of Xen's public interface, and Xen
refuses a chain that is broken.

Source: xen/include/public/hvm/save.h (struct hvm_save_descriptor), public/arch-x86/hvm/save.h (struct hvm_save_header,
the type codes), xen/arch/x86/hvm/save.c (hvm_load).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, Self

from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.errors import BodyError
from understudy_xen.streams.fields import PAIR, Layout
from understudy_xen.streams.formats import ByteOrder, LibxcType

__all__ = ["ENTRY_NAMES", "HvmContext", "HvmEntry", "chain"]

ENTRY_NAMES: Final = {
    0: "END",
    1: "HEADER",
    2: "CPU",
    3: "PIC",
    4: "IOAPIC",
    5: "LAPIC",
    6: "LAPIC_REGS",
    7: "PCI_IRQ",
    8: "ISA_IRQ",
    9: "PCI_LINK",
    10: "PIT",
    11: "RTC",
    12: "HPET",
    13: "PMTIMER",
    14: "MTRR",
    15: "VIRIDIAN_DOMAIN",
    16: "CPU_XSAVE",
    17: "VIRIDIAN_VCPU",
    18: "VMCE_VCPU",
    19: "TSC_ADJUST",
    20: "CPU_MSR",
}
"""Names of the entries that Xen 4.14 to 4.22 write. Others are passed over: which ones there are is Xen's business."""

_END: Final = 0
_HEADER: Final = 1
_MAGIC: Final = 0x54381286
_VERSION: Final = 1
_DESCRIPTOR: Final = Layout("HHI")
_HEADER_BYTES: Final = 24


class HvmEntry(NamedTuple):
    """One entry; `instance` is the vcpu, for those there is one of per vcpu."""

    type: int
    instance: int
    data: memoryview


def chain(body: memoryview, byteorder: ByteOrder) -> Iterator[HvmEntry]:
    """Go through the entries, without the END that closes them.

    Raises:
        BodyError: The chain is broken.
    """
    descriptor = _DESCRIPTOR.of(byteorder)
    at = 0
    while True:
        if len(body) - at < descriptor.size:
            raise BodyError("the chain of entries does not end with END", at=at)
        kind, instance, length = descriptor.unpack_from(body, at)
        start = at + descriptor.size
        if length > len(body) - start:
            name = ENTRY_NAMES.get(kind, kind)
            raise BodyError(
                f"entry {name} claims {length} bytes, {len(body) - start} are left",
                at=at,
                allowed=f"{len(body) - start}",
            )
        if (kind == _HEADER) != (at == 0):
            raise BodyError("HEADER is not the first entry, or not the only one", at=at)
        if kind == _END:
            return
        yield HvmEntry(kind, instance, body[start : start + length])
        at = start + length


@dataclass(frozen=True, slots=True)
class HvmContext:
    """State of the vcpus and of the devices inside Xen."""

    kind: ClassVar = LibxcType.HVM_CONTEXT
    head_bytes: ClassVar[int | None] = None

    blob: Buffer

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:  # noqa: ARG002 - the blob is in Xen's order already
        """Return the body's parts."""
        return (self.blob,)

    @classmethod
    def check(cls, head: Buffer, length: int, byteorder: ByteOrder) -> None:  # noqa: ARG003 - as the others
        """Raise what is wrong with this body."""
        cls.unpack(memoryview(head), byteorder)

    @classmethod
    def unpack(cls, body: memoryview, byteorder: ByteOrder) -> Self:
        """Read a body; it is not copied.

        Raises:
            BodyError: It is wrong.
        """
        for entry in chain(body, byteorder):
            if entry.type == _HEADER:
                if len(entry.data) < _HEADER_BYTES:
                    raise BodyError(f"entry HEADER has {len(entry.data)} bytes", allowed=f"{_HEADER_BYTES}")
                magic, version = PAIR.of(byteorder).unpack_from(entry.data)
                if (magic, version) != (_MAGIC, _VERSION):
                    raise BodyError(
                        f"entry HEADER has magic {magic:#x}, version {version}",
                        at=8,
                        allowed=f"{_MAGIC:#x}, {_VERSION}",
                    )
        return cls(body)

    def entries(self, byteorder: ByteOrder) -> Iterator[HvmEntry]:
        """Go through the entries."""
        return chain(memoryview(self.blob), byteorder)
