"""Where everything goes that an engine tells: history, figures, observers, and whoever waits on the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from understudy.agent.figures import Figures
from understudy.agent.history import History
from understudy.observers import ObserverFeed
from understudy.report import EpochReport, Observer

__all__ = ["Tellings"]

log = logging.getLogger("understudy.agent")

# What decides about a guest: on the disk before anything that is told later.
DECISIONS = frozenset(
    {"swap", "fenced", "promoting", "promoted", "kept", "released", "discarded", "protected"}
)


class Tellings:
    """Takes what all engines of this host tell (`understudy.engine.Telling`).

    Args:
        history: Kept on the disk, by a thread of its own.
        figures: Kept in memory.
        observers: Pairs of name and observer, of plugins.
        progress: Told of initial copies: guest, what, done and total bytes.
    """

    def __init__(
        self,
        history: History,
        figures: Figures,
        observers: list[tuple[str, Observer]],
        progress: Callable[[str, str, int, int], None],
    ) -> None:
        self.figures = figures
        self._progress = progress
        self._history = ObserverFeed([("history", _Recorder(history))], limit=100_000)
        self._observers = ObserverFeed(observers)

    def epoch(self, report: EpochReport) -> None:
        """Take the report of a committed epoch."""
        self.figures.epoch(report)
        self._observers.epoch(report)

    def event(self, guest: str, name: str, facts: Mapping[str, Any]) -> None:
        """Take an event of a session, or of the agent."""
        fields = {key: facts[key] for key in ("session", "epoch") if facts.get(key)} | {"guest": guest}
        log.info("guest %s: %s %s", guest, name, _words(facts), extra=fields)
        self._history.event(guest, name, facts)
        self._observers.event(guest, name, facts)

    def progress(self, guest: str, what: str, done_bytes: int, total_bytes: int) -> None:
        """Take the progress of an initial copy."""
        self._progress(guest, what, done_bytes, total_bytes)

    def close(self) -> None:
        """Write what is queued; blocks, bounded."""
        self._history.close()
        self._observers.close()


class _Recorder(Observer):
    __slots__ = ("_history",)

    def __init__(self, history: History) -> None:
        self._history = history

    def event(self, guest: str, name: str, facts: Mapping[str, object]) -> None:
        self._history.add(guest, name, facts, durable=name in DECISIONS)


def _words(facts: Mapping[str, Any]) -> str:
    # Nested facts (whole records) are the history's; a line of the log has the short ones.
    short = {
        key: value for key, value in facts.items() if isinstance(value, str | int | float) and value != ""
    }
    return " ".join(
        f"{key}={value}" for key, value in short.items() if key not in {"session", "side", "state"}
    )
