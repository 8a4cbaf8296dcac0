"""Who an agent is to others, and how often they hear of each other."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Timing:
    """Heartbeats, seconds."""

    interval_s: float = 0.1
    limit_s: float = 1.0
