"""Turn a table of a TOML file into a typed, frozen options dataclass, or say exactly which key is wrong.

The dataclass is the schema: its field names carry the units (``compare_timeout_ms``), its annotations say what is
allowed, its defaults make every key optional, and a `ValueError` of its ``__post_init__`` says what is out of range.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from understudy.errors import ConfigError

__all__ = ["parse_options"]

T = TypeVar("T")

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}


def parse_options(options: type[T], table: Mapping[str, Any], *, source: str, where: str) -> T:
    """Make an options object from a table.

    Args:
        options: A dataclass with defaults for all fields; annotations may be ``bool``, ``int``, ``float``, ``str``,
            `Path`, an `Enum` (by value), a ``Literal``, ``tuple[X, ...]`` and unions of these with ``None``.
        table: The keys that the user set.
        source: The file, for errors.
        where: Dotted name of the table in it.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type or is out of range; names the key and what is
            allowed.
        TypeError: The class itself is not a usable schema; the plugin's fault, not the user's.
    """
    schema = _schema(options)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in schema:
            near = difflib.get_close_matches(key, schema, n=1)
            problem = "unknown key" + (f", did you mean {near[0]}?" if near else "")
            raise ConfigError(source, f"{where}.{key}", problem, ", ".join(schema) or "no keys")
        try:
            values[key] = _convert(schema[key], value)
        except ValueError:
            problem = f"{value!r} does not fit"
            raise ConfigError(source, f"{where}.{key}", problem, _words(schema[key])) from None
    try:
        return options(**values)
    except ValueError as error:
        raise ConfigError(source, where, str(error)) from error


def _schema(options: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(options):
        raise TypeError(f"{options.__name__} is no dataclass")
    hints = get_type_hints(options)
    return {field.name: hints[field.name] for field in dataclasses.fields(options) if field.init}


def _convert(wanted: Any, value: Any) -> Any:
    origin = get_origin(wanted)
    if origin in {Union, types.UnionType}:
        return _first_that_fits(get_args(wanted), value)
    if origin is Literal:
        # True == 1: the type must agree, too.
        if any(value == each and type(value) is type(each) for each in get_args(wanted)):
            return value
        raise ValueError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError
        return tuple(_convert(get_args(wanted)[0], each) for each in value)
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return wanted(value)
    return _plain(wanted, value)


def _first_that_fits(members: tuple[Any, ...], value: Any) -> Any:
    for member in members:
        try:
            return _convert(member, value)
        except ValueError:
            continue
    raise ValueError


def _plain(wanted: Any, value: Any) -> Any:
    if wanted in {bool, int, str, type(None)}:
        fits = type(value) is wanted
    elif wanted is float:
        fits = type(value) in {int, float}
    elif wanted is Path:
        fits = type(value) is str
    else:
        raise TypeError(f"options cannot be annotated with {wanted!r}")
    if not fits:
        raise ValueError
    return wanted(value) if wanted in {float, Path} else value


def _words(wanted: Any) -> str:
    origin = get_origin(wanted)
    if origin in {Union, types.UnionType}:
        return " or ".join(_words(each) for each in get_args(wanted) if each is not type(None))
    if origin is Literal:
        return ", ".join(repr(each) for each in get_args(wanted))
    if origin is tuple:
        return f"a list, each {_words(get_args(wanted)[0])}"
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return ", ".join(repr(each.value) for each in wanted)
    return _WORDS[wanted]
