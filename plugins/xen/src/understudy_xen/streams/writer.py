"""Bytes of a stream: what a sender writes around the output of ``xc_domain_save``, and every record there is.

Records come as lists of buffers for ``writev``, so that the state of a device model or the contents of pages are not
copied. A sender of a Remus stream writes `preamble`, `libxl_header`, ``record(LibxlType.LIBXC_CONTEXT)``, lets libxc
write, and after each of its CHECKPOINT records `checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.formats import (
    XL_FLAG_JSON,
    XL_FLAG_STREAM_V2,
    ByteOrder,
    GuestType,
    LibxcType,
    LibxlType,
    padded,
    record_header,
)
from understudy_xen.streams.heads import LibxcHeaders, LibxlHeader, Preamble
from understudy_xen.streams.libxl import EmulatorContext, EmulatorXenstoreData

__all__ = [
    "Body",
    "abandonment",
    "checkpoint",
    "ending",
    "joined",
    "libxc_headers",
    "libxl_header",
    "preamble",
    "raw_record",
    "record",
]

_PADDING: Final = tuple(bytes(count) for count in range(8))
_UNKNOWN_MANDATORY: Final = 0x7FFFFFFF  # the last type that no specification has given away


class Body(Protocol):
    """A record with a body: one of the classes of `understudy_xen.streams.libxl` and `.libxc`."""

    @property
    def kind(self) -> int:
        """The record's type."""

    def pack(self, byteorder: ByteOrder) -> tuple[Buffer, ...]:
        """Return the body's parts."""


def preamble(config: bytes | str | Mapping[str, Any], byteorder: ByteOrder = "little") -> bytes:
    """Write what ``xl`` expects in front of a libxl stream.

    Args:
        config: The guest's configuration in libxl's JSON, as text or as the object itself.
        byteorder: Of the sending host.

    Source: tools/xl/xl_saverestore.c (save_domain_core_writeconfig).
    """
    if isinstance(config, Mapping):
        config = json.dumps(config)
    text = config.encode() if isinstance(config, str) else config
    text = text.rstrip(b"\0") + b"\0"
    return Preamble(byteorder, XL_FLAG_JSON | XL_FLAG_STREAM_V2, 0, text).pack()


def libxl_header(byteorder: ByteOrder = "little", *, legacy: bool = False) -> bytes:
    """Write the head of a libxl stream."""
    return LibxlHeader(byteorder, legacy).pack()


def libxc_headers(
    guest: GuestType, byteorder: ByteOrder = "little", *, version: int = 3, xen: tuple[int, int] = (4, 17)
) -> bytes:
    """Write image header and domain header of a libxc stream."""
    return LibxcHeaders(byteorder, version, guest, xen).pack()


def record(what: Body | LibxlType | LibxcType, byteorder: ByteOrder = "little") -> list[Buffer]:
    """Write one record.

    Args:
        what: The record, or the type of one that has no body.
        byteorder: Of its layer.

    Returns:
        Its buffers in order, for ``writev``; those of large bodies are the record's own, not copies.
    """
    if isinstance(what, LibxlType | LibxcType):
        return [record_header(byteorder).pack(what, 0)]
    return raw_record(what.kind, *what.pack(byteorder), byteorder=byteorder)


def raw_record(kind: int, *body: Buffer, byteorder: ByteOrder = "little") -> list[Buffer]:
    """Write a record of any type with any body."""
    length = sum(memoryview(part).nbytes for part in body)
    return [record_header(byteorder).pack(kind, length), *body, _PADDING[padded(length) - length]]


def checkpoint(
    context: EmulatorContext | None = None,
    xenstore: EmulatorXenstoreData | None = None,
    byteorder: ByteOrder = "little",
) -> list[Buffer]:
    """Write libxl's part of a checkpoint, which follows libxc's CHECKPOINT record and makes the checkpoint whole.

    Args:
        context: State of the device model, for an HVM guest.
        xenstore: Its keys, if it has any.
        byteorder: Of the libxl layer.

    Source: tools/libs/light/libxl_stream_write.c (libxl__stream_write_start_checkpoint).
    """
    return _emulator(context, xenstore, byteorder) + record(LibxlType.CHECKPOINT_END, byteorder)


def ending(
    context: EmulatorContext | None = None,
    xenstore: EmulatorXenstoreData | None = None,
    byteorder: ByteOrder = "little",
) -> list[Buffer]:
    """Write libxl's part of a stream without checkpoints, which follows libxc's END record and ends the stream.

    Args:
        context: State of the device model, for an HVM guest.
        xenstore: Its keys, if it has any.
        byteorder: Of the libxl layer.

    Source: tools/libs/light/libxl_stream_write.c (emulator_xenstore_record_done, emulator_context_record_done).
    """
    return _emulator(context, xenstore, byteorder) + record(LibxlType.END, byteorder)


def abandonment() -> bytes:
    """Write what ends a Remus stream between two checkpoints so that a stock receiver drops its copy.

    The end of such a stream, wherever it is, is a stock receiver's takeover. But a record that must be understood and
    is not, makes its restore fail, and a domain whose restore fails is destroyed. It is looked at when its checkpoint
    is whole, so it comes as one.

    Source: tools/libs/guest/xg_sr_restore.c (restore, handle_checkpoint) of Xen 4.17;
        docs/specs/libxc-migration-stream.pandoc (Record: a type below 0x80000000 is mandatory).
    """
    return joined(
        [*raw_record(_UNKNOWN_MANDATORY), *record(LibxcType.CHECKPOINT), *record(LibxlType.CHECKPOINT_END)]
    )


def _emulator(
    context: EmulatorContext | None, xenstore: EmulatorXenstoreData | None, byteorder: ByteOrder
) -> list[Buffer]:
    buffers: list[Buffer] = []
    if xenstore is not None and xenstore.pairs:
        buffers += record(xenstore, byteorder)
    if context is not None:
        buffers += record(context, byteorder)
    return buffers


def joined(buffers: Iterable[Buffer]) -> bytes:
    """Return the buffers' bytes as one; for small records and tests."""
    return b"".join(buffers)
