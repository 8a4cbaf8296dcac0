"""What is in a stream: runs of records, and a tally for every checkpoint.

Memory is constant if the caller takes both away as they come.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from understudy_xen.streams.formats import Form, Layer, LibxcType, LibxlType, Limits
from understudy_xen.streams.frames import Frame
from understudy_xen.streams.verifier import Verifier

__all__ = ["Inspector", "Run", "Tally"]


@dataclass(frozen=True, slots=True)
class Run:
    """Records of one type that follow each other: PAGE_DATA as many as there are, others alone."""

    layer: Layer
    name: str
    start: int
    end: int
    count: int = 1
    length: int = 0
    """Of all bodies, bytes."""
    pfns: int = 0
    pages: int = 0

    def and_then(self, other: Self) -> Self:
        """Return the run of this one and the next."""
        return replace(
            self,
            end=other.end,
            count=self.count + other.count,
            length=self.length + other.length,
            pfns=self.pfns + other.pfns,
            pages=self.pages + other.pages,
        )


@dataclass(frozen=True, slots=True)
class Tally:
    """What one checkpoint brought, or all after the last one, with the headers in front of the first."""

    number: int
    start: int
    end: int
    records: int = 0
    pfns: int = 0
    pages: int = 0
    device_model_bytes: int = 0

    @property
    def size(self) -> int:
        """How long it is in the stream, bytes."""
        return self.end - self.start


class Inspector(Verifier):
    """Verify a stream and say what is in it.

    Args:
        form: As `Verifier`.
        limits: As `Verifier`.
    """

    def __init__(self, form: Form | None = None, *, limits: Limits | None = None) -> None:
        super().__init__(form, limits=limits)
        self._seen: list[Run | Tally] = []
        self._open: Run | None = None
        self._tally = Tally(1, 0, 0)
        self._counted = (0, 0)

    def take(self) -> list[Run | Tally]:
        """Return the runs that have ended since the last call, a checkpoint's tally after its last run."""
        seen, self._seen = self._seen, []
        return seen

    def close(self) -> Tally | None:
        """End the last run, and return the tally of what came after the last checkpoint, if anything did."""
        if self._open is not None:
            self._seen.append(self._open)
            self._open = None
        return self._tally if self._tally.records else None

    def _whole(self, length: int) -> Frame:
        frame = super()._whole(length)
        pfns, pages = self.pfns - self._counted[0], self.pages - self._counted[1]
        self._counted = (self.pfns, self.pages)
        run = Run(frame.layer, frame.name, frame.start, frame.end, 1, length, pfns, pages)
        of_pages = frame.layer is Layer.LIBXC and frame.type == LibxcType.PAGE_DATA
        if self._open is not None and of_pages:
            self._open = self._open.and_then(run)
        else:
            self.close()
            if of_pages:
                self._open = run
            else:
                self._seen.append(run)
        of_model = frame.layer is Layer.LIBXL and frame.type == LibxlType.EMULATOR_CONTEXT
        tally = self._tally
        self._tally = Tally(
            tally.number,
            tally.start,
            frame.end,
            tally.records + 1,
            tally.pfns + pfns,
            tally.pages + pages,
            tally.device_model_bytes + (length if of_model else 0),
        )
        if frame.ends_checkpoint:
            self._seen.append(self._tally)
            self._tally = Tally(tally.number + 1, frame.end, frame.end)
        return frame
