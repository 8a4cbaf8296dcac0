"""Find, load and ask plugins. The only module besides hookspecs that knows pluggy.

Entry points of the group ``understudy`` are loaded one by one: a plugin that fails to import, or breaks the contract,
is recorded by name with its distribution and left out; the others load. A plugin that is not allowed is not even
imported. What plugins offer is sorted by ``(priority, name)``, never by the order of installation.

Each implementation of a hook is called by itself instead of through ``pm.hook``, because pluggy ends the call at the
first exception and then nobody knows what the others would have offered.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from understudy import hookspecs
from understudy.device import Subkind
from understudy.errors import PluginError
from understudy.hookspecs import (
    PROJECT,
    ArbiterOffer,
    CommandOffer,
    HypervisorOffer,
    IntervalOffer,
    ObserverOffer,
)

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Offered", "PluginInfo", "Plugins"]

log = logging.getLogger(__name__)

T = TypeVar("T", Subkind, HypervisorOffer, ArbiterOffer, IntervalOffer, ObserverOffer, CommandOffer)

_HOOKS: dict[str, type] = {
    "understudy_hypervisors": HypervisorOffer,
    "understudy_subkinds": Subkind,
    "understudy_arbiters": ArbiterOffer,
    "understudy_intervals": IntervalOffer,
    "understudy_observers": ObserverOffer,
    "understudy_commands": CommandOffer,
}


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """Where a plugin comes from and what became of it."""

    name: str  #: its entry point's name
    distribution: str  #: ``"?"`` if unknown
    version: str  #: of the distribution, ``"?"`` if unknown
    module: str  #: what the entry point names, e.g. ``"understudy_qemu.plugin"``
    file: str = ""  #: what was imported, empty if nothing was
    problem: str = ""  #: why it was left out, empty if it is loaded
    allowed: bool = True  #: False: the configuration's list leaves it out, so it was not imported


@dataclass(frozen=True, slots=True)
class Offered(Generic[T]):
    """One offer, and the plugin that made it."""

    offer: T
    plugin: PluginInfo


class Plugins:
    """The loaded plugins of one process.

    Make it by `discover`, or empty and `add` objects to it, as tests do.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._loaded: dict[str, PluginInfo] = {}
        self._left_out: list[PluginInfo] = []

    @classmethod
    def discover(cls, allowed: Sequence[str] | None = None) -> Plugins:
        """Load the plugins of all installed distributions.

        Args:
            allowed: Names of entry points that may be imported, ``None`` for all. The core's own are always allowed.

        Returns:
            The plugins; never raises for what a plugin does (see `infos`).
        """
        from importlib.metadata import entry_points  # noqa: PLC0415 - slow, and `understudy --version` needs none

        plugins = cls()
        points = entry_points(group=PROJECT)  # reads the metadata of all that is installed
        own = [point for point in points if _distribution(point) == PROJECT]
        others = [point for point in points if _distribution(point) != PROJECT]
        # The core's own come first, so that nobody can take their names.
        for point in (*sorted(own, key=_by_origin), *sorted(others, key=_by_origin)):
            is_ours = _distribution(point) == PROJECT
            plugins._load(point, allowed=is_ours or allowed is None or point.name in allowed)
        known = {info.name for info in plugins.infos}
        for name in allowed or ():
            if name not in known:
                missing = PluginInfo(
                    name, "?", "?", "?", problem="allowed by the configuration, but not installed"
                )
                plugins._leave_out(missing)
        return plugins

    def add(self, plugin: object, info: PluginInfo) -> None:
        """Register a module or object as a plugin.

        Raises:
            PluginError: It implements a hook that does not exist, with arguments that do not exist, as a wrapper, or
                under a name that is taken; it is not registered.
        """
        if info.name in self._loaded:
            other = self._loaded[info.name]
            problem = f"the name is taken by the distribution {other.distribution} ({other.module})"
            raise PluginError(info.name, info.distribution, problem)
        try:
            self._manager.register(plugin, info.name)
            # One plugin at a time, so that a misspelt hook is this plugin's error and not everybody's.
            self._manager.check_pending()
            for caller in self._manager.get_hookcallers(plugin) or ():
                if any(impl.wrapper or impl.hookwrapper for impl in caller.get_hookimpls()):
                    raise PluginError(
                        info.name, info.distribution, f"{caller.name}: wrappers are not called here"
                    )
        except PluginError:
            self._manager.unregister(name=info.name)
            raise
        except Exception as error:
            if self._manager.has_plugin(info.name):
                self._manager.unregister(name=info.name)
            raise PluginError(info.name, info.distribution, _in_words(error)) from error
        self._loaded[info.name] = info

    @property
    def infos(self) -> tuple[PluginInfo, ...]:
        """All plugins that were seen, also those that were left out."""
        return (*self._loaded.values(), *self._left_out)

    @property
    def problems(self) -> tuple[PluginInfo, ...]:
        """The plugins that should have been loaded and were not, or that failed when asked."""
        return tuple(info for info in self._left_out if info.problem)

    # --- What is offered ---------------------------------------------------------------------------------------------

    def subkinds(self) -> tuple[Subkind, ...]:
        """Return the ways to protect a device, in the order in which they are asked.

        Raises:
            PluginError: A plugin failed or offered nonsense, or two offer one name; the session must not start.
        """
        return self._strict("understudy_subkinds", Subkind)

    def intervals(self) -> tuple[IntervalOffer, ...]:
        """Return the interval policies. As `subkinds`."""
        return self._strict("understudy_intervals", IntervalOffer)

    def hypervisors(self) -> tuple[HypervisorOffer, ...]:
        """Return the hypervisors; a plugin that fails is reported by name and left out."""
        return self._lenient("understudy_hypervisors", HypervisorOffer)

    def arbiters(self) -> tuple[ArbiterOffer, ...]:
        """Return the kinds of arbiter; a plugin that fails is reported by name and left out."""
        return self._lenient("understudy_arbiters", ArbiterOffer)

    def observers(self) -> tuple[ObserverOffer, ...]:
        """Return the observers; a plugin that fails is reported by name and left out."""
        return self._lenient("understudy_observers", ObserverOffer)

    def commands(self) -> tuple[CommandOffer, ...]:
        """Return commands for the command line; a plugin that fails is reported by name and left out."""
        return self._lenient("understudy_commands", CommandOffer)

    def everything(self) -> tuple[Offered[Any], ...]:
        """Return all offers of all hooks with their plugins, for ``understudy plugins list``."""
        offered: list[Offered[Any]] = []
        for hook, wanted in _HOOKS.items():
            offered += self._ask(hook, wanted, self._report)
        return tuple(offered)

    def _strict(self, hook: str, wanted: type[T]) -> tuple[T, ...]:
        def fail(error: PluginError) -> None:
            raise error

        return tuple(each.offer for each in self._ask(hook, wanted, fail))

    def _lenient(self, hook: str, wanted: type[T]) -> tuple[T, ...]:
        return tuple(each.offer for each in self._ask(hook, wanted, self._report))

    def _ask(self, hook: str, wanted: type[T], failed: Callable[[PluginError], None]) -> list[Offered[T]]:
        first: dict[str, Offered[T]] = {}
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            info = self._loaded[impl.plugin_name]
            try:
                offers = _checked(hook, impl.function(), wanted)
            except Exception as error:  # noqa: BLE001 - whatever it raises is this plugin's failure
                failed(_blame(info, f"{hook}: {_in_words(error)}", error))
                continue
            for offer in offers:
                if offer.name in first:
                    other = first[offer.name].plugin
                    problem = f"{hook}: {offer.name!r} is offered by {other.name} ({other.distribution}), too"
                    failed(_blame(info, problem, None))
                else:
                    first[offer.name] = Offered(offer, info)
        return sorted(first.values(), key=lambda each: (each.offer.priority, each.offer.name))

    # --- Loading -----------------------------------------------------------------------------------------------------

    def _load(self, point: EntryPoint, *, allowed: bool) -> None:
        version = point.dist.version if point.dist is not None else "?"
        info = PluginInfo(point.name, _distribution(point), version, point.value, allowed=allowed)
        if not allowed:
            self._left_out.append(info)
            return
        try:
            plugin = point.load()
        except Exception as error:  # noqa: BLE001 - an import can raise anything; the other plugins load all the same
            self._leave_out(_with(info, problem=f"it cannot be imported: {_in_words(error)}"))
            return
        module = sys.modules.get(point.module)
        info = _with(info, file=getattr(module, "__file__", None) or "")
        try:
            self.add(plugin, info)
        except PluginError as error:
            self._leave_out(_with(info, problem=error.problem))

    def _leave_out(self, info: PluginInfo) -> None:
        log.error("plugin %s (distribution %s) is left out: %s", info.name, info.distribution, info.problem)
        self._left_out.append(info)

    def _report(self, error: PluginError) -> None:
        told = PluginInfo(error.plugin, error.distribution, "?", "?", problem=error.problem)
        if told not in self._left_out:
            self._leave_out(told)


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "?"


def _by_origin(point: EntryPoint) -> tuple[str, str]:
    return _distribution(point), point.name


def _with(info: PluginInfo, *, file: str = "", problem: str = "") -> PluginInfo:
    return PluginInfo(
        info.name, info.distribution, info.version, info.module, file or info.file, problem, info.allowed
    )


def _in_words(error: BaseException) -> str:
    from understudy.phases import in_words  # noqa: PLC0415 - with asyncio, which the command line does without

    return in_words(error)


def _blame(info: PluginInfo, problem: str, cause: BaseException | None) -> PluginError:
    error = PluginError(info.name, info.distribution, problem)
    error.__cause__ = cause
    return error


def _checked(hook: str, offers: Iterable[Any] | None, wanted: type[T]) -> list[T]:
    # All of them before any is used: a plugin is taken whole or not at all.
    checked: list[T] = []
    for offer in offers or ():
        if not isinstance(offer, wanted):
            raise TypeError(f"expected {wanted.__name__}, got {type(offer).__name__} from {hook}")
        checked.append(offer)
    return checked
