"""What a QEMU disk must be to be protected by DRBD, as far as no DRBD is needed to say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from understudy.device import Decline, DeviceInfo, Kind, Mode, ProbeContext, ReplicationMode, Severity
from understudy.services import Services
from understudy_drbd.findings import of_disk
from understudy_drbd.subkind import DRBD

FIT = {"path": "/dev/drbd0", "format": "raw", "cache": "none"}


@pytest.mark.parametrize(
    ("properties", "problem", "remedy"),
    [
        ({"format": "qcow2"}, "the disk is qcow2", 'format = "raw"'),
        ({"cache": "writeback"}, "goes through this host's page cache (cache writeback)", 'cache = "none"'),
    ],
)
def test_what_does_not_fit_is_an_error(properties: dict[str, Any], problem: str, remedy: str) -> None:
    [finding] = of_disk("disk0", FIT | properties)
    assert finding.severity is Severity.ERROR
    assert problem in finding.problem
    assert remedy in finding.remedy


@pytest.mark.parametrize("properties", [FIT, FIT | {"cache": "directsync"}, {"pdev_path": "/dev/drbd0"}])
def test_what_fits_is_not_spoken_of(properties: dict[str, Any]) -> None:
    assert not list(of_disk("disk0", properties))


async def test_a_qemu_disk_must_ask_for_drbd() -> None:
    device = DeviceInfo(Kind.DISK, "disk0", 0, "qemu", properties=FIT)
    context = ProbeContext(
        "web", device, ReplicationMode.PRIMARY, Mode.REMUS, None, Services(), Path("/nonexistent")
    )
    answer = await DRBD.probe(context)
    assert isinstance(answer, Decline)
    assert answer.reason == 'under QEMU only a disk with subkind = "drbd" is protected by DRBD'
