"""Protect a small file of a guest, such as UEFI variables, by sending it whole at every checkpoint."""

import asyncio
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy import Decline, Gate, Kind, Mode, OpenContext, ProtectedDevice, Subkind, hookimpl
from understudy.device import ReplicationMode


@dataclass(frozen=True, slots=True)
class NvramOptions:
    max_size_bytes: int = 1 << 20  #: larger files are left to other subkinds


class NvramDevice(ProtectedDevice):
    def __init__(self, context: OpenContext) -> None:
        self.is_primary = context.side is ReplicationMode.PRIMARY
        self.path = Path(context.device.properties["path"])
        self.peer = context.peer
        self.arrived: bytes | None = None  # sent by the primary, part of no checkpoint yet
        self.held: bytes | None = None  # belongs to the checkpoint that this side holds

    async def postsuspend(self, epoch: int) -> None:
        if self.is_primary:  # the guest stands still: what is read now is one state
            data = await asyncio.to_thread(self.path.read_bytes)
            await self.peer.request("take", {"data": b64encode(data).decode()}, timeout_s=5)

    async def serve(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        if method != "take" or self.is_primary:
            return await super().serve(method, params)
        self.arrived = b64decode(params["data"])
        return {}

    async def checkpoint(self, epoch: int) -> None:
        self.held = self.arrived

    async def stop(self, *, failover: bool) -> None:
        if failover and not self.is_primary and self.held is not None:
            await asyncio.to_thread(self.path.write_bytes, self.held)


async def open_nvram(context: OpenContext) -> ProtectedDevice | Decline:
    if context.device.properties.get("bus") != "pflash":
        return Decline("it is no flash memory")
    if context.device.properties["size_bytes"] > context.options.max_size_bytes:
        return Decline(f"it is larger than max_size_bytes ({context.options.max_size_bytes})")
    return NvramDevice(context)


@hookimpl
def understudy_subkinds() -> Iterable[Subkind]:
    needs = frozenset({Gate.POSTSUSPEND})  # the guest must wait while its file is sent
    yield Subkind("nvram", Kind.DISK, frozenset({Mode.REMUS}), open_nvram, options=NvramOptions, needs=needs)
