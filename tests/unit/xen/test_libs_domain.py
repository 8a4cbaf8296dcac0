from __future__ import annotations

import struct
import uuid

import pytest

from understudy_xen.libs import DomainType, ShutdownReason, XenVersion
from understudy_xen.libs.domain import parse, shutdown_of
from understudy_xen.libs.versions import FACTS, Facts

UUID = uuid.UUID("2e09a417-e0af-4f87-b2fe-8c48af1b11f5")
HVM, SHUTDOWN, PAUSED, BLOCKED, HAP = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 8
LAPIC, EVERYTHING = 1, 0x7FF


def raw(facts: Facts, *, flags: int, emulated: int = 0, last_vcpu: int = 1) -> bytes:
    # struct xen_domctl_getdomaininfo, field by field.
    head = struct.pack("=HHI", 7, 0, flags) + struct.pack("=7Q", 24592, 24832, 0, 0, 0, 0, 23905912037)
    head += struct.pack("=III", 2, last_vcpu, 0) + UUID.bytes + struct.pack("=I", 0)
    return head.ljust(facts.emulation_at, b"\0") + struct.pack("=I", emulated).ljust(
        facts.info_bytes - facts.emulation_at, b"\0"
    )


@pytest.mark.parametrize("version", sorted(FACTS), ids=str)
@pytest.mark.parametrize(
    ("flags", "emulated", "kind"),
    [
        (HVM | HAP, LAPIC, DomainType.PVH),
        (HVM | HAP, 0, DomainType.PVH),
        (HVM | HAP, EVERYTHING, DomainType.HVM),
        (0, 0, DomainType.PV),
    ],
)
def test_the_kind_is_told_in_every_version(
    version: XenVersion, flags: int, emulated: int, kind: DomainType
) -> None:
    facts = FACTS[version]
    info = parse(raw(facts, flags=flags, emulated=emulated), facts)
    assert (info.kind, info.hap) == (kind, bool(flags & HAP))


def test_all_fields() -> None:
    facts = FACTS[XenVersion(4, 17)]
    info = parse(raw(facts, flags=HVM | PAUSED | BLOCKED), facts)
    assert (info.domid, info.uuid, info.pages, info.max_pages) == (7, UUID, 24592, 24832)
    assert (info.max_vcpus, info.online_vcpus, info.cpu_ns) == (2, 2, 23905912037)
    assert (info.paused, info.blocked, info.running, info.dying) == (True, True, False, False)
    assert info.shutdown is None


def test_a_domain_without_any_vcpu() -> None:
    facts = FACTS[XenVersion(4, 17)]
    assert parse(raw(facts, flags=0, last_vcpu=0xFFFFFFFF), facts).max_vcpus == 0


@pytest.mark.parametrize("reason", [reason for reason in ShutdownReason if reason != ShutdownReason.UNKNOWN])
def test_the_reason_of_a_shutdown(reason: ShutdownReason) -> None:
    assert shutdown_of(SHUTDOWN | reason << 16) is reason
    assert shutdown_of(reason << 16) is None


def test_a_reason_that_is_not_known_yet() -> None:
    assert shutdown_of(SHUTDOWN | 99 << 16) is ShutdownReason.UNKNOWN


def test_suspended_is_neither_crashed_nor_dying() -> None:
    facts = FACTS[XenVersion(4, 17)]
    suspended = SHUTDOWN | ShutdownReason.SUSPEND << 16
    assert parse(raw(facts, flags=HVM | suspended), facts).suspended
    assert not parse(raw(facts, flags=HVM | suspended | 1), facts).suspended
    assert not parse(raw(facts, flags=HVM | SHUTDOWN | ShutdownReason.CRASH << 16), facts).suspended
