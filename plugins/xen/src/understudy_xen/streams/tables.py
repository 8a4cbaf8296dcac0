"""What ``stream inspect`` prints, as the stream is read: lines for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from understudy.errors import UnderstudyError
from understudy_xen.streams.inspector import Run, Tally
from understudy_xen.streams.report import fault_of, sentence_of

__all__ = ["JsonReport", "Report", "TextReport"]

Print = Callable[[str], None]


class Report(Protocol):
    """Takes what an `Inspector` finds, in order."""

    def add(self, found: Run | Tally) -> None:
        """Print a run of records, or the tally of a checkpoint."""

    def end(self, rest: Tally | None, facts: Mapping[str, Any], error: UnderstudyError | None) -> None:
        """Print what there is to say at the end."""


class TextReport:
    """A table of records, a line for each checkpoint, a summary.

    Args:
        show: Prints a line.
        records: Whether the table is wanted; without it there are the checkpoints alone.
    """

    def __init__(self, show: Print, *, records: bool) -> None:
        self._show = show
        self._records = records
        self._after_first: list[int] = []
        self._count = self._least = self._most = self._sum = 0
        if records:
            show(f"{'offset':>14}  {'bytes':>12}  {'layer':<5}  record")

    def add(self, found: Run | Tally) -> None:
        """Print a run of records, or the tally of a checkpoint."""
        if isinstance(found, Tally):
            self._show(_line_of(found, f"checkpoint {found.number}"))
            self._reckon(found)
        elif self._records:
            times = f" x {found.count}" if found.count > 1 else ""
            pages = f": {found.pages} pages of {found.pfns} pfns" if found.pfns else ""
            size = found.end - found.start
            self._show(f"{found.start:>14}  {size:>12}  {found.layer.value:<5}  {found.name}{times}{pages}")

    def end(self, rest: Tally | None, facts: Mapping[str, Any], error: UnderstudyError | None) -> None:
        """Print a summary; an error is not printed here."""
        if rest is not None and facts["checkpoints"]:
            self._show(_line_of(rest, "after that"))
        if self._count:
            mean = self._sum / self._count
            self._show(
                f"pages per checkpoint, without the first: {self._least} to {self._most}, {mean:.1f} in the mean"
            )
        if error is None:
            self._show(sentence_of(facts))
        for remark in facts["remarks"]:
            self._show(f"remark: {remark}")

    def _reckon(self, tally: Tally) -> None:
        if tally.number > 1:
            self._least = min(self._least, tally.pages) if self._count else tally.pages
            self._most = max(self._most, tally.pages)
            self._count += 1
            self._sum += tally.pages


def _line_of(tally: Tally, what: str) -> str:
    model = f", device model {tally.device_model_bytes} bytes" if tally.device_model_bytes else ""
    return (
        f"{what}: offsets {tally.start} to {tally.end}, {tally.size} bytes, {tally.records} records, "
        f"{tally.pages} pages of {tally.pfns} pfns{model}"
    )


class JsonReport:
    """One JSON object, written as the stream is read: a stream of any size is not held in memory for it.

    Args:
        write: Writes text as it is.
        records: Whether each checkpoint's records are wanted.
    """

    def __init__(self, write: Print, *, records: bool) -> None:
        self._write = write
        self._records = records
        self._before_tally = ""
        self._before_record = ""
        write('{"parts": [')

    def add(self, found: Run | Tally) -> None:
        """Write a run of records, or what there is to say of its checkpoint after the last of them."""
        if isinstance(found, Tally):
            self._close(found, whole=True)
            return
        if not self._records:
            return
        row = {
            "offset": found.start,
            "bytes": found.end - found.start,
            "layer": found.layer.value,
            "record": found.name,
            "count": found.count,
        }
        if found.pfns:
            row |= {"pfns": found.pfns, "pages": found.pages}
        self._open()
        self._write(f"{self._before_record}\n    {json.dumps(row)}")
        self._before_record = ","

    def _open(self) -> None:
        if not self._before_record:
            self._write(f'{self._before_tally}\n  {{"records": [')
            self._before_tally = ","

    def _close(self, tally: Tally, *, whole: bool) -> None:
        values = {
            "checkpoint": tally.number if whole else None,
            "offset": tally.start,
            "bytes": tally.size,
            "pfns": tally.pfns,
            "pages": tally.pages,
            "device_model_bytes": tally.device_model_bytes,
        }
        self._open()
        self._write(f"], {json.dumps(values)[1:]}")
        self._before_record = ""

    def end(self, rest: Tally | None, facts: Mapping[str, Any], error: UnderstudyError | None) -> None:
        """Write the rest of the object, with the error if there was one."""
        if rest is not None:
            self._close(rest, whole=False)
        values = {**facts, **({"error": fault_of(error)} if error is not None else {})}
        self._write(f"], {json.dumps(values, indent=2)[1:].lstrip()}\n")
