"""The agent's configuration: /etc/understudy/agent.toml. docs/reference/agent-toml.md describes every key."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from understudy.schema import Table, read_toml

__all__ = [
    "CONFIG_VARIABLE",
    "DEFAULT_CONFIG",
    "DEFAULT_PORT",
    "NAME_PATTERN",
    "NAME_WORDS",
    "AgentConfig",
    "Directories",
    "Limits",
    "PeerConfig",
    "config_path",
    "read_config",
]

DEFAULT_CONFIG = Path("/etc/understudy/agent.toml")
DEFAULT_PORT = 7464
CONFIG_VARIABLE = "UNDERSTUDY_CONFIG"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
NAME_WORDS = "1 to 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit"


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Where another host's agent listens."""

    name: str
    address: str  #: numeric
    port: int


@dataclass(frozen=True, slots=True)
class Directories:
    """Where the agent keeps things."""

    state: Path  #: survives a reboot: history, ids, records of what was made
    runtime: Path  #: sockets; does not survive
    guests: Path  #: guest files
    overlays: Path  #: write overlays of copies


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how fast."""

    heartbeat_interval_ms: int = 100
    heartbeat_limit_ms: int = 1000  #: silence longer than this is a loss
    bwlimit_bytes_per_s: int = 0  #: for initial copies, 0 = none


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What agent.toml says."""

    source: Path
    host: str
    insecure: bool
    address: str  #: numeric address that the agent listens on
    port: int
    peers: Mapping[str, PeerConfig]
    directories: Directories
    limits: Limits = field(default_factory=Limits)
    plugins: frozenset[str] | None = (
        None  #: entry points that may be loaded, ``None`` = all that are installed
    )
    arbiter_kind: str = ""  #: empty: no arbiter is configured, nothing can be protected
    arbiter_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def socket(self) -> Path:
        """The Unix socket on which the agent talks to the command line."""
        return self.directories.runtime / "agent.sock"


def config_path(given: str | os.PathLike[str] | None = None) -> Path:
    """Return the file to read: what was `given`, else ``$UNDERSTUDY_CONFIG``, else the default place."""
    return Path(given or os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG)


def read_config(path: Path) -> AgentConfig:
    """Read the agent's configuration.

    Raises:
        ConfigError: The file is missing, or a key is unknown or wrong.
    """
    table = read_toml(path)
    host = table.str("host", pattern=NAME_PATTERN, allowed=NAME_WORDS)
    insecure = table.bool("insecure", default=False)
    if not insecure:
        raise table.error(
            "insecure",
            "this version has no encryption yet: agents talk in plain text, and an agent starts only when its "
            "configuration says that this is accepted",
            "true, on a network that only the two hosts can reach",
        )
    listen = table.table("listen")
    directories = _directories(table.table("directories"))
    arbiter = table.table("arbiter")
    kind = arbiter.str("kind") if arbiter.mapping else ""
    plugins = table.strings("plugins", None)
    config = AgentConfig(
        source=path,
        host=host,
        insecure=insecure,
        address=_address(listen, "address"),
        port=listen.int("port", DEFAULT_PORT, minimum=1, maximum=65535),
        peers=_peers(table, host),
        directories=directories,
        limits=_limits(table.table("limits")),
        plugins=None if plugins is None else frozenset(plugins),
        arbiter_kind=kind,
        arbiter_options=MappingProxyType(arbiter.rest()),
    )
    table.done()
    return config


def _address(table: Table, key: str) -> str:
    text = table.str(key)
    allowed = 'for example "10.9.0.1" or "fd00::1"'
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise table.error(key, f"{text!r} is no numeric address", allowed) from None
    if address.is_unspecified or address.is_multicast:
        # The other host connects to it, and streams of copies are accepted there.
        raise table.error(key, f"{text!r} is no address of one host", allowed)
    return str(address)


def _peers(table: Table, host: str) -> Mapping[str, PeerConfig]:
    peers = {}
    for name, peer in table.named_tables("peers").items():
        if name == host:
            raise table.error(f"peers.{name}", "is this host itself", "names of other hosts")
        peers[name] = PeerConfig(
            name, _address(peer, "address"), peer.int("port", DEFAULT_PORT, minimum=1, maximum=65535)
        )
    return MappingProxyType(peers)


def _directories(table: Table) -> Directories:
    def path(key: str, default: str) -> Path:
        text = table.str(key, default)
        if not text.startswith("/"):
            raise table.error(key, f"{text!r} is no absolute path", "a path that begins with /")
        return Path(text)

    state = path("state", "/var/lib/understudy")
    return Directories(
        state=state,
        runtime=path("runtime", "/run/understudy"),
        guests=path("guests", "/etc/understudy/guests"),
        overlays=path("overlays", str(state / "overlays")),
    )


def _limits(table: Table) -> Limits:
    interval_ms = table.int("heartbeat_interval_ms", 100, minimum=10, maximum=10_000)
    limit_ms = table.int("heartbeat_limit_ms", 1000, minimum=50, maximum=60_000)
    if limit_ms < 3 * interval_ms:
        raise table.error(
            "heartbeat_limit_ms",
            f"{limit_ms} is too short for a heartbeat every {interval_ms} ms: one late packet would be a loss",
            f"at least three intervals, {3 * interval_ms}",
        )
    return Limits(interval_ms, limit_ms, table.bytes("bwlimit", 0))
