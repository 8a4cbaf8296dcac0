"""``understudy demo`` on machines that cannot show it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from understudy_qemu.demo.command import demo
from understudy_qemu.demo.run import missing_programs


def test_without_root_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(demo, ["--page", str(page)])
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "run it as root" in result.output
    assert not page.exists()


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    sentence = missing_programs()
    assert "qemu-img" in sentence
    assert "apt-get install iproute2 qemu-system-x86 qemu-utils" in sentence


def test_wrong_options_are_refused() -> None:
    for arguments in (["--mode", "other"], ["--disks", "0"], ["--interval", "1"]):
        assert CliRunner().invoke(demo, arguments).exit_code == 2
