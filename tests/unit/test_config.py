"""agent.toml."""

from pathlib import Path

import pytest

from understudy.config import CONFIG_VARIABLE, DEFAULT_CONFIG, DEFAULT_PORT, config_path, read_config
from understudy.errors import ConfigError

MINIMAL = """
host = "alpha"
insecure = true
[listen]
address = "10.9.0.1"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_minimal_file_has_the_documented_defaults(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, MINIMAL))
    assert (config.host, config.address, config.port) == ("alpha", "10.9.0.1", DEFAULT_PORT)
    assert config.peers == {}
    assert config.plugins is None
    assert config.arbiter_kind == ""
    assert config.directories.state == Path("/var/lib/understudy")
    assert config.directories.overlays == Path("/var/lib/understudy/overlays")
    assert config.socket == Path("/run/understudy/agent.sock")
    assert (config.limits.heartbeat_interval_ms, config.limits.heartbeat_limit_ms) == (100, 1000)
    assert config.limits.bwlimit_bytes_per_s == 0


def test_everything(tmp_path: Path) -> None:
    text = (
        'plugins = ["qemu"]\n'
        + MINIMAL
        + """
port = 1234
[peers.beta]
address = "fd00::2"
port = 99
[directories]
state = "/s"
runtime = "/r"
guests = "/g"
overlays = "/o"
[arbiter]
kind = "directory"
path = "/shared"
[limits]
heartbeat_interval_ms = 50
heartbeat_limit_ms = 500
bwlimit = "10MiB"
"""
    )
    config = read_config(write(tmp_path, text))
    assert config.peers["beta"].address == "fd00::2"
    assert config.peers["beta"].port == 99
    assert config.plugins == frozenset({"qemu"})
    assert (config.arbiter_kind, dict(config.arbiter_options)) == ("directory", {"path": "/shared"})
    assert config.limits.bwlimit_bytes_per_s == 10 << 20
    assert config.socket == Path("/r/agent.sock")


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (MINIMAL.replace("true", "false"), "insecure", "plain text"),
        (MINIMAL.replace("insecure = true", ""), "insecure", "no encryption"),
        (MINIMAL.replace("alpha", "a b"), "host", "letters, digits"),
        (MINIMAL.replace("10.9.0.1", "alpha.example"), "listen.address", "no numeric address"),
        (MINIMAL.replace("10.9.0.1", "0.0.0.0"), "listen.address", "no address of one host"),  # noqa: S104 - refused
        (MINIMAL + "prot = 1", "listen.prot", "did you mean 'port'"),
        (MINIMAL + "port = 70000", "listen.port", "from 1 to 65535"),
        (MINIMAL + '[peers.alpha]\naddress = "10.9.0.2"', "peers.alpha", "this host itself"),
        (MINIMAL + "[peers.beta]", "peers.beta.address", "is missing"),
        (MINIMAL + '[directories]\nstate = "here"', "directories.state", "no absolute path"),
        (MINIMAL + '[arbiter]\npath = "/x"', "arbiter.kind", "is missing"),
        (MINIMAL + "[limits]\nheartbeat_limit_ms = 250", "limits.heartbeat_limit_ms", "three intervals"),
        (MINIMAL + "[limitz]", "limitz", "did you mean 'limits'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(write(tmp_path, text))
    assert caught.value.key == key
    assert caught.value.source.endswith("agent.toml")


def test_which_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert config_path() == DEFAULT_CONFIG
    monkeypatch.setenv(CONFIG_VARIABLE, "/env.toml")
    assert config_path() == Path("/env.toml")
    assert config_path("/given.toml") == Path("/given.toml")
