"""docs/reference/xen-guest.md: its example is right, and it lists exactly the keys that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from understudy.device import Mode
from understudy.errors import ConfigError
from understudy.guestfile import read_guest
from understudy.hypervisor import Protection
from understudy_xen.guestfile import Compression, SuspendVia, XenConfig, parse_config

PAGE = Path(__file__).parents[2] / "docs/reference/xen-guest.md"
TEXT = PAGE.read_text(encoding="utf-8")


def parse(table: dict[str, Any], host: str = "alpha") -> XenConfig:
    source = Path("/etc/understudy/guests/web.toml")
    return parse_config(table, name="web", source=source, protection=Protection(Mode.REMUS), host=host)


def part(section: str) -> str:
    return TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(("host", "bridge"), [("alpha", "xenbr0"), ("beta", "br-guests")])
def test_the_example_is_right(tmp_path: Path, host: str, bridge: str) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "web.toml"
    path.write_text(example)
    file = read_guest(path, host, ("alpha", "beta"))
    assert (file.name, file.hypervisor, file.protection.peer) == ("web", "xen", "beta")
    config = parse(dict(file.rest), host)
    assert [device.name for device in config.devices] == ["disk0", "nic0"]
    assert config.nic("nic0").bridge == bridge
    assert config.nic("nic0").script == Path("/etc/xen/scripts/vif-understudy")


@pytest.mark.parametrize(
    ("section", "table"),
    [
        ("The guest", {"config": "a", "no-such-key": 1}),
        ("`[[disk]]`", {"config": "a", "disk": [{"vdev": "xvda", "no-such-key": 1}]}),
        ("`[[nic]]`", {"config": "a", "nic": [{"no-such-key": 1}]}),
    ],
)
def test_the_keys_are_those_that_exist(section: str, table: dict[str, Any]) -> None:
    rows = [line.split("|")[1] for line in part(section).splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`([a-z_]+)`", row)}
    with pytest.raises(ConfigError) as raised:
        parse(table)
    assert documented == set(raised.value.allowed.split(", ")) - {"disk", "nic"}


@pytest.mark.parametrize(("key", "values"), [("compression", Compression), ("suspend", SuspendVia)])
def test_the_values_are_those_that_exist(key: str, values: type[Compression | SuspendVia]) -> None:
    (row,) = [line for line in part("The guest").splitlines() if line.startswith(f"| `{key}`")]
    assert re.findall(r"`([a-z-]+)`", row.split("|")[2]) == [each.value for each in values]


def test_the_defaults_are_those_that_are_told() -> None:
    config = parse({"config": "a"})
    assert (config.compression, config.suspend) == (Compression.AUTO, SuspendVia.AUTO)
    assert config.hold_limit_bytes == 1 << 30
    assert "| `hold_limit` | size | 1 GiB |" in TEXT
