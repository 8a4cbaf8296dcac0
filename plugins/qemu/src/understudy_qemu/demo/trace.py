"""Write every epoch and event of this agent to a file, for the demo's page and for tests.

An observer that does something only when ``$UNDERSTUDY_TRACE`` names a file. One JSON object a line:
``{"t_ns": ..., "epoch": {...}}`` or ``{"t_ns": ..., "event": ..., "guest": ..., "facts": {...}}``, where
``t_ns`` is CLOCK_MONOTONIC, which is one clock for all hosts of a laboratory.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import IO, Any

from understudy.report import EpochReport, Observer

__all__ = ["TRACE_VARIABLE", "Trace"]

TRACE_VARIABLE = "UNDERSTUDY_TRACE"


class Trace(Observer):
    """The observer.

    Args:
        path: file to append to; by default what ``$UNDERSTUDY_TRACE`` says, and nothing if it is not set.
    """

    __slots__ = ("_file",)

    def __init__(self, path: str | None = None) -> None:
        chosen = path or os.environ.get(TRACE_VARIABLE)
        self._file: IO[str] | None = None
        if chosen:
            # Open for as long as the agent lives. A line is on its way when the call returns, because
            # the agents that are watched are killed without warning.
            self._file = open(chosen, "a", buffering=1, encoding="utf-8")  # noqa: PTH123, SIM115

    def epoch(self, report: EpochReport) -> None:
        """Write the report of a committed epoch."""
        if self._file is None:
            return
        values = {name: _plain(getattr(report, name)) for name in report.__dataclass_fields__}
        self._write({"epoch": values})

    def event(self, guest: str, name: str, facts: Mapping[str, object]) -> None:
        """Write an event of a session."""
        if self._file is not None:
            self._write({"event": name, "guest": guest, "facts": _plain(facts)})

    def close(self) -> None:
        """Close the file; what is told afterwards is dropped. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"t_ns": time.monotonic_ns(), **line}, default=str) + "\n")


def _plain(value: Any) -> Any:
    # Mapping proxies are no dictionaries to json, and enumerations are their values.
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return getattr(value, "value", value)
