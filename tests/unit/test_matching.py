"""Who is asked to protect a device, in which order, and what the user is told when nobody does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.device_fakes import NoPeer, disk
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
from understudy.errors import ConfigError, DeviceError, DeviceNotSupported
from understudy.matching import claim, fitting, in_order, options_of, probe_device, refusals
from understudy.services import Services
from understudy.testing.clock import in_virtual_time

BOTH = frozenset(Mode)
ALL_GATES = frozenset(Gate)
ALL_MODES = dict.fromkeys(Mode, ALL_GATES)


def answering(answer: Any, asked: list[str] | None = None) -> Any:
    async def open_(context: OpenContext) -> Any:
        if asked is not None:
            asked.append(context.options)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return open_


def subkind(name: str, answer: Any = None, **more: Any) -> Subkind:
    return Subkind(name, more.pop("kind", Kind.DISK), more.pop("modes", BOTH), answering(answer), **more)


def open_context(device: DeviceInfo, mode: Mode = Mode.REMUS) -> OpenContext:
    return OpenContext(
        guest="web",
        device=device,
        side=ReplicationMode.PRIMARY,
        mode=mode,
        session="s",
        options=None,
        services=Services(),
        peer=NoPeer(),
        directory=Path("/nonexistent"),
        local_address="192.0.2.1",
        peer_address="192.0.2.2",
    )


def no_options(subkind: Subkind) -> None:
    return None


def test_order_is_priority_then_name_whatever_the_order_of_installation() -> None:
    offered = [subkind("b"), subkind("z", priority=1), subkind("a"), subkind("late", priority=90)]
    names = [each.name for each in in_order(offered)]
    assert names == ["z", "a", "b", "late"]
    assert [each.name for each in in_order(reversed(offered))] == names


@in_virtual_time
async def test_the_first_that_claims_is_kept_and_later_ones_are_not_asked() -> None:
    mine = ProtectedDevice()
    asked: list[str] = []
    offered = [
        Subkind("c", Kind.DISK, BOTH, answering(ProtectedDevice(), asked)),
        Subkind("a", Kind.DISK, BOTH, answering(None, asked)),
        Subkind("b", Kind.DISK, BOTH, answering(mine, asked)),
    ]
    claimed = await claim(
        offered, ALL_GATES, open_context(disk("disk0")), lambda each: f"options of {each.name}"
    )
    assert claimed.device is mine
    assert claimed.subkind.name == "b"
    assert asked == ["options of a", "options of b"]


@in_virtual_time
async def test_nobody_claims_it_and_everybodys_reason_is_told() -> None:
    offered = [
        subkind("declines", Decline("it is no DRBD device")),
        subkind("none"),
        subkind("nic", kind=Kind.NIC),
        subkind("colo-only", modes=frozenset({Mode.COLO})),
        subkind("elsewhere", hypervisors=frozenset({"xen"})),
        subkind("needy", needs=frozenset({Gate.PRERESUME, Gate.CHECKPOINT})),
    ]
    with pytest.raises(DeviceNotSupported) as caught:
        await claim(offered, frozenset({Gate.POSTSUSPEND}), open_context(disk("disk0")), no_options)
    reasons = dict(caught.value.declined)
    assert list(reasons) == ["declines", "none", "colo-only", "elsewhere", "needy"]
    assert reasons["declines"] == "it is no DRBD device"
    assert reasons["colo-only"] == "it serves mode colo, not remus"
    assert reasons["elsewhere"] == "it works on xen, not on sim"
    assert "needs the guest to wait at checkpoint, preresume, which sim does not do" in reasons["needy"]


@in_virtual_time
async def test_raising_stops_the_search() -> None:
    offered = [subkind("a", OSError("drbdsetup failed")), subkind("b", ProtectedDevice())]
    with pytest.raises(DeviceError, match=r"device disk0 \(a\): open: OSError: drbdsetup failed") as caught:
        await claim(offered, ALL_GATES, open_context(disk("disk0")), no_options)
    assert isinstance(caught.value.__cause__, OSError)


@in_virtual_time
async def test_nonsense_is_no_answer() -> None:
    with pytest.raises(DeviceError, match="returned int"):
        await claim([subkind("a", 5)], ALL_GATES, open_context(disk("disk0")), no_options)


@in_virtual_time
async def test_the_operators_choice_restricts_the_search() -> None:
    offered = [
        subkind("a", ProtectedDevice()),
        subkind("b", ProtectedDevice()),
        subkind("net", kind=Kind.NIC),
    ]
    chosen = await claim(offered, ALL_GATES, open_context(disk("disk0", subkind="b")), no_options)
    assert chosen.subkind.name == "b"
    for name, reason in (
        ("drbd", "no installed plugin offers"),
        ("net", "it protects a nic, this is a disk"),
    ):
        with pytest.raises(DeviceNotSupported, match=reason):
            await claim(offered, ALL_GATES, open_context(disk("disk0", subkind=name)), no_options)


@dataclass(frozen=True)
class Options:
    delay_ms: int = 20


def test_options_belong_to_their_subkind() -> None:
    with_options = subkind("a", options=Options)
    assert options_of(with_options, {"a": {"delay_ms": 5}}, "web.toml") == Options(5)
    assert options_of(with_options, {}, "web.toml") == Options()
    assert options_of(subkind("b"), {}, "web.toml") is None
    with pytest.raises(
        ConfigError, match=r"web.toml: protection\.options\.b: the subkind b takes no options"
    ):
        options_of(subkind("b"), {"b": {"x": 1}}, "web.toml")


# --- Preflight ---


def probing(answer: Any) -> Any:
    async def probe(context: ProbeContext) -> Sequence[Finding] | Decline:
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    return probe


def probe_context(device: DeviceInfo) -> ProbeContext:
    return ProbeContext(
        guest="web",
        device=device,
        side=ReplicationMode.SECONDARY,
        mode=Mode.REMUS,
        options=None,
        services=Services(),
        directory=Path("/nonexistent"),
    )


@in_virtual_time
async def test_probing_tells_who_would_claim_it() -> None:
    note = Finding(Severity.NOTE, "disk0", "it is a volume")
    offered = [
        subkind("a", probe=probing(Decline("not mine"))),
        subkind("b", probe=probing([note])),
        subkind("c", probe=probing([])),
    ]
    assert await probe_device(offered, ALL_MODES, probe_context(disk("disk0")), no_options) == ("b", (note,))


@in_virtual_time
async def test_a_probe_that_fails_is_a_finding_and_no_error() -> None:
    offered = [subkind("a", probe=probing(KeyError("lv_name")))]
    name, [finding] = await probe_device(offered, ALL_MODES, probe_context(disk("disk0")), no_options)
    assert name == "a"
    assert finding.severity is Severity.ERROR
    assert "KeyError: 'lv_name'" in finding.problem
    assert "secondary" in finding.subject


@in_virtual_time
async def test_wrong_options_are_a_finding() -> None:
    def wrong(each: Subkind) -> Any:
        return options_of(each, {"a": {"delay": 1}}, "web.toml")

    name, [finding] = await probe_device(
        [subkind("a", options=Options)], ALL_MODES, probe_context(disk("disk0")), wrong
    )
    assert name == "a"
    assert "did you mean delay_ms?" in finding.problem


@in_virtual_time
async def test_a_device_that_nobody_protects_is_a_finding_with_every_reason() -> None:
    offered = [subkind("a", probe=probing(Decline("not mine"))), subkind("b", modes=frozenset({Mode.COLO}))]
    name, [finding] = await probe_device(offered, ALL_MODES, probe_context(disk("disk0")), no_options)
    assert name is None
    assert "a: not mine; b: it serves mode colo, not remus" in finding.problem
    assert finding.remedy == 'set protection.mode = "colo" (for a, b)'
    only = {Mode.REMUS: ALL_GATES}
    _, [finding] = await probe_device(offered, only, probe_context(disk("disk0")), no_options)
    assert finding.remedy == "install or allow a plugin with a disk subkind for sim, mode remus"
    _, [finding] = await probe_device([], ALL_MODES, probe_context(disk("disk0")), no_options)
    assert "no installed plugin offers one" in finding.problem
    assert finding.remedy == "install or allow a plugin with a disk subkind for sim, mode remus"


@in_virtual_time
async def test_what_would_fit_instead_is_said_by_the_probe_and_by_the_open() -> None:
    # A host with nothing but colo-proxy, and a guest file that says nothing of modes.
    remedy = 'set protection.mode = "colo" (for colo-proxy)'
    context = replace(probe_context(disk("nic0")), device=NIC)
    name, [finding] = await probe_device([PROXY], QEMU_MODES, context, no_options)
    assert name is None
    assert finding.remedy == remedy
    with pytest.raises(DeviceNotSupported, match="it serves mode colo, not remus") as caught:
        await claim([PROXY], QEMU_MODES[Mode.REMUS], open_context(NIC), no_options)
    assert caught.value.remedy == remedy
    assert remedy in str(caught.value)


# --- Pairs that do not fit ---

QEMU_MODES = {Mode.REMUS: frozenset({Gate.POSTSUSPEND}), Mode.COLO: frozenset[Gate]()}
PLUG = subkind("netbuffer", kind=Kind.NIC, needs=frozenset({Gate.POSTSUSPEND}))
PROXY = subkind("colo-proxy", kind=Kind.NIC, modes=frozenset({Mode.COLO}))
REPLICATION = subkind("replication", modes=BOTH)
NIC = DeviceInfo(Kind.NIC, "nic0", 0, "sim")


def test_pairs_that_fit_are_not_refused() -> None:
    assert refusals("sim", QEMU_MODES, [PLUG, REPLICATION], Mode.REMUS, [disk("disk0"), NIC]) == ()


def test_a_gate_that_is_missing_is_said_with_what_would_fit() -> None:
    [finding] = refusals("sim", QEMU_MODES, [PLUG, REPLICATION], Mode.COLO, [disk("disk0"), NIC])
    assert finding.severity is Severity.ERROR
    assert finding.subject == "nic0"
    assert finding.problem == (
        "no nic subkind fits sim in mode colo "
        "(netbuffer: it needs the guest to wait at postsuspend, which sim does not do in mode colo)"
    )
    assert finding.remedy == 'set protection.mode = "remus" (for netbuffer)'


def test_what_would_fit_depends_on_what_is_there() -> None:
    [finding] = refusals("sim", QEMU_MODES, [PROXY], Mode.REMUS, [NIC])
    assert finding.remedy == 'set protection.mode = "colo" (for colo-proxy)'
    [finding] = refusals("sim", QEMU_MODES, [], Mode.REMUS, [NIC])
    assert "(none is installed)" in finding.problem
    assert finding.remedy == "install or allow a plugin with a nic subkind for sim, mode remus"
    chosen = DeviceInfo(Kind.NIC, "nic0", 0, "sim", "colo-proxy")
    [finding] = refusals("sim", QEMU_MODES, [PROXY, PLUG], Mode.REMUS, [chosen])
    assert finding.remedy == (
        'set the device\'s subkind to one of: auto, netbuffer; or set protection.mode = "colo" (for colo-proxy)'
    )
    [finding] = refusals("sim", QEMU_MODES, [PROXY], Mode.REMUS, [chosen])
    assert finding.remedy == 'set protection.mode = "colo" (for colo-proxy)'


def test_a_mode_that_the_hypervisor_does_not_have() -> None:
    [finding] = refusals("sim", {Mode.REMUS: ALL_GATES}, [PLUG], Mode.COLO, [NIC])
    assert finding.remedy == "set protection.mode to one of: remus"
    [finding] = refusals("sim", {}, [PLUG], Mode.COLO, [])
    assert "no mode at all" in finding.remedy


def test_fitting_names_nobody_of_another_kind() -> None:
    asked, passed_over = fitting([PLUG, PROXY, REPLICATION], NIC, Mode.COLO, frozenset())
    assert [each.name for each in asked] == ["colo-proxy"]
    assert [name for name, _ in passed_over] == ["netbuffer"]
