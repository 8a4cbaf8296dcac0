"""The script that hotplug/README.md shows keeps what the page promises."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.hotplug.scripts import FAKES, HOTPLUG, Fault, Scripts


@pytest.fixture
def links(tmp_path: Path) -> Path:
    links = tmp_path / "host" / "links"
    (links / "lo").mkdir(parents=True)
    (links / "lo" / "ifindex").write_text("1\n")
    (tmp_path / "host" / "next").write_text("7\n")
    return links


@pytest.fixture
def example(tmp_path: Path) -> str:
    blocks = re.findall(r"```sh\n(.*?)```", (HOTPLUG / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    script = tmp_path / "site-setup"
    script.write_text(blocks[0])
    script.chmod(0o755)
    shutil.copy(HOTPLUG / "frame.sh", tmp_path)
    return str(script)


def test_it_works_twice(tmp_path: Path, links: Path, example: str) -> None:
    scripts = Scripts(tmp_path, FAKES, {"FAKE_HOST": str(links.parent)})
    for _ in range(2):
        ended = scripts.run(example)
        assert (ended.status, ended.results, ended.stderr) == (0, {"hotplug-status": "connected"}, "")
        assert (links / "site0" / "up").exists()


@pytest.mark.parametrize("fault", [Fault.REFUSES, Fault.ENDED], ids=lambda fault: fault.name)
def test_it_takes_back_what_it_did(tmp_path: Path, links: Path, example: str, fault: Fault) -> None:
    scripts = Scripts(tmp_path, FAKES, {"FAKE_HOST": str(links.parent)})
    at = next(at for at, call in enumerate(scripts.run(example).calls, 1) if call.endswith(" up"))
    shutil.rmtree(links / "site0")
    ended = scripts.run(example, fault=fault, at=at)
    assert (ended.status, ended.results["hotplug-status"]) == (2, "error")
    assert [link.name for link in links.iterdir()] == ["lo"]
