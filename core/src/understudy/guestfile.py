"""Guest files: one TOML file per guest, the same text on both hosts. docs/reference/guest-file.md describes them.

The core owns ``name``, ``hypervisor``, ``[protection]`` and ``[host.NAME]``; everything else is the hypervisor's.
What differs per host stands in ``[host.NAME]`` and is merged over the rest on that host: tables key by key, arrays
of tables entry by entry (an override entry that has a ``name`` meets the entry of that name, another one the entry
at its own position), anything else is replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

from understudy.config import NAME_PATTERN, NAME_WORDS
from understudy.device import Mode
from understudy.hypervisor import Protection
from understudy.schema import Table, read_toml

if TYPE_CHECKING:
    from understudy.hypervisor import GuestConfig, Hypervisor

__all__ = ["GuestFile", "default_mode", "merge", "parse_guest", "read_guest"]


@dataclass(frozen=True, slots=True)
class GuestFile:
    """A guest file as far as the core reads it, this host's overrides applied."""

    source: Path
    name: str
    hypervisor: str
    mode: Mode | None  #: ``None``: whatever the hypervisor does best
    protection: Protection  #: its `mode` counts only where `mode` above is given
    rest: Mapping[str, Any]  #: what the hypervisor's `parse` reads


def read_guest(path: Path, host: str, hosts: Collection[str]) -> GuestFile:
    """Read the guest file `path` as it counts on one host.

    Args:
        path: The file.
        host: This host's name.
        hosts: All host names that ``[host.NAME]`` may use, this one's included.

    Raises:
        ConfigError: The file cannot be read, or a key that the core owns is unknown or wrong.
    """
    whole = read_toml(path)
    for name, override in whole.named_tables("host").items():
        if name not in hosts:
            raise whole.error(f"host.{name}", "no such host in agent.toml", ", ".join(sorted(hosts)))
        for key in ("host", "name", "hypervisor"):
            if override.has(key):
                raise override.error(key, "must be the same on all hosts", "to leave it out here")
    tree = {key: value for key, value in whole.mapping.items() if key != "host"}
    overrides = whole.mapping.get("host", {}).get(host, {})
    table = Table(path, "", _merge(Table(path, f"host.{host}", overrides), tree))
    name = table.str("name", path.stem, pattern=NAME_PATTERN, allowed=NAME_WORDS)
    hypervisor = table.str("hypervisor")
    protection = table.table("protection")
    mode, parsed = _protection(protection)
    protection.done()
    return GuestFile(path, name, hypervisor, mode, parsed, MappingProxyType(table.rest()))


def parse_guest(file: GuestFile, hypervisor: Hypervisor) -> GuestConfig:
    """Let the hypervisor read the rest of a guest file.

    Raises:
        ConfigError: The hypervisor found a key that is unknown or wrong.
    """
    protection = file.protection
    if file.mode is None:
        protection = replace(protection, mode=default_mode(hypervisor))
    return hypervisor.parse(file.rest, name=file.name, source=file.source, protection=protection)


def default_mode(hypervisor: Hypervisor) -> Mode:
    """Return the mode that a guest is protected in when nobody says: remus where the hypervisor has it."""
    modes = hypervisor.modes
    return Mode.REMUS if Mode.REMUS in modes else next(iter(modes), Mode.REMUS)


def merge(over: Mapping[str, Any], under: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the tree `over` on the tree `under` as the module says; neither is changed.

    Raises:
        ConfigError: An entry of an array of tables meets nothing.
    """
    return _merge(Table("override", "", over), under)


def _merge(over: Table, under: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.mapping.items():
        below = under.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _merge(Table(over.source, over.path(key), value), below)
        elif _is_tables(value) and _is_tables(below):
            merged[key] = _merge_tables(over, key, value, below)
        else:
            merged[key] = value
    return merged


def _merge_tables(over: Table, key: str, entries: list[Any], below: list[Any]) -> list[Any]:
    merged = list(below)
    names = [entry.get("name") for entry in below]
    for index, entry in enumerate(entries):
        at, name = index, entry.get("name")
        if name is not None and name in names:
            at = names.index(name)
        elif index >= len(below) or (name is not None and names[index] is not None):
            known = [name for name in names if name is not None]
            allowed = f"names: {', '.join(known)}" if known else f"at most {len(below)} entries"
            raise over.error(f"{key}[{index}]", "overrides an entry that does not exist", allowed)
        merged[at] = _merge(Table(over.source, over.path(f"{key}[{index}]"), entry), merged[at])
    return merged


def _is_tables(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _protection(table: Table) -> tuple[Mode | None, Protection]:
    mode = table.choice("mode", Mode) if table.has("mode") else None
    options = table.table("options")
    return mode, Protection(
        mode=mode or Mode.REMUS,
        peer=table.str("peer", ""),
        interval=table.str("interval", "fixed"),
        interval_options=MappingProxyType(table.raw("interval_options")),
        subkind_options=MappingProxyType(
            {name: MappingProxyType(options.raw(name)) for name in options.mapping}
        ),
        prefer_primary=table.bool("prefer_primary", default=False),
        overwrite_secondary=table.bool("overwrite_secondary", default=False),
        allow_unsafe=table.bool("allow_unsafe", default=False),
    )
