"""Guest files: what the core reads, and the overrides per host."""

import re
from pathlib import Path

import pytest

from understudy.device import Mode
from understudy.errors import ConfigError
from understudy.guestfile import GuestFile, merge, read_guest

HOSTS = ("alpha", "beta")
TEXT = """
name = "web"
hypervisor = "qemu"
memory = "512MiB"

[[disk]]
name = "root"
image = "/images/web.qcow2"
[[disk]]
name = "data"
image = "/images/data.qcow2"
[[nic]]
bridge = "br0"

[protection]
mode = "colo"
peer = "beta"
[protection.options.colo-proxy]
compare_timeout_ms = 500

[host.beta]
[[host.beta.disk]]
name = "data"
image = "/fast/data.qcow2"
[[host.beta.nic]]
bridge = "br1"
[host.beta.protection]
peer = "alpha"
"""


def read(tmp_path: Path, text: str, host: str = "alpha") -> GuestFile:
    path = tmp_path / "web.toml"
    path.write_text(text)
    return read_guest(path, host, HOSTS)


def test_the_host_without_overrides(tmp_path: Path) -> None:
    guest = read(tmp_path, TEXT)
    assert (guest.name, guest.hypervisor, guest.mode) == ("web", "qemu", Mode.COLO)
    assert guest.protection.peer == "beta"
    assert dict(guest.protection.subkind_options["colo-proxy"]) == {"compare_timeout_ms": 500}
    assert set(guest.rest) == {"memory", "disk", "nic"}
    assert guest.rest["nic"] == [{"bridge": "br0"}]


def test_overrides_meet_their_entries(tmp_path: Path) -> None:
    guest = read(tmp_path, TEXT, "beta")
    assert [disk["image"] for disk in guest.rest["disk"]] == ["/images/web.qcow2", "/fast/data.qcow2"]
    assert guest.rest["nic"] == [{"bridge": "br1"}]
    assert guest.protection.peer == "alpha"
    assert guest.protection.mode is Mode.COLO


def test_the_name_is_the_files_unless_given(tmp_path: Path) -> None:
    guest = read(tmp_path, 'hypervisor = "sim"')
    assert guest.name == "web"
    assert guest.mode is None
    assert guest.protection.interval == "fixed"


def test_what_is_unsafe_is_refused_unless_the_file_allows_it(tmp_path: Path) -> None:
    assert not read(tmp_path, TEXT).protection.allow_unsafe
    allowed = TEXT.replace('peer = "beta"\n', 'peer = "beta"\nallow_unsafe = true\n')
    assert read(tmp_path, allowed).protection.allow_unsafe


def test_every_key_of_protection_is_in_the_reference(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, TEXT.replace('peer = "beta"', "no_such_key = 1"))
    page = (Path(__file__).parents[2] / "docs/reference/guest-file.md").read_text()
    documented = set(re.findall(r"^\| `protection\.(\w+)(?:\.SUBKIND)?` \|", page, re.MULTILINE))
    assert documented == set(raised.value.allowed.split(", "))


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("", "hypervisor", "is missing"),
        (TEXT.replace('"colo"', '"cold"'), "protection.mode", "did you mean 'colo'"),
        (TEXT.replace('peer = "beta"', 'pear = "beta"'), "protection.pear", "did you mean 'peer'"),
        (TEXT + "[host.gamma]\n", "host.gamma", "no such host"),
        (TEXT.replace("[host.beta]", '[host.beta]\nname = "x"'), "host.beta.name", "same on all hosts"),
        (TEXT.replace('name = "web"', 'name = "../x"'), "name", "letters, digits"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read(tmp_path, text)
    assert caught.value.key == key
    assert caught.value.source.endswith("web.toml")


def test_an_override_that_meets_nothing_is_an_error(tmp_path: Path) -> None:
    text = TEXT.replace('[[host.beta.disk]]\nname = "data"', '[[host.beta.disk]]\nname = "date"')
    with pytest.raises(ConfigError, match="does not exist") as caught:
        read(tmp_path, text, "beta")
    assert caught.value.key == "host.beta.disk[0]"
    assert "root, data" in caught.value.allowed


def test_merge_changes_neither_tree() -> None:
    under = {"a": {"b": 1, "c": 2}, "l": [{"x": 1}, {"x": 2}], "s": [1, 2]}
    over = {"a": {"b": 9}, "l": [{"y": 3}], "s": [7], "new": True}
    assert merge(over, under) == {
        "a": {"b": 9, "c": 2},
        "l": [{"x": 1, "y": 3}, {"x": 2}],
        "s": [7],
        "new": True,
    }
    assert under == {"a": {"b": 1, "c": 2}, "l": [{"x": 1}, {"x": 2}], "s": [1, 2]}
