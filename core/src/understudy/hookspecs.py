"""All hooks: what a plugin can offer. Read this file first when you write one.

A plugin is a module (or object) registered in the entry-point group ``understudy``; it implements the hooks it needs
with `hookimpl`. All hooks are synchronous, are called before a guest is touched, return frozen descriptors, and have
no side effects. Work happens later, on the objects the descriptors make. Order is the descriptors' ``(priority,
name)``, never the order of installation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from understudy.arbiter import Arbiter
    from understudy.device import Subkind
    from understudy.hypervisor import HostContext, Hypervisor
    from understudy.interval import IntervalPolicy
    from understudy.report import Observer

__all__ = [
    "PROJECT",
    "ArbiterOffer",
    "CommandOffer",
    "HypervisorOffer",
    "IntervalOffer",
    "ObserverOffer",
    "hookimpl",
    "hookspec",
    "understudy_arbiters",
    "understudy_commands",
    "understudy_hypervisors",
    "understudy_intervals",
    "understudy_observers",
    "understudy_subkinds",
]

PROJECT = "understudy"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, slots=True)
class HypervisorOffer:
    """A hypervisor, made once per agent."""

    name: str
    make: Callable[[HostContext], Hypervisor]
    priority: int = 50


@dataclass(frozen=True, slots=True)
class ArbiterOffer:
    """A kind of arbiter, chosen by ``[arbiter] kind = NAME`` of agent.toml."""

    name: str
    make: Callable[
        [Mapping[str, Any], str], Arbiter
    ]  #: (the rest of the ``[arbiter]`` table, this host's name)
    priority: int = 50


@dataclass(frozen=True, slots=True)
class ObserverOffer:
    """An observer of epochs and events, made once per agent."""

    name: str
    make: Callable[[], Observer]
    priority: int = 50


@dataclass(frozen=True, slots=True)
class IntervalOffer:
    """An interval policy, made once per session."""

    name: str
    make: Callable[[Mapping[str, Any]], IntervalPolicy]  #: the guest file's ``[protection.interval_options]``
    priority: int = 50


@dataclass(frozen=True, slots=True)
class CommandOffer:
    """A command of the command line; `load` is called only when the command, or the help, needs it."""

    name: str
    short_help: str
    load: Callable[[], click.Command]
    priority: int = 50


# --- Before a guest is touched --------------------------------------------------------------------------------------


@hookspec
def understudy_hypervisors() -> Iterable[HypervisorOffer]:
    """Offer hypervisors.

    Called: once, when an agent starts.
    Combined: all results, sorted by (priority, name); two of one name are an error that names both plugins.
    On error: the plugin is reported by name and left out; no guest is touched.
    """
    return ()


@hookspec
def understudy_subkinds() -> Iterable[Subkind]:
    """Offer ways to protect a NIC or a disk.

    Called: once per session and once per preflight, before the guest is touched.
    Combined: all results, sorted by (priority, name); two of one name are an error that names both plugins.
    On error: the session does not start; the guest is untouched.
    """
    return ()


@hookspec
def understudy_arbiters() -> Iterable[ArbiterOffer]:
    """Offer kinds of arbiter.

    Called: once, when an agent starts.
    Combined: by name; two of one name are an error that names both plugins.
    On error: the agent does not start if the configured kind is missing.
    """
    return ()


@hookspec
def understudy_intervals() -> Iterable[IntervalOffer]:
    """Offer policies that decide when the next remus checkpoint is taken.

    Called: once per session.
    Combined: by name; two of one name are an error that names both plugins.
    On error: the session does not start; the guest is untouched.
    """
    return ()


# --- While guests are protected -------------------------------------------------------------------------------------


@hookspec
def understudy_observers() -> Iterable[ObserverOffer]:
    """Offer observers, told of every committed epoch and every event.

    Called: once, when an agent starts.
    Combined: all are told, through a bounded queue off the pause path.
    On error: an observer that raises is logged with its name; the session never notices.
    """
    return ()


# --- On the command line --------------------------------------------------------------------------------------------


@hookspec
def understudy_commands() -> Iterable[CommandOffer]:
    """Offer commands of ``understudy``.

    Called: when the command line is not one of the core's own commands, or asks for help or completion.
    Combined: by name; the core's own names cannot be replaced.
    On error: the plugin is reported by name; the core's own commands work on.
    """
    return ()
