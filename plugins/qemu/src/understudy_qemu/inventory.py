"""What a QEMU has that a session may add to: taken at its birth, compared when a session was cut short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from understudy.services import Monitor

__all__ = ["Inventory"]


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a QEMU has that a session may add to."""

    objects: frozenset[str]
    chardevs: frozenset[str]
    nodes: frozenset[str]
    exports: frozenset[str]
    capabilities: frozenset[str]  #: of migration, those that are on

    @classmethod
    async def take(cls, monitor: Monitor) -> Inventory:
        """Ask a QEMU what it has.

        Nodes that QEMU named itself are left out, they go with what they belong to; so is a filter-rewriter: a guest
        that took over keeps it for good, because open connections may depend on it.
        """
        objects = await monitor.execute("qom-list", {"path": "/objects"})
        nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
        capabilities = await monitor.execute("query-migrate-capabilities")
        return cls(
            objects=frozenset(
                item["name"]
                for item in objects
                if item["type"].startswith("child<") and item["type"] != "child<filter-rewriter>"
            ),
            chardevs=frozenset(item["label"] for item in await monitor.execute("query-chardev")),
            nodes=frozenset(n["node-name"] for n in nodes if not n["node-name"].startswith("#")),
            exports=frozenset(item["id"] for item in await monitor.execute("query-block-exports")),
            capabilities=frozenset(item["capability"] for item in capabilities if item["state"]),
        )

    def to_json(self) -> dict[str, list[str]]:
        """Return it JSON-able; `from_json` is its inverse."""
        return {name: sorted(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def from_json(cls, data: Mapping[str, list[str]]) -> Inventory:
        """Make one from what `to_json` returned."""
        return cls(**{name: frozenset(data.get(name, ())) for name in cls.__slots__})
