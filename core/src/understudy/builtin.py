"""What the core itself offers, through the same hooks as everybody else."""

from __future__ import annotations

from collections.abc import Iterable

from understudy.hookspecs import IntervalOffer, hookimpl
from understudy.interval import make_adaptive, make_fixed

__all__ = ["understudy_intervals"]


@hookimpl
def understudy_intervals() -> Iterable[IntervalOffer]:
    """Offer the policies ``fixed`` and ``adaptive``."""
    return (IntervalOffer("fixed", make_fixed), IntervalOffer("adaptive", make_adaptive))
