"""Read a parsed configuration table key by key, with types, and name everything that does not belong there.

The reader asks for each key it knows, with the type it needs; `Table.done` then complains about every key that
nobody asked for, with the nearest known name. All complaints are `ConfigError`: file, dotted key, what is allowed.

::

    table = read_toml(path)
    name = table.str("name")
    memory_bytes = table.bytes("memory", minimum=1 << 20)
    for disk in table.tables("disk"):
        image = disk.str("image")
    table.done()  # also closes the tables taken from it
"""

from __future__ import annotations

import builtins
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar, overload

from understudy.errors import ConfigError

__all__ = ["Table", "parse_bytes", "read_toml"]

D = TypeVar("D")
E = TypeVar("E", bound=Enum)
# Inside `Table` the names of the built-in types are those of its methods.
_Bool = builtins.bool
_Int = builtins.int
_Str = builtins.str


class _Required(Enum):
    REQUIRED = "required"


_REQUIRED: Final = _Required.REQUIRED
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])?(iB|B)?\s*", re.IGNORECASE)
_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE_WORDS = 'a number of bytes or a text like "512MiB" (KiB, MiB, GiB, TiB; powers of 1024)'
_TOML_NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def parse_bytes(text: str | int) -> int:
    """Turn ``512MiB``, ``4G`` or a plain number into bytes; units are powers of 1024.

    Args:
        text: The size; a number is bytes.

    Raises:
        ValueError: It is no size; the text says what would be.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is no size; expected {_SIZE_WORDS}")
    return int(float(match[1]) * _FACTOR[(match[2] or "").upper()])


def read_toml(path: Path) -> Table:
    """Read the TOML file `path` as one table.

    Raises:
        ConfigError: The file cannot be read or is no TOML; the text has the line.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "", f"is not UTF-8 at byte {error.start}") from error
    try:
        return Table(str(path), "", tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), "", f"is not valid TOML: {error}") from error


