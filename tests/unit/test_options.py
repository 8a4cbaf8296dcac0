"""Tables into typed options."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from understudy.errors import ConfigError
from understudy.options import parse_options


class Policy(Enum):
    DROP = "drop"
    ALLOW = "allow"


@dataclass(frozen=True, slots=True)
class Options:
    compare_timeout_ms: int = 3000
    share: float = 0.1
    on: bool = True
    name: str = "x"
    policy: Policy = Policy.DROP
    where: Path = Path("/tmp")  # noqa: S108 - never opened
    level: Literal["low", 1] = "low"
    limit_bytes: int | None = None
    bridges: tuple[str, ...] = ()
    made: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.compare_timeout_ms <= 0:
            raise ValueError("compare_timeout_ms must be above 0")


def parse(table: dict[str, Any]) -> Options:
    return parse_options(Options, table, source="web.toml", where="protection.options.x")


def test_all_types_and_defaults() -> None:
    assert parse({}) == Options()
    got = parse(
        {
            "compare_timeout_ms": 5,
            "share": 1,
            "on": False,
            "name": "n",
            "policy": "allow",
            "where": "/srv",
            "level": 1,
            "limit_bytes": 7,
            "bridges": ["a", "b"],
        }
    )
    assert got == Options(5, 1.0, False, "n", Policy.ALLOW, Path("/srv"), 1, 7, ("a", "b"))
    assert type(got.share) is float


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"compare_timeout": 5},
            r"x\.compare_timeout: unknown key, did you mean compare_timeout_ms\? \(allowed: comp",
        ),
        ({"zzz": 5}, r"x\.zzz: unknown key \(allowed: compare_timeout_ms, share"),
        ({"made": 5}, r"x\.made: unknown key"),
        ({"compare_timeout_ms": 1.5}, r"compare_timeout_ms: 1\.5 does not fit \(allowed: a whole number\)"),
        ({"compare_timeout_ms": True}, "a whole number"),
        ({"compare_timeout_ms": "5"}, "a whole number"),
        ({"share": "1"}, r"share: '1' does not fit \(allowed: a number\)"),
        ({"share": False}, "a number"),
        ({"on": 1}, "true or false"),
        ({"name": 1}, "a text"),
        ({"policy": "maybe"}, "'drop', 'allow'"),
        ({"where": 1}, "a path"),
        ({"level": True}, "'low', 1"),
        ({"limit_bytes": "x"}, "a whole number"),
        ({"bridges": "a"}, "a list, each a text"),
        ({"bridges": [1]}, "a list, each a text"),
        ({"compare_timeout_ms": 0}, r"web\.toml: protection\.options\.x: compare_timeout_ms must be above 0"),
    ],
)
def test_what_is_wrong_is_said_with_key_and_what_is_allowed(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(table)


@dataclass(frozen=True)
class Bad:
    what: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Worse:
    what: complex = 0


def test_a_class_that_is_no_schema_is_the_plugins_fault() -> None:
    for schema in (Bad, Worse):
        with pytest.raises(TypeError, match="cannot be annotated"):
            parse_options(schema, {"what": {}}, source="f", where="w")
    with pytest.raises(TypeError, match="no dataclass"):
        parse_options(int, {}, source="f", where="w")
