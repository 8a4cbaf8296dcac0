"""What every test in a dom0 of the Xen bed relies on, asked inside it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.xen(inside=True), pytest.mark.timeout(120)]


def test_this_is_a_dom0_under_xen() -> None:
    assert os.environ["UNDERSTUDY_BED"] == "xen"
    assert os.geteuid() == 0
    assert Path("/proc/xen/capabilities").read_text().strip() == "control_d"
    assert Path("/sys/hypervisor/version/major").read_text().strip() == "4"


def test_the_toolstack_answers() -> None:
    said = subprocess.run(["xl", "list"], check=True, capture_output=True, text=True, timeout=30).stdout
    assert said.splitlines()[1].split()[:2] == ["Domain-0", "0"]


@pytest.mark.parametrize("name", ["understudy", "understudy_netbuffer", "understudy_xen", "zstandard"])
def test_the_project_is_there(name: str) -> None:
    assert importlib.import_module(name).__name__ == name
    assert sys.version_info[:2] == (3, 11)


@pytest.mark.parametrize("kind", ["ifb", "veth", "bridge", "dummy"])
def test_the_modules_are_there(kind: str) -> None:
    subprocess.run(["ip", "link", "add", f"{kind}9", "type", kind], check=True, timeout=30)
    subprocess.run(["ip", "link", "delete", f"{kind}9"], check=True, timeout=30)


def test_what_a_failure_says_comes_out() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        subprocess.run(["xl", "domid", "nobody"], check=True, capture_output=True, timeout=30)
    assert b"nobody" in caught.value.stderr
