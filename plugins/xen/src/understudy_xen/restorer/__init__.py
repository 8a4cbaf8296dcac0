"""Domains are made from streams in a process of its own, that can be killed."""

from __future__ import annotations

# Nothing is imported here: the process itself starts through this package, and its start is part of a takeover.
