"""Who an agent is to others, and how often they hear of each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from understudy.link.frame import VERSION

__all__ = ["Identity", "Timing"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this agent is to others."""

    host: str
    agent: str  #: version of the agent
    protocol: int = VERSION
    incarnation: str = ""  #: another one for every run of the agent

    def header(self, kind: str) -> dict[str, Any]:
        """Return the first frame of a connection."""
        return {
            "t": kind,
            "host": self.host,
            "agent": self.agent,
            "protocol": self.protocol,
            "incarnation": self.incarnation,
        }

    def misfit(self, version: int | None, header: Mapping[str, Any]) -> str:
        """Return why these two agents cannot understand each other, one sentence; empty if they can.

        Args:
            version: Of the other side's preamble.
            header: The other side's first frame, ``hello`` or ``welcome``.
        """
        theirs = header.get("protocol")
        if theirs == version == self.protocol:
            return ""
        if theirs == self.protocol:
            theirs = version  # it says one thing and speaks another
        return (
            f"protocol version {theirs} of agent {header.get('agent')} on {header.get('host')} is not version "
            f"{self.protocol} of agent {self.agent} on {self.host}: install the same version of understudy on both "
            "hosts"
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """Heartbeats, seconds."""

    interval_s: float = 0.1
    limit_s: float = 1.0
