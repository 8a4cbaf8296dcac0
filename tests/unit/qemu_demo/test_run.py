"""How the demo measures: what it takes for loss, suspicion, takeover and the first reply."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE
from typing import Any, cast

import pytest

from understudy_qemu.demo.chain import DiskCheck
from understudy_qemu.demo.lab import LabError
from understudy_qemu.demo.pair import Pair
from understudy_qemu.demo.result import DemoResult, Reply
from understudy_qemu.demo.run import DemoOptions, _Demo
from understudy_qemu.demo.talk import Talk

MS = 10**6
SOUND = DiskCheck(100, contiguous=True, acknowledged_lost=0, problems=())


class FakePair:
    """A pair whose standby takes over as told, without any process."""

    def __init__(self, rows: list[dict[str, Any]], checks: list[list[DiskCheck]]) -> None:
        self.rows = rows
        self.checks = checks
        self.lost_ns = 0

    async def lose(self, name: str) -> int:
        assert name == "alpha"
        self.lost_ns = time.monotonic_ns()
        return self.lost_ns

    def trace(self, name: str, start: int = 0) -> tuple[list[dict[str, Any]], int]:
        if name != "beta" or not self.lost_ns:
            return [], start
        rows = [{**row, "t_ns": self.lost_ns + row["t_ns"]} for row in self.rows]
        return rows[start:], len(rows)

    async def check_disks(self, name: str, talk: object) -> list[DiskCheck]:
        assert name == "beta"
        return self.checks.pop(0) if len(self.checks) > 1 else self.checks[0]


class FakeTalk:
    """A client whose replies are given in milliseconds after the loss."""

    def __init__(self, pair: FakePair, replies_ms: list[int], *, lost: bool = False) -> None:
        self.pair = pair
        self.replies_ms = replies_ms
        self.problems: list[str] = []
        self.lost_ns = 1 if lost else None

    @property
    def replies(self) -> list[Reply]:
        return [
            Reply(self.pair.lost_ns + ms * MS, MS, n, ok=True)
            for n, ms in enumerate(self.replies_ms, start=1)
        ]

    async def replies_after(self, t_ns: int, count: int, timeout_s: float) -> Reply:
        after = [reply for reply in self.replies if reply.t_ns > t_ns]
        if len(after) < count:
            raise TimeoutError("no replies")
        return after[0]


def state(ms: int, to: str) -> dict[str, Any]:
    return {"t_ns": ms * MS, "event": "state", "guest": "demo", "facts": {"to": to, "side": "secondary"}}


PROMOTED = {"t_ns": 1150 * MS, "event": "promoted", "guest": "demo", "facts": {}}
TAKEOVER = [
    state(-50, "standby"),
    state(1010, "suspect"),
    state(1060, "promoting"),
    state(1140, "alone"),
    PROMOTED,
]


async def lose(pair: FakePair, talk: FakeTalk) -> DemoResult:
    demo = _Demo(cast("Pair", pair), DemoOptions(alone_s=0.01), lambda _: None)
    await demo._lose("alpha", "beta", cast("Talk", talk))
    return demo.result


async def test_the_three_times_are_told_apart() -> None:
    pair = FakePair(TAKEOVER, [[SOUND]])
    # A reply that was under way when the host died is not the survivor's.
    result = await lose(pair, FakeTalk(pair, [-20, 3, 1300, 1320, 1340, 1360, 1380]))
    failover = result.failovers[0]
    assert (failover.detection_ms, failover.takeover_ms, failover.first_reply_ms) == (1010.0, 140.0, 1300.0)
    assert failover.passed
    assert [(mark.kind, mark.host) for mark in result.marks] == [
        ("kill", "alpha"),
        ("suspect", "beta"),
        ("running", "beta"),
    ]


async def test_a_lost_connection_and_lost_words_are_told() -> None:
    worse = DiskCheck(90, contiguous=False, acknowledged_lost=10, problems=("acknowledged word 91 is lost",))
    pair = FakePair(TAKEOVER, [[SOUND, worse]])
    demo = _Demo(cast("Pair", pair), DemoOptions(alone_s=0.01), lambda _: None)
    # The disks get time to settle, which a bad one uses up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("understudy_qemu.demo.run._SETTLE_S", 0.0)
        await demo._lose("alpha", "beta", cast("Talk", FakeTalk(pair, [*range(1300, 1400, 10)], lost=True)))
    failover = demo.result.failovers[0]
    assert not failover.connection_kept
    assert failover.acknowledged_lost == 10
    assert not failover.disk_contiguous
    assert demo.result.problems == ["acknowledged word 91 is lost"]


async def test_disks_may_settle() -> None:
    committing = DiskCheck(
        90, contiguous=True, acknowledged_lost=1, problems=("acknowledged word 91 is lost",)
    )
    pair = FakePair(TAKEOVER, [[committing], [SOUND]])
    result = await lose(pair, FakeTalk(pair, [*range(1300, 1400, 10)]))
    assert result.failovers[0].acknowledged_lost == 0


async def test_no_takeover_says_what_was_seen() -> None:
    pair = FakePair(TAKEOVER[:3], [[SOUND]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("understudy_qemu.demo.run._TAKEOVER_S", 0.05)
        with pytest.raises(LabError, match=r"beta did not take the guest over .*state"):
            await lose(pair, FakeTalk(pair, []))


async def spoken(*rows: dict[str, Any]) -> Talk:
    lines = "\n".join(json.dumps(row) for row in rows)
    return Talk(await asyncio.create_subprocess_exec(sys.executable, "-c", f"print({lines!r})", stdout=PIPE))


async def test_a_talk_is_read_from_the_client() -> None:
    greeting = {"id": 1, "slot": 0, "disks": 1, "blocks": 1024, "pages": 1024, "draw": 64}
    talk = await spoken(
        {"greeting": greeting},
        {"t_send_ns": 10, "t_reply_ns": 15, "wall_ns": 0, "n": 1, "ok": True, "hash": "aa"},
        {
            "t_send_ns": 20,
            "t_reply_ns": 29,
            "wall_ns": 0,
            "n": 2,
            "ok": False,
            "hash": "bb",
            "why": "word 2: hash",
        },
        {"lost": "gone", "t_ns": 40, "wall_ns": 0},
        {"summary": {"bad": 1}},
    )
    await talk.until(lambda: bool(talk.summary), 10)
    assert talk.greeting is not None
    assert talk.greeting.blocks == 1024
    assert talk.replies == [Reply(15, 5, 1, ok=True), Reply(29, 9, 2, ok=False)]
    assert talk.acknowledged == {1: "aa", 2: "bb"}
    assert talk.problems == ["word 2: hash", "gone"]
    assert talk.lost_ns == 40
    assert (await talk.replies_after(10, 2, 1)).t_ns == 15
    with pytest.raises(TimeoutError):
        await talk.replies_after(15, 2, 1)
    assert await talk.end() == {"bad": 1}


async def test_waiting_for_a_client_that_has_ended_ends() -> None:
    talk = await spoken({"summary": {"bad": 0}})
    with pytest.raises(TimeoutError, match="the client has ended"):
        await talk.until(lambda: talk.greeting is not None, 10)
    await talk.end()
