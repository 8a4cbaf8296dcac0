"""Draw a demo's result as one self-contained page: no network, no libraries, readable without scripts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from understudy_qemu.demo.result import DemoResult, percentile

__all__ = ["render"]

_WIDTH, _LEFT, _RIGHT = 1140, 64, 1126
_LABELS, _BAND, _GAP = 76, 22, 40
_RTT, _PAUSE, _RATE = 190, 150, 96
_CROWD = 60  # more points than this are drawn smaller


def render(result: DemoResult) -> str:
    """Return the page as HTML.

    Args:
        result: of a demo, also one that failed half-way; what is missing is left out.
    """
    chart = _Chart(result)
    page = Template((files("understudy_qemu.demo") / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        headline=_headline(result),
        lead=escape(_lead(result)),
        tiles=_tiles(result),
        chart=chart.svg(),
        table=_table(result.rows()),
        explanation=_explanation(result),
        seconds=_table(_seconds(result, chart.start_ns)),
        # "</" would end the script element.
        data=json.dumps(chart.data()).replace("</", "<\\/"),
    )


# --- Words ------------------------------------------------------------------------------------------


def _headline(result: DemoResult) -> str:
    if result.passed:
        return "Both hosts died. The client never noticed."
    return "The demo did not succeed"


def _lead(result: DemoResult) -> str:
    disks = f"{result.disks} disk{'s' * (result.disks != 1)}"
    nics = f"{result.nics} interface{'s' * (result.nics != 1)}"
    text = f"{result.hypervisor or 'QEMU'}, mode {result.mode}, a guest with {disks} and {nics}, "
    text += f"{result.duration_s:.0f} seconds in all."
    return " ".join([text, *result.problems])


def _tiles(result: DemoResult) -> str:
    rtt = percentile([r.rtt_ns / 1e6 for r in result.replies if _protected_at(result, r.t_ns)], 50)
    pause = result.pause_ms
    tiles = [
        (_ms(failover.first_reply_ms), f"from the loss of {host} to the client's next reply", failover.passed)
        for failover, host in zip(result.failovers, _lost_hosts(result), strict=False)
    ]
    lost = sum(failover.acknowledged_lost for failover in result.failovers)
    words = result.client.get("acknowledged", len(result.replies))
    tiles += [
        (f"{lost} of {words}", "acknowledged words lost", lost == 0),
        (str(len(result.epochs)), "checkpoints", True),
        (f"{_ms(pause['p50'])} · {_ms(pause['p99'])}", "pause per checkpoint, p50 · p99", True),
        (_ms(rtt), "client's round trip while protected, median", True),
    ]
    return "".join(
        f'<div class="tile"><b{"" if good else " class=no"}>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text, good in tiles
    )


def _protected_at(result: DemoResult, t_ns: int) -> bool:
    return any(s.protected and s.start_ns <= t_ns < s.end_ns for s in result.segments)


def _lost_hosts(result: DemoResult) -> list[str]:
    return [mark.host for mark in result.marks if mark.kind == "kill"]


def _ms(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"  # noqa: PLR2004


def _explanation(result: DemoResult) -> str:
    held = (
        "Its replies are held until the other host has acknowledged the checkpoint that explains them, so a round "
        "trip takes about one interval."
        if result.mode == "remus"
        else "Both copies of the guest run and their replies are compared; a difference costs a checkpoint."
    )
    return (
        "<p>A client keeps one TCP connection to the guest. Every reply carries a running hash over all the client "
        "sent, over random values that the guest draws, over a table in its memory and over what it reads back from "
        f"its disks; the client computes the same and would see one stale page or sector. {held}</p>"
        "<p>At each red line the cable of the host that runs the guest is cut without a sign and everything on "
        "that host is killed. The other host suspects, asks the arbiter, and goes on from the last checkpoint. The "
        "dead host comes back, cleans up, and becomes the guest's second copy in its turn.</p>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in body)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def _seconds(result: DemoResult, start_ns: int) -> list[tuple[str, ...]]:
    rtts: dict[int, list[float]] = defaultdict(list)
    pauses: dict[int, list[float]] = defaultdict(list)
    for reply in result.replies:
        rtts[(reply.t_ns - start_ns) // 10**9].append(reply.rtt_ns / 1e6)
    for epoch in result.epochs:
        pauses[(epoch.t_ns - start_ns) // 10**9].append(epoch.pause_ns / 1e6)
    rows: list[tuple[str, ...]] = [
        ("second", "replies", "round trip p50 (ms)", "max", "checkpoints", "pause p50 (ms)", "max")
    ]
    for second in sorted(rtts.keys() | pauses.keys()):
        rtt, pause = rtts[second], pauses[second]
        rows.append((str(second), str(len(rtt)), *_summary(rtt), str(len(pause)), *_summary(pause)))
    return rows


def _summary(values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "", ""
    return f"{percentile(values, 50):.1f}", f"{max(values):.1f}"


# --- The chart ----------------------------------------------------------------------------------------


class _Chart:
    # Four panels above one time axis: who runs the guest, round trips, pauses, rate.
    def __init__(self, result: DemoResult) -> None:
        self.result = result
        times = (
            [r.t_ns for r in result.replies]
            + [e.t_ns for e in result.epochs]
            + [m.t_ns for m in result.marks]
        )
        self.start_ns = min(times, default=0)
        self.span_ns = max(max(times, default=0) - self.start_ns, 10**9)
        self.band = _LABELS
        self.rtt = self.band + _BAND + _GAP
        self.pause = self.rtt + _RTT + _GAP
        self.rate = self.pause + _PAUSE + _GAP
        self.bottom = self.rate + _RATE
        self.out: list[str] = []

    def data(self) -> dict[str, object]:
        # Thinned for the reader's sake only in digits: every point is there.
        replies = [[self._seconds(r.t_ns), round(r.rtt_ns / 1e6, 2)] for r in self.result.replies]
        epochs = [[self._seconds(e.t_ns), round(e.pause_ns / 1e6, 2), e.number] for e in self.result.epochs]
        geometry = {"width": _WIDTH, "left": _LEFT, "right": _RIGHT, "span": self.span_ns / 1e9}
        return {**geometry, "replies": replies, "epochs": epochs}

    def svg(self) -> str:
        self._time_axis()
        self._marks()
        self._bands()
        self._log_panel(
            self.rtt,
            _RTT,
            "client's round trip (ms)",
            [
                (r.t_ns, r.rtt_ns / 1e6, "bad" if not r.ok else self._host_at(r.t_ns))
                for r in self.result.replies
            ],
        )
        self._log_panel(
            self.pause,
            _PAUSE,
            "guest paused per checkpoint (ms)",
            [(e.t_ns, e.pause_ns / 1e6, e.host) for e in self.result.epochs],
        )
        self._rate_panel()
        self.out.append(f'<line id="cursor" x1="0" x2="0" y1="{self.band}" y2="{self.bottom}"/>')
        label = "Round trips, pauses and checkpoint rate over time"
        head = f'<svg viewBox="0 0 {_WIDTH} {self.bottom + 34}" role="img" aria-label="{label}">'
        return f"{head}{''.join(self.out)}</svg>"

    def _seconds(self, t_ns: int) -> float:
        return round((t_ns - self.start_ns) / 1e9, 3)

    def _x(self, t_ns: float) -> float:
        return round(_LEFT + (t_ns - self.start_ns) / self.span_ns * (_RIGHT - _LEFT), 1)

    def _host_at(self, t_ns: int) -> str:
        return next((s.host for s in reversed(self.result.segments) if s.start_ns <= t_ns), "alpha")

    def _line(self, css: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.out.append(f'<line class="{css}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def _text(self, x: float, y: float, text: str, *, css: str = "", anchor: str = "start") -> None:
        shown = escape(text)
        self.out.append(f'<text x="{x}" y="{y}" class="{css}" text-anchor="{anchor}">{shown}</text>')

    def _time_axis(self) -> None:
        seconds = self.span_ns / 1e9
        step = next((s for s in (1, 2, 5, 10, 20, 50) if seconds / s <= 14), 100)  # noqa: PLR2004
        for tick in range(0, int(seconds) + 1, step):
            x = self._x(self.start_ns + tick * 10**9)
            self._line("grid", x, self.rtt, x, self.bottom)
            self._text(x, self.bottom + 18, f"{tick} s", anchor="middle")

    def _bands(self) -> None:
        for segment in self.result.segments:
            x, end = self._x(segment.start_ns), self._x(segment.end_ns)
            css = segment.host if segment.protected else f"{segment.host} bare"
            width = max(1.0, round(end - x - 1, 1))
            title = f"{segment.host}, {'protected' if segment.protected else 'alone'}"
            self.out.append(
                f'<rect class="{css}" x="{x}" y="{self.band}" width="{width}" height="{_BAND}" rx="2">'
                f"<title>{title}</title></rect>"
            )
            if segment.protected and width > 130:  # noqa: PLR2004 - room for the words
                self._text(
                    x + width / 2, self.band + 15, f"{segment.host}, protected", css="band", anchor="middle"
                )
        self._text(_LEFT - 8, self.band + 15, "guest on", anchor="end")

    def _log_panel(self, top: int, height: int, title: str, points: Sequence[tuple[int, float, str]]) -> None:
        self._text(_LEFT, top - 10, title, css="title")
        values = [value for _, value, _ in points] or [1.0]
        low = math.floor(math.log10(max(min(values), 0.1)))
        high = max(math.ceil(math.log10(max(values))), low + 1)
        for power in range(low, high + 1):
            y = round(top + height - (power - low) / (high - low) * height, 1)
            self._line("axis" if power == low else "grid", _LEFT, y, _RIGHT, y)
            self._text(_LEFT - 8, y + 4, f"{10.0**power:g}", anchor="end")
        radius = 2.2 if len(points) > _CROWD else 4
        for t_ns, value, css in points:
            y = top + height - (math.log10(max(value, 10.0**low)) - low) / (high - low) * height
            self.out.append(f'<circle class="dot {css}" cx="{self._x(t_ns)}" cy="{y:.1f}" r="{radius}"/>')

    def _rate_panel(self) -> None:
        self._text(_LEFT, self.rate - 10, "checkpoints per second", css="title")
        counts: dict[tuple[int, str], int] = defaultdict(int)
        for epoch in self.result.epochs:
            counts[(epoch.t_ns - self.start_ns) // 10**9, epoch.host] += 1
        top = _ceiling(max(counts.values(), default=1))
        for share in (0.0, 0.5, 1.0):
            y = round(self.rate + _RATE * (1 - share), 1)
            self._line("axis" if share == 0 else "grid", _LEFT, y, _RIGHT, y)
            self._text(_LEFT - 8, y + 4, f"{top * share:g}", anchor="end")
        width = max(1.0, round((_RIGHT - _LEFT) / (self.span_ns / 1e9) - 2, 1))
        for (second, host), count in counts.items():
            x = self._x(self.start_ns + second * 10**9)
            bar = round(count / top * _RATE, 1)
            room = min(width, _RIGHT - x)
            self.out.append(
                f'<rect class="{host}" x="{x + 1}" y="{self.rate + _RATE - bar:.1f}" '
                f'width="{room}" height="{bar}" rx="1"/>'
            )

    def _marks(self) -> None:
        # Labels stand in three lines, each where the one before it has ended. A suspicion is followed by the
        # takeover within a hair's breadth, which has the label.
        ends = [0.0, 0.0, 0.0]
        shown = [mark for mark in self.result.marks if mark.kind != "suspect"]
        for mark in sorted(shown, key=lambda mark: mark.t_ns):
            x = self._x(mark.t_ns)
            css = "kill" if mark.kind == "kill" else ""
            width = 6.6 * len(mark.text) + 8
            anchor, begin = ("end", x - width) if x + width > _RIGHT else ("start", x)
            row = min(
                range(3), key=lambda line: (ends[line] > begin, line if ends[line] <= begin else ends[line])
            )
            ends[row] = begin + width
            y = 14 + 20 * row
            self._line(f"mark {css}", x, y - 8, x, self.bottom)
            self._text(x + (4 if anchor == "start" else -4), y, mark.text, css=f"label {css}", anchor=anchor)


def _ceiling(value: int) -> int:
    steps: Iterable[int] = (2, 4, 6, 10, 20, 30, 40, 60, 80, 100, 150, 200)
    return next((step for step in steps if step >= value), value)
