"""The entry point: what this distribution offers."""

from __future__ import annotations

from collections.abc import Iterable

from understudy.device import Subkind
from understudy.hookspecs import hookimpl

__all__ = ["understudy_subkinds"]


@hookimpl
def understudy_subkinds() -> Iterable[Subkind]:
    """Offer ``colo-proxy``."""
    from understudy_colo_proxy.subkind import COLO_PROXY  # noqa: PLC0415 - only where guests are protected

    return (COLO_PROXY,)
