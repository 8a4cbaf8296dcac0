"""The files that the tutorial shows are files that the agent reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from understudy.config import read_config
from understudy.device import Mode
from understudy.guestfile import read_guest
from understudy_qemu.guestfile import parse_config

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "first-guest.md"
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_it_shows_two_agents_and_a_guest() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize(("block", "host", "peer"), [(0, "alpha", "beta"), (1, "beta", "alpha")])
def test_its_agents_are_configured(tmp_path: Path, block: int, host: str, peer: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(BLOCKS[block])
    config = read_config(path)
    assert config.host == host
    assert list(config.peers) == [peer]
    assert config.arbiter_kind == "directory"


def test_its_guest_is_described(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    path.write_text(BLOCKS[2])
    guest = read_guest(path, "alpha", ["alpha", "beta"])
    assert (guest.name, guest.hypervisor, guest.mode) == ("web", "qemu", Mode.COLO)
    config = parse_config(
        guest.rest, name=guest.name, source=guest.source, protection=guest.protection, host="alpha"
    )
    assert [device.name for device in config.devices] == ["disk0", "nic0"]
