"""A model of QEMU's monitor with the objects and character devices that colo-proxy uses, for one guest.

It refuses what QEMU refuses (unknown ids, ids in use, a chardev that an object uses) and keeps a log of commands. A
write of the checkpoint delay is a checkpoint: RESUME of the guest, and of the copy that it is paired with.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from understudy.errors import HypervisorError
from understudy.services import MonitorEvent

Json = Mapping[str, Any]

_USES = ("indev", "outdev", "primary_in", "secondary_in", "notify_dev")
TYPES = ("colo-compare", "filter-buffer", "filter-mirror", "filter-redirector", "filter-rewriter", "iothread")


class Qemu:
    """One QEMU process; `Monitor` of the services."""

    def __init__(self) -> None:
        self.types: tuple[str, ...] = TYPES  # what object-add knows
        self.objects: dict[str, dict[str, Any]] = {}
        self.chardevs: dict[str, int] = {}
        self.fds: dict[str, int] = {}
        self.filters: list[str] = []  # in QEMU's order
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.running = True
        self.replicating = False
        self.dead = False
        self.delay_ms = 10_000
        self.copy: Qemu | None = None
        self.refuse: Callable[[str, Json], str] = lambda command, arguments: ""
        self.answers = True  # whether a checkpoint that is asked for comes
        self._queues: list[asyncio.Queue[MonitorEvent | None]] = []

    def die(self) -> None:
        """End the process, and everything it holds."""
        self.dead = True
        for fd in (*self.chardevs.values(), *self.fds.values()):
            os.close(fd)
        self.chardevs.clear()
        self.fds.clear()
        self.objects.clear()
        for queue in self._queues:
            queue.put_nowait(None)

    def tell(self, name: str) -> None:
        """Send an event."""
        for queue in self._queues:
            queue.put_nowait(MonitorEvent(name, {}, 0))

    def checkpoint(self) -> None:
        """Take one checkpoint."""
        if self.replicating and self.answers:
            for qemu in (self.copy, self):
                if qemu is not None and not qemu.dead:
                    qemu.running = True
                    qemu.tell("RESUME")

    def used(self) -> set[str]:
        """Return the chardevs that objects use."""
        return {str(o[key]) for o in self.objects.values() for key in _USES if key in o}

    # --- Monitor -------------------------------------------------------------------------------------------------

    async def execute(
        self, command: str, arguments: Json | None = None, *, timeout_s: float | None = None
    ) -> Any:
        await asyncio.sleep(0)
        if self.dead:
            raise HypervisorError("the monitor's connection is lost")
        given = dict(arguments or {})
        self.commands.append((command, given))
        if why := self.refuse(command, given):
            raise HypervisorError(why)
        answer = getattr(self, "_" + command.replace("-", "_"))(given)
        await asyncio.sleep(0)
        return answer

    async def supports(self, command: str, *members: str) -> bool:
        wanted = {member.removeprefix("qom-type.") for member in members if member.startswith("qom-type.")}
        return wanted <= set(self.types)

    async def give_fd(self, name: str, fd: int) -> None:
        await self.execute("getfd", {"fdname": name, "fd": fd})

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[AsyncIterator[MonitorEvent]]:
        queue: asyncio.Queue[MonitorEvent | None] = asyncio.Queue()
        self._queues.append(queue)

        async def read() -> AsyncIterator[MonitorEvent]:
            while (event := await queue.get()) is not None:
                if event.name in names:
                    yield event
            raise HypervisorError("the monitor's connection is lost")

        try:
            yield read()
        finally:
            self._queues.remove(queue)

    # --- Commands ------------------------------------------------------------------------------------------------

    def _getfd(self, given: dict[str, Any]) -> None:
        self._closefd(given)
        self.fds[given["fdname"]] = os.dup(given["fd"])

    def _closefd(self, given: dict[str, Any]) -> None:
        if given["fdname"] in self.fds:
            os.close(self.fds.pop(given["fdname"]))

    def _chardev_add(self, given: dict[str, Any]) -> None:
        name = given["backend"]["data"]["addr"]["data"]["str"]
        if given["id"] in self.chardevs or name not in self.fds:
            raise HypervisorError(f"cannot make chardev {given['id']}")
        assert given["backend"]["data"]["server"] is False
        self.chardevs[given["id"]] = self.fds.pop(name)

    def _chardev_remove(self, given: dict[str, Any]) -> None:
        if given["id"] not in self.chardevs or given["id"] in self.used():
            raise HypervisorError(f"chardev {given['id']} is not there or busy")
        os.close(self.chardevs.pop(given["id"]))

    def _object_add(self, given: dict[str, Any]) -> None:
        assert given["qom-type"] in TYPES
        if given["id"] in self.objects:
            raise HypervisorError(f"attempt to add duplicate property {given['id']}")
        missing = {given[key] for key in _USES if key in given} - set(self.chardevs)
        if missing:
            raise HypervisorError(f"no chardev {missing}")
        self.objects[given["id"]] = given
        if given["qom-type"].startswith("filter-"):
            self.filters.insert(0 if given.get("position") == "head" else len(self.filters), given["id"])

    def _object_del(self, given: dict[str, Any]) -> None:
        if given["id"] not in self.objects:
            raise HypervisorError(f"object '{given['id']}' not found")
        del self.objects[given["id"]]
        if given["id"] in self.filters:
            self.filters.remove(given["id"])

    def _qom_set(self, given: dict[str, Any]) -> None:
        name = given["path"].removeprefix("/objects/")
        if name not in self.objects:
            raise HypervisorError(f"object '{name}' not found")
        self.objects[name][given["property"]] = given["value"]

    def _qom_list(self, _: dict[str, Any]) -> list[dict[str, str]]:
        return [{"name": n, "type": f"child<{o['qom-type']}>"} for n, o in self.objects.items()]

    def _query_chardev(self, _: dict[str, Any]) -> list[dict[str, str]]:
        return [{"label": name, "filename": "tcp:"} for name in self.chardevs]

    def _query_status(self, _: dict[str, Any]) -> dict[str, str]:
        return {"status": "running" if self.running else "paused"}

    def _query_migrate(self, _: dict[str, Any]) -> dict[str, str]:
        return {"status": "colo" if self.replicating else "none"}

    def _query_migrate_parameters(self, _: dict[str, Any]) -> dict[str, int]:
        return {"x-checkpoint-delay": self.delay_ms}

    def _migrate_set_parameters(self, given: dict[str, Any]) -> None:
        self.delay_ms = given["x-checkpoint-delay"]
        self.checkpoint()

    def _query_cpus_fast(self, _: dict[str, Any]) -> list[dict[str, int]]:
        return [{"thread-id": 1 << 30}]

    def _trace_event_set_state(self, _: dict[str, Any]) -> None:
        return None

    def _stop(self, _: dict[str, Any]) -> None:
        self.running = False
