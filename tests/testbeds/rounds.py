"""How often a test repeats itself: seldom by default, often in `make test-long`."""

from __future__ import annotations

import os

LONG = os.environ.get("UNDERSTUDY_ROUNDS") == "long"


def rounds(short: int, long: int) -> int:
    """Return how many rounds a test takes: `long` when UNDERSTUDY_ROUNDS is ``long``, else `short`."""
    return long if LONG else short
