"""Logging of the daemon: one line per event, with guest, session and epoch as fields.

On a terminal or in a file the fields follow the text; under systemd (``$JOURNAL_STREAM``) the line carries the
priority prefix that the journal understands and no time of its own.
"""

from __future__ import annotations

import logging
import os
import sys
import time

__all__ = ["FIELDS", "configure"]

FIELDS = ("guest", "session", "epoch")  #: keys of ``extra=`` that are shown
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _Formatter(logging.Formatter):
    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        fields = " ".join(f"{key}={getattr(record, key)}" for key in FIELDS if hasattr(record, key))
        if fields:
            text = f"{text} [{fields}]"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        if self._journal:
            prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
            return "\n".join(prefix + line for line in text.splitlines())
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        return f"{now}.{int(record.msecs):03d} {record.levelname.lower():7} {record.name}: {text}"


def configure(level: str) -> None:
    """Send what the agent logs to standard error.

    Args:
        level: Name of the lowest level that is shown, e.g. ``"info"``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(journal="JOURNAL_STREAM" in os.environ))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
