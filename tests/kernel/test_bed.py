"""What every test in the kernel bed relies on, asked inside it."""

from __future__ import annotations

import os
import subprocess

import pytest

pytestmark = pytest.mark.kernel


def test_this_is_another_kernel() -> None:
    assert os.environ["UNDERSTUDY_BED"] == "kernel"
    assert os.geteuid() == 0
    assert os.cpu_count() == 1


@pytest.mark.parametrize("kind", ["ifb", "veth", "bridge", "dummy"])
def test_modules_load_by_themselves(kind: str) -> None:
    subprocess.run(["ip", "link", "add", f"{kind}9", "type", kind], check=True)
    subprocess.run(["ip", "link", "delete", f"{kind}9"], check=True)
