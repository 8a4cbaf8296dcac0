"""The small parts of the agent: control socket, history, figures, log lines, the service manager."""

import asyncio
import json
import logging
import os
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from understudy.agent.control import Call, ControlServer
from understudy.agent.faults import describe, finding_of, finding_row
from understudy.agent.figures import Figures, percentile
from understudy.agent.history import History
from understudy.agent.logs import _Formatter
from understudy.agent.systemd import notify
from understudy.device import Finding, Mode, Severity
from understudy.errors import ConfigError, DeviceError, PreflightFailed, StateError
from understudy.report import EpochReport


async def answer(call: Call) -> Any:
    match call.method:
        case "echo":
            return dict(call.params)
        case "fail":
            raise StateError("not now")
        case "crash":
            raise KeyError("x")
        case "copy":
            for step in range(3):
                call.progress("disk0", step, 3)
            call.note("nearly")
            return "done"
    raise StateError("unknown")


async def ask(path: Path, line: bytes) -> list[dict[str, Any]]:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(line)
    lines = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return [json.loads(each) for each in lines.splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "agent.sock"


async def test_requests_and_answers(path: Path) -> None:
    server = ControlServer(path, answer)
    await server.start()
    try:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600  # noqa: PTH116 - it is a local socket
        assert await ask(path, b'{"method":"echo","params":{"a":1}}\n') == [{"result": {"a": 1}}]
        assert (await ask(path, b'{"method":"fail"}\n'))[0]["error"] == {
            "kind": "StateError",
            "message": "not now",
        }
        assert "KeyError" in (await ask(path, b'{"method":"crash"}\n'))[0]["error"]["message"]
        lines = await ask(path, b'{"method":"copy"}\n')
        assert lines[0] == {"progress": {"what": "disk0", "done_bytes": 0, "total_bytes": 3}}
        assert lines[-2:] == [{"note": "nearly"}, {"result": "done"}]
    finally:
        await server.close()
    assert not os.path.exists(path)  # noqa: ASYNC240, PTH110 - as above


@pytest.mark.parametrize(
    "garbage", [b"\n", b"GET /\n", b"[]\n", b'{"method":1}\n', b'{"method":"x","params":[]}\n']
)
async def test_garbage_is_no_request(path: Path, garbage: bytes) -> None:
    server = ControlServer(path, answer)
    await server.start()
    try:
        assert "no request" in (await ask(path, garbage))[0]["error"]["message"]
        assert await ask(path, b'{"method":"echo"}\n') == [{"result": {}}]
    finally:
        await server.close()


async def test_a_line_without_end_is_refused(path: Path) -> None:
    server = ControlServer(path, answer)
    await server.start()
    try:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"x" * (3 << 20))
        # It ends; whether the words still arrive is up to the kernel, which drops what nobody read.
        with suppress(ConnectionError):
            assert b"result" not in await asyncio.wait_for(reader.read(), 5)
        writer.close()
        assert await ask(path, b'{"method":"echo"}\n') == [{"result": {}}]
    finally:
        await server.close()


@pytest.mark.parametrize("how", ["half-close", "disappear"])
async def test_a_client_that_goes_away_cancels_its_request(path: Path, how: str) -> None:
    begun, undone = asyncio.Event(), asyncio.Event()

    async def slow(call: Call) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            undone.set()

    server = ControlServer(path, slow)
    await server.start()
    try:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"method":"slow"}\n')
        await asyncio.wait_for(begun.wait(), 5)
        if how == "half-close":
            writer.write_eof()
            line = json.loads(await asyncio.wait_for(reader.readline(), 5))
            assert line["error"]["kind"] == "Cancelled"
            assert undone.is_set()  # told only when it is undone
        writer.close()
        await asyncio.wait_for(undone.wait(), 5)
    finally:
        await server.close()


async def test_a_socket_that_a_dead_agent_left_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = ControlServer(path, answer)
    await server.start()
    with pytest.raises(StateError, match="another agent is running"):
        await ControlServer(path, answer).start()
    assert await ask(path, b'{"method":"echo"}\n') == [{"result": {}}]
    await server.close()


# --- History ---------------------------------------------------------------------------------------------------------


def test_history_is_kept_in_order_and_survives_a_cut_line(tmp_path: Path) -> None:
    history = History(tmp_path / "history", "alpha")
    for number in range(5):
        history.add("web", "state", {"to": number}, durable=number == 4)
    with (tmp_path / "history/web.jsonl").open("ab") as file:
        file.write(b'{"time": "20')
    assert [event["to"] for event in history.read("web")] == [0, 1, 2, 3, 4]
    last = history.read("web", 1)[0]
    assert (last["event"], last["host"], last["guest"]) == ("state", "alpha", "web")
    assert last["time"].endswith("+00:00")
    assert history.read("other") == []


