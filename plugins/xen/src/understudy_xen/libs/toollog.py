"""What Xen's libraries log, as Python's log records and progress reports.

libxc and libxl speak to a `struct xentoollog_logger`: a table of three functions, to be followed by whatever the
logger needs. Without one they write to the standard error of the whole process.

Source: Xen tools/include/xentoollog.h (4.17.0; the same from 4.14 to 4.22), tools/libs/toollog/xtl_core.c.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Final

__all__ = ["LEVELS", "Log", "Progress", "ToolLog"]

Progress = Callable[[str, int, int], None]  #: what is being done, done, total
Log = Callable[[int, str, str], None]  #: level of `logging`, context (``"xc"``, ``"libxl"``), text

# enum xentoollog_level, to the levels of `logging`.
LEVELS: Final = {
    1: logging.DEBUG,
    2: logging.DEBUG,
    3: logging.DEBUG,
    4: logging.DEBUG,
    5: logging.DEBUG,  # several lines for each checkpoint
    6: logging.INFO,
    7: logging.WARNING,
    8: logging.ERROR,
    9: logging.CRITICAL,
}
_TEXT_BYTES: Final = 2048

_pointer = ctypes.c_void_p
_VMessage = ctypes.CFUNCTYPE(
    None, _pointer, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, _pointer
)
_Progress = ctypes.CFUNCTYPE(
    None, _pointer, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong
)
_Destroy = ctypes.CFUNCTYPE(None, _pointer)


class _Logger(ctypes.Structure):
    _fields_ = (("vmessage", _VMessage), ("progress", _Progress), ("destroy", _Destroy))


_libc = ctypes.CDLL(None)
_libc.vsnprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, _pointer]
_libc.vsnprintf.restype = ctypes.c_int


class ToolLog:
    """A logger for Xen's libraries.

    Args:
        log: Gets each message; called from the thread that is in the library. ``None`` drops them.
        progress: Gets progress reports; likewise.
        least: The least level of `logging` that is formatted at all.

    Guarantees:
        An exception of `log` or `progress` is not let into the library: it is dropped, for there is nobody who could
        take it. The object must outlive every handle that was opened with it.
    """

    def __init__(
        self, log: Log | None, progress: Progress | None = None, *, least: int = logging.INFO
    ) -> None:
        self._log = log
        self._progress = progress
        self._least = least
        self.errors: list[str] = []  #: texts of the errors logged since somebody emptied it
        self._struct = _Logger(_VMessage(self._message), _Progress(self._report), _Destroy())
        if progress is None:
            self.stop_progress()

    @property
    def address(self) -> int:
        """Where the struct is; what the libraries' functions take."""
        return ctypes.addressof(self._struct)

    def stop_progress(self) -> None:
        """Have the library make no more progress reports; without a function it does not even count."""
        self._struct.progress = _Progress()

    def _message(
        self, _logger: int, level: int, code: int, context: bytes | None, form: bytes, arguments: int
    ) -> None:
        severity = LEVELS.get(level, logging.ERROR)
        if severity < self._least:
            return
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        # On the ABIs that Xen's tools run on, a va_list that is an argument is a pointer.
        _libc.vsnprintf(buffer, _TEXT_BYTES, form, arguments)
        text = buffer.value.decode("utf-8", "replace").rstrip()
        if code >= 0:
            text = f"{text}: errno {code}"
        if severity >= logging.ERROR:
            self.errors.append(text)
        if self._log is not None:
            self._log(severity, (context or b"").decode("utf-8", "replace"), text)

    def _report(
        self, _logger: int, _context: bytes | None, doing: bytes | None, _percent: int, done: int, total: int
    ) -> None:
        if self._progress is not None:
            self._progress((doing or b"").decode("utf-8", "replace"), done, total)
