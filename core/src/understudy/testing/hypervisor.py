"""A simulated hypervisor that keeps the contract of understudy.hypervisor to the letter, with any set of gates.

Its guests count (understudy.testing.history); its checkpoints travel as messages on a socket that the agents' channels
made; whatever goes wrong is scripted on the `SimulatedHost`, by step: ``"primary.replicate"``,
``"primary.checkpoint"``, ``"secondary.launch"``, ``"secondary.load"``, ``"secondary.promote"``,
``"primary.nic0.start"`` and so on. It runs on any event loop, best in virtual time (understudy.testing.clock).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from understudy.device import DeviceInfo, Finding, Gate, Kind, Mode, ReplicationMode
from understudy.errors import ConfigError, GuestNotFound, HypervisorError
from understudy.hypervisor import (
    FoundGuest,
    GuestConfig,
    GuestState,
    HostContext,
    Hypervisor,
    PrimaryDomain,
    Protection,
    SecondaryDomain,
)
from understudy.services import Services
from understudy.testing.history import BORN
from understudy.testing.simhost import SIMULATED_HOST, SimulatedGuest, SimulatedHost
from understudy.testing.simprimary import SimulatedPrimary
from understudy.testing.simsecondary import SimulatedSecondary

if TYPE_CHECKING:
    from understudy.arbiter import Record

__all__ = ["EVERY_GATE", "SimulatedConfig", "SimulatedHypervisor", "simulated_config"]

EVERY_GATE = frozenset(Gate)


@dataclass(frozen=True, slots=True)
class SimulatedConfig(GuestConfig):
    """A simulated guest."""


def simulated_config(
    name: str = "guest",
    *,
    mode: Mode = Mode.REMUS,
    peer: str = "",
    nics: int = 1,
    disks: int = 1,
    prefer_primary: bool = False,
    period_ms: float = 50.0,
) -> SimulatedConfig:
    """Return the configuration of a simulated guest with so many devices."""
    counts = ((Kind.NIC, nics), (Kind.DISK, disks))
    devices = tuple(
        DeviceInfo(kind, f"{kind.value}{index}", index, SimulatedHypervisor.name)
        for kind, number in counts
        for index in range(number)
    )
    protection = Protection(
        mode, peer, interval_options={"period_ms": period_ms}, prefer_primary=prefer_primary
    )
    return SimulatedConfig(name, SimulatedHypervisor.name, Path(f"{name}.toml"), protection, devices)


class SimulatedHypervisor(Hypervisor):
    """The hypervisor of one agent's life on a simulated host.

    Args:
        here: As for every hypervisor.
        host: The host, which outlives the agent.
        gates: At which phases the guest waits for the devices, in each mode.
        early_resume: The guest runs again before the acknowledgement where no gate is in the way, as under Xen.
    """

    name: ClassVar[str] = "simulated"

    def __init__(
        self,
        here: HostContext,
        host: SimulatedHost,
        *,
        gates: Mapping[Mode, frozenset[Gate]] | frozenset[Gate] = EVERY_GATE,
        early_resume: bool = False,
    ) -> None:
        super().__init__(here)
        self.host = host
        self.early_resume = early_resume
        by_mode = dict.fromkeys(Mode, gates) if isinstance(gates, frozenset) else dict(gates)
        self._gates = MappingProxyType(by_mode)

    @property
    def modes(self) -> Mapping[Mode, frozenset[Gate]]:
        """The modes and gates that it was made with."""
        return self._gates

    def parse(
        self, table: Mapping[str, Any], *, name: str, source: Path, protection: Protection
    ) -> GuestConfig:
        """Take ``nics = N`` and ``disks = N``."""
        for key, value in table.items():
            if key not in {"nics", "disks"}:
                raise ConfigError(str(source), key, "unknown key", "nics, disks")
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(str(source), key, f"is {value!r}", "a number of devices")
        made = simulated_config(name, nics=table.get("nics", 1), disks=table.get("disks", 1))
        return SimulatedConfig(name, self.name, source, protection, made.devices)

    async def facts(self, config: GuestConfig) -> Mapping[str, Any]:
        """Return the state of the guest."""
        return {"state": (await self.state(config)).value}

    async def probe(
        self, config: GuestConfig, *, side: ReplicationMode, mode: Mode, peer_facts: Mapping[str, Any]
    ) -> Sequence[Finding]:
        """Find nothing wrong."""
        del config, side, mode, peer_facts
        return ()

    def probe_services(self, config: GuestConfig) -> Services:
        """Offer the host."""
        del config
        return Services((SIMULATED_HOST, self.host))

    async def found(self) -> Sequence[FoundGuest]:
        """List the processes on the host."""
        return [FoundGuest(guest.name, guest.state, ours=True) for guest in self.host.guests.values()]

    async def state(self, config: GuestConfig) -> GuestState:
        """Tell what the process does."""
        process = self.host.guests.get(config.name)
        return process.state if process is not None else GuestState.ABSENT

    async def start(self, config: GuestConfig, record: Record) -> None:
        """Start the guest from what is on its first disk."""
        if record.owner != self.host.name or record.state.value != "alone":
            self.host.network.accuse(f"{self.host.name} starts {config.name} by the record {record}")
        await self.host.at("start", self.host.latency.boot_s)
        if config.name in self.host.guests:
            raise HypervisorError(f"guest {config.name} exists on {self.host.name} already")
        disks = [device.name for device in config.devices if device.kind is Kind.DISK]
        contents = {self.host.disk(config.name, disk) for disk in disks} or {BORN}
        if len(contents) > 1:
            self.host.network.accuse(f"I3: {self.host.name} starts {config.name} from disks of {contents}")
        process = SimulatedGuest(self.host, config.name, contents.pop(), disks)
        self.host.guests[config.name] = process
        self.host.network.born(config.name, process.memory)
        self.host.touched.discard(config.name)
        process.resume()

    async def stop(self, config: GuestConfig, *, force: bool, timeout_s: float) -> None:
        """Let the guest shut down, or kill it."""
        process = self.host.guests.get(config.name)
        if process is None:
            return
        async with asyncio.timeout(timeout_s):
            if force:
                process.outlet = False
                await self.host.at("kill", self.host.latency.kill_s)
                process.kill()
            else:
                await self.host.at("shutdown", self.host.latency.shutdown_s)
                if process.state is not GuestState.ABSENT:
                    process.shut_down()

    async def primary(self, config: GuestConfig) -> PrimaryDomain:
        """Open the running guest for a session."""
        process = self.host.guests.get(config.name)
        if process is None:
            raise GuestNotFound(f"guest {config.name} does not run on {self.host.name}")
        if process.state not in {GuestState.RUNNING, GuestState.PAUSED}:
            raise HypervisorError(f"guest {config.name} is {process.state.value} on {self.host.name}")
        mode = config.protection.mode
        return SimulatedPrimary(process, mode, self._gates[mode], early_resume=self.early_resume)

    async def secondary(self, config: GuestConfig, peer_facts: Mapping[str, Any]) -> SecondaryDomain:
        """Make ready to hold a copy."""
        del peer_facts
        disks = [device.name for device in config.devices if device.kind is Kind.DISK]
        return SimulatedSecondary(self.host, config.name, config.protection.mode, disks)

    async def sweep(self, config: GuestConfig, record: Record | None) -> Sequence[str]:
        """Clean what a dead agent left: the gate opens only if the record says ``alone`` for this host."""
        host, name = self.host, config.name
        mine = record is not None and record.owner == host.name
        alone = mine and record is not None and record.state.value == "alone"
        waits = record is not None and (mine or record.standby == host.name)
        process = host.guests.get(name)
        done: list[str] = []
        if process is not None and not alone and not waits:
            process.outlet = False
            process.kill()
            done.append(f"killed {name}, which another host owns")
            process = None
        for (guest, nic), gate in list(host.gates.items()):
            if guest == name and (alone or process is None):
                gate.open() if alone and process is not None else gate.drop()
                done.append(f"removed the gate of {nic}")
        if process is not None and alone and process.state is not GuestState.INCOMING:
            if not process.outlet:  # its agent died between its promotion and its outlet
                process.outlet = True
                host.network.announce(host.name, name)
                done.append(f"opened the outlet of {name}")
            if process.state is GuestState.PAUSED:
                process.resume()
                done.append(f"let {name} run on")
        return done
