"""What a QEMU binary can do, asked of itself by ``query-qmp-schema``; never derived from its version.

Source: QEMU docs/devel/qapi-code-gen.rst, "Client JSON Protocol introspection". Type names are masked there, so
everything is found by walking from a command.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Features", "Schema"]


class Schema:
    """The parsed answer to ``query-qmp-schema``.

    Args:
        entities: QAPI's SchemaInfo objects by name.
    """

    def __init__(self, entities: Mapping[str, Mapping[str, Any]]) -> None:
        self._entities = entities

    @classmethod
    def parse(cls, answer: Iterable[Mapping[str, Any]]) -> Schema:
        """Make a schema from the command's answer."""
        return cls({entity["name"]: entity for entity in answer})

    def supports(self, command: str, *members: str) -> bool:
        """Tell whether `command` exists and takes all of `members`.

        Args:
            command: QMP name.
            members: Dotted paths below its arguments; a part is a member of any variant, or an enumeration's value.
        """
        entity = self._entities.get(command)
        if entity is None or entity["meta-type"] != "command":
            return False
        return all(self._has([entity["arg-type"]], member.split(".")) for member in members)

    def has_event(self, event: str) -> bool:
        """Tell whether this QEMU knows the event `event`."""
        entity = self._entities.get(event)
        return entity is not None and entity["meta-type"] == "event"

    def _has(self, types: Sequence[str], path: Sequence[str]) -> bool:
        if not path:
            return True
        found = [below for name in types for below in self._below(name, path[0], set())]
        return bool(found) and self._has(found, path[1:])

    def _below(self, name: str, part: str, seen: set[str]) -> list[str]:
        # The types that `part` leads to from the type `name`; an enumeration's value leads back to it.
        if name in seen:
            return []
        seen.add(name)
        entity = self._entities[name]
        kind = entity["meta-type"]
        if kind == "enum":
            return [name] if part in entity["values"] else []
        if kind == "array":
            return self._below(entity["element-type"], part, seen)
        if kind == "alternate":
            return [t for member in entity["members"] for t in self._below(member["type"], part, seen)]
        if kind != "object":
            return []
        found = [member["type"] for member in entity["members"] if member["name"] == part]
        for variant in entity.get("variants", ()):
            found += self._below(variant["type"], part, seen)
        return found


@dataclass(frozen=True)
class Features:
    """One QEMU binary's abilities, as far as this plugin decides by them."""

    version: str  #: QEMU's own words, compared only for equality between the two hosts
    schema: Schema

    @cached_property
    def colo(self) -> bool:
        """COLO is compiled in: its capability, its takeover command and the replication driver."""
        return (
            self.schema.supports("migrate-set-capabilities", "capabilities.capability.x-colo")
            and self.schema.supports("x-colo-lost-heartbeat")
            and self.replication
        )

    @cached_property
    def replication(self) -> bool:
        """The block driver ``replication`` and a quorum that takes children at run time."""
        drivers = ("driver.replication", "driver.quorum")
        return self.schema.supports("blockdev-add", *drivers) and self.schema.supports("x-blockdev-change")

    @cached_property
    def reconnect_ms(self) -> bool:
        """Socket chardevs take ``reconnect-ms``; without it ``reconnect`` in seconds."""
        return self.schema.supports("chardev-add", "backend.data.reconnect-ms")

    @cached_property
    def block_export(self) -> bool:
        """Exports are made by ``block-export-add``; without it by ``nbd-server-add``."""
        return self.schema.supports("block-export-add", "type.nbd")

    @cached_property
    def multifd(self) -> bool:
        """Migration over several connections."""
        return self.schema.supports("migrate-set-capabilities", "capabilities.capability.multifd")

    @cached_property
    def yank(self) -> bool:
        """Connections can be cut by ``yank``."""
        return self.schema.supports("yank")

    def to_json(self) -> dict[str, Any]:
        """Return what the other host's preflight must know."""
        names = ("colo", "replication", "reconnect_ms", "block_export", "multifd", "yank")
        return {"version": self.version, **{name: getattr(self, name) for name in names}}
