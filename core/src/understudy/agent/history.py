"""What happened to each guest on this host: one JSON object per line and event, in the state directory.

Each line has ``time`` (ISO 8601, UTC), ``time_ns`` (realtime), ``host``, ``guest``, ``event`` and the event's own
facts. Lines are appended whole, in their order; a decision is on the disk before any later line is written.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["History"]

log = logging.getLogger("understudy.agent")

# A file that is larger is set aside as NAME.1, the one before that is dropped.
LIMIT_BYTES = 4 << 20


class History:
    """The histories of one host's guests.

    Args:
        directory: Where they are kept; made when the first line is written.
        host: This host's name.
    """

    def __init__(self, directory: Path, host: str) -> None:
        self.directory = directory
        self._host = host

    def add(self, guest: str, event: str, facts: Mapping[str, object], *, durable: bool = False) -> None:
        """Append one event.

        Args:
            guest: The guest.
            event: One word.
            facts: JSON-able; what is not is written as text.
            durable: Wait until it is on the disk.

        Guarantees:
            A failure is logged and changes nothing else: a full disk must not end a protection.
        """
        now_ns = time.time_ns()
        line = {
            "time": datetime.fromtimestamp(now_ns / 1e9, UTC).isoformat(timespec="milliseconds"),
            "time_ns": now_ns,
            "host": self._host,
            "guest": guest,
            "event": event,
            **facts,
        }
        try:
            self._append(self._path(guest), json.dumps(line, default=str).encode() + b"\n", durable=durable)
        except OSError as error:
            log.error("the history of %s cannot be written: %s", guest, error)  # noqa: TRY400 - no traceback needed

    def read(self, guest: str, limit: int = 0) -> Sequence[dict[str, Any]]:
        """Return the events of `guest`, oldest first; with a `limit` only the last ones."""
        events = []
        for path in (self._path(guest).with_suffix(".jsonl.1"), self._path(guest)):
            try:
                lines = path.read_bytes().splitlines()
            except OSError:
                continue
            for line in lines:
                # The last line of a host that crashed may be cut.
                try:
                    events.append(json.loads(line))
                except ValueError:
                    continue
        return events[-limit:] if limit else events

    def _path(self, guest: str) -> Path:
        return self.directory / f"{guest}.jsonl"

    def _append(self, path: Path, line: bytes, *, durable: bool) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(fd).st_size
            os.write(fd, line)
            if durable:
                os.fdatasync(fd)
        finally:
            os.close(fd)
        if size > LIMIT_BYTES:
            path.replace(path.with_suffix(".jsonl.1"))
