"""Errors as the command line gets to see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from understudy.device import Finding, Severity
from understudy.errors import ConfigError, PreflightFailed
from understudy.phases import first_failure, in_words

__all__ = ["describe", "finding_of", "finding_row"]


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error as a JSON-able object: the first cause leads, what failed afterwards is attached.

    Keys: ``kind`` (class name), ``message``; ``also`` (list of messages) where more failed; ``findings`` for a
    refused preflight; ``source``, ``key`` and ``allowed`` for a wrong configuration.
    """
    first = first_failure(error)
    fault: dict[str, Any] = {"kind": type(first).__name__, "message": in_words(first)}
    also = [in_words(each) for each in _leaves(error) if each is not first]
    if also:
        fault["also"] = also
    if isinstance(first, PreflightFailed):
        fault["findings"] = [finding_row(finding) for finding in first.findings]
    if isinstance(first, ConfigError):
        fault |= {"source": first.source, "key": first.key, "allowed": first.allowed}
    return fault


def finding_row(finding: Finding) -> Mapping[str, Any]:
    """Return a finding as a JSON-able object; `finding_of` is its inverse."""
    return {
        "severity": finding.severity.value,
        "subject": finding.subject,
        "problem": finding.problem,
        "remedy": finding.remedy,
        "unsafe": finding.unsafe,
    }


def finding_of(row: Mapping[str, Any]) -> Finding:
    """Return the finding that `finding_row` made `row` of.

    Raises:
        KeyError: It is no finding.
        ValueError: Its severity is none.
    """
    severity, unsafe = Severity(row["severity"]), bool(row.get("unsafe", False))
    return Finding(severity, row["subject"], row["problem"], row["remedy"], unsafe)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error
