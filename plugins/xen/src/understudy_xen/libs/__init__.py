"""Xen's own libraries through ctypes, loaded by the version of the hypervisor that runs.

A name is imported from its module when it is first used: a process that restores a domain needs few of them, and its
start is part of a takeover.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy_xen.libs.domain import DomainInfo as DomainInfo
    from understudy_xen.libs.domain import DomainType as DomainType
    from understudy_xen.libs.domain import ShutdownReason as ShutdownReason
    from understudy_xen.libs.errors import DomainGone as DomainGone
    from understudy_xen.libs.errors import LibraryMissing as LibraryMissing
    from understudy_xen.libs.errors import LibxlFailed as LibxlFailed
    from understudy_xen.libs.errors import NoPrivilege as NoPrivilege
    from understudy_xen.libs.errors import NotXen as NotXen
    from understudy_xen.libs.errors import RestorerLost as RestorerLost
    from understudy_xen.libs.errors import SuspendFailed as SuspendFailed
    from understudy_xen.libs.errors import SuspendFailure as SuspendFailure
    from understudy_xen.libs.errors import UnknownXen as UnknownXen
    from understudy_xen.libs.errors import XenCallFailed as XenCallFailed
    from understudy_xen.libs.errors import XenUnavailable as XenUnavailable
    from understudy_xen.libs.saving import Precopy as Precopy
    from understudy_xen.libs.saving import PrecopyStats as PrecopyStats
    from understudy_xen.libs.saving import SaveCallbacks as SaveCallbacks
    from understudy_xen.libs.saving import Stream as Stream
    from understudy_xen.libs.saving import save as save
    from understudy_xen.libs.saving import save_claimed as save_claimed
    from understudy_xen.libs.suspending import Suspended as Suspended
    from understudy_xen.libs.suspending import Suspender as Suspender
    from understudy_xen.libs.suspending import Way as Way
    from understudy_xen.libs.versions import XenVersion as XenVersion
    from understudy_xen.libs.xen import Capabilities as Capabilities
    from understudy_xen.libs.xen import HvmParam as HvmParam
    from understudy_xen.libs.xen import Xen as Xen
    from understudy_xen.libs.xen import open_xen as open_xen

_HOMES = {
    "understudy_xen.libs.domain": (
        "DomainInfo",
        "DomainType",
        "ShutdownReason",
    ),
    "understudy_xen.libs.errors": (
        "DomainGone",
        "LibraryMissing",
        "LibxlFailed",
        "NoPrivilege",
        "NotXen",
        "RestorerLost",
        "SuspendFailed",
        "SuspendFailure",
        "UnknownXen",
        "XenCallFailed",
        "XenUnavailable",
    ),
    "understudy_xen.libs.saving": (
        "Precopy",
        "PrecopyStats",
        "SaveCallbacks",
        "Stream",
        "save",
        "save_claimed",
    ),
    "understudy_xen.libs.suspending": (
        "Suspended",
        "Suspender",
        "Way",
    ),
    "understudy_xen.libs.versions": ("XenVersion",),
    "understudy_xen.libs.xen": (
        "Capabilities",
        "HvmParam",
        "Xen",
        "open_xen",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604 - the names are strings; the linter cannot see through the table
    *_HOME_OF,
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'understudy_xen.libs' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
