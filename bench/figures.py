"""What a benchmark returns: named figures with their samples, and how they become bench.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Figure", "flat", "ratio", "table"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure.

    Args:
        name: Ends with its unit (``_ms``, ``_us``, ``_cores``) or ``_ratio``.
        samples: All samples, at least one.
        aim: An upper bound worth reaching, or ``None`` for a figure that is only recorded.
        floor: A lower bound without which other figures say little, as a rate that a load is to have.
    """

    name: str
    samples: Sequence[float]
    aim: float | None = None
    floor: float | None = None

    @property
    def value(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the first and the third quartile; 0 for fewer than four samples."""
        if len(self.samples) < 4:  # noqa: PLR2004 - quartiles of fewer samples say nothing
            return 0.0
        first, _, third = statistics.quantiles(self.samples, n=4)
        return (third - first) / 2


def ratio(name: str, ours: Figure, theirs: Figure, aim: float | None = None) -> Figure:
    """Compare two figures of the same run: ours divided by theirs."""
    return Figure(name, [ours.value / theirs.value], aim)


def flat(figures: Iterable[Figure]) -> dict[str, float]:
    """Return one flat object: for each figure its value, the number of samples and the spread."""
    result: dict[str, float] = {}
    for figure in figures:
        result[figure.name] = round(figure.value, 4)
        result[f"{figure.name}_samples"] = len(figure.samples)
        result[f"{figure.name}_spread"] = round(figure.spread, 4)
    return result


def table(figures: Iterable[Figure]) -> str:
    """Return the figures as aligned text, with their bounds and whether they are kept."""
    lines = []
    for figure in figures:
        bounds = [
            f"aim {sign} {bound:g}  {'met' if kept else 'MISSED'}"
            for sign, bound, kept in (
                ("<=", figure.aim, figure.aim is None or figure.value <= figure.aim),
                (">=", figure.floor, figure.floor is None or figure.value >= figure.floor),
            )
            if bound is not None
        ]
        lines.append(
            f"{figure.name:<42}{figure.value:>12.3f}  ±{figure.spread:<10.3f} n={len(figure.samples):<4} "
            f"{'  '.join(bounds)}".rstrip()
        )
    return "\n".join(lines)
