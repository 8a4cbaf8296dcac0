"""docs/reference/filter-buffer.md: its example is the default, and its tables list what there is."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from understudy.options import parse_options
from understudy.services import Monitor
from understudy_qemu.egressblock import EgressBlock
from understudy_qemu.filterbuffer import FILTER_BUFFER, FilterBufferOptions
from understudy_qemu.heldnic import HeldNic

TEXT = (Path(__file__).parents[2] / "docs/reference/filter-buffer.md").read_text(encoding="utf-8")


def keys(section: str) -> set[str]:
    """Return what stands in the first column of a section's table."""
    body = TEXT.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`[^|]*) \|", body, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_example_is_the_default() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    table: Mapping[str, Any] = tomllib.loads(example)["protection"]["options"][FILTER_BUFFER.name]
    assert parse_options(FilterBufferOptions, table, source="page", where="example") == FilterBufferOptions()


def test_every_option_is_listed() -> None:
    assert keys("Options") == {field.name for field in dataclasses.fields(FilterBufferOptions)}


def test_every_counter_is_listed() -> None:
    nic = HeldNic("nic0", "nic0", cast("Monitor", None), EgressBlock("nothing"))
    assert keys("Reports") == set(nic.counters())
