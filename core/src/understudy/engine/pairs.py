"""The two groups of one session: how they are made, and how the halves of a device reach each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from understudy.device import Gate, Progress, ReplicationMode, no_progress
from understudy.errors import PeerError
from understudy.group import DeviceGroup, GroupSetup

if TYPE_CHECKING:
    from understudy.engine.surroundings import Surroundings, Way
    from understudy.link.port import PeerPort
    from understudy.services import Services

__all__ = ["OtherHalf", "make_group", "serve_device"]

Json = Mapping[str, Any]


class OtherHalf:
    """The way to the other half of one device (`understudy.device.Peer`).

    Args:
        port: The session's conversation.
        device: The device's name.
    """

    __slots__ = ("_device", "_port")

    def __init__(self, port: PeerPort, device: str) -> None:
        self._port = port
        self._device = device

    async def request(self, method: str, params: Json, *, timeout_s: float) -> Json:
        """Ask the other half; see `understudy.device.Peer.request`."""
        asked = {"device": self._device, "method": method, "params": dict(params)}
        return await self._port.request("device", asked, timeout_s=timeout_s)


async def serve_device(group: DeviceGroup, params: Json) -> Json:
    """Hand a request of the other host to the half of the device that is in `group`."""
    try:
        device, method, inner = str(params["device"]), str(params["method"]), params["params"]
    except KeyError as missing:
        raise PeerError(f"a request to a device lacks {missing}") from missing
    return await group.serve(device, method, inner)


async def make_group(
    around: Surroundings,
    side: ReplicationMode,
    session: str,
    services: Services,
    gates: frozenset[Gate],
    way: Way,
    *,
    progress: Progress = no_progress,
    bwlimit_bytes_per_s: int = 0,
) -> DeviceGroup:
    """Make the group of one side, of the devices as they are on this host; nothing is touched before its `new`.

    Args:
        around: Guest, plugins and limits.
        side: Which side this host is in the session.
        session: Its id.
        services: What the domain offers.
        gates: What the hypervisor has in the session's mode.
        way: The way to the other host.
        progress: Told of initial copies.
        bwlimit_bytes_per_s: For initial copies; 0: that of this host's configuration.
    """
    here = around.hypervisor.here
    config = around.config
    directory = here.overlay_directory / config.name
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return DeviceGroup(
        GroupSetup(
            guest=config.name,
            session=session,
            side=side,
            mode=config.protection.mode,
            devices=await around.hypervisor.devices(config),
            subkinds=around.subkinds(),
            gates=gates,
            services=services,
            peer=lambda device: OtherHalf(way.port, device),
            directory=directory,
            local_address=here.address,
            peer_address=way.peer_address,
            options=config.protection.subkind_options,
            source=str(config.source),
            progress=progress,
            bwlimit_bytes_per_s=bwlimit_bytes_per_s or here.bwlimit_bytes_per_s,
            deadlines=around.deadlines,
        )
    )
