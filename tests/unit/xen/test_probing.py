"""The preflight on a machine where no Xen runs: it says so, on either side, and raises nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.device import Mode, ReplicationMode, Severity
from understudy.hypervisor import HostContext, Protection
from understudy_xen.guestfile import XenConfig, parse_config
from understudy_xen.hypervisor import XenHypervisor
from understudy_xen.probing import facts, probe

pytestmark = pytest.mark.skipif(
    Path("/sys/hypervisor/type").exists(), reason="a hypervisor is under this kernel, tests/xen looks at Xen"
)


def hypervisor(tmp_path: Path) -> XenHypervisor:
    return XenHypervisor(HostContext("alpha", "127.0.0.1", tmp_path, tmp_path, tmp_path))


def guest() -> XenConfig:
    table = {"config": "web.cfg", "hold_limit": "1MiB"}
    return parse_config(
        table, name="web", source=Path("/x/web.toml"), protection=Protection(Mode.REMUS), host="alpha"
    )


@pytest.mark.parametrize("side", [*ReplicationMode])
async def test_a_machine_without_xen(tmp_path: Path, side: ReplicationMode) -> None:
    (finding,) = await probe(hypervisor(tmp_path), guest(), side=side, peer_facts={})
    assert (finding.severity, finding.subject) == (Severity.ERROR, "Xen on alpha")
    assert "no Xen runs under this kernel" in finding.problem
    assert "boot the host with Xen" in finding.remedy


async def test_the_other_host_is_told_that_there_is_none(tmp_path: Path) -> None:
    told = await facts(hypervisor(tmp_path), guest())
    assert (told["host"], told["xen"], told["guest"]) == ("alpha", None, None)
    assert told["cpu"]["flags"]
