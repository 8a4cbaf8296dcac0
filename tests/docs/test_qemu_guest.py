"""docs/reference/qemu-guest.md: its example is right, and it lists exactly the keys that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from understudy.device import Mode
from understudy.errors import ConfigError
from understudy.hypervisor import Protection
from understudy_qemu.guestfile import QemuConfig, parse_config

PAGE = Path(__file__).parents[2] / "docs/reference/qemu-guest.md"
TEXT = PAGE.read_text(encoding="utf-8")


def parse(table: dict[str, Any]) -> QemuConfig:
    source = Path("/etc/understudy/guests/web.toml")
    return parse_config(table, name="web", source=source, protection=Protection(Mode.REMUS), host="alpha")


def test_the_example_is_right() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    table = tomllib.loads(example)
    assert (table.pop("name"), table.pop("hypervisor")) == ("web", "qemu")
    config = parse(table)
    assert [device.name for device in config.devices] == ["disk0", "disk1", "nic0"]


@pytest.mark.parametrize(
    ("section", "table"),
    [
        ("The machine", {"memory": "1GiB", "no-such-key": 1}),
        ("`[[disk]]`", {"memory": "1GiB", "disk": [{"path": "a", "no-such-key": 1}]}),
        ("`[[nic]]`", {"memory": "1GiB", "nic": [{"bridge": "b", "no-such-key": 1}]}),
        ("`[overlays]`", {"memory": "1GiB", "overlays": {"no-such-key": 1}}),
    ],
)
def test_the_keys_are_those_that_exist(section: str, table: dict[str, Any]) -> None:
    part = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`([a-z_]+)`", row)}
    with pytest.raises(ConfigError) as raised:
        parse(table)
    known = set(raised.value.allowed.split(", ")) - {"disk", "nic", "overlays"}
    assert documented == known
