"""docs/reference/interval.md: its examples are the defaults, and its tables list what there is."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from understudy.interval import AdaptiveOptions, FixedOptions
from understudy.options import parse_options

TEXT = (Path(__file__).parents[2] / "docs/reference/interval.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("policy", "options"), [("fixed", FixedOptions), ("adaptive", AdaptiveOptions)])
def test_a_policy_is_described_as_it_is(policy: str, options: type[FixedOptions | AdaptiveOptions]) -> None:
    section = TEXT.split(f"## `{policy}`\n", 1)[1].split("\n## ", 1)[0]
    (example,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    protection = tomllib.loads(example)["protection"]
    assert protection["interval"] == policy
    shown = protection["interval_options"]
    assert parse_options(options, shown, source="page", where="example") == options()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `?\"?([\w.]+)\"?`? \|", section, re.MULTILINE)
    assert dict(rows) == {key: str(value) for key, value in shown.items()}
    assert set(shown) == {field.name for field in dataclasses.fields(options)}
