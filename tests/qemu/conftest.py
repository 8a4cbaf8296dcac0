"""One host for the tests of the hypervisor: directories, a bridge, and whatever was started on it ended afterwards."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.pair import boot_sector, need_qemu
from tests.testbeds.bed import missing_for_namespaces, need
from understudy.arbiter import Record, RecordState
from understudy.device import Mode
from understudy.hypervisor import HostContext, Protection
from understudy_qemu import network
from understudy_qemu.guestfile import QemuConfig
from understudy_qemu.hypervisor import QemuHypervisor

IMAGE_BYTES = 4 << 20

#: A boot sector that powers the machine off: SLP_EN at the PM1a control block where SeaBIOS puts it on ``pc``.
POWERS_OFF = bytes.fromhex("ba0406 b80020 ef f4 ebfd").ljust(510, b"\0") + b"\x55\xaa"


@dataclass
class Bed:
    """A host named anew for each test, so that its taps meet nobody else's."""

    root: Path
    bridge: str
    name: str = field(default_factory=lambda: f"alpha-{uuid.uuid4().hex[:8]}")
    configs: list[QemuConfig] = field(default_factory=list)
    agents: list[QemuHypervisor] = field(default_factory=list)

    def agent(self) -> QemuHypervisor:
        """Return a new agent's hypervisor on this host."""
        root = self.root
        here = HostContext(self.name, "127.0.0.1", root / "lib", root / "run", root / "overlays")
        self.agents.append(QemuHypervisor(here))
        return self.agents[-1]

    async def crash(self, agent: QemuHypervisor) -> None:
        """Let an agent's connections go, as its death would; its guests run on."""
        for qemu in agent._guests.values():
            await qemu.close()
        agent._guests.clear()

    def guest(self, name: str = "counter", sector: bytes | None = None, **table: Any) -> QemuConfig:
        """Return a guest with one disk that boots, one interface, and what the test says."""
        source = self.root / f"{name}.toml"
        table = {
            "memory": "16MiB",
            "accel": "tcg",
            "disk": [{"path": f"{name}-disk0.qcow2"}],
            "nic": [{"bridge": self.bridge}],
            "serial": f"{name}.serial",
            **table,
        }
        agent = self.agents[-1] if self.agents else self.agent()
        config = agent.parse(table, name=name, source=source, protection=Protection(Mode.REMUS))
        self.configs.append(config)
        for disk in config.disks:
            self.make_image(disk.path, disk.format, sector or boot_sector())
        return config

    def make_image(self, path: Path, image_format: str, sector: bytes) -> None:
        """Make an image that boots `sector`."""
        raw = self.root / "sector"
        raw.write_bytes(sector.ljust(IMAGE_BYTES, b"\0"))
        subprocess.run(["qemu-img", "convert", "-O", image_format, raw, path], check=True)
        raw.unlink()

    def serial(self, config: QemuConfig) -> str:
        """Return what the guest has printed."""
        assert config.serial is not None
        return config.serial.read_text(errors="replace") if config.serial.exists() else ""

    async def counts(self, config: QemuConfig, more: int = 2, timeout_s: float = 30.0) -> None:
        """Wait until the guest has counted on by `more`."""
        lines = self.serial(config).count("\n")
        async with asyncio.timeout(timeout_s):
            while self.serial(config).count("\n") < lines + more:  # noqa: ASYNC110 - a file tells nobody
                await asyncio.sleep(0.02)

    def raw(self, path: Path) -> bytes:
        """Return the content of an image that nobody uses."""
        raw = self.root / "content"
        subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
        return raw.read_bytes()

    def alone(self, owner: str = "", state: RecordState = RecordState.ALONE, **more: Any) -> Record:
        """Return a record of this host's guest."""
        owner = owner or self.name
        values: dict[str, Any] = {"standby": None, "session": None, "generation": 1} | more
        return Record(guest="counter", state=state, owner=owner, writer=owner, attempt="1", **values)

    def traces(self) -> set[str]:
        """Return files, taps and processes of this host's guests."""
        left = {f"file {path.name}" for path in (self.root / "run").rglob("*") if not path.is_dir()}
        links = ip("-o", "link")
        left |= {f"tap {nic.tap}" for config in self.configs for nic in config.nics if nic.tap in links}
        return left


def ip(*arguments: str) -> str:
    """Run ``ip`` and return what it says."""
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    need("qemu", missing_for_namespaces())
    need_qemu()
    bridge = f"usb{uuid.uuid4().hex[:8]}"
    ip("link", "add", bridge, "type", "bridge")
    made = Bed(tmp_path, bridge)
    try:
        ip("link", "set", bridge, "up")
        yield made
    finally:
        for agent in made.agents:
            for config in made.configs:
                await agent.discard(config)
        for config in made.configs:
            for nic in config.nics:
                await network.remove_tap(nic.tap)
        ip("link", "delete", bridge)
