"""The options, what the kernel must have, names and claims."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from understudy.device import Decline, DeviceInfo, Gate, Kind, Mode, ProbeContext, ReplicationMode, Severity
from understudy.errors import ConfigError
from understudy.options import parse_options
from understudy.services import Services
from understudy_netbuffer import subkind as subkind_module
from understudy_netbuffer.installation import Claim, gate_name
from understudy_netbuffer.nic import BufferedNic, interface_of
from understudy_netbuffer.options import NetbufferOptions
from understudy_netbuffer.parts import missing_parts
from understudy_netbuffer.plugin import understudy_subkinds
from understudy_netbuffer.subkind import NETBUFFER

MODULES = ("sch_plug", "ifb", "act_mirred", "sch_ingress", "cls_u32")


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit_bytes": 1000},
        {"limit_bytes": 1 << 32},
        {"early_share": 0.0},
        {"early_share": 0.9, "full_share": 0.9},
        {"full_share": 1.1},
        {"look_ms": 0},
        {"when_full": "drop"},
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_in_words(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_options(NetbufferOptions, wrong, source="web.toml", where="protection.options.netbuffer")
    assert any(key in str(refused.value) for key in wrong)


def test_the_defaults_fit() -> None:
    assert NetbufferOptions() == parse_options(NetbufferOptions, {}, source="", where="")


def test_every_option_and_counter_is_documented_with_its_default() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "netbuffer.md").read_text()
    for field in dataclasses.fields(NetbufferOptions):
        default = f'`"{field.default}"`' if isinstance(field.default, str) else str(field.default)
        assert f"| `{field.name}` | {default} |" in page
    counted = re.findall(r'"(\w+)": ', inspect.getsource(BufferedNic.counters))
    assert counted
    for name in counted:
        assert f"`{name}`" in page


def test_the_descriptor() -> None:
    assert tuple(understudy_subkinds()) == (NETBUFFER,)
    assert NETBUFFER.modes == {Mode.REMUS}
    assert NETBUFFER.needs == {Gate.POSTSUSPEND}
    assert not NETBUFFER.hypervisors


@pytest.mark.parametrize("key", ["interface", "tap", "vif", "veth"])
def test_any_hypervisor_that_tells_the_hosts_side_will_do(key: str) -> None:
    assert interface_of({"mac": "52:54:00:00:00:01", key: "vif3.0"}) == "vif3.0"
    assert not interface_of({key: ""})


def test_a_gates_name_is_its_interfaces_and_fits() -> None:
    names = {gate_name(f"vif{domain}.0") for domain in range(1000)}
    assert len(names) == 1000
    assert {len(name) for name in names} == {15}


def test_a_claim_survives_in_an_alias() -> None:
    claim = Claim("a guest", "nic0", "vif3.0", "s-1")
    assert Claim.of(claim.alias()) == claim
    for other in ("", None, "uplink to rack 3", "{}", '{"understudy-gate": {"guest": "web"}}'):
        assert Claim.of(other) is None


# --- What the kernel has ---------------------------------------------------------------------------------------------


def modules(directory: Path, *names: str, builtin: tuple[str, ...] = ()) -> Path:
    directory.mkdir(exist_ok=True)
    dep = "".join(f"kernel/net/sched/{name.replace('_', '-')}.ko.xz: kernel/x.ko\n" for name in names)
    (directory / "modules.dep").write_text(dep)
    (directory / "modules.builtin").write_text("".join(f"kernel/net/{name}.ko\n" for name in builtin))
    return directory


def test_a_kernel_may_have_its_parts_loaded_built_in_or_to_be_loaded(tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    (loaded / "ifb").mkdir(parents=True)
    there = modules(tmp_path / "modules", "sch_plug", "act_mirred", builtin=("sch_ingress", "cls_matchall"))
    assert missing_parts(there, loaded) == []


def test_what_a_kernel_lacks_is_named(tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    assert missing_parts(modules(tmp_path / "a", *MODULES[1:]), loaded) == [
        "the plug qdisc (module sch_plug)"
    ]
    [filters] = missing_parts(modules(tmp_path / "b", *MODULES[:-1]), loaded)
    assert "cls_matchall or cls_u32" in filters
    assert len(missing_parts(tmp_path / "none", loaded)) == 5


def probe(subkind: str = "auto", **properties: str) -> ProbeContext:
    nic = DeviceInfo(Kind.NIC, "nic0", 0, "qemu", subkind=subkind, properties=properties)
    return ProbeContext(
        "web", nic, ReplicationMode.PRIMARY, Mode.REMUS, NetbufferOptions(), Services(), Path("/nonexistent")
    )


async def test_without_plug_it_declines_unless_it_was_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subkind_module, "missing_parts", lambda: ["the plug qdisc (module sch_plug)"])
    answer = await NETBUFFER.probe(probe(tap="lo"))
    assert isinstance(answer, Decline)
    assert "sch_plug" in answer.reason
    asked = await NETBUFFER.probe(probe("netbuffer", tap="lo"))
    assert not isinstance(asked, Decline)
    [finding] = asked
    assert finding.severity is Severity.ERROR
    assert "sch_plug" in finding.problem


async def test_the_preflight_looks_for_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subkind_module, "missing_parts", list)
    assert not await NETBUFFER.probe(probe(tap="lo"))
    answer = await NETBUFFER.probe(probe(tap="no-such-tap"))
    assert not isinstance(answer, Decline)
    assert "no-such-tap" in answer[0].problem
    declined = await NETBUFFER.probe(probe(mac="52:54:00:00:00:01"))
    assert isinstance(declined, Decline)
    assert "no interface on the host's side" in declined.reason
