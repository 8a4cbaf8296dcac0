"""What an operator takes upon himself: unsafe findings, allowed by an option or by the guest file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testbeds.twoagents import two_hosts
from understudy.device import Finding, Severity
from understudy.errors import PreflightFailed

UNSAFE = Finding(Severity.ERROR, "disk0", "it is not replicated", "put it on DRBD", unsafe=True)
PLAIN = Finding(Severity.ERROR, "nic0", "the bridge is missing", "make it")


async def test_an_unsafe_finding_is_an_error_until_it_is_allowed(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        hosts.world.found.append(UNSAFE)
        await hosts.call("alpha", "start", guest="web")
        refused = await hosts.call("alpha", "check", guest="web")
        (row,) = refused["findings"][:1]
        assert not refused["protectable"]
        assert (row["severity"], row["unsafe"]) == ("error", True)
        assert row["remedy"] == "put it on DRBD; or take it upon yourself with --allow-unsafe"
        with pytest.raises(PreflightFailed, match="not replicated"):
            await hosts.call("alpha", "protect", guest="web")
        allowed = await hosts.call("alpha", "check", guest="web", allow_unsafe=True)
        (row,) = allowed["findings"][:1]
        assert allowed["protectable"]
        assert (row["severity"], row["remedy"]) == ("warning", "put it on DRBD")


async def test_other_errors_are_not_allowed_with_it(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        hosts.world.found += [UNSAFE, PLAIN]
        await hosts.call("alpha", "start", guest="web")
        with pytest.raises(PreflightFailed) as refused:
            await hosts.call("alpha", "protect", guest="web", allow_unsafe=True)
        errors = [finding for finding in refused.value.findings if finding.severity is Severity.ERROR]
        assert errors == [PLAIN]


async def test_status_says_what_is_unsafe_while_it_is_protected(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        hosts.world.found.append(UNSAFE)
        await hosts.call("alpha", "start", guest="web")
        await hosts.call("alpha", "protect", guest="web", allow_unsafe=True)
        rows = (await hosts.call("alpha", "status", guest="web"))["guests"]
        told = {row["host"]: row.get("unsafe") for row in rows}
        assert told == {"alpha": ["disk0: it is not replicated"], "beta": None}
        await hosts.call("alpha", "unprotect", guest="web")
        rows = (await hosts.call("alpha", "status", guest="web"))["guests"]
        assert all("unsafe" not in row for row in rows)
        hosts.world.found.clear()
        await hosts.call("alpha", "protect", guest="web")
        rows = (await hosts.call("alpha", "status", guest="web"))["guests"]
        assert all("unsafe" not in row for row in rows)


async def test_the_guest_file_may_allow_it(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        for host in hosts.agents:
            hosts.write_guest(host, "web", interval="allow_unsafe = true")
        hosts.world.found.append(UNSAFE)
        await hosts.call("alpha", "start", guest="web")
        assert (await hosts.call("alpha", "check", guest="web"))["protectable"]
        assert (await hosts.call("alpha", "protect", guest="web"))["state"] == "protected"


async def test_subkinds_see_the_devices_as_they_are_on_their_host(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.call("alpha", "protect", guest="web")
        assert hosts.world.probed == {"primary": "fake0", "secondary": None}
        assert hosts.world.interfaces == {"primary": "fake0", "secondary": None}
