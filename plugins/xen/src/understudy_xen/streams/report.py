"""What the command ``stream`` says of a stream as a whole, of what is wrong with it, and of how far it has read."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from understudy.errors import UnderstudyError
from understudy_xen.streams.errors import StreamError
from understudy_xen.streams.formats import GuestType
from understudy_xen.streams.verifier import Verifier

__all__ = ["ProgressLine", "facts_of", "fault_of", "sentence_of"]

_GUESTS: Final = {GuestType.X86_PV: "x86 PV", GuestType.X86_HVM: "x86 HVM"}
_EVERY_S: Final = 0.1
_MIB: Final = 1 << 20


def facts_of(name: str, verifier: Verifier) -> dict[str, Any]:
    """Return what is known of a stream by now.

    Args:
        name: Of the file.
        verifier: That has read it.
    """
    libxc = verifier.libxc
    return {
        "file": name,
        "form": verifier.form.value if verifier.form else None,
        "guest": _GUESTS[libxc.guest] if libxc else None,
        "xen": "{}.{}".format(*libxc.xen) if libxc else None,
        "version": libxc.version if libxc else None,
        "byteorder": libxc.byteorder if libxc else None,
        "bytes": verifier.offset,
        "pfns": verifier.pfns,
        "pages": verifier.pages,
        "checkpoints": verifier.checkpoints,
        "checkpoint_end": verifier.checkpoint_end,
        "colo": verifier.colo,
        "ended": verifier.ended,
        "remarks": list(verifier.remarks),
    }


def sentence_of(facts: Mapping[str, Any]) -> str:
    """Say the same in one line, of a stream that is right."""
    checkpoints = facts["checkpoints"]
    end = "ends with END" if facts["ended"] else "ends with a whole checkpoint, without END"
    return (
        f"{facts['file']}: {facts['form']} stream of an {facts['guest']} guest from Xen {facts['xen']}, "
        f"{facts['bytes']} bytes, {facts['pages']} pages of {facts['pfns']} pfns, "
        + (f"{checkpoints} checkpoint{'s' * (checkpoints != 1)}, " if checkpoints else "")
        + end
    )


def fault_of(error: UnderstudyError) -> dict[str, Any]:
    """Return an error as the command line's JSON has it."""
    fault: dict[str, Any] = {"kind": type(error).__name__, "message": str(error), "exit": 1}
    if isinstance(error, StreamError):
        fault |= {
            key: getattr(error, key) for key in ("problem", "offset", "layer", "record", "start", "allowed")
        }
    return fault


class ProgressLine:
    """How far the reading is, on standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._shown_s = time.monotonic()
        self._on = sys.stderr.isatty()
        self._written = False

    def __call__(self, passed: int, total: int) -> None:
        """Show it, at most ten times a second."""
        now_s = time.monotonic()
        if not self._on or now_s - self._shown_s < _EVERY_S:
            return
        self._shown_s, self._written = now_s, True
        of = f" of {total / _MIB:.0f} MiB, {passed / total:4.0%}" if total else " MiB"
        sys.stderr.write(f"\r\x1b[K{passed / _MIB:.0f}{of}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take it away again."""
        if self._written:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
