"""Where records begin and end: an incremental parser of all three layers that never looks at what records contain.

Control alternates between the two inner layers in a checkpointed stream::

    libxl  LIBXC_CONTEXT, then:
    libxc    headers, records of the whole guest, CHECKPOINT
    libxl      [EMULATOR_XENSTORE_DATA] [EMULATOR_CONTEXT] CHECKPOINT_END     <- checkpoint 1 is whole here
    libxl      [CHECKPOINT_STATE, in COLO]
    libxc    records of what has changed, CHECKPOINT
    libxl      … CHECKPOINT_END                                               <- checkpoint 2 is whole here
    …
    libxc    END, when the sender comes to an end by itself
    libxl  END

Bodies are passed over by their length, without being copied or looked at; memory is constant but for the guest's
configuration, which has a limit.

Source: as `understudy_xen.streams.formats`; the alternation: tools/libs/guest/xg_sr_save.c (save),
tools/libs/light/libxl_stream_read.c (stream_continue), libxl_colo_save.c (CHECKPOINT_STATE in the main stream).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final, NoReturn, ParamSpec, TypeVar

from understudy_xen.streams.cursor import Buffer, Cursor, Steps
from understudy_xen.streams.errors import BodyError, StreamCut, StreamError
from understudy_xen.streams.formats import (
    HEADER,
    LIBXC_HEADERS_BYTES,
    LIBXC_MARKER,
    LIBXL_HEADER_BYTES,
    LIBXL_IDENT,
    RECORD_HEADER_BYTES,
    XL_MAGIC,
    XL_PREAMBLE_BYTES,
    ByteOrder,
    Form,
    Layer,
    LibxcType,
    LibxlType,
    Limits,
    padded,
    record_header,
    record_name,
)
from understudy_xen.streams.frames import Frame
from understudy_xen.streams.heads import LibxcHeaders, LibxlHeader, Preamble, PreambleNumbers
from understudy_xen.streams.order import LibxcOrder, LibxlOrder

__all__ = ["Framer"]

P = ParamSpec("P")
T = TypeVar("T")

_DETECT_BYTES: Final = 8
_STATE_BYTES: Final = (4, 8)  # libxl's own length of CHECKPOINT_STATE, and the specification's

_BEGINNINGS: Final = {XL_MAGIC[:_DETECT_BYTES]: Form.XL, LIBXL_IDENT: Form.LIBXL, LIBXC_MARKER: Form.LIBXC}


class Framer:
    """Find the records of a stream that arrives in pieces of any size.

    Args:
        form: With which layer it begins; found out from its first bytes if not given.
        limits: What it may claim.

    Guarantees:
        A call takes time for the records that begin in its piece, none for the bytes of their bodies. What the
        attributes say is true also after an error: `checkpoint_end` bytes from the beginning are `checkpoints` whole
        checkpoints.
    """

    def __init__(self, form: Form | None = None, *, limits: Limits | None = None) -> None:
        self.form = form
        self.limits = limits or Limits()
        self.preamble: Preamble | None = None
        self.libxl: LibxlHeader | None = None
        self.libxc: LibxcHeaders | None = None
        self.checkpoints = 0
        """How many checkpoints are whole."""
        self.checkpoint_end = 0
        """Offset one past the last whole checkpoint, 0 before the first one."""
        self.colo = False
        """A CHECKPOINT_STATE record was seen: the sender is a COLO primary."""
        self._cursor = Cursor(self._stream())
        self._frames: list[Frame] = []
        self._error: StreamError | None = None
        self._layer = Layer.XL
        self._kind: int | None = HEADER
        self._start = 0

    # --- What callers use --------------------------------------------------------------------------------------------

    @property
    def offset(self) -> int:
        """How many bytes of the stream have come; after its end, how long it was."""
        return self._cursor.received

    @property
    def ended(self) -> bool:
        """Whether the stream's last END record is whole."""
        return self._cursor.done

    @property
    def skippable(self) -> int:
        """How many of the next bytes will not be looked at: a file's reader may seek over them, and call `skip`."""
        return self._cursor.skippable

    def feed(self, data: Buffer) -> list[Frame]:
        """Take the next bytes.

        Args:
            data: Any number of them. After the stream's end they are left alone: `offset` stays.

        Returns:
            The frames that are whole with these bytes, in the stream's order.

        Raises:
            StreamError: The stream is wrong. Its `frames` are those that were whole before. Every later call raises
                the same error, without frames.
        """
        if self._error is not None:
            self._error.frames = ()
            raise self._error
        try:
            self._cursor.feed(memoryview(data).cast("B"))
        except StreamError as error:
            self._error = error
            error.frames = tuple(self._taken())
            raise
        return self._taken()

    def skip(self, count: int) -> list[Frame]:
        """Pass over `count` bytes, at most `skippable`, as if they had been fed.

        Args:
            count: Bytes that are surely there.

        Returns:
            The frames that are whole with them.

        Raises:
            StreamError: As `feed`.
        """
        if self._error is not None:
            return self.feed(b"")
        try:
            self._cursor.skip(count)
        except StreamError as error:
            self._error = error
            error.frames = tuple(self._taken())
            raise
        return self._taken()

    def finish(self) -> None:
        """Note that no more bytes will come.

        Guarantees:
            Returns only if the stream has ended with END, or is checkpointed and ends with a whole checkpoint, which
            is how Remus ends.

        Raises:
            StreamCut: It ends anywhere else.
            StreamError: It was wrong before.
        """
        if self._error is not None:
            self.feed(b"")
        if self.ended or (self.checkpoints and self.offset == self.checkpoint_end):
            return
        problem = f"the stream ends here, at least {self._cursor.missing} bytes before it may"
        if not self.offset:
            problem = "the stream is empty"
        elif self.checkpoints:
            problem += f"; checkpoint {self.checkpoints} is whole up to offset {self.checkpoint_end}"
        self._error = StreamCut(
            problem, offset=self.offset, layer=self._layer.value, record=self._record, start=self._start
        )
        raise self._error

    # --- The parser --------------------------------------------------------------------------------------------------

    def _taken(self) -> list[Frame]:
        frames, self._frames = self._frames, []
        return frames

    def _fail(self, problem: str, *, at: int | None = None, allowed: str = "") -> NoReturn:
        raise StreamError(
            problem,
            offset=self._start if at is None else at,
            layer=self._layer.value,
            record=self._record,
            start=self._start,
            allowed=allowed,
        )

    def _unpacked(self, unpack: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> T:
        try:
            return unpack(*arguments, **more)
        except BodyError as error:
            self._fail(error.problem, at=self._start + error.at, allowed=error.allowed)

    @property
    def _record(self) -> str:
        return "record header" if self._kind is None else record_name(self._layer, self._kind)

    def _begin(self, layer: Layer, kind: int | None, start: int) -> None:
        self._layer, self._kind, self._start = layer, kind, start

    def _whole(self, length: int) -> Frame:
        assert self._kind is not None  # noqa: S101 - a record is whole after its header
        frame = Frame(self._layer, self._kind, self._start, self._cursor.offset, length)
        self._frames.append(frame)
        return frame

    def _stream(self) -> Steps:
        head = yield _DETECT_BYTES
        form = _BEGINNINGS.get(head)
        if form is None or self.form not in {None, form}:
            wanted = (
                f"the beginning of a stream of form {self.form.value}"
                if self.form
                else "any form's beginning"
            )
            self._fail(f"begins with {head!r}, which is not {wanted}", allowed=_beginnings(self.form))
        self.form = form
        if form is Form.XL:
            yield from self._preamble(head)
            head = yield _DETECT_BYTES
        yield from (self._libxc_alone(head) if form is Form.LIBXC else self._libxl_stream(head))

    def _preamble(self, head: bytes) -> Steps:
        head += yield XL_PREAMBLE_BYTES - len(head)
        numbers = self._unpacked(PreambleNumbers.unpack, head)
        if numbers.data_bytes > self.limits.config_bytes:
            claim = f"claims {numbers.data_bytes} bytes of optional data"
            self._fail(claim, at=XL_PREAMBLE_BYTES - 4, allowed=f"{self.limits.config_bytes} bytes")
        data = (yield numbers.data_bytes) if numbers.data_bytes else b""
        self.preamble = self._unpacked(Preamble.of, numbers, data)
        self._note_preamble(self.preamble)
        self._whole(XL_PREAMBLE_BYTES + numbers.data_bytes)

    def _libxl_stream(self, head: bytes) -> Steps:
        self._begin(Layer.LIBXL, HEADER, self._cursor.offset - len(head))
        head += yield LIBXL_HEADER_BYTES - len(head)
        self.libxl = self._unpacked(LibxlHeader.unpack, head)
        self._whole(LIBXL_HEADER_BYTES)
        byteorder = self.libxl.byteorder
        unpack = record_header(byteorder).unpack
        order = LibxlOrder()
        libxc: LibxcOrder | None = None
        while True:
            self._begin(Layer.LIBXL, None, self._cursor.offset)
            header = yield RECORD_HEADER_BYTES
            kind, length = unpack(header)
            is_state = order.state_may_come and kind == LibxlType.CHECKPOINT_STATE and length in _STATE_BYTES
            if order.libxc_may_go_on and not is_state:
                # Between the two layers only this tells them apart: the same number in libxc is a part of a PV vcpu
                # that never comes first, and never with so little in it.
                assert libxc is not None  # noqa: S101 - it has been left with a CHECKPOINT
                order.back_from_libxc((yield from self._libxc_records(libxc, header)))
                continue
            yield from self._record_body(kind, length, order.admit(kind, length), byteorder)
            if kind == LibxlType.LIBXC_CONTEXT:
                libxc = yield from self._libxc_headers(b"")
                order.back_from_libxc((yield from self._libxc_records(libxc, b"")))
            elif kind == LibxlType.CHECKPOINT_END:
                self.checkpoints += 1
                self.checkpoint_end = self._cursor.offset
            elif kind == LibxlType.CHECKPOINT_STATE:
                self.colo = True
            elif kind == LibxlType.END:
                return

    def _libxc_alone(self, head: bytes) -> Steps:
        order = yield from self._libxc_headers(head)
        while (yield from self._libxc_records(order, b"")) != LibxcType.END:
            pass

    def _libxc_headers(self, head: bytes) -> Generator[int, bytes, LibxcOrder]:
        self._begin(Layer.LIBXC, HEADER, self._cursor.offset - len(head))
        head += yield LIBXC_HEADERS_BYTES - len(head)
        self.libxc = self._unpacked(LibxcHeaders.unpack, head)
        self._note_libxc(self.libxc)
        self._whole(LIBXC_HEADERS_BYTES)
        return LibxcOrder(self.libxc.version, self.libxc.guest)

    def _libxc_records(self, order: LibxcOrder, header: bytes) -> Generator[int, bytes, LibxcType]:
        assert self.libxc is not None  # noqa: S101 - its headers come first
        byteorder = self.libxc.byteorder
        unpack = record_header(byteorder).unpack
        start = self._cursor.offset - len(header)
        while True:
            self._begin(Layer.LIBXC, None, start)
            kind, length = unpack(header or (yield RECORD_HEADER_BYTES))
            header = b""
            yield from self._record_body(kind, length, order.admit(kind, length), byteorder)
            if kind in {LibxcType.CHECKPOINT, LibxcType.END}:
                return LibxcType(kind)
            start = self._cursor.offset

    def _record_body(self, kind: int, length: int, problem: str, byteorder: ByteOrder) -> Steps:
        self._kind = kind
        if problem:
            self._fail(problem)
        if length > self.limits.record_bytes:
            self._fail(
                f"claims a body of {length} bytes",
                at=self._start + 4,
                allowed=f"{self.limits.record_bytes} bytes",
            )
        yield from self._look(kind, length, byteorder)
        self._whole(length)

    # --- What a closer look adds -------------------------------------------------------------------------------------

    def _look(self, kind: int, length: int, byteorder: ByteOrder) -> Steps:  # noqa: ARG002 - for subclasses
        """Take a record's body and padding."""
        if length:
            yield -padded(length)

    def _note_preamble(self, preamble: Preamble) -> None:
        """Look at what ``xl`` put in front."""

    def _note_libxc(self, headers: LibxcHeaders) -> None:
        """Look at libxc's headers."""


def _beginnings(form: Form | None) -> str:
    return ", ".join(repr(head) for head, its in _BEGINNINGS.items() if form in {None, its})
