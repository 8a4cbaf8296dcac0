"""What a COLO secondary sends back to the primary, next to the main stream.

The two layers alternate here, too: libxl's CHECKPOINT_STATE records tell how far the secondary is, and libxc's
CHECKPOINT_DIRTY_PFN_LIST says which pages it has written to. There are no headers. After each checkpoint of the main
stream: SVM_READY, SVM_RESUMED; after the primary's CHECKPOINT_STATE NEW: SVM_SUSPENDED, the list.

libxc's own writer of the list (master, August 2026) puts 16 bytes in front of it instead of a record header's 8, the
address of its buffer being the second half; such a list is refused here.

Source: Xen docs/specs/libxl-migration-stream.pandoc (CHECKPOINT_STATE), libxc-migration-stream.pandoc
(CHECKPOINT_DIRTY_PFN_LIST), tools/libs/light/libxl_colo_restore.c; tools/libs/guest/xg_sr_restore.c
(handle_checkpoint, send_checkpoint_dirty_pfn_list).
"""

from __future__ import annotations

from typing import Final, NoReturn

from understudy_xen.streams.cursor import Buffer, Cursor, Steps
from understudy_xen.streams.errors import BodyError, StreamCut, StreamError
from understudy_xen.streams.formats import (
    RECORD_HEADER_BYTES,
    ByteOrder,
    Layer,
    LibxcType,
    LibxlType,
    Limits,
    padded,
    record_header,
    record_name,
)
from understudy_xen.streams.libxc import DirtyPfnList
from understudy_xen.streams.libxl import CheckpointState, ColoState

__all__ = ["BackChannel"]

_TURNS: Final = (ColoState.SVM_READY, ColoState.SVM_RESUMED, ColoState.SVM_SUSPENDED, None)  # None: the list


class BackChannel:
    """Read a COLO secondary's answers, which arrive in pieces of any size.

    Args:
        byteorder: Of both layers, as the main stream's headers say.
        limits: What it may claim.
    """

    def __init__(self, byteorder: ByteOrder = "little", *, limits: Limits | None = None) -> None:
        self._byteorder = byteorder
        self._limits = limits or Limits()
        self._cursor = Cursor(self._records())
        self._found: list[CheckpointState | DirtyPfnList] = []
        self._error: StreamError | None = None
        self._layer = Layer.LIBXL
        self._record = "record header"
        self._start = 0

    @property
    def offset(self) -> int:
        """How many bytes have come."""
        return self._cursor.received

    def feed(self, data: Buffer) -> list[CheckpointState | DirtyPfnList]:
        """Take the next bytes.

        Args:
            data: Any number of them.

        Returns:
            The records that are whole with them.

        Raises:
            StreamError: Something is wrong; every later call raises the same. Records in the same bytes before it are
                not returned: a secondary that breaks the protocol is not to be believed.
        """
        if self._error is not None:
            raise self._error
        try:
            self._cursor.feed(memoryview(data).cast("B"))
        except StreamError as error:
            self._error = error
            raise
        found, self._found = self._found, []
        return found

    def finish(self) -> None:
        """Note that no more bytes will come.

        Raises:
            StreamCut: In the middle of a record.
            StreamError: Something was wrong before.
        """
        if self._error is not None:
            raise self._error
        if self._cursor.received > self._start:
            self._error = StreamCut(
                f"the back channel ends here, {self._cursor.missing} bytes before it may",
                offset=self._cursor.received,
                layer=self._layer.value,
                record=self._record,
                start=self._start,
            )
            raise self._error

    def _records(self) -> Steps:
        unpack = record_header(self._byteorder).unpack
        turn = 0
        while True:
            expected = _TURNS[turn % len(_TURNS)]
            self._layer = Layer.LIBXC if expected is None else Layer.LIBXL
            self._start, self._record = self._cursor.offset, "record header"
            kind, length = unpack((yield RECORD_HEADER_BYTES))
            wanted = LibxcType.CHECKPOINT_DIRTY_PFN_LIST if expected is None else LibxlType.CHECKPOINT_STATE
            self._record = record_name(self._layer, kind)
            if kind != wanted:
                self._fail("comes where another record has its turn", 0, wanted.name)
            if length > self._limits.record_bytes:
                self._fail(f"claims a body of {length} bytes", 4, f"{self._limits.record_bytes} bytes")
            body = memoryview((yield padded(length)) if length else b"")
            try:
                value = (DirtyPfnList if expected is None else CheckpointState).unpack(
                    body[:length], self._byteorder
                )
            except BodyError as error:
                self._fail(error.problem, RECORD_HEADER_BYTES + error.at, error.allowed)
            if any(body[length:]):
                self._fail("has padding that is not zero", RECORD_HEADER_BYTES + length, "zero")
            if isinstance(value, CheckpointState) and value.state is not expected:
                assert expected is not None  # noqa: S101 - a list was not asked for
                self._fail(f"says {value.state.name}", RECORD_HEADER_BYTES, expected.name)
            self._found.append(value)
            turn += 1

    def _fail(self, problem: str, at: int, allowed: str) -> NoReturn:
        raise StreamError(
            problem,
            offset=self._start + at,
            layer=self._layer.value,
            record=self._record,
            start=self._start,
            allowed=allowed,
        )