class Table:
    """One table of a configuration file and which of its keys have been asked for.

    Args:
        source: The file, for error messages.
        prefix: Dotted path of this table in the file, ``""`` for the file itself.
        mapping: The parsed table.
    """

    __slots__ = ("_children", "_known", "mapping", "prefix", "source")

    def __init__(self, source: _Str | Path, prefix: _Str, mapping: Mapping[_Str, Any]) -> None:
        self.source = builtins.str(source)
        self.prefix = prefix
        self.mapping = mapping
        self._known: dict[_Str, None] = {}
        self._children: list[Table] = []

    def path(self, key: _Str) -> _Str:
        """Return the dotted path of `key` in the file."""
        return f"{self.prefix}.{key}" if self.prefix else key

    def error(self, key: _Str, problem: _Str, allowed: _Str = "") -> ConfigError:
        """Make the error that says what is wrong with `key`; the caller raises it."""
        return ConfigError(self.source, self.path(key), problem, allowed)

    def has(self, key: _Str) -> _Bool:
        """Tell whether `key` is there, without taking it."""
        return key in self.mapping

    # --- Values --------------------------------------------------------------------------------------------------

    @overload
    def str(
        self, key: _Str, *, choices: Sequence[_Str] = (), pattern: _Str = "", allowed: _Str = ""
    ) -> _Str: ...
    @overload
    def str(
        self, key: _Str, default: D, *, choices: Sequence[_Str] = (), pattern: _Str = "", allowed: _Str = ""
    ) -> _Str | D: ...
    def str(
        self,
        key: _Str,
        default: Any = _REQUIRED,
        *,
        choices: Sequence[_Str] = (),
        pattern: _Str = "",
        allowed: _Str = "",
    ) -> Any:
        """Take a text.

        Args:
            key: Its name in this table.
            default: What to return when it is missing; without one it is required.
            choices: All values that are allowed; empty for any.
            pattern: A regular expression that the whole text must match.
            allowed: The pattern in words.

        Raises:
            ConfigError: Missing, of another type, or not allowed.
        """
        value = self._take(key, default, (_Str,), allowed or _list(choices) or "text")
        if value is default:
            return value
        if choices and value not in choices:
            near = difflib.get_close_matches(value, choices, 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise self.error(key, f"{value!r} is none of the allowed values{hint}", _list(choices))
        if pattern and re.fullmatch(pattern, value) is None:
            raise self.error(key, f"{value!r} is not allowed", allowed or f"text that matches {pattern}")
        return value

    @overload
    def int(self, key: _Str, *, minimum: _Int | None = None, maximum: _Int | None = None) -> _Int: ...
    @overload
    def int(
        self, key: _Str, default: D, *, minimum: _Int | None = None, maximum: _Int | None = None
    ) -> _Int | D: ...
    def int(
        self, key: _Str, default: Any = _REQUIRED, *, minimum: _Int | None = None, maximum: _Int | None = None
    ) -> Any:
        """Take an integer from `minimum` to `maximum`, both included; other arguments as for `str`."""
        allowed = _range("an integer", minimum, maximum)
        value = self._take(key, default, (_Int,), allowed)
        if value is not default:
            self._check_range(key, value, minimum, maximum, allowed)
        return value

    @overload
    def float(self, key: _Str, *, minimum: builtins.float | None = None) -> builtins.float: ...
    @overload
    def float(
        self, key: _Str, default: D, *, minimum: builtins.float | None = None
    ) -> builtins.float | D: ...
    def float(self, key: _Str, default: Any = _REQUIRED, *, minimum: builtins.float | None = None) -> Any:
        """Take a number, at least `minimum`; other arguments as for `str`."""
        allowed = _range("a number", minimum, None)
        value = self._take(key, default, (_Int, builtins.float), allowed)
        if value is not default:
            self._check_range(key, value, minimum, None, allowed)
        return value

    @overload
    def bool(self, key: _Str) -> _Bool: ...
    @overload
    def bool(self, key: _Str, default: D) -> _Bool | D: ...
    def bool(self, key: _Str, default: Any = _REQUIRED) -> Any:
        """Take true or false; other arguments as for `str`."""
        return self._take(key, default, (_Bool,), "true or false")

    @overload
    def bytes(self, key: _Str, *, minimum: _Int = 0) -> _Int: ...
    @overload
    def bytes(self, key: _Str, default: D, *, minimum: _Int = 0) -> _Int | D: ...
    def bytes(self, key: _Str, default: Any = _REQUIRED, *, minimum: _Int = 0) -> Any:
        """Take a size in bytes, a number or a text like ``"512MiB"``; other arguments as for `str`."""
        value = self._take(key, default, (_Int, _Str), _SIZE_WORDS)
        if value is default:
            return value
        try:
            size = parse_bytes(value)
        except ValueError:
            raise self.error(key, f"{value!r} is no size", _SIZE_WORDS) from None
        self._check_range(key, size, minimum, None, f"at least {minimum} bytes")
        return size

    @overload
    def strings(self, key: _Str) -> tuple[_Str, ...]: ...
    @overload
    def strings(self, key: _Str, default: D) -> tuple[_Str, ...] | D: ...
    def strings(self, key: _Str, default: Any = _REQUIRED) -> Any:
        """Take a list of texts; other arguments as for `str`."""
        value = self._take(key, default, (list,), "a list of texts")
        if value is default:
            return value
        if not all(isinstance(item, _Str) for item in value):
            raise self.error(key, "holds something that is no text", "a list of texts")
        return tuple(value)

    def choice(self, key: _Str, values: type[E], default: E | None = None) -> E:
        """Take one value of the enumeration `values`, written as the member's value."""
        words = [builtins.str(member.value) for member in values]
        text = (
            self.str(key, choices=words) if default is None else self.str(key, default.value, choices=words)
        )
        return values(text)

    # --- Tables --------------------------------------------------------------------------------------------------

    def table(self, key: _Str) -> Table:
        """Take a table of this table; a missing one is an empty one."""
        value = self._take(key, {}, (dict,), "a table")
        return self._child(self.path(key), value)

    def tables(self, key: _Str) -> tuple[Table, ...]:
        """Take an array of tables (``[[key]]``); a missing one is empty."""
        value = self._take(key, [], (list,), f"an array of tables, written [[{self.path(key)}]]")
        if not all(isinstance(item, dict) for item in value):
            allowed = f"an array of tables, written [[{self.path(key)}]]"
            raise self.error(key, "holds something that is no table", allowed)
        return tuple(self._child(f"{self.path(key)}[{index}]", item) for index, item in enumerate(value))

    def named_tables(self, key: _Str) -> dict[_Str, Table]:
        """Take a table whose values are all tables, such as ``[peers.NAME]``; a missing one is empty."""
        outer = self.table(key)
        return {name: outer.table(name) for name in outer.mapping}

    def raw(self, key: _Str) -> dict[_Str, Any]:
        """Take a table as it is, for a reader of its own; a missing one is empty."""
        return dict(self._take(key, {}, (dict,), "a table"))

    def rest(self) -> dict[_Str, Any]:
        """Take all keys that were not asked for yet, for a reader of its own."""
        found = {key: value for key, value in self.mapping.items() if key not in self._known}
        self._known.update(dict.fromkeys(found))
        return found

    def done(self) -> None:
        """Complain about every key that nobody asked for, here and in the tables taken from here.

        Raises:
            ConfigError: There is one; the text has the nearest known name and lists what is allowed.
        """
        unknown = [key for key in self.mapping if key not in self._known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._known, 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            more = f" (also unknown: {_list(unknown[1:])})" if unknown[1:] else ""
            raise self.error(unknown[0], f"unknown key{hint}{more}", _list(sorted(self._known)) or "nothing")
        for child in self._children:
            child.done()

    # --- Inside --------------------------------------------------------------------------------------------------

    def _child(self, prefix: _Str, mapping: Mapping[_Str, Any]) -> Table:
        child = Table(self.source, prefix, mapping)
        self._children.append(child)
        return child

    def _take(self, key: _Str, default: Any, types: tuple[type, ...], allowed: _Str) -> Any:
        self._known[key] = None
        if key not in self.mapping:
            if default is _REQUIRED:
                raise self.error(key, "is missing", allowed)
            return default
        value = self.mapping[key]
        # bool is an int to Python, but not to somebody who writes a configuration.
        if not isinstance(value, types) or (isinstance(value, _Bool) and _Bool not in types):
            kind = _TOML_NAMES.get(type(value), type(value).__name__)
            raise self.error(key, f"is {kind}", allowed)
        return value

    def _check_range(
        self,
        key: _Str,
        value: builtins.float,
        minimum: builtins.float | None,
        maximum: builtins.float | None,
        allowed: _Str,
    ) -> None:
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            raise self.error(key, f"{value} is out of range", allowed)


def _list(values: Sequence[str]) -> str:
    return ", ".join(values)


def _range(what: str, minimum: float | None, maximum: float | None) -> str:
    if minimum is not None and maximum is not None:
        return f"{what} from {minimum} to {maximum}"
    if minimum is not None:
        return f"{what}, at least {minimum}"
    return f"{what}, at most {maximum}" if maximum is not None else what
