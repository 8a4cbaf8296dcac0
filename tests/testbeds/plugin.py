"""What the pytest plugins of the beds have in common: tests marked for a bed run inside it and are reported here.

A module's marked tests share one machine. Not one for the whole session, except where booting takes too long: what a
test leaves in a kernel (interfaces, modules, DRBD minors) cannot be swept as reliably as by a new one, modules
can be run in any order and by several workers, and each may ask for its own memory. Not one for each test: that would
be seconds each. The tests are named to the inner pytest one at a time, with the one that follows, as pytest-xdist does
it: so fixtures of modules work, ``-x``, ``-k`` and node ids mean what they always mean, and a test that takes its
machine along costs no other its result. The next one gets a new machine.

What needs the network, or is to be kept for the next run, is done outside before the machine is booted: by the function
that the marker names, as in ``kernel(outside=build)``.

A test has its ordinary timeout inside. If it does not even end then, its machine is killed `GRACE_S` later.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from tests.testbeds.bed import need
from tests.testbeds.inside import Inside
from tests.testbeds.machine import INSIDE, MachineDied
from tests.testbeds.modulebed import ORDERED, Bed, ModuleBed, NotCollected, NotPrepared

__all__ = ["configure"]

GRACE_S: Final = 10.0
# Of the bed: told as the failure of the test.
FAILURES: Final = (MachineDied, NotCollected, NotPrepared, OSError)
UNTIMED_S: Final = 600.0  # deadline of a test that has no timeout: not even the bed waits for ever


class Outside:
    """Runs in the pytest process outside.

    Args:
        config: pytest's.
        kind: the bed.
    """

    def __init__(self, config: pytest.Config, kind: Bed) -> None:
        self._config, self._kind = config, kind
        self._bed: ModuleBed | None = None
        self._broken: dict[Path, Exception] = {}
        self._timeout_s: dict[str, float] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Run a marked test inside; let pytest do as ever where the bed is missing, which skips it."""
        if not self._is_ours(item) or self._kind.missing():
            return None
        following = self._following(item, nextitem)
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item, following):
            hook.pytest_runtest_logreport(report=report)
        if following is None:
            self._close()
        # A test before this one may have left standing outside what it thought to share with it.
        call = pytest.CallInfo.from_call(
            lambda: item.session._setupstate.teardown_exact(nextitem), when="teardown"
        )
        if call.excinfo is not None:
            hook.pytest_runtest_logreport(report=hook.pytest_runtest_makereport(item=item, call=call))
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip or fail a marked test where the bed is missing."""
        if item.get_closest_marker(self._kind.name) is not None:
            need(self._kind.name, self._kind.missing())

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        """Take note of the timeout: the clock runs inside, and here only after it."""
        if not self._is_ours(item):
            return None
        self._timeout_s[item.nodeid] = settings.timeout
        return True

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """End the last machine before pytest-cov, around this, gathers its data."""
        try:
            return (yield)
        finally:
            self._close()

    def _reports(self, item: pytest.Item, following: pytest.Item | None) -> Iterator[pytest.TestReport]:
        began = time.monotonic()
        phase: Literal["setup", "call", "teardown"] = "setup"
        try:
            bed = self._bed_for(item)
            timeout_s = self._timeout_s.get(item.nodeid, UNTIMED_S)
            for report in bed.run(item, following, timeout_s + GRACE_S):
                phase = "call" if report.when == "setup" and report.passed else "teardown"
                yield report
        except FAILURES as problem:
            self._close()
            took_s = time.monotonic() - began
            yield _failure(item, phase, str(problem), took_s)
            if phase != "teardown":
                yield _failure(item, "teardown", None, 0.0)

    def _following(self, item: pytest.Item, nextitem: pytest.Item | None) -> pytest.Item | None:
        # The next test that this machine runs. A shared one may have to wait meanwhile.
        if not self._kind.shared:
            ours = nextitem is not None and self._is_ours(nextitem) and nextitem.path == item.path
            return nextitem if ours else None
        left = item.session.items[item.session.items.index(item) + 1 :]
        return next((each for each in left if self._is_ours(each)), None) if nextitem else None

    def _bed_for(self, item: pytest.Item) -> ModuleBed:
        if item.path in self._broken:
            raise self._broken[item.path]
        if self._bed is not None and item.path not in self._bed.modules:
            self._close()
        if self._bed is None:
            ours = [
                each
                for each in item.session.items
                if self._is_ours(each) and (self._kind.shared or each.path == item.path)
            ]
            marks = [mark for mark in map(self._mark, ours) if mark is not None]
            try:
                for prepare in {mark.kwargs["outside"] for mark in marks if "outside" in mark.kwargs}:
                    _prepare(prepare)
                sizes = {
                    name: max(mark.kwargs.get(name, usual) for mark in marks)
                    for name, usual in self._kind.sizes.items()
                }
                modules = list(dict.fromkeys(each.path for each in ours))
                self._bed = ModuleBed(self._kind, self._config, modules, sizes)
                self._bed.ready()
            except FAILURES as problem:
                self._broken[item.path] = problem
                raise
        return self._bed

    def _mark(self, item: pytest.Item) -> pytest.Mark | None:
        mark = item.get_closest_marker(self._kind.name)
        return mark if mark is not None and self._kind.runs_inside(mark) else None

    def _is_ours(self, item: pytest.Item) -> bool:
        return self._mark(item) is not None

    def _close(self) -> None:
        bed, self._bed = self._bed, None
        if bed is not None:
            bed.close()


def _prepare(prepare: Callable[[], object]) -> None:
    try:
        prepare()
    except Exception as problem:  # whatever it is, it is told as the failure of the test
        raise NotPrepared(f"outside, before the machine was booted: {problem}") from problem


def _failure(
    item: pytest.Item, phase: Literal["setup", "call", "teardown"], text: str | None, took_s: float
) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="passed" if text is None else "failed",
        longrepr=text,
        when=phase,
        duration=took_s,
    )


def configure(config: pytest.Config, bed: Bed) -> None:
    """Be the outer half, or inside the bed the inner one, or inside at a developer's prompt nothing at all."""
    here = os.environ.get(INSIDE)
    if here is None:
        config.pluginmanager.register(Outside(config, bed), f"understudy-{bed.name}-outside")
    elif here == bed.name and os.environ.pop(ORDERED, ""):
        config.pluginmanager.register(Inside(config, bed.inside()), f"understudy-{bed.name}-inside")
