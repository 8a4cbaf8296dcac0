"""When the next remus checkpoint is taken: policies that see every epoch's report and answer with a number.

Two things make protection felt. The *pause share* is the part of time that the guest stands still; it falls when
checkpoints are rarer. The *added latency* is how long output waits in the gate, at worst one whole epoch and the time
to the acknowledgement; it rises when checkpoints are rarer. A policy chooses between them.

Source: Cully et al., Remus (NSDI 2008), section 4.3: fixed frequencies of 10 to 40 checkpoints per second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from understudy.options import parse_options
from understudy.report import EpochReport

__all__ = ["Adaptive", "AdaptiveOptions", "Fixed", "FixedOptions", "IntervalPolicy", "Wins"]

_NS_PER_MS = 1_000_000


class IntervalPolicy:
    """Decides how long the guest runs between two checkpoints, for one session."""

    __slots__ = ()

    def next_ms(self, report: EpochReport | None) -> float:
        """Return how long the guest runs from its resume to its next stop, milliseconds, greater than 0.

        Args:
            report: The epoch that was just committed, ``None`` at the beginning.
        """
        raise NotImplementedError

    def notice(self) -> str:
        """Return one sentence for the operator when the policy cannot keep what it promised, else ``""``."""
        return ""


@dataclass(frozen=True, slots=True)
class FixedOptions:
    """``[protection.interval_options]`` of the policy ``fixed``."""

    period_ms: float = 50.0  #: from one checkpoint's stop to the next

    def __post_init__(self) -> None:
        _positive("period_ms", self.period_ms)


class Fixed(IntervalPolicy):
    """Takes a checkpoint every `period_ms`; a pause longer than the period leaves the guest a tenth of it to run.

    Args:
        period_ms: From one checkpoint's stop to the next, milliseconds.
    """

    __slots__ = ("_late", "period_ms")

    def __init__(self, period_ms: float = 50.0) -> None:
        self.period_ms = FixedOptions(period_ms).period_ms
        self._late = False

    def next_ms(self, report: EpochReport | None) -> float:
        """Return the rest of the period after the pause."""
        pause_ms = report.pause_ns / _NS_PER_MS if report is not None else 0.0
        rest_ms = self.period_ms - pause_ms
        least_ms = self.period_ms / 10
        self._late = rest_ms < least_ms
        return max(rest_ms, least_ms)

    def notice(self) -> str:
        """Tell when pauses are about as long as the period."""
        return f"the pauses do not fit into the period of {self.period_ms:g} ms" if self._late else ""


class Wins(Enum):
    """Which bound of `Adaptive` is kept when both cannot be."""

    LATENCY = "latency"  #: output never waits longer; the guest may stand still for a larger share
    PAUSE = "pause"  #: the guest never stands still for a larger share; output may wait longer


@dataclass(frozen=True, slots=True)
class AdaptiveOptions:
    """``[protection.interval_options]`` of the policy ``adaptive``."""

    max_pause_share: float = 0.10  #: of time, 0 to 1: pause / (running + pause)
    max_latency_ms: float = 100.0  #: that the gate may add to an output, at worst
    min_ms: float = 5.0  #: the shortest running time between two checkpoints
    max_ms: float = 1000.0  #: the longest
    wins: Wins = Wins.LATENCY  #: the bound that is kept when both cannot be
    smoothing: float = 0.25  #: weight of the newest epoch in the average when things get better, 0 to 1

    def __post_init__(self) -> None:
        for name in ("max_latency_ms", "min_ms", "max_ms"):
            _positive(name, getattr(self, name))
        if not 0 < self.max_pause_share < 1:
            raise ValueError(f"max_pause_share is {self.max_pause_share!r}, it must lie between 0 and 1")
        if not 0 < self.smoothing <= 1:
            raise ValueError(f"smoothing is {self.smoothing!r}, it must be above 0 and at most 1")
        if self.min_ms > self.max_ms:
            raise ValueError(f"min_ms ({self.min_ms:g}) is above max_ms ({self.max_ms:g})")


class Adaptive(IntervalPolicy):
    """Keeps the pause share and the added latency under their bounds, by what was measured.

    With an expected pause P and time to the acknowledgement A (from the stop), a running time T costs the share
    P / (T + P) and makes an output wait at worst T + A. So a share s asks for T of at least P / s - P, and a latency L
    for T of at most L - A. When both can be kept, T is the geometric mean of the two, which leaves room on both
    sides: an idle guest gets short epochs, a busy one long ones. When they cannot, the bound that
    `AdaptiveOptions.wins` names is kept exactly, and `notice` says by how much the other is not. ``min_ms`` and
    ``max_ms`` hold always.

    Expectations rise at once with a bad epoch and fall slowly after it, so that a burst of dirty pages is answered in
    the next epoch and a quiet moment does not make the interval jump.

    Args:
        options: The bounds.
    """

    __slots__ = ("_acknowledge_ms", "_pause_ms", "_why", "options")

    def __init__(self, options: AdaptiveOptions | None = None) -> None:
        self.options = options or AdaptiveOptions()
        self._pause_ms = 0.0
        self._acknowledge_ms = 0.0
        self._why = ""

    def next_ms(self, report: EpochReport | None) -> float:
        """Return the running time that keeps the bounds; the shortest one before anything was measured."""
        bounds = self.options
        self._why = ""
        if report is None:
            return bounds.min_ms
        self._pause_ms = self._expect(self._pause_ms, report.pause_ns / _NS_PER_MS)
        self._acknowledge_ms = self._expect(self._acknowledge_ms, report.acknowledge_ns / _NS_PER_MS)
        at_least_ms = self._pause_ms / bounds.max_pause_share - self._pause_ms
        at_most_ms = bounds.max_latency_ms - self._acknowledge_ms
        if at_least_ms <= at_most_ms:
            wanted_ms = math.sqrt(at_least_ms * at_most_ms)
        else:
            wanted_ms = at_most_ms if bounds.wins is Wins.LATENCY else at_least_ms
        chosen_ms = min(max(wanted_ms, bounds.min_ms), bounds.max_ms)
        self._why = self._broken(chosen_ms)
        return chosen_ms

    def notice(self) -> str:
        """Tell which bound is not kept, and by how much."""
        return self._why

    def _expect(self, expected: float, measured: float) -> float:
        if measured >= expected:
            return measured
        return expected + self.options.smoothing * (measured - expected)

    def _broken(self, chosen_ms: float) -> str:
        share = self._pause_ms / (chosen_ms + self._pause_ms)
        latency_ms = chosen_ms + self._acknowledge_ms
        # A billionth of slack: the bound itself is kept, whatever the last bit of a float says.
        slack = 1 + 1e-9
        told = []
        if share > self.options.max_pause_share * slack:
            told.append(
                f"the guest stands still for {share:.0%} of the time (bound {self.options.max_pause_share:.0%})"
            )
        if latency_ms > self.options.max_latency_ms * slack:
            told.append(f"output waits up to {latency_ms:.0f} ms (bound {self.options.max_latency_ms:g} ms)")
        return " and ".join(told)


def make_fixed(options: Mapping[str, Any]) -> Fixed:
    """Make `Fixed` from a guest file's ``[protection.interval_options]``.

    Raises:
        ConfigError: A key is unknown or wrong.
    """
    parsed = parse_options(FixedOptions, options, source="guest file", where="protection.interval_options")
    return Fixed(parsed.period_ms)


def make_adaptive(options: Mapping[str, Any]) -> Adaptive:
    """Make `Adaptive` from a guest file's ``[protection.interval_options]``.

    Raises:
        ConfigError: A key is unknown or wrong.
    """
    where = "protection.interval_options"
    return Adaptive(parse_options(AdaptiveOptions, options, source="guest file", where=where))


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}, it must be a number above 0")
