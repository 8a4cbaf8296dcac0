"""The monitor against a server that misbehaves."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.qemu.qmp_server import QmpServer, qmp_server
from understudy.errors import HypervisorError, MonitorSilent
from understudy_qemu import monitor as monitor_module
from understudy_qemu.monitor import CommandRefused, OutOfBand, QemuMonitor


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[QmpServer]:
    async with qmp_server(tmp_path / "qmp") as made:
        yield made


@pytest.fixture
async def monitor(server: QmpServer, tmp_path: Path) -> AsyncIterator[QemuMonitor]:
    made = await QemuMonitor.connect(tmp_path / "qmp", name="web on alpha", deadline_s=0.2)
    yield made
    await made.close()


async def test_a_command_and_its_answer(server: QmpServer, monitor: QemuMonitor) -> None:
    server.answer = lambda message: {"return": message["arguments"]}
    assert await monitor.execute("echo", {"a-b": 1}) == {"a-b": 1}


async def test_a_refusal_keeps_the_monitor_alive(server: QmpServer, monitor: QemuMonitor) -> None:
    server.answer = lambda _: {"error": {"class": "DeviceNotFound", "desc": "no disk9"}}
    with pytest.raises(CommandRefused, match="web on alpha: block-thing: no disk9") as raised:
        await monitor.execute("block-thing")
    assert raised.value.error_class == "DeviceNotFound"
    assert monitor.dead is None
    server.answer = lambda _: {"return": 1}
    assert await monitor.execute("x") == 1


async def test_a_silent_command_kills_the_monitor_and_later_calls_raise_at_once(
    server: QmpServer, monitor: QemuMonitor
) -> None:
    server.answer = lambda _: None
    with pytest.raises(MonitorSilent, match=r"no answer to stop within 0.2 s"):
        await monitor.execute("stop")
    began = time.monotonic()
    with pytest.raises(MonitorSilent, match="cont not sent"):
        await monitor.execute("cont", timeout_s=60)
    assert time.monotonic() - began < 0.1
    assert [message["execute"] for message in server.received] == ["qmp_capabilities", "stop"]


async def test_a_socket_that_accepts_and_says_nothing(tmp_path: Path) -> None:
    async with qmp_server(tmp_path / "qmp") as server:
        server.greeting = b""
        with pytest.raises(MonitorSilent, match=r"did not greet within 0.2 s"):
            await QemuMonitor.connect(tmp_path / "qmp", name="web", timeout_s=0.2)


async def test_a_socket_that_speaks_something_else(tmp_path: Path) -> None:
    async with qmp_server(tmp_path / "qmp") as server:
        server.greeting = b"220 mail ready\r\n"
        with pytest.raises(HypervisorError, match="no monitor at"):
            await QemuMonitor.connect(tmp_path / "qmp", name="web", timeout_s=2)


async def test_an_answer_for_the_client_before_us_is_survived(tmp_path: Path) -> None:
    async with qmp_server(tmp_path / "qmp") as server:
        right = server.greeting
        server.greeting = right + b'{"error": {"class": "GenericError", "desc": "late"}, "id": "old"}\r\n'
        connecting = asyncio.create_task(QemuMonitor.connect(tmp_path / "qmp", name="web"))
        async with asyncio.timeout(10):
            while not server.received:  # noqa: ASYNC110 - the fake tells nobody
                await asyncio.sleep(0)
        server.greeting = right
        monitor = await connecting
        assert await monitor.execute("x") == {}
        assert len(server.connections) > 1
        await monitor.close()


async def test_connect_waits_for_a_socket_that_appears_late(tmp_path: Path) -> None:
    connecting = asyncio.create_task(QemuMonitor.connect(tmp_path / "qmp", name="web"))
    await asyncio.sleep(0)
    async with qmp_server(tmp_path / "qmp"):
        monitor = await connecting
        assert await monitor.execute("x") == {}
        await monitor.close()


async def test_a_process_that_died_before_its_socket_appeared(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="QEMU ended with status 1; it said: no such machine"):
        await QemuMonitor.connect(
            tmp_path / "qmp",
            name="web",
            describe=lambda: "QEMU ended with status 1; it said: no such machine",
        )


async def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="may not be longer than 107"):
        await QemuMonitor.connect(tmp_path / ("x" * 108), name="web")


async def test_a_lost_connection_tells_calls_and_subscribers(server: QmpServer, monitor: QemuMonitor) -> None:
    server.answer = lambda _: server.hang_up()
    async with monitor.events() as events:
        with pytest.raises(HypervisorError, match="connection is lost while it ran stop"):
            await monitor.execute("stop", timeout_s=5)
        with pytest.raises(HypervisorError, match="connection is lost"):
            await anext(events)
    assert monitor.dead is not None


async def test_events_are_kept_from_the_moment_of_subscription(
    server: QmpServer, monitor: QemuMonitor
) -> None:
    server.event("EARLY")
    await monitor.execute("x")
    async with monitor.events("STOP", "RESUME") as events:
        server.event("STOP", 5)
        server.event("OTHER")
        server.event("RESUME", 7, reason="test")
        # The answer came after the events, so they are here although nobody was reading.
        await monitor.execute("x")
        first, second = await anext(events), await anext(events)
    assert (first.name, first.host_ns) == ("STOP", 1_000_005_000)
    assert (second.name, second.data) == ("RESUME", {"reason": "test"})


async def test_an_overflow_of_events_is_an_error_after_those_that_came_before(
    server: QmpServer, monitor: QemuMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "EVENTS_KEPT", 2)
    async with monitor.events() as events:
        for number in range(3):
            server.event(f"E{number}")
        await monitor.execute("x")
        assert [(await anext(events)).name for _ in range(2)] == ["E0", "E1"]
        with pytest.raises(HypervisorError, match="some are lost"):
            await anext(events)


async def test_two_subscribers_get_their_own_copies(server: QmpServer, monitor: QemuMonitor) -> None:
    async with monitor.events("A") as first, monitor.events() as second:
        server.event("A")
        assert (await anext(first)).name == (await anext(second)).name == "A"


async def test_a_cancelled_call_leaves_the_monitor_usable(server: QmpServer, monitor: QemuMonitor) -> None:
    held: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    server.answer = held.put_nowait
    call = asyncio.create_task(monitor.execute("slow", timeout_s=60))
    message = await held.get()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    server.send({"return": {}, "id": message["id"]})
    server.answer = lambda _: {"return": "second"}
    assert await monitor.execute("x") == "second"


async def test_close_is_idempotent_and_ends_everything(server: QmpServer, monitor: QemuMonitor) -> None:
    async with monitor.events() as events:
        await monitor.close()
        await monitor.close()
        with pytest.raises(HypervisorError, match="closed"):
            await anext(events)
    with pytest.raises(HypervisorError, match="closed"):
        await monitor.execute("x")


async def test_yank_goes_out_of_band(server: QmpServer, tmp_path: Path) -> None:
    oob = await OutOfBand.connect(tmp_path / "qmp", name="web")
    await oob.yank({"type": "migration"}, {"type": "block-node", "node-name": "n"})
    await oob.close()
    assert server.received[0]["arguments"] == {"enable": ["oob"]}
    assert server.received[1]["exec-oob"] == "yank"
    assert server.received[1]["arguments"]["instances"][1]["node-name"] == "n"


async def test_a_monitor_without_out_of_band_commands_is_refused(tmp_path: Path) -> None:
    async with qmp_server(tmp_path / "qmp") as server:
        server.greeting = server.greeting.replace(b'"oob"', b"")
        with pytest.raises(HypervisorError, match="cannot run commands out of band"):
            await OutOfBand.connect(tmp_path / "qmp", name="web")


async def test_a_close_while_the_connection_breaks_leaves_no_error_that_nobody_saw(
    server: QmpServer, tmp_path: Path
) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    for turns in range(20):
        monitor = await QemuMonitor.connect(tmp_path / "qmp", name="web")
        server.hang_up()
        for _ in range(turns):
            await asyncio.sleep(0)
        await monitor.close()
        del monitor
        # Until whatever still runs has ended and was thrown away.
        for _ in range(20):
            await asyncio.sleep(0)
        gc.collect()
    assert not complaints
