"""Observers never make a guest wait."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from tests.unit.test_interval import report
from understudy.observers import ObserverFeed
from understudy.report import EpochReport, Observer


class Recorder(Observer):
    def __init__(self) -> None:
        self.seen: list[object] = []
        self.threads: set[str] = set()
        self.told = threading.Semaphore(0)

    def epoch(self, report: EpochReport) -> None:
        self.threads.add(threading.current_thread().name)
        self.seen.append(report)
        self.told.release()

    def event(self, guest: str, name: str, facts: Mapping[str, object]) -> None:
        self.seen.append((guest, name, facts))
        self.told.release()


class Stuck(Observer):
    """Hangs in its first report until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def epoch(self, report: EpochReport) -> None:
        self.entered.set()
        self.let_go.wait()


class Fails(Recorder):
    def epoch(self, report: EpochReport) -> None:
        super().epoch(report)
        raise ValueError("no room on the disk")


def test_everything_is_told_in_order_in_a_thread_of_its_own() -> None:
    recorder = Recorder()
    feed = ObserverFeed([("recorder", recorder)])
    reports = [report(n) for n in range(100)]
    for each in reports:
        feed.epoch(each)
    feed.event("web", "failover", {"host": "beta"})
    assert feed.close() == ()
    assert recorder.seen == [*reports, ("web", "failover", {"host": "beta"})]
    assert recorder.threads == {"observer-recorder"}
    assert feed.dropped == {"recorder": 0}


def test_one_that_hangs_delays_nobody_and_its_losses_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    stuck, recorder = Stuck(), Recorder()
    feed = ObserverFeed([("stuck", stuck), ("recorder", recorder)], limit=10)
    feed.epoch(report(1))
    assert stuck.entered.wait(5)
    assert recorder.told.acquire(timeout=5)
    for n in range(15):
        feed.event("web", "e", {"n": n})
        assert recorder.told.acquire(timeout=5)  # the quick one keeps up all the while
    assert feed.dropped["stuck"] == 5
    assert feed.dropped["recorder"] == 0
    assert "observer stuck is too slow" in caplog.text
    assert caplog.text.count("too slow") == 1
    assert feed.close(timeout_s=0.05) == ("stuck",)
    assert len(recorder.seen) == 16
    stuck.let_go.set()
    assert feed.close(timeout_s=5) == ()


def test_one_that_raises_is_logged_by_name_and_told_the_next_report(caplog: pytest.LogCaptureFixture) -> None:
    fails, recorder = Fails(), Recorder()
    feed = ObserverFeed([("prometheus", fails), ("recorder", recorder)])
    feed.epoch(report(1))
    feed.epoch(report(2))
    feed.close()
    assert len(fails.seen) == len(recorder.seen) == 2
    assert feed.failed == {"prometheus": 2, "recorder": 0}
    assert "observer prometheus failed: ValueError: no room on the disk" in caplog.text


def test_without_observers_there_are_no_threads() -> None:
    before = threading.active_count()
    feed = ObserverFeed([])
    feed.epoch(report(1))
    unused = ObserverFeed([("idle", Recorder())])
    assert threading.active_count() == before
    assert (feed.close(), unused.close()) == ((), ())
    unused.epoch(report(1))
    assert threading.active_count() == before


def test_an_observer_may_leave_both_methods_alone() -> None:
    feed = ObserverFeed([("nothing", Observer())])
    feed.epoch(report(1))
    feed.event("web", "e", {})
    assert feed.close() == ()
    assert feed.failed == {"nothing": 0}
