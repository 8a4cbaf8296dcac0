"""``understudy demo``, whole: two real guests' lives, two dead hosts, one client that never notices."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from tests.testbeds.bed import missing_for_qemu, need

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

LIMIT_S = 170.0


async def demo(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "understudy", "demo", *arguments, stdout=PIPE, stderr=PIPE
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(), err.decode()


def left_over() -> set[str]:
    files = {str(path) for path in Path("/var/tmp").glob("understudy-demo-*")}  # noqa: S108 - the demo's own place
    return files | {name for _, name in socket.if_nameindex()}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("mode", "checkpoints"), [("remus", 20), ("colo", 1)])
async def test_both_hosts_die_and_the_client_never_notices(
    mode: str, checkpoints: int, tmp_path: Path
) -> None:
    need("qemu", missing_for_qemu())
    before = left_over()
    page = tmp_path / "page.html"
    options = ["--mode", mode, "--disks", "2", "--nics", "2", "--seconds", "5"]
    code, out, err = await demo("--format", "json", "--page", str(page), *options)
    assert code == 0, err
    answer = json.loads(out)
    assert set(answer) == {"failovers", "checkpoints", "pause_ms"}
    assert len(answer["failovers"]) == 2
    for failover in answer["failovers"]:
        assert failover["connection_kept"] is True
        assert failover["acknowledged_lost"] == 0
        assert failover["disk_contiguous"] is True
        # The heartbeat's limit is 1000 ms, counted from the last beat.
        assert 500 < failover["detection_ms"] < 5000
        assert 0 < failover["takeover_ms"] < 5000
        assert failover["first_reply_ms"] > failover["detection_ms"]
    assert answer["checkpoints"] >= checkpoints
    assert 0 < answer["pause_ms"]["p50"] <= answer["pause_ms"]["p99"]
    assert "The client never noticed." in page.read_text(encoding="utf-8")
    assert left_over() == before


@pytest.mark.timeout(120)
async def test_called_off_it_leaves_nothing(tmp_path: Path) -> None:
    need("qemu", missing_for_qemu())
    before = left_over()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "understudy", "demo", "--page", str(tmp_path / "page.html")),
        stdout=PIPE,
        stderr=PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        async for line in process.stdout:
            if b"protecting" in line:
                break
    process.send_signal(2)
    async with asyncio.timeout(60):
        _, err = await process.communicate()
    assert process.returncode == 1
    assert b"called off" in err
    assert b"Traceback" not in err
    assert left_over() == before
    assert not (tmp_path / "page.html").exists()
