"""Understudy keeps a live second copy of a running virtual machine on another host.

The public names, most important first: what a plugin author imports. A name is imported from its module when it is
first used, so that the command line does not wait for what it does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy.device import Decline as Decline
    from understudy.device import DeviceInfo as DeviceInfo
    from understudy.device import Finding as Finding
    from understudy.device import Gate as Gate
    from understudy.device import Kind as Kind
    from understudy.device import Mode as Mode
    from understudy.device import OpenContext as OpenContext
    from understudy.device import Peer as Peer
    from understudy.device import ProbeContext as ProbeContext
    from understudy.device import ProtectedDevice as ProtectedDevice
    from understudy.device import ReplicationMode as ReplicationMode
    from understudy.device import Severity as Severity
    from understudy.device import Subkind as Subkind
    from understudy.device import SweepContext as SweepContext
    from understudy.device import Verdict as Verdict
    from understudy.errors import UnderstudyError as UnderstudyError
    from understudy.hookspecs import hookimpl as hookimpl
    from understudy.report import Checkpoint as Checkpoint
    from understudy.report import EpochReport as EpochReport
    from understudy.report import Observer as Observer

_HOMES = {
    "understudy.device": (
        "ProtectedDevice",
        "Subkind",
        "OpenContext",
        "ProbeContext",
        "Decline",
        "Finding",
        "Severity",
        "DeviceInfo",
        "Kind",
        "Mode",
        "ReplicationMode",
        "SweepContext",
        "Verdict",
        "Gate",
        "Peer",
    ),
    "understudy.hookspecs": ("hookimpl",),
    "understudy.report": ("Observer", "EpochReport", "Checkpoint"),
    "understudy.errors": ("UnderstudyError",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604 - the names are strings; the linter cannot see through the table
    *_HOME_OF,
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'understudy' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
