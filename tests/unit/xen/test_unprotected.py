"""Devices that are left as they are: who claims them, and what the preflight says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from understudy.device import (
    Decline,
    DeviceInfo,
    Finding,
    Gate,
    Kind,
    Mode,
    OpenContext,
    ProbeContext,
    ProtectedDevice,
    ReplicationMode,
    Severity,
    Subkind,
)
from understudy.matching import in_order, probe_device
from understudy.services import Services
from understudy_xen.unprotected import UNBUFFERED, UNREPLICATED

PRIMARY, SECONDARY = ReplicationMode.PRIMARY, ReplicationMode.SECONDARY
MODES = {Mode.REMUS: frozenset({Gate.POSTSUSPEND, Gate.PRERESUME})}
DISK = DeviceInfo(
    Kind.DISK, "disk0", 0, "xen", "auto", MappingProxyType({"path": "/dev/vg/web", "read_only": False})
)
NIC = DeviceInfo(Kind.NIC, "nic0", 0, "xen", "auto", MappingProxyType({"vif": "vif1.0"}))


async def _nothing(context: OpenContext) -> None:
    return None


async def _declines(context: ProbeContext) -> Decline:
    return Decline("it is no DRBD device")


OTHER = Subkind("zz-drbd", Kind.DISK, frozenset({Mode.REMUS}), _nothing, _declines)


async def probe(
    device: DeviceInfo, side: ReplicationMode = SECONDARY, *others: Subkind
) -> tuple[str | None, Sequence[Finding]]:
    context = ProbeContext("web", device, side, Mode.REMUS, None, Services(), Path("/nowhere"))
    return await probe_device((UNREPLICATED, UNBUFFERED, *others), MODES, context, lambda _: None)


async def test_a_disk_that_nobody_replicates_is_unsafe() -> None:
    name, (finding,) = await probe(DISK, SECONDARY, OTHER)
    assert name == "unreplicated"
    assert (finding.severity, finding.unsafe) == (Severity.ERROR, True)
    assert "after a takeover its content is whatever that host has at /dev/vg/web" in finding.problem
    assert finding.remedy
    assert await probe(DISK, PRIMARY) == ("unreplicated", ())


def test_whoever_replicates_disks_is_asked_first() -> None:
    assert in_order((UNREPLICATED, OTHER)) == (OTHER, UNREPLICATED)


async def test_a_disk_that_is_only_read_is_worth_a_note() -> None:
    read_only = replace(DISK, properties={"path": "/images/cd.iso", "read_only": True})
    _, (finding,) = await probe(read_only)
    assert (finding.severity, finding.unsafe) == (Severity.NOTE, False)
    assert "/images/cd.iso" in finding.problem


async def test_an_interface_goes_without_a_gate_only_when_asked_for_by_name() -> None:
    name, (refused,) = await probe(NIC, PRIMARY)
    assert (name, refused.severity, refused.unsafe) == (None, Severity.ERROR, False)
    assert 'only an interface with subkind = "unbuffered"' in refused.problem
    asked = replace(NIC, subkind="unbuffered")
    name, (finding,) = await probe(asked, PRIMARY)
    assert (name, finding.severity, finding.unsafe) == ("unbuffered", Severity.ERROR, True)
    assert "leaves before it is acknowledged" in finding.problem
    assert await probe(asked, SECONDARY) == ("unbuffered", ())


@pytest.mark.parametrize("subkind", [UNREPLICATED, UNBUFFERED])
async def test_they_are_xens_alone(subkind: Subkind) -> None:
    device = replace(DISK if subkind is UNREPLICATED else NIC, hypervisor="qemu", subkind=subkind.name)
    name, (finding,) = await probe(device)
    assert name is None
    assert "it works on xen, not on qemu" in finding.problem


async def test_nothing_is_done_to_the_device() -> None:
    context = OpenContext(
        guest="web",
        device=NIC,
        side=PRIMARY,
        mode=Mode.REMUS,
        session="s",
        options=None,
        services=Services(),
        peer=None,  # type: ignore[arg-type]
        directory=Path("/nowhere"),
        local_address="127.0.0.1",
        peer_address="127.0.0.1",
    )
    assert isinstance(await UNBUFFERED.open(context), Decline)
    opened = await UNBUFFERED.open(replace(context, device=replace(NIC, subkind="unbuffered")))
    assert type(opened) is ProtectedDevice
    assert type(await UNREPLICATED.open(replace(context, device=DISK))) is ProtectedDevice
