"""The reader of configuration tables."""

from enum import Enum
from pathlib import Path

import pytest

from understudy.errors import ConfigError
from understudy.schema import Table, parse_bytes, read_toml


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def table(**values: object) -> Table:
    return Table("a.toml", "", values)


def test_values_of_each_type() -> None:
    t = table(s="x", i=3, f=2, b=True, m="2MiB", l=["a", "b"], c="blue", t={"k": 1}, ts=[{"n": 1}, {"n": 2}])
    assert t.str("s") == "x"
    assert t.int("i", minimum=1, maximum=3) == 3
    assert t.float("f") == 2
    assert t.bool("b") is True
    assert t.bytes("m") == 2 << 20
    assert t.strings("l") == ("a", "b")
    assert t.choice("c", Colour) is Colour.BLUE
    assert t.table("t").int("k") == 1
    assert [each.int("n") for each in t.tables("ts")] == [1, 2]
    t.done()


def test_defaults_and_missing() -> None:
    t = table()
    assert t.str("s", None) is None
    assert t.int("i", 5) == 5
    assert t.choice("c", Colour, Colour.RED) is Colour.RED
    assert t.table("t").mapping == {}
    assert t.tables("ts") == ()
    with pytest.raises(ConfigError, match=r"^a.toml: gone: is missing \(allowed: text\)$"):
        t.str("gone")


@pytest.mark.parametrize(
    ("method", "value", "words"),
    [
        ("int", True, "is true or false"),
        ("int", "3", "is text"),
        ("bool", 1, "is an integer"),
        ("str", 1, "is an integer"),
        ("bytes", "12 parsecs", "is no size"),
        ("bytes", -1, "is no size"),
        ("strings", ["a", 1], "no text"),
        ("table", 3, "is an integer"),
        ("tables", {"a": 1}, "is a table"),
        ("tables", [1], "no table"),
    ],
)
def test_wrong_type_names_file_and_key(method: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        getattr(Table("a.toml", "disk[0]", {"k": value}), method)("k")
    assert (caught.value.source, caught.value.key) == ("a.toml", "disk[0].k")
    assert caught.value.allowed


def test_out_of_range_and_not_among_the_choices() -> None:
    with pytest.raises(ConfigError, match="from 1 to 5"):
        table(i=6).int("i", minimum=1, maximum=5)
    with pytest.raises(ConfigError, match="did you mean 'remus'"):
        table(mode="remos").str("mode", choices=["remus", "colo"])
    with pytest.raises(ConfigError, match="a name"):
        table(name="a b").str("name", pattern="[a-z]+", allowed="a name")


def test_unknown_keys_are_named_with_the_nearest_known_one() -> None:
    t = table(memroy=1, zzz=2)
    t.int("memory", 0)
    with pytest.raises(ConfigError, match="did you mean 'memory'") as caught:
        t.done()
    assert "zzz" in str(caught.value)
    assert caught.value.allowed == "memory"


def test_done_closes_the_tables_taken_from_it() -> None:
    t = table(peers={"beta": {"adress": "::1"}})
    t.named_tables("peers")["beta"].str("address", "")
    with pytest.raises(ConfigError, match=r"peers.beta.adress: unknown key, did you mean 'address'"):
        t.done()


def test_rest_takes_what_nobody_asked_for() -> None:
    t = table(a=1, b=2)
    t.int("a")
    assert t.rest() == {"b": 2}
    t.done()


def test_sizes() -> None:
    assert [parse_bytes(x) for x in ("0", "1k", "1KiB", "1.5 GiB", "7B", 9)] == [0, 1024, 1024, 3 << 29, 7, 9]


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"not valid TOML.*line 1"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "bin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_toml(tmp_path / "bin.toml")
