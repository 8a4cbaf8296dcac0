"""Policies that pace the checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from understudy.device import Mode
from understudy.errors import ConfigError
from understudy.interval import (
    Adaptive,
    AdaptiveOptions,
    Fixed,
    IntervalPolicy,
    Wins,
    make_adaptive,
    make_fixed,
)
from understudy.report import EpochReport


def report(pause_ms: float, acknowledge_ms: float = 0.0, length_ms: float = 50.0) -> EpochReport:
    return EpochReport(
        guest="web",
        session="s",
        mode=Mode.REMUS,
        epoch=1,
        wall_ns=0,
        length_ns=int(length_ms * 1e6),
        pause_ns=int(pause_ms * 1e6),
        acknowledge_ns=int(acknowledge_ms * 1e6),
        commit_ns=0,
        transferred_bytes=0,
        dirty_pages=0,
        held_packets=0,
        held_bytes=0,
    )


# --- fixed ---


def test_the_fixed_period_includes_the_pause() -> None:
    policy = Fixed(50)
    assert policy.next_ms(None) == 50
    assert policy.next_ms(report(20)) == 30
    assert policy.notice() == ""
    assert policy.next_ms(report(80)) == 5
    assert "do not fit into the period of 50 ms" in policy.notice()


@given(period_ms=st.floats(0.1, 1e5), pause_ms=st.floats(0, 1e6))
def test_the_fixed_policy_always_lets_the_guest_run(period_ms: float, pause_ms: float) -> None:
    assert period_ms / 10 <= Fixed(period_ms).next_ms(report(pause_ms)) <= period_ms


# --- adaptive ---

BOUNDS = st.builds(
    AdaptiveOptions,
    max_pause_share=st.floats(0.01, 0.9),
    max_latency_ms=st.floats(1, 5000),
    min_ms=st.floats(0.5, 20),
    max_ms=st.floats(20, 10000),
    wins=st.sampled_from(Wins),
    smoothing=st.floats(0.01, 1),
)
EPOCHS = st.lists(st.tuples(st.floats(0, 2000), st.floats(0, 2000)), min_size=1, max_size=20)


def kept(
    bounds: AdaptiveOptions, next_ms: float, pause_ms: float, acknowledge_ms: float
) -> tuple[bool, bool]:
    slack = 1 + 1e-4  # a report has whole nanoseconds
    share = pause_ms / (next_ms + pause_ms) <= bounds.max_pause_share * slack
    return share, next_ms + acknowledge_ms <= bounds.max_latency_ms * slack


@given(bounds=BOUNDS, epochs=EPOCHS)
def test_both_bounds_are_kept_whenever_they_can_be(
    bounds: AdaptiveOptions, epochs: list[tuple[float, float]]
) -> None:
    policy = Adaptive(bounds)
    worst_pause_ms = worst_acknowledge_ms = 0.0
    for pause_ms, extra_ms in epochs:
        next_ms = policy.next_ms(report(pause_ms, pause_ms + extra_ms))
        worst_pause_ms = max(worst_pause_ms, pause_ms)
        worst_acknowledge_ms = max(worst_acknowledge_ms, pause_ms + extra_ms)
        assert bounds.min_ms <= next_ms <= bounds.max_ms
        at_least_ms = worst_pause_ms / bounds.max_pause_share - worst_pause_ms
        at_most_ms = bounds.max_latency_ms - worst_acknowledge_ms
        if at_least_ms <= bounds.max_ms and at_most_ms >= bounds.min_ms and at_least_ms <= at_most_ms:
            # Room for the worst epoch so far, hence for what is expected now.
            assert kept(bounds, next_ms, pause_ms, pause_ms + extra_ms) == (True, True)
            assert policy.notice() == ""


@given(
    wins=st.sampled_from(Wins),
    kept_ms=st.floats(1, 5000),
    apart=st.floats(1.01, 100),
    shortest=st.floats(0.1, 0.99),
    longest=st.floats(1.01, 10),
    pause_ms=st.floats(0.1, 2000),
    extra_ms=st.floats(0, 2000),
)
def test_when_both_cannot_be_kept_the_named_one_is_and_the_other_is_told(
    wins: Wins,
    kept_ms: float,
    apart: float,
    shortest: float,
    longest: float,
    pause_ms: float,
    extra_ms: float,
) -> None:
    # The bound that wins asks for `kept_ms`, and the other one is out of its reach.
    at_least_ms = kept_ms * apart if wins is Wins.LATENCY else kept_ms
    at_most_ms = kept_ms if wins is Wins.LATENCY else kept_ms / apart
    bounds = AdaptiveOptions(
        max_pause_share=pause_ms / (at_least_ms + pause_ms),
        max_latency_ms=at_most_ms + pause_ms + extra_ms,
        min_ms=kept_ms * shortest,
        max_ms=kept_ms * longest,
        wins=wins,
    )
    policy = Adaptive(bounds)
    next_ms = policy.next_ms(report(pause_ms, pause_ms + extra_ms))
    share, latency = kept(bounds, next_ms, pause_ms, pause_ms + extra_ms)
    if bounds.wins is Wins.LATENCY:
        assert latency
        assert "stands still" in policy.notice()
    else:
        assert share
        assert "output waits" in policy.notice()


@given(
    share=st.floats(0.02, 0.5),
    dirty_ms_per_ms=st.floats(0.0, 0.01),
    fixed_pause_ms=st.floats(0.1, 5),
    link_ms=st.floats(0, 20),
)
def test_it_settles_within_the_bounds_when_the_pause_grows_with_the_epoch(
    share: float, dirty_ms_per_ms: float, fixed_pause_ms: float, link_ms: float
) -> None:
    # A guest whose pause has a fixed part and one that grows with the time it ran: the loop must not oscillate out.
    bounds = AdaptiveOptions(max_pause_share=share, max_latency_ms=400, min_ms=1, max_ms=1000)
    policy = Adaptive(bounds)
    running_ms = policy.next_ms(None)
    for _ in range(60):
        pause_ms = fixed_pause_ms + dirty_ms_per_ms * running_ms
        running_ms = policy.next_ms(report(pause_ms, pause_ms + link_ms, running_ms))
    pause_ms = fixed_pause_ms + dirty_ms_per_ms * running_ms
    at_least_ms = pause_ms / share - pause_ms
    assume(at_least_ms < 0.5 * (400 - pause_ms - link_ms))
    assert kept(bounds, running_ms, pause_ms, pause_ms + link_ms) == (True, True)


def test_it_answers_a_burst_at_once_and_forgets_it_slowly() -> None:
    policy = Adaptive(AdaptiveOptions(max_pause_share=0.2, max_latency_ms=500, max_ms=1000, min_ms=1))
    quiet = policy.next_ms(report(1, 2))
    burst = policy.next_ms(report(30, 35))
    assert burst > 2 * quiet
    after = [policy.next_ms(report(1, 2)) for _ in range(30)]
    assert burst > after[0] > after[5] > after[29]
    assert after[29] == pytest.approx(quiet, rel=0.05)


def test_an_idle_guest_gets_the_shortest_epochs() -> None:
    policy = Adaptive()
    assert policy.next_ms(None) == policy.options.min_ms
    assert policy.next_ms(report(0, 1)) == policy.options.min_ms


# --- options ---


@pytest.mark.parametrize(
    ("make", "table", "message"),
    [
        (make_fixed, {"period_ms": 0}, "period_ms is 0.0"),
        (make_fixed, {"period": 5}, "did you mean period_ms"),
        (make_adaptive, {"max_pause_share": 1.0}, "between 0 and 1"),
        (make_adaptive, {"smoothing": 0}, "smoothing"),
        (make_adaptive, {"min_ms": 50, "max_ms": 5}, r"min_ms \(50\) is above max_ms \(5\)"),
        (make_adaptive, {"max_latency_ms": float("inf")}, "max_latency_ms"),
        (make_adaptive, {"max_latency_ms": float("nan")}, "max_latency_ms"),
        (make_adaptive, {"wins": "both"}, "'latency', 'pause'"),
    ],
)
def test_wrong_options_are_refused(make: Any, table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(table)


def test_options_from_the_guest_file() -> None:
    assert make_fixed({"period_ms": 25}).period_ms == 25
    assert make_adaptive({"wins": "pause", "max_ms": 99}).options == AdaptiveOptions(
        wins=Wins.PAUSE, max_ms=99
    )


def test_a_policy_must_decide() -> None:
    with pytest.raises(NotImplementedError):
        IntervalPolicy().next_ms(None)
    assert IntervalPolicy().notice() == ""
