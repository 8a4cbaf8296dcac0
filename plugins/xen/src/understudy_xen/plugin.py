"""What this distribution offers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from understudy.hookspecs import hookimpl

if TYPE_CHECKING:
    from understudy.device import Subkind

__all__ = ["understudy_subkinds"]

# Imports wait until something is really needed: the command line loads all plugins to learn their commands.


@hookimpl
def understudy_subkinds() -> Iterable[Subkind]:
    """Offer what an operator may choose to leave unprotected."""
    from understudy_xen.unprotected import UNBUFFERED, UNREPLICATED  # noqa: PLC0415

    return (UNREPLICATED, UNBUFFERED)
