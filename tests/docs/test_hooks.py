"""Every hook is documented with its exact signature, its rules and the fields of what it offers."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from understudy import hookspecs
from understudy.device import Subkind

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "hooks.md"
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("understudy_"))


def section(name: str) -> str:
    text = PAGE.read_text()
    found = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE.name} says nothing about {name}"
    return found[1]


def words(text: str) -> str:
    return re.sub(r"[\s*`]+", " ", text)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_documented_as_it_is(name: str) -> None:
    hook = getattr(hookspecs, name)
    source = inspect.getsource(hook)
    signature = re.search(rf"^def {name}\(.*?\) -> .*?(?=:$)", source, re.MULTILINE)
    assert signature
    assert f"```python\n{signature[0]}\n```" in section(name)
    doc = inspect.getdoc(hook) or ""
    for part in ("Called:", "Combined:", "On error:"):
        assert part in doc
    for line in doc.splitlines():
        assert words(line).strip() in words(section(name)), line


@pytest.mark.parametrize("name", HOOKS)
def test_the_fields_of_what_it_offers_are_listed(name: str) -> None:
    offered = re.search(r"Iterable\[(\w+)\]", inspect.getsource(getattr(hookspecs, name)))
    assert offered
    offer: Any = Subkind if offered[1] == "Subkind" else getattr(hookspecs, offered[1])
    listed = section(name)
    assert f"Fields of `{offered[1]}`" in listed
    for field in dataclasses.fields(offer):
        assert f"`{field.name}`" in listed


def test_nothing_is_documented_that_is_not_there() -> None:
    assert re.findall(r"^## `(\w+)`", PAGE.read_text(), re.MULTILINE) == [
        name for name in vars(hookspecs) if name.startswith("understudy_")
    ]
