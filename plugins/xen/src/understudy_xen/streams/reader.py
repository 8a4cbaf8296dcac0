"""Records as values: what a framer has found is read out of the bytes that the caller has kept.

Contents of pages, contexts and blobs in a value are views of the caller's bytes, not copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.errors import BodyError, StreamError
from understudy_xen.streams.formats import (
    HEADER,
    OPTIONAL,
    RECORD_HEADER_BYTES,
    ByteOrder,
    Layer,
    LibxcType,
    LibxlType,
)
from understudy_xen.streams.framer import Framer
from understudy_xen.streams.frames import Frame
from understudy_xen.streams.heads import LibxcHeaders, LibxlHeader, Preamble
from understudy_xen.streams.hvmcontext import HvmContext
from understudy_xen.streams.libxc import CpuidPolicy, DirtyPfnList, HvmParams, MsrPolicy, TscInfo
from understudy_xen.streams.libxl import CheckpointState, EmulatorContext, EmulatorXenstoreData
from understudy_xen.streams.pages import PageData
from understudy_xen.streams.x86pv import P2mFrames, PvInfo, SharedInfo, VcpuContext

__all__ = ["LibxcValue", "LibxlValue", "Optional", "Value", "read_record", "records"]


@dataclass(frozen=True, slots=True)
class Optional:
    """A record of a type that is not known, and that may be ignored."""

    kind: int
    body: Buffer

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:  # noqa: ARG002 - what is in it is not known
        """Return the body's parts."""
        return (self.body,)


LibxlValue = LibxlType | EmulatorXenstoreData | EmulatorContext | CheckpointState
LibxcValue = (
    LibxcType
    | PageData
    | PvInfo
    | P2mFrames
    | VcpuContext
    | SharedInfo
    | TscInfo
    | HvmContext
    | HvmParams
    | DirtyPfnList
    | CpuidPolicy
    | MsrPolicy
)
Value = LibxlValue | LibxcValue | Optional | Preamble | LibxlHeader | LibxcHeaders
"""What a record says; the enumerations' members stand for the records without a body."""

_LIBXL: Final[Mapping[int, type[EmulatorXenstoreData | EmulatorContext | CheckpointState]]] = {
    int(each.kind): each for each in (EmulatorXenstoreData, EmulatorContext, CheckpointState)
}
_LIBXC: Final = {
    int(each.kind): each
    for each in (
        PageData,
        PvInfo,
        P2mFrames,
        SharedInfo,
        TscInfo,
        HvmContext,
        HvmParams,
        DirtyPfnList,
        CpuidPolicy,
        MsrPolicy,
    )
}
_VCPU: Final = frozenset(
    {
        LibxcType.X86_PV_VCPU_BASIC,
        LibxcType.X86_PV_VCPU_EXTENDED,
        LibxcType.X86_PV_VCPU_XSAVE,
        LibxcType.X86_PV_VCPU_MSRS,
    }
)


def read_record(
    layer: Layer, kind: int, body: memoryview, byteorder: ByteOrder
) -> LibxlValue | LibxcValue | Optional:
    """Read the body of one record.

    Args:
        layer: Whose record it is; not `Layer.XL`, which has none.
        kind: Its type.
        body: Without padding.
        byteorder: Of the layer.

    Raises:
        BodyError: It is wrong.
    """
    if kind & OPTIONAL:
        return Optional(kind, body)
    if layer is Layer.LIBXL:
        return _LIBXL[kind].unpack(body, byteorder) if kind in _LIBXL else LibxlType(kind)
    if kind in _VCPU:
        return VcpuContext.unpack(LibxcType(kind), body, byteorder)
    return _LIBXC[kind].unpack(body, byteorder) if kind in _LIBXC else LibxcType(kind)


def records(stream: Buffer, framer: Framer | None = None) -> Iterator[tuple[Frame, Value]]:
    """Go through a stream, or the next part of one, that is in memory.

    Args:
        stream: Its bytes, from where the framer stands.
        framer: One that has been given what came before; a fresh one if there was nothing.

    Yields:
        Each record with where it lies. A record that began in an earlier part is left out: its bytes are not here.

    Raises:
        StreamError: The stream is wrong, or a record's body is.
    """
    framer = framer or Framer()
    base, view = framer.offset, memoryview(stream).cast("B")
    failure: StreamError | None = None
    try:
        frames = framer.feed(view)
    except StreamError as error:
        failure, frames = error, list(error.frames)
    for frame in frames:
        if frame.start < base:
            continue
        if frame.type == HEADER:
            header = {Layer.XL: framer.preamble, Layer.LIBXL: framer.libxl, Layer.LIBXC: framer.libxc}[
                frame.layer
            ]
            assert header is not None  # noqa: S101 - the frame says that it was read
            yield frame, header
        else:
            yield frame, _value(frame, view[frame.start - base :], framer)
    if failure is not None:
        raise failure


def _value(frame: Frame, rest: memoryview, framer: Framer) -> Value:
    head = framer.libxl if frame.layer is Layer.LIBXL else framer.libxc
    assert head is not None  # noqa: S101 - a record comes after its layer's header
    body = rest[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + frame.length]
    try:
        return read_record(frame.layer, frame.type, body, head.byteorder)
    except BodyError as error:
        raise StreamError(
            error.problem,
            offset=frame.start + RECORD_HEADER_BYTES + error.at,
            layer=frame.layer.value,
            record=frame.name,
            start=frame.start,
            allowed=error.allowed,
        ) from error
