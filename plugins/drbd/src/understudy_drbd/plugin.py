"""The entry point: what this distribution offers."""

from __future__ import annotations

from collections.abc import Iterable

from understudy.device import Subkind
from understudy.hookspecs import hookimpl

__all__ = ["understudy_subkinds"]


@hookimpl
def understudy_subkinds() -> Iterable[Subkind]:
    """Offer ``drbd``, and ``drbd-checkpoint`` for the Remus fork."""
    from understudy_drbd.fork import DRBD_CHECKPOINT  # noqa: PLC0415 - only where guests are protected
    from understudy_drbd.subkind import DRBD  # noqa: PLC0415 - as above

    return (DRBD_CHECKPOINT, DRBD)
