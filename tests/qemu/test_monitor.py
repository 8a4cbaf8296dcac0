"""The monitor, its second socket and the probe against a real QEMU."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from tests.qemu.conftest import Bed
from understudy.errors import HypervisorError, StateError
from understudy.services import MONITOR
from understudy_qemu.monitor import CommandRefused
from understudy_qemu.probing import probe_binary
from understudy_qemu.running import Qemu

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]


@pytest.fixture
async def qemu(bed: Bed) -> Qemu:
    agent = bed.agent()
    config = bed.guest(nic=[])
    await agent.start(config, bed.alone())
    running = await agent.running(config)
    assert running is not None
    return running


async def test_the_schema_tells_what_this_qemu_can_do(qemu: Qemu) -> None:
    monitor = qemu.monitor
    assert await monitor.supports("migrate-set-capabilities", "capabilities.capability.x-colo")
    assert not await monitor.supports("migrate-set-capabilities", "capabilities.capability.y-colo")
    assert await monitor.supports("blockdev-add", "driver.replication", "top-id", "mode.secondary")
    assert await monitor.supports("object-add", "qom-type.colo-compare", "compare_timeout")
    assert await monitor.supports("migrate-set-parameters", "x-checkpoint-delay")
    # One of the two names of the same option, or both.
    names = [
        await monitor.supports("chardev-add", f"backend.data.{name}")
        for name in ("reconnect", "reconnect-ms")
    ]
    assert any(names)
    assert (await monitor.schema()).has_event("COLO_EXIT")


async def test_stop_and_cont_are_seen_in_order(qemu: Qemu) -> None:
    async with qemu.monitor.events("STOP", "RESUME") as events:
        for _ in range(3):
            await qemu.monitor.execute("stop")
            await qemu.monitor.execute("cont")
        seen = [await anext(events) for _ in range(6)]
    assert [event.name for event in seen] == ["STOP", "RESUME"] * 3
    assert sorted(event.host_ns for event in seen) == [event.host_ns for event in seen]


async def test_a_descriptor_arrives(qemu: Qemu) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await qemu.monitor.give_fd("gift", theirs.fileno())
        backend = {
            "type": "socket",
            "data": {"addr": {"type": "fd", "data": {"str": "gift"}}, "server": False},
        }
        await qemu.monitor.execute("chardev-add", {"id": "gift", "backend": backend})
        theirs.close()
        await qemu.monitor.execute("chardev-remove", {"id": "gift"})
        ours.settimeout(10)
        assert ours.recv(1) == b""  # QEMU had it, and has closed it


async def test_yank_cuts_what_exists_and_refuses_what_does_not(qemu: Qemu) -> None:
    with pytest.raises(CommandRefused):
        await qemu.oob.yank({"type": "migration"})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await qemu.monitor.give_fd("gift", theirs.fileno())
        backend = {
            "type": "socket",
            "data": {"addr": {"type": "fd", "data": {"str": "gift"}}, "server": False},
        }
        await qemu.monitor.execute("chardev-add", {"id": "gift", "backend": backend})
        theirs.close()
        assert {"type": "chardev", "id": "gift"} in await qemu.oob.yankable()
        await qemu.oob.yank({"type": "chardev", "id": "gift"})
        ours.settimeout(10)
        assert ours.recv(1) == b""


async def test_yank_works_while_the_main_loop_hangs(bed: Bed, qemu: Qemu) -> None:
    # A connection to a server that accepts and never speaks holds QEMU's main loop: the trap behind the second
    # socket. The NBD client waits for the server's greeting inside blockdev-add.
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        server = {"type": "inet", "host": "127.0.0.1", "port": str(deaf.getsockname()[1])}
        options = {"driver": "nbd", "node-name": "deaf", "server": server, "export": "x", "open-timeout": 0}
        with pytest.raises(HypervisorError, match=r"no answer to blockdev-add within 0\.5 s"):
            await qemu.monitor.execute("blockdev-add", options, timeout_s=0.5)
        assert qemu.monitor.dead is not None
        await qemu.oob.yank({"type": "block-node", "node-name": "deaf"})
    await qemu.reconnect()
    assert await qemu.status() == "running"


async def test_what_qemu_said_is_in_the_error_when_it_dies(qemu: Qemu) -> None:
    async with qemu.monitor.events() as events:
        qemu.process._child.send_signal(6)  # type: ignore[union-attr]
        with pytest.raises(HypervisorError, match="QEMU was killed by SIGABRT"):
            await anext(events)
    with pytest.raises(HypervisorError, match=r"stop not sent.*SIGABRT"):
        await qemu.monitor.execute("stop")


async def test_the_binary_is_asked_without_a_guest(bed: Bed) -> None:
    config = bed.guest()
    features = await probe_binary(config.qemu)
    assert features.colo
    assert features.yank
    assert features.replication
    assert features.version[0].isdigit()
    assert await probe_binary(config.qemu) is features
    with pytest.raises(HypervisorError, match="is not installed"):
        await probe_binary("/no/such/qemu")


async def test_a_program_that_is_no_qemu(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho I am not QEMU >&2\nexit 2\n")
    program.chmod(0o755)
    with pytest.raises(HypervisorError, match="QEMU ended with status 2; it said: I am not QEMU"):
        await probe_binary(str(program))


async def test_a_probe_changes_nothing(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest(nic=[])
    monitor = agent.probe_services(config).get(MONITOR)
    assert await monitor.supports("blockdev-add")
    with pytest.raises(StateError, match="does not run on this host"):
        await monitor.execute("query-status")
    with pytest.raises(StateError, match="must not"):
        await monitor.execute("stop")
    with pytest.raises(StateError):
        await monitor.give_fd("x", 0)
    with pytest.raises(StateError):
        async with monitor.events():
            pass
    await agent.start(config, bed.alone())
    assert (await monitor.execute("query-status"))["status"] == "running"


async def test_only_the_guests_own_user_may_talk_to_the_sockets(bed: Bed, qemu: Qemu) -> None:
    assert mode(qemu.paths.runtime) == 0o700
    peer = socket.socket(socket.AF_UNIX)
    with peer:
        peer.connect(str(qemu.paths.oob))
        pid, *_ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    assert pid == qemu.process.pid


def mode(path: Path) -> int:
    return os.stat(path).st_mode & 0o777  # noqa: PTH116 - as the kernel says it
