"""What the command line's exit codes mean. docs/reference/exit-codes.md is checked against this table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final

__all__ = ["MEANINGS", "Exit", "exit_for"]


class Exit(IntEnum):
    """Exit codes."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNKNOWN_GUEST = 3
    WRONG_STATE = 4
    NOT_PROTECTABLE = 5
    NO_PEER = 6
    NO_ARBITER = 7
    NO_AGENT = 8
    CONFIG = 9
    CANCELLED = 130


MEANINGS: Final[Mapping[Exit, str]] = MappingProxyType(
    {
        Exit.OK: "done",
        Exit.FAILED: "it failed; the message says what state the guest is in",
        Exit.USAGE: "the command line itself was wrong",
        Exit.UNKNOWN_GUEST: "no such guest on this host",
        Exit.WRONG_STATE: "the guest's present state does not allow it, or another operation is under way",
        Exit.NOT_PROTECTABLE: "the preflight found errors: the guest cannot be protected as it is",
        Exit.NO_PEER: "the other host's agent cannot be reached, or refused",
        Exit.NO_ARBITER: "the arbiter gave no answer, or the record does not allow it",
        Exit.NO_AGENT: "no agent runs on this host, or it does not answer",
        Exit.CONFIG: "agent.toml or a guest file is wrong",
        Exit.CANCELLED: "called off by Ctrl-C; what had begun was undone",
    }
)

_BY_KIND: Final[Mapping[str, Exit]] = MappingProxyType(
    {
        "GuestNotFound": Exit.UNKNOWN_GUEST,
        "GuestBusy": Exit.WRONG_STATE,
        "StateError": Exit.WRONG_STATE,
        "PreflightFailed": Exit.NOT_PROTECTABLE,
        "DeviceNotSupported": Exit.NOT_PROTECTABLE,
        "LinkError": Exit.NO_PEER,
        "LinkLost": Exit.NO_PEER,
        "PeerError": Exit.NO_PEER,
        "ArbiterError": Exit.NO_ARBITER,
        "ArbiterUnavailable": Exit.NO_ARBITER,
        "IllegalChange": Exit.NO_ARBITER,
        "AgentUnreachable": Exit.NO_AGENT,
        "ConfigError": Exit.CONFIG,
        "Cancelled": Exit.CANCELLED,
    }
)


def exit_for(kind: str) -> Exit:
    """Return the exit code for an error of the class named `kind`."""
    return _BY_KIND.get(kind, Exit.FAILED)
