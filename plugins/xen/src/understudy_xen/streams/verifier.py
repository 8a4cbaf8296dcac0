"""Everything that the specifications say of a stream, checked while it arrives; contents of pages are never touched.

Beyond what `understudy_xen.streams.framer` checks: the configuration is JSON, every record's body is as its type
demands, reserved fields and padding are zero.

Source: as the modules of the records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NoReturn

from understudy_xen.streams.cursor import Buffer, Steps
from understudy_xen.streams.errors import BodyError
from understudy_xen.streams.fields import PAIR
from understudy_xen.streams.formats import (
    OPTIONAL,
    RECORD_HEADER_BYTES,
    XL_PREAMBLE_BYTES,
    ByteOrder,
    Form,
    Layer,
    LibxcType,
    LibxlType,
    Limits,
    padded,
)
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.heads import LibxcHeaders, Preamble
from understudy_xen.streams.hvmcontext import HvmContext
from understudy_xen.streams.libxc import CpuidPolicy, HvmParams, MsrPolicy, TscInfo
from understudy_xen.streams.libxl import CheckpointState, ColoState, EmulatorContext, EmulatorXenstoreData
from understudy_xen.streams.pages import ENTRY_BYTES, check_contents, count_pages, largest_pfn, page_count
from understudy_xen.streams.x86pv import P2mFrames, PvInfo, SharedInfo, VcpuContext

__all__ = ["Verifier"]

_ENTRIES_AT_ONCE: Final = 1 << 16
_MOST_REMARKS: Final = 20


_Check = Callable[[Buffer, int, ByteOrder], None]

_VCPU: Final = frozenset(
    {
        LibxcType.X86_PV_VCPU_BASIC,
        LibxcType.X86_PV_VCPU_EXTENDED,
        LibxcType.X86_PV_VCPU_XSAVE,
        LibxcType.X86_PV_VCPU_MSRS,
    }
)
_MAY_BE_EMPTY: Final = _VCPU | {LibxcType.HVM_PARAMS}
_CHECKS: Final[Mapping[tuple[Layer, int], tuple[int | None, _Check]]] = {
    **{
        (Layer.LIBXL, int(each.kind)): (each.head_bytes, each.check)
        for each in (CheckpointState, EmulatorContext, EmulatorXenstoreData)
    },
    **{
        (Layer.LIBXC, int(each.kind)): (each.head_bytes, each.check)
        for each in (CpuidPolicy, HvmContext, HvmParams, MsrPolicy, PvInfo, SharedInfo, TscInfo)
    },
}


def _anything(head: Buffer, length: int, byteorder: ByteOrder) -> None:
    """Find nothing wrong with a body."""


class Verifier(Framer):
    """Check a stream that arrives in pieces of any size.

    Args:
        form: As `Framer`.
        limits: As `Framer`.

    Guarantees:
        What `feed` raises is the first thing that is wrong, with its offset. Memory: one record other than PAGE_DATA
        and the state of a device model, as far as its bytes have come; half a MiB of any other.
    """

    def __init__(self, form: Form | None = None, *, limits: Limits | None = None) -> None:
        super().__init__(form, limits=limits)
        self.pfns = 0
        """How many pages PAGE_DATA records have spoken of."""
        self.pages = 0
        """Of how many they brought the contents."""
        self.remarks: list[str] = []
        """What is unusual, but allowed; at most 20 sentences."""
        self._width: int | None = None
        self._last_pfn: int | None = None

    def _look(self, kind: int, length: int, byteorder: ByteOrder) -> Steps:
        if kind == LibxcType.PAGE_DATA and self._layer is Layer.LIBXC:
            yield from self._pages(length, byteorder)
            return
        head_bytes, check = self._check_of(kind)
        taken = length if head_bytes is None else min(length, head_bytes)
        head = (yield taken) if taken else b""
        try:
            check(head, length, byteorder)
        except BodyError as error:
            self._blame(error)
        self._note(kind, head, length, byteorder)
        if length > taken:
            yield taken - length
        if padded(length) > length:
            padding = yield padded(length) - length
            if any(padding):
                self._fail("has padding that is not zero", at=self._start + RECORD_HEADER_BYTES + length)

    def _check_of(self, kind: int) -> tuple[int | None, _Check]:
        if kind & OPTIONAL:
            return 0, _anything
        if self._layer is Layer.LIBXC and kind in _VCPU:
            return PAIR.size, partial(VcpuContext.check, kind, width=self._width)
        if self._layer is Layer.LIBXC and kind == LibxcType.X86_PV_P2M_FRAMES:
            return PAIR.size, partial(P2mFrames.check, width=self._width)
        return _CHECKS.get((self._layer, kind), (0, _anything))

    def _note(self, kind: int, head: bytes, length: int, byteorder: ByteOrder) -> None:
        if kind & OPTIONAL:
            self._remark("is optional, of no known type, and was passed over")
        elif self._layer is Layer.LIBXC:
            if kind == LibxcType.X86_PV_INFO:
                self._width = head[0]
            elif kind == LibxcType.X86_PV_P2M_FRAMES:
                self._last_pfn = max(self._last_pfn or 0, int.from_bytes(head[4:8], byteorder))
            elif length == PAIR.size and kind in _MAY_BE_EMPTY:
                self._remark("is empty, as Xen 4.6 to 4.8 wrote it")
        elif kind == LibxlType.CHECKPOINT_STATE:
            state = CheckpointState.unpack(memoryview(head), byteorder).state
            if state is not ColoState.NEW:
                problem = f"says {state.name}, which only a secondary does"
                self._fail(problem, at=self._start + RECORD_HEADER_BYTES, allowed=ColoState.NEW.name)

    def _pages(self, length: int, byteorder: ByteOrder) -> Steps:
        head = (yield min(length, PAIR.size)) if length else b""
        try:
            count = page_count(head, length, byteorder)
            pages = 0
            for first in range(0, count, _ENTRIES_AT_ONCE):
                entries = yield min(count - first, _ENTRIES_AT_ONCE) * ENTRY_BYTES
                pages += count_pages(entries, byteorder, first=first)
                if self._last_pfn is not None and largest_pfn(entries, byteorder) > self._last_pfn:
                    raise BodyError(
                        f"pfn {largest_pfn(entries, byteorder):#x} is beyond the P2M table",
                        at=PAIR.size + first * ENTRY_BYTES,
                        allowed=f"up to {self._last_pfn:#x}",
                    )
            check_contents(count, pages, length)
        except BodyError as error:
            self._blame(error)
        if pages:
            yield PAIR.size + count * ENTRY_BYTES - length
        self.pfns += count
        self.pages += pages

    def _blame(self, error: BodyError) -> NoReturn:
        at = self._start + RECORD_HEADER_BYTES + error.at
        self._fail(error.problem, at=at, allowed=error.allowed)

    def _remark(self, what: str) -> None:
        if len(self.remarks) < _MOST_REMARKS:
            self.remarks.append(f"offset {self._start}: {self._layer.value} {self._record} {what}")

    def _note_preamble(self, preamble: Preamble) -> None:
        if preamble.optional_flags:
            self._remark(f"has unknown optional flags {preamble.optional_flags:#x}")
        if not preamble.is_json:
            self._remark(
                "holds a configuration that is not JSON" if preamble.config else "holds no configuration"
            )
            return
        at = min(XL_PREAMBLE_BYTES + 4, self._cursor.offset)  # behind its length, if there is room for one
        try:
            config = json.loads(preamble.config.rstrip(b"\0"))
        except (ValueError, RecursionError) as error:
            self._fail(f"says that the configuration is JSON, but: {error}", at=at)
        if not isinstance(config, dict):
            self._fail(f"holds as configuration a {type(config).__name__}", at=at, allowed="object")

    def _note_libxc(self, headers: LibxcHeaders) -> None:
        if any(headers.reserved):
            self._fail("have reserved fields that are not zero", allowed="zero")
        if not headers.xen[0]:
            self._remark("are a converter's: the stream was made from one of Xen 4.5 or older")
