"""The contract of a hypervisor, on the simulated one with every set of gates, and on bad ones that it must catch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from understudy.arbiter import Record
from understudy.device import DeviceInfo, Gate, Mode, Progress, ReplicationMode
from understudy.errors import HypervisorError
from understudy.group import DeviceGroup
from understudy.hypervisor import FoundGuest, GuestConfig, HostContext, Phases, PrimaryDomain, SecondaryDomain
from understudy.report import Checkpoint
from understudy.services import Channels
from understudy.testing import clock
from understudy.testing.history import BORN, SimulatedNetwork
from understudy.testing.hypervisor import SimulatedHypervisor, simulated_config
from understudy.testing.hypervisor_kit import CHECKS, ContractBroken, HypervisorBed, check_hypervisor
from understudy.testing.link import SimulatedCable
from understudy.testing.simchannels import Trench
from understudy.testing.simdevices import simulated_subkinds
from understudy.testing.simhost import SimulatedGuest, SimulatedHost
from understudy.testing.simprimary import SimulatedPrimary
from understudy.testing.simsecondary import SimulatedSecondary

SIDES = {ReplicationMode.PRIMARY: "alpha", ReplicationMode.SECONDARY: "beta"}
GATES = [frozenset(some) for n in range(len(Gate) + 1) for some in combinations(Gate, n)]


class SimulatedBed(HypervisorBed):
    def __init__(self, directory: Path, mode: Mode, kind: type[SimulatedHypervisor], **how: Any) -> None:
        self.subkinds = simulated_subkinds()
        self.record: Record | None = None
        self.network = SimulatedNetwork(self._may_open)
        self.trench = Trench(SimulatedCable(seed=1), "alpha", "beta")
        self.guest = simulated_config("web", mode=mode, nics=0 if how.get("nics") == 0 else 1)
        self.hosts = {
            side: SimulatedHost(name, self.network, seed=n) for n, (side, name) in enumerate(SIDES.items())
        }
        self.path = directory
        how.pop("nics", None)
        self.hypervisors = {
            side: kind(
                HostContext(SIDES[side], "192.0.2.1", directory, directory, directory),
                self.hosts[side],
                **how,
            )
            for side in SIDES
        }

    def _may_open(self, guest: str, host: str) -> bool:
        return self.record is not None and self.record.state.value == "alone" and self.record.owner == host

    def hypervisor(self, side: ReplicationMode) -> SimulatedHypervisor:
        return self.hypervisors[side]

    def config(self, side: ReplicationMode) -> GuestConfig:
        return self.guest

    def channels(self, side: ReplicationMode) -> Channels:
        return self.trench.of(SIDES[side])

    def directory(self, side: ReplicationMode) -> Path:
        return self.path

    def told(self, record: Record) -> None:
        self.record = record

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        return self.hosts[side].traces()

    async def works(self, side: ReplicationMode) -> None:
        before = self.hosts[side].guests["web"].memory
        async with asyncio.timeout(5):
            while self.hosts[side].guests["web"].memory == before:  # noqa: ASYNC110 - time is virtual
                await asyncio.sleep(0.01)

    async def verify(self) -> None:
        assert self.network.violations == []

    def close(self) -> None:
        self.trench.close()
        for host in self.hosts.values():
            for process in list(host.guests.values()):
                process.kill()


def run_kit(
    tmp_path: Path,
    mode: Mode = Mode.REMUS,
    kind: type[SimulatedHypervisor] = SimulatedHypervisor,
    only: Sequence[str] = (),
    **how: Any,
) -> tuple[str, ...]:
    @asynccontextmanager
    async def make() -> AsyncIterator[HypervisorBed]:
        bed = SimulatedBed(tmp_path, mode, kind, **how)
        try:
            yield bed
        finally:
            bed.close()

    return clock.run(check_hypervisor(make, only=only), strict=False)


@pytest.mark.parametrize(
    "gates", [g for g in GATES if g], ids=lambda g: "+".join(sorted(each.value for each in g))
)
@pytest.mark.parametrize("early_resume", [False, True])
def test_the_simulated_hypervisor_in_mode_remus(
    tmp_path: Path, gates: frozenset[Gate], early_resume: bool
) -> None:
    assert run_kit(tmp_path, gates=gates, early_resume=early_resume) == tuple(CHECKS)


@pytest.mark.parametrize("gates", [frozenset[Gate](), frozenset(Gate)])
def test_the_simulated_hypervisor_in_mode_colo(tmp_path: Path, gates: frozenset[Gate]) -> None:
    assert run_kit(tmp_path, Mode.COLO, gates=gates) == tuple(CHECKS)


# --- Bad ones, one for each promise ---


class BadPrimary(SimulatedPrimary):
    """A primary of which a test spoils one thing."""


class BadHypervisor(SimulatedHypervisor):
    """Opens bad domains."""

    primary_kind: type[SimulatedPrimary] = BadPrimary
    secondary_kind: type[SimulatedSecondary] = SimulatedSecondary

    async def primary(self, config: GuestConfig) -> PrimaryDomain:
        await super().primary(config)
        process = self.host.guests[config.name]
        mode = config.protection.mode
        return self.primary_kind(process, mode, self.modes[mode], early_resume=self.early_resume)

    async def secondary(self, config: GuestConfig, peer_facts: Mapping[str, Any]) -> SecondaryDomain:
        return self.secondary_kind(self.host, config.name, config.protection.mode, ["disk0"])


class RunsAtTheGate(BadPrimary):
    async def checkpoint(self, epoch: int, phases: Phases) -> Checkpoint:
        process = self.process

        class Impatient:
            async def postsuspend(self, epoch: int) -> None:
                process.resume()
                await phases.postsuspend(epoch)
                process.stop()

            def __getattr__(self, name: str) -> Any:
                return getattr(phases, name)

        return await super().checkpoint(epoch, Impatient())


class ForgetsAGate(BadPrimary):
    async def checkpoint(self, epoch: int, phases: Phases) -> Checkpoint:
        class Deaf:
            async def preresume(self, epoch: int) -> None:
                return

            def __getattr__(self, name: str) -> Any:
                return getattr(phases, name)

        return await super().checkpoint(epoch, Deaf())


class CountsWrong(BadPrimary):
    async def checkpoint(self, epoch: int, phases: Phases) -> Checkpoint:
        return replace(await super().checkpoint(epoch, phases), epoch=epoch + 1)


class AcknowledgesNothing(BadPrimary):
    """Says that a checkpoint is held although the stream is gone."""

    async def checkpoint(self, epoch: int, phases: Phases) -> Checkpoint:
        try:
            return await super().checkpoint(epoch, phases)
        except HypervisorError:
            self.process.resume()
            return Checkpoint(epoch, 1, 2, 3, gated=True)


class StaysStopped(BadPrimary):
    async def resume_alone(self, group: DeviceGroup) -> None:
        await super().resume_alone(group)
        self.process.stop()


class StaysStoppedHalfWay(BadPrimary):
    async def replicate(self, group: DeviceGroup, channels: Channels, progress: Progress) -> None:
        try:
            await super().replicate(group, channels, progress)
        except BaseException:
            self.process.stop()
            raise


class RunsWhenFrozen(BadPrimary):
    async def freeze(self) -> None:
        self.process.resume()


class Survives(BadPrimary):
    async def discard(self) -> None:
        return


class ForgetsWhatItLoaded(SimulatedSecondary):
    async def sever(self, reason: str) -> int:
        await super().sever(reason)
        return 0


class CopyStays(SimulatedSecondary):
    async def discard(self) -> None:
        return


class StaysClosed(SimulatedSecondary):
    async def open_outlet(self, won: Record) -> None:
        return


class NotFound(BadHypervisor):
    async def primary(self, config: GuestConfig) -> PrimaryDomain:
        process = self.host.guests.get(config.name) or SimulatedGuest(self.host, config.name, BORN, ["disk0"])
        return SimulatedPrimary(process, Mode.REMUS, self.modes[Mode.REMUS], early_resume=False)


class Strangers(BadHypervisor):
    async def found(self) -> Sequence[FoundGuest]:
        return [replace(guest, ours=False) for guest in await super().found()]


class LooksTooHard(BadHypervisor):
    async def facts(self, config: GuestConfig) -> Mapping[str, Any]:
        for process in self.host.guests.values():
            process.stop()
        return await super().facts(config)


class RenamesDevices(BadHypervisor):
    async def devices(self, config: GuestConfig) -> Sequence[DeviceInfo]:
        return [replace(device, name=f"vif{device.index}") for device in config.devices]


class MakesTooEarly(BadHypervisor):
    async def secondary(self, config: GuestConfig, peer_facts: Mapping[str, Any]) -> SecondaryDomain:
        domain = await super().secondary(config, peer_facts)
        self.host.guests[config.name] = SimulatedGuest(self.host, config.name, BORN, ["disk0"], incoming=True)
        return domain


class SweepsTooMuch(BadHypervisor):
    async def sweep(self, config: GuestConfig, record: Record | None) -> Sequence[str]:
        return [*await super().sweep(config, record), "removed something that was nobody's"]


def opening(primary: type[SimulatedPrimary]) -> type[SimulatedHypervisor]:
    return type("Opens", (BadHypervisor,), {"primary_kind": primary})


def holding(secondary: type[SimulatedSecondary]) -> type[SimulatedHypervisor]:
    return type("Holds", (BadHypervisor,), {"secondary_kind": secondary, "primary_kind": SimulatedPrimary})


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (opening(RunsAtTheGate), "unprotect"),
        (opening(ForgetsAGate), "unprotect"),
        (opening(CountsWrong), "unprotect"),
        (opening(AcknowledgesNothing), "failover"),
        (opening(StaysStopped), "unprotect"),
        (opening(StaysStoppedHalfWay), "given-up-half-way"),
        (opening(RunsWhenFrozen), "failover"),
        (opening(Survives), "failover"),
        (holding(ForgetsWhatItLoaded), "failover"),
        (holding(CopyStays), "unprotect"),
        (holding(StaysClosed), "failover"),
        (NotFound, "start-and-stop"),
        (Strangers, "start-and-stop"),
        (LooksTooHard, "looking-changes-nothing"),
        (RenamesDevices, "looking-changes-nothing"),
        (MakesTooEarly, "nothing-before-launch"),
        (SweepsTooMuch, "sweep-of-nothing"),
    ],
    ids=lambda each: each if isinstance(each, str) else getattr(each, "__name__", ""),
)
def test_a_bad_hypervisor_is_caught(tmp_path: Path, kind: type[SimulatedHypervisor], check: str) -> None:
    with pytest.raises(ContractBroken) as caught:
        run_kit(tmp_path, kind=kind)
    assert caught.value.check == check, str(caught.value)
