"""What the demo measured: its JSON, its table, its page, and the trace it is read from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType

import pytest

from understudy.device import Mode
from understudy.report import EpochReport
from understudy_qemu.demo.page import render
from understudy_qemu.demo.result import DemoResult, Epoch, Failover, Mark, Reply, Segment, percentile
from understudy_qemu.demo.trace import TRACE_VARIABLE, Trace

S = 10**9
GOOD = Failover(1091.2, 103.4, 1450.1, connection_kept=True, acknowledged_lost=0, disk_contiguous=True)


def sample() -> DemoResult:
    begin = 5000 * S
    return DemoResult(
        hypervisor="QEMU 7.2.22",
        failovers=[GOOD, replace(GOOD, detection_ms=1001.0)],
        epochs=[
            Epoch(begin + n * S // 10, "alpha", n, (5 + n % 7) * 10**6, 50 * 10**6, 10**6)
            for n in range(10, 90)
        ],
        replies=[Reply(begin + n * S // 10, 30 * 10**6, n, ok=True) for n in range(1, 200)],
        marks=[
            Mark(begin + S, "protected", "alpha", "protected"),
            Mark(begin + 9 * S, "kill", "alpha", "alpha killed"),
            Mark(begin + 10 * S, "running", "beta", "beta runs the guest"),
            Mark(begin + 18 * S, "kill", "beta", "beta killed"),
        ],
        segments=[
            Segment(begin, begin + S, "alpha", protected=False),
            Segment(begin + S, begin + 9 * S, "alpha", protected=True),
            Segment(begin + 10 * S, begin + 18 * S, "beta", protected=True),
        ],
        client={"acknowledged": 199, "bad": 0},
        duration_s=20.0,
    )


def test_the_json_is_what_the_documentation_says() -> None:
    answer = json.loads(json.dumps(sample().to_json()))
    assert set(answer) == {"failovers", "checkpoints", "pause_ms"}
    assert set(answer["pause_ms"]) == {"p50", "p99"}
    assert answer["checkpoints"] == 80
    assert answer["failovers"][0] == {
        "detection_ms": 1091.2,
        "takeover_ms": 103.4,
        "first_reply_ms": 1450.1,
        "connection_kept": True,
        "acknowledged_lost": 0,
        "disk_contiguous": True,
    }


def test_a_demo_of_nothing_has_json_and_a_page_too() -> None:
    empty = DemoResult(problems=["the guest did not boot"])
    assert empty.to_json() == {"failovers": [], "checkpoints": 0, "pause_ms": {"p50": None, "p99": None}}
    assert not empty.passed
    page = render(empty)
    assert "did not succeed" in page
    assert "the guest did not boot" in page


@pytest.mark.parametrize(
    "change",
    [
        {"connection_kept": False},
        {"acknowledged_lost": 1},
        {"disk_contiguous": False},
        {"first_reply_ms": None},
    ],
)
def test_any_defect_of_one_failover_fails_the_demo(change: Mapping[str, object]) -> None:
    assert sample().passed
    result = sample()
    result.failovers[1] = replace(result.failovers[1], **change)  # type: ignore[arg-type]
    assert not result.passed


def test_wrong_replies_problems_or_a_missing_failover_fail_the_demo() -> None:
    spoils: list[dict[str, object]] = [
        {"client": {"bad": 1}},
        {"problems": ["x"]},
        {"failovers": [GOOD]},
        {"client": {}},
    ]
    for spoil in spoils:
        result = sample()
        for name, value in spoil.items():
            setattr(result, name, value)
        assert not result.passed


def test_percentiles_are_measured_values() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert percentile([4, 1, 3, 2], 50) == 2
    assert percentile(range(1, 101), 99) == 99


class Page(HTMLParser):
    """Notes what a page refers to, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.circles = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [
            value or "" for name, value in attrs if name in {"src", "href", "srcset", "action"}
        ]
        self.circles += tag == "circle"
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.circles += tag == "circle"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_well_formed() -> None:
    page = render(sample())
    parser = Page()
    parser.feed(page)
    assert parser.open == []
    assert parser.references == []
    assert "http" not in page
    assert "@import" not in page
    assert "$" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    assert "Both hosts died. The client never noticed." in page


def test_the_page_draws_every_reply_and_checkpoint() -> None:
    result = sample()
    parser = Page()
    parser.feed(render(result))
    assert parser.circles == len(result.replies) + len(result.epochs)


def test_the_page_draws_inside_its_frame() -> None:
    page = render(sample())
    xs = [float(x) for x in re.findall(r'<circle[^>]* cx="([0-9.-]+)"', page)]
    ys = [float(y) for y in re.findall(r'<circle[^>]* cy="([0-9.-]+)"', page)]
    box = re.search(r'viewBox="0 0 (\d+) (\d+)"', page)
    assert box is not None
    assert min(xs) >= 0
    assert max(xs) <= int(box[1])
    assert min(ys) >= 0
    assert max(ys) <= int(box[2])


def test_words_in_the_page_cannot_become_markup() -> None:
    result = sample()
    result.problems = ["<script>alert(1)</script>"]
    result.marks.append(Mark(5001 * S, "back", "alpha", "</svg><b>"))
    page = render(result)
    assert "<script>alert" not in page
    assert "</svg><b>" not in page


def report(epoch: int) -> EpochReport:
    return EpochReport(
        guest="demo",
        session="s",
        mode=Mode.REMUS,
        epoch=epoch,
        wall_ns=1,
        length_ns=2,
        pause_ns=3,
        acknowledge_ns=4,
        commit_ns=5,
        transferred_bytes=6,
        dirty_pages=7,
        held_packets=8,
        held_bytes=9,
        phases_ns=MappingProxyType({"postsuspend": 1}),
    )


def test_the_trace_writes_whole_lines_at_once(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "trace"))
    trace.epoch(report(17))
    trace.event("demo", "state", MappingProxyType({"to": "suspect", "mode": Mode.COLO, "n": 1}))
    # Read while the file is open: an agent that is killed closes nothing.
    first, second = map(json.loads, (tmp_path / "trace").read_text(encoding="utf-8").splitlines())
    assert first["t_ns"] <= second["t_ns"]
    assert (first["epoch"]["epoch"], first["epoch"]["pause_ns"], first["epoch"]["mode"]) == (17, 3, "remus")
    assert first["epoch"]["phases_ns"] == {"postsuspend": 1}
    assert (second["event"], second["guest"]) == ("state", "demo")
    assert second["facts"] == {"to": "suspect", "mode": "colo", "n": 1}
    trace.close()


def test_without_a_file_the_trace_does_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(TRACE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    trace = Trace()
    trace.epoch(report(1))
    trace.event("demo", "state", {})
    trace.close()
    assert not list(tmp_path.iterdir())


def test_the_environment_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TRACE_VARIABLE, str(tmp_path / "named"))
    trace = Trace()
    trace.epoch(report(1))
    trace.close()
    assert (tmp_path / "named").exists()
