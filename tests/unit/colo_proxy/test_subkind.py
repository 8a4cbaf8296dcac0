"""What the subkind claims, what its preflight says, and which options it takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.colo_proxy.qemu_model import Qemu
from understudy.device import (
    Decline,
    DeviceInfo,
    Finding,
    Kind,
    Mode,
    ProbeContext,
    ReplicationMode,
    Severity,
)
from understudy.errors import ConfigError
from understudy.options import parse_options
from understudy.services import MONITOR, Services
from understudy_colo_proxy.options import ColoProxyOptions
from understudy_colo_proxy.plugin import understudy_subkinds
from understudy_colo_proxy.subkind import COLO_PROXY

PROPERTIES = {"netdev": "nic0", "tap": "tap0", "vnet_hdr": True}


async def probe(
    qemu: Qemu | None,
    properties: Mapping[str, Any] = PROPERTIES,
    *,
    side: ReplicationMode = ReplicationMode.PRIMARY,
    options: ColoProxyOptions | None = None,
) -> list[Finding] | Decline:
    device = DeviceInfo(Kind.NIC, "nic0", 0, "qemu", properties=properties)
    services = Services((MONITOR, qemu)) if qemu is not None else Services()
    context = ProbeContext("web", device, side, Mode.COLO, options, services, Path("/nonexistent"))
    answer = await COLO_PROXY.probe(context)
    return answer if isinstance(answer, Decline) else list(answer)


def severities(found: list[Finding] | Decline) -> list[Severity]:
    assert isinstance(found, list)
    return [finding.severity for finding in found]


def test_it_is_offered() -> None:
    assert list(understudy_subkinds()) == [COLO_PROXY]
    assert COLO_PROXY.kind is Kind.NIC
    assert COLO_PROXY.modes == {Mode.COLO}


@pytest.mark.parametrize("missing", ["netdev", "tap"])
async def test_a_device_without_the_facts_is_not_its_business(missing: str) -> None:
    answer = await probe(Qemu(), {key: value for key, value in PROPERTIES.items() if key != missing})
    assert isinstance(answer, Decline)
    assert missing in answer.reason


async def test_without_a_monitor_it_declines() -> None:
    answer = await probe(None)
    assert isinstance(answer, Decline)
    assert "monitor" in answer.reason


@pytest.mark.parametrize("fault", [{"vhost": True}, {"queues": 4}])
async def test_what_filters_cannot_do_is_an_error(fault: dict[str, Any]) -> None:
    assert Severity.ERROR in severities(await probe(Qemu(), PROPERTIES | fault))


async def test_allowing_what_cannot_be_compared_is_a_warning() -> None:
    found = await probe(Qemu(), options=ColoProxyOptions(uncompared_ipv6="allow"))
    assert severities(found) == [Severity.WARNING]


async def test_a_qemu_without_the_comparison_is_an_error() -> None:
    qemu = Qemu()
    qemu.types = ("iothread",)
    found = await probe(qemu, options=ColoProxyOptions(uncompared_ipv6="allow"))
    assert severities(found) == [Severity.WARNING, Severity.ERROR]
    assert "colo-compare" in str(found)


async def test_a_guest_that_does_not_run_is_no_finding_here() -> None:
    qemu = Qemu()
    qemu.die()
    assert Severity.ERROR not in severities(
        await probe(qemu, options=ColoProxyOptions(uncompared_ipv6="allow"))
    )


async def test_the_secondary_has_nothing_to_say() -> None:
    assert await probe(Qemu(), side=ReplicationMode.SECONDARY) == []


def test_without_tc_the_default_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    from understudy_colo_proxy.subkind import _of_uncompared  # noqa: PLC0415 - private, of this test alone

    assert [finding.severity for finding in _of_uncompared("nic0", ColoProxyOptions())] == [Severity.ERROR]


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"compare_timeout": 1}, "compare_timeout"),
        ({"compare_timeout_ms": 0}, "compare_timeout_ms"),
        ({"max_queue_size_packets": 0}, "max_queue_size_packets"),
        ({"expired_scan_cycle_ms": "1s"}, "expired_scan_cycle_ms"),
        ({"uncompared_ipv6": "maybe"}, "uncompared_ipv6"),
        ({"checkpoint_delay_ms": 10_000_000}, "checkpoint_delay_ms"),
    ],
)
def test_wrong_options_are_named(table: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_options(ColoProxyOptions, table, source="web.toml", where="protection.options.colo-proxy")