def test_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("understudy.agent.history.LIMIT_BYTES", 2000)
    history = History(tmp_path, "alpha")
    for number in range(200):
        history.add("web", "n", {"n": number})
    kept = [event["n"] for event in history.read("web")]
    assert kept[-1] == 199
    assert kept == list(range(kept[0], 200))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 6000


def test_a_history_that_cannot_be_written_is_logged_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    History(tmp_path / "file", "alpha").add("web", "state", {})
    assert "cannot be written" in caplog.text


# --- Figures ---------------------------------------------------------------------------------------------------------


def report(epoch: int, pause_ms: int) -> EpochReport:
    return EpochReport(
        guest="web",
        session="s",
        mode=Mode.REMUS,
        epoch=epoch,
        wall_ns=epoch * 100_000_000,
        length_ns=0,
        pause_ns=pause_ms * 1_000_000,
        acknowledge_ns=2_000_000,
        commit_ns=0,
        transferred_bytes=5,
        dirty_pages=0,
        held_packets=7,
        held_bytes=0,
    )


def test_figures_of_the_last_epochs() -> None:
    figures = Figures()
    assert figures.row("web", 0) == {}
    for epoch in range(1, 101):
        figures.epoch(report(epoch, epoch))
    row = figures.row("web", 100 * 100_000_000 + 1_000_000)
    assert (row["epoch"], row["pause_p50_ms"], row["pause_p99_ms"]) == (100, 50.0, 99.0)
    assert row["acknowledge_p50_ms"] == 2.0
    assert row["checkpoints_per_s"] == 10.0
    assert row["lag_ms"] == 3.0
    assert row["held_packets"] == 7
    figures.forget("web")
    assert figures.row("web", 0) == {}


def test_percentiles() -> None:
    assert [percentile([5], p) for p in (1, 50, 99)] == [5, 5, 5]
    assert percentile([3, 1, 2], 50) == 2
    assert percentile(list(range(1, 1001)), 99) == 990


# --- Log lines, faults, the service manager --------------------------------------------------------------------------


def test_log_lines_have_their_fields() -> None:
    record = logging.makeLogRecord(
        {"msg": "it %s", "args": ("runs",), "levelno": 30, "levelname": "WARNING", "name": "n"}
    )
    record.guest, record.epoch = "web", 3
    assert _Formatter(journal=False).format(record).endswith("warning n: it runs [guest=web epoch=3]")
    assert _Formatter(journal=True).format(record) == "<4>it runs [guest=web epoch=3]"


def test_the_first_cause_leads_and_the_others_are_attached() -> None:
    first, later = DeviceError("nic0", "x", "start", 3, "gone"), OSError("also")
    fault = describe(ExceptionGroup("both", [first, later]))
    assert fault["kind"] == "DeviceError"
    assert "nic0" in fault["message"]
    assert fault["also"] == ["OSError: also"]
    wrong = describe(ConfigError("f.toml", "a.b", "is missing", "text"))
    assert (wrong["source"], wrong["key"], wrong["allowed"]) == ("f.toml", "a.b", "text")
    refused = describe(PreflightFailed("web", [Finding(Severity.ERROR, "s", "p", "r")]))
    assert refused["findings"] == [
        {"severity": "error", "subject": "s", "problem": "p", "remedy": "r", "unsafe": False}
    ]


def test_a_finding_goes_over_the_link_whole() -> None:
    for unsafe in (False, True):
        finding = Finding(Severity.ERROR, "s", "p", "r", unsafe)
        assert finding_of(json.loads(json.dumps(finding_row(finding)))) == finding
    plain = {"severity": "note", "subject": "s", "problem": "p", "remedy": ""}
    assert finding_of(plain) == Finding(Severity.NOTE, "s", "p")


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"understudy-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}" if abstract else str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else str(tmp_path / "notify"))
        notify("READY=1")
        assert sock.recv(100) == b"READY=1"


def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")


DEAF = """
import asyncio, logging
from understudy.agent import daemon

async def deaf():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass

async def main():
    tasks = [asyncio.create_task(deaf(), name="deaf"), asyncio.create_task(asyncio.sleep(3600), name="obedient")]
    await asyncio.sleep(0)
    await daemon._let_go()

logging.basicConfig()
daemon.LET_GO_S = 0.1
asyncio.run(main())
"""


def test_a_task_that_does_not_end_does_not_keep_the_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=30, check=True
    )
    assert ended.stderr == "ERROR:understudy.agent:ending although these do not: deaf\n"
