"""Devices and subkinds whose every step a test decides."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.device import (
    DeviceInfo,
    Gate,
    Kind,
    Mode,
    OpenContext,
    ProtectedDevice,
    ReplicationMode,
    Subkind,
    Verdict,
)
from understudy.group import GroupSetup
from understudy.phases import Deadlines
from understudy.services import Services

# What a step does: nothing, raise, or take its time and then perhaps raise.
Script = Callable[[], Awaitable[None]]


@dataclass
class Journal:
    """What was done to the devices, in order."""

    entries: list[str] = field(default_factory=list)

    def add(self, entry: str) -> None:
        self.entries.append(entry)

    def of(self, device: str) -> list[str]:
        return [entry.split(":", 1)[1] for entry in self.entries if entry.startswith(f"{device}:")]


class FakeDevice(ProtectedDevice):
    """Writes every step to the journal, and does what the test's scripts say."""

    def __init__(self, name: str, journal: Journal, scripts: Mapping[str, Script]) -> None:
        self.name = name
        self.journal = journal
        self.scripts = scripts

    async def _do(self, step: str, detail: str = "") -> None:
        self.journal.add(f"{self.name}:{step}{detail}")
        if step in self.scripts:
            await self.scripts[step]()
        else:
            await asyncio.sleep(0)
        self.journal.add(f"{self.name}:{step} done")

    async def start(self, side: ReplicationMode) -> None:
        await self._do("start", f" {side.value}")

    async def postsuspend(self, epoch: int) -> None:
        await self._do("postsuspend", f" {epoch}")

    async def checkpoint(self, epoch: int) -> None:
        await self._do("checkpoint", f" {epoch}")

    async def preresume(self, epoch: int) -> None:
        await self._do("preresume", f" {epoch}")

    async def postresume(self, epoch: int) -> None:
        await self._do("postresume", f" {epoch}")

    async def error(self) -> None:
        await self._do("error")

    async def commit(self, epoch: int) -> None:
        await self._do("commit", f" {epoch}")

    async def stop(self, *, failover: bool) -> None:
        await self._do("stop", " failover" if failover else "")

    async def teardown(self, verdict: Verdict) -> None:
        await self._do("teardown", f" {verdict.value}")

    async def serve(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        await self._do("serve", f" {method}")
        return {"device": self.name, **params}

    def counters(self) -> Mapping[str, int | float]:
        return {"steps": len(self.journal.of(self.name))}


class NoPeer:
    """A device without another half."""

    async def request(self, method: str, params: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        raise AssertionError(f"nobody should ask {method}")


def fails(error: Exception | str, after_s: float = 0.0) -> Script:
    """A step that takes its time and raises."""

    async def script() -> None:
        await asyncio.sleep(after_s)
        raise OSError(error) if isinstance(error, str) else error

    return script


def takes(seconds: float) -> Script:
    """A step that takes its time."""

    async def script() -> None:
        await asyncio.sleep(seconds)

    return script


def deaf(until_s: float) -> Script:
    """A step that ends at a time of the loop's clock, whatever is done to it."""

    async def script() -> None:
        loop = asyncio.get_running_loop()
        while (left := until_s - loop.time()) > 0:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                continue

    return script


@dataclass
class FakeWorld:
    """Devices by name with the scripts of their steps; ``open`` is a step, too."""

    scripts: dict[str, dict[str, Script]]
    journal: Journal = field(default_factory=Journal)
    contexts: list[OpenContext] = field(default_factory=list)

    async def open(self, context: OpenContext) -> ProtectedDevice:
        name = context.device.name
        self.contexts.append(context)
        self.journal.add(f"{name}:open")
        scripts = self.scripts[name]
        if "open" in scripts:
            await scripts["open"]()
        self.journal.add(f"{name}:open done")
        return FakeDevice(name, self.journal, scripts)

    def setup(
        self,
        *,
        side: ReplicationMode = ReplicationMode.PRIMARY,
        deadlines: Deadlines | None = None,
        subkinds: tuple[Subkind, ...] | None = None,
        **more: Any,
    ) -> GroupSetup:
        return GroupSetup(
            guest="web",
            session="s1",
            side=side,
            mode=Mode.REMUS,
            devices=[disk(name, index) for index, name in enumerate(self.scripts)],
            subkinds=subkinds or (Subkind("fake", Kind.DISK, frozenset(Mode), self.open),),
            gates=frozenset(Gate),
            services=Services(),
            peer=lambda _: NoPeer(),
            directory=Path("/nonexistent"),
            local_address="192.0.2.1",
            peer_address="192.0.2.2",
            deadlines=deadlines or Deadlines(),
            **more,
        )


def disk(name: str, index: int = 0, subkind: str = "auto") -> DeviceInfo:
    """A disk of a simulated hypervisor."""
    return DeviceInfo(Kind.DISK, name, index, "sim", subkind)
