"""docs/how-to/xen-hosts.md and docs/explanation/xen-remus.md: their files are right, and what they name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import click
import pytest

from understudy.cli.program import COMMANDS
from understudy.config import read_config
from understudy.device import Mode
from understudy.guestfile import read_guest
from understudy.hypervisor import Protection
from understudy_xen.guestfile import parse_config
from understudy_xen.interop.command import xen
from understudy_xen.preflight import _MUST_STAY

ROOT = Path(__file__).parents[2]
HOW_TO = ROOT / "docs/how-to/xen-hosts.md"
COMPARISON = ROOT / "docs/explanation/xen-remus.md"


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", HOW_TO.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language == kind]


def xl_configuration() -> dict[str, Any]:
    (text,) = (block for block in blocks("") if 'type    = "pvh"' in block)
    return {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }


def words(setting: str) -> dict[str, str]:
    return {key: value for key, _, value in (word.strip().partition("=") for word in setting.split(","))}


def test_the_agents_files_name_each_other(tmp_path: Path) -> None:
    hosts = {}
    for text in blocks("toml")[:2]:
        path = tmp_path / "agent.toml"
        path.write_text(text)
        config = read_config(path)
        hosts[config.host] = config
    assert set(hosts) == {"alpha", "beta"}
    for one, other in (("alpha", "beta"), ("beta", "alpha")):
        assert hosts[one].peers[other].address == hosts[other].address
    assert hosts["alpha"].arbiter_options == hosts["beta"].arbiter_options


@pytest.mark.parametrize("host", ["alpha", "beta"])
def test_the_guest_file_fits_the_xl_configuration(tmp_path: Path, host: str) -> None:
    path = tmp_path / "web.toml"
    path.write_text(blocks("toml")[2])
    file = read_guest(path, host, ("alpha", "beta"))
    config = parse_config(
        dict(file.rest), name=file.name, source=path, protection=Protection(Mode.REMUS), host=host
    )
    xl = xl_configuration()
    (disk,), (vif,) = map(words, xl["disk"]), map(words, xl["vif"])
    assert (config.name, str(config.config)) == (xl["name"], "/etc/xen/web.cfg")
    assert [(each.vdev, str(each.path)) for each in config.disks] == [(disk["vdev"], disk["target"])]
    assert [(each.bridge, each.script and each.script.name) for each in config.nics] == [
        (vif["bridge"], vif["script"])
    ]
    assert (ROOT / "hotplug" / vif["script"]).exists()
    assert {event: xl[event] for event in _MUST_STAY} == dict.fromkeys(_MUST_STAY, "preserve")


@pytest.mark.parametrize("page", [HOW_TO, COMPARISON], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links
    for target, anchor in links:
        found = page.parent / target if target else page
        assert found.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            made = {"#" + re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in made, f"{target}{anchor}"


@pytest.mark.parametrize("page", [HOW_TO, COMPARISON], ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"^(?:ExecStart=\S*/)?understudy ([a-z]+)", text, re.MULTILINE))
    named |= set(re.findall(r"`understudy ([a-z]+)", text))
    assert named - {"xen"} <= set(COMMANDS)
    for command, option in re.findall(r"`understudy xen ([a-z]+) (--[a-z-]+)", text):
        options = [opt for each in xen.commands[command].params for opt in each.opts]
        assert isinstance(xen.commands[command], click.Command)
        assert option in options


def test_every_source_of_the_comparison_is_listed() -> None:
    text, _, sources = COMPARISON.read_text(encoding="utf-8").partition("\n## Sources\n")
    cited = set(re.findall(r"\| \[(\d)\] \|$", text, re.MULTILINE))
    assert cited == set(re.findall(r"^\| \[(\d)\] \|", sources, re.MULTILINE))
