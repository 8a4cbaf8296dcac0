"""Two hosts in one process: real QEMU guests, this plugin's domains, and an engine that does one step at a time.

The guest is counter.S: no network, no kernel, running after a second. What a test asks of it is that its count goes
on, and that every count is on every disk.
"""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.qemu.wires import LoopChannels, LoopPeer, Relay
from tests.testbeds.bed import need
from understudy.arbiter import Record, RecordState
from understudy.device import Mode, Progress, ReplicationMode, Subkind, Verdict, no_progress
from understudy.group import DeviceGroup, GroupSetup
from understudy.hypervisor import DomainEvent, DomainEventKind, Protection
from understudy.report import Checkpoint
from understudy_qemu.accel import Accel, build_preload
from understudy_qemu.blockreplication import BLOCK_REPLICATION
from understudy_qemu.disksession import DiskSession, Replica
from understudy_qemu.guestfile import QemuConfig, parse_config
from understudy_qemu.images import ImageIdentity, Images
from understudy_qemu.machine import DriveProvider, GuestPaths, ImageDrive
from understudy_qemu.primary import GATES, QemuPrimary
from understudy_qemu.running import Launched, Qemu
from understudy_qemu.secondary import QemuSecondary

SIZE_BYTES = 4 << 20
GUEST = "counter"
QEMU = os.environ.get("UNDERSTUDY_QEMU") or "qemu-system-x86_64"
BOOT_S = 20.0  # what the guest's kernel may take


def need_qemu() -> None:
    """Skip or fail without QEMU and a compiler; neither root nor a network is needed here."""
    programs = (QEMU, "qemu-img", "gcc", "ld")
    need("qemu", [f"the program {name}" for name in programs if shutil.which(name) is None])


@functools.cache
def boot_sector() -> bytes:
    """Return the assembled counter.S."""
    source = Path(__file__).with_name("counter.S")
    with tempfile.TemporaryDirectory(prefix="understudy-counter-") as name:
        made, sector = Path(name, "counter.o"), Path(name, "counter.bin")
        subprocess.run(["gcc", "-c", "-m32", "-o", str(made), str(source)], check=True)
        layout = ["-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"]
        subprocess.run(["ld", *layout, "-o", str(sector), str(made)], check=True)
        return sector.read_bytes()


@dataclass
class Host:
    """One of the two hosts: directories, and the guest if it runs there."""

    name: str
    root: Path
    accel: Accel
    disks: int
    arguments: Sequence[str] = ()
    qemu: Qemu | None = None
    everything: list[Qemu] = field(default_factory=list)

    @functools.cached_property
    def config(self) -> QemuConfig:
        self.root.mkdir(exist_ok=True)
        disk = [{"path": f"disk{index}.qcow2", "cache": "writeback"} for index in range(self.disks)]
        table: dict[str, Any] = {"memory": "16MiB", "machine": "pc", "disk": disk, "accel": self.accel.value}
        table["arguments"] = list(self.arguments)
        if self.accel is Accel.KVM:
            table["cpu"] = "host,-arch-capabilities"
        source, protection = self.root / "guest.toml", Protection(mode=Mode.COLO)
        return parse_config(table, name=GUEST, source=source, protection=protection, host=self.name)

    @property
    def paths(self) -> GuestPaths:
        return GuestPaths(runtime=self.root / "run", state=self.root / "state")

    @property
    def overlays(self) -> Path:
        made = self.root / "overlays"
        made.mkdir(exist_ok=True, parents=True)
        return made

    @property
    def images(self) -> Images:
        return Images("qemu-img", self.root / "state")

    async def preload(self) -> Path | None:
        return None if self.accel is Accel.KVM else build_preload(self.root.parent / "cache")

    def make_images(self) -> None:
        for index, disk in enumerate(self.config.disks):
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", disk.path, str(SIZE_BYTES)], check=True
            )
            if index == 0:
                raw = self.root / "boot.bin"
                raw.write_bytes(boot_sector())
                subprocess.run(["qemu-io", "-c", f"write -q -s {raw} 0 512", disk.path], check=True)

    async def start(self) -> Qemu:
        """Start the guest, not protected, and wait until it counts."""
        self.make_images()
        drives = {disk.name: ImageDrive(disk) for disk in self.config.disks}
        qemu = await self.launch(drives, copy=False)
        await qemu.monitor.execute("cont")
        self.qemu = qemu
        await self.counts_on(1, BOOT_S)
        return qemu

    async def launch(self, drives: Mapping[str, DriveProvider], *, copy: bool) -> Qemu:
        launched = Launched(accel=self.accel.value, qemu=QEMU, copy=copy, taps={})
        qemu = await Qemu.launch(
            self.config,
            self.paths,
            launched,
            drives,
            name=f"{GUEST} on {self.name}",
            preload=await self.preload(),
        )
        self.everything.append(qemu)
        return qemu

    async def kill(self) -> None:
        for qemu in self.everything:
            # A bad descriptor is that of a process which was killed and let go of before.
            with suppress(OSError):
                await qemu.kill()

    # --- What the guest did --------------------------------------------------------------------------------------

    def count(self) -> int:
        """Return the last count on the serial console, 0 if there is none."""
        try:
            lines = self.paths.serial.read_text(errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return 0
        counts = [line for line in lines if len(line.strip("\r")) == 8]
        return int(counts[-1], 16) if counts else 0

    async def counts_on(self, more: int, timeout_s: float = 20.0) -> int:
        """Wait until the guest has counted on by `more`; return its count then."""
        first = self.count()
        await until(lambda: self.count() >= first + more, f"{self.name}: the guest counts on", timeout_s)
        return self.count()

    async def quit(self) -> None:
        """End QEMU in order, so that its images can be read."""
        assert self.qemu is not None
        await self.qemu.monitor.execute("quit")
        assert await self.qemu.process.wait(10)

    def disk_counts(self) -> list[list[int]]:
        """Return, for each disk, the counts that are on it in the order of their blocks."""
        found = []
        for disk in self.config.disks:
            raw = self.root / "check.raw"
            subprocess.run(["qemu-img", "convert", "-O", "raw", disk.path, raw], check=True)
            data = raw.read_bytes()
            raw.unlink()
            blocks = [data[512 * n : 512 * n + 8] for n in range(1, 1025)]
            found.append([struct.unpack("<I", block[:4])[0] for block in blocks if block[4:] == b"CNTR"])
        return found


async def stands_still(host: Host, for_s: float = 0.6, timeout_s: float = 20.0) -> None:
    """Wait until the guest has not counted for `for_s` seconds, which are many of its ticks."""
    seen, since = host.count(), time.monotonic()
    deadline = since + timeout_s
    while time.monotonic() < since + for_s:
        assert time.monotonic() < deadline, f"{host.name}: the guest counts on and on"
        await asyncio.sleep(0.02)
        if host.count() != seen:
            seen, since = host.count(), time.monotonic()


async def until(true: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Wait until something outside this program is so."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


class GroupPhases:
    """The phases of one checkpoint, asked of both groups."""

    def __init__(self, *groups: DeviceGroup) -> None:
        self.groups = groups

    async def postsuspend(self, epoch: int) -> None:
        for group in self.groups:
            await group.postsuspend(epoch)

    async def checkpoint(self, epoch: int) -> None:
        for group in self.groups:
            await group.do_checkpoint_all(epoch)

    async def preresume(self, epoch: int) -> None:
        await self.groups[0].preresume(epoch)

    async def postresume(self, epoch: int) -> None:
        for group in self.groups:
            await group.postresume(epoch)


def record(state: RecordState, owner: str, generation: int) -> Record:
    """Return a record as an arbiter would have it."""
    return Record(GUEST, generation, state, owner, None, "s", owner, str(generation))


class Session:
    """One session between two hosts, driven by hand in the order of the engine."""

    def __init__(
        self,
        alpha: Host,
        beta: Host,
        *,
        mode: Mode = Mode.COLO,
        delay_ms: int = 200,
        name: str = "s1",
        relayed: bool = False,
        subkinds: Sequence[Subkind] = (BLOCK_REPLICATION,),
        bwlimit_bytes_per_s: int = 0,
    ) -> None:
        assert alpha.qemu is not None
        self.alpha, self.beta, self.mode, self.name, self.delay_ms = alpha, beta, mode, name, delay_ms
        self.subkinds = subkinds
        self.bwlimit = bwlimit_bytes_per_s
        self.relays: list[Relay] = []
        self._relay = self._new_relay if relayed else None
        self.stream = self._new_relay()  #: under the checkpoint stream, if relayed
        self.channels = LoopChannels(self.stream if relayed else None)
        self.running = alpha.qemu
        self.epoch = 0
        self.events: list[DomainEvent] = []  # of the primary
        self.copy_events: list[DomainEvent] = []
        self.primary: Any = None
        self.receiving: asyncio.Task[None] | None = None
        self._watching: list[asyncio.Task[None]] = []
        self.p_disks = DiskSession(alpha.disks)
        replicas = {
            disk.name: Replica(
                disk, SIZE_BYTES, ImageIdentity("id-1", GUEST, disk.name, 1, ReplicationMode.PRIMARY)
            )
            for disk in beta.config.disks
        }
        self.s_disks = DiskSession(beta.disks, replicas=replicas, images=beta.images)
        self.secondary = QemuSecondary(
            start=functools.partial(beta.launch, copy=True),
            connect=self._connect,
            discard=self._discard_copy,
            disks=self.s_disks,
            config=beta.config,
        )
        self.connected = False
        self.copy_dead = False

    def _new_relay(self) -> Relay:
        self.relays.append(Relay())
        return self.relays[-1]

    def drop_cable(self) -> None:
        """Silence everything between the two hosts."""
        for relay in self.relays:
            relay.drop()

    async def _connect(self) -> None:
        self.connected = True

    async def _discard_copy(self) -> None:
        self.copy_dead = True
        with suppress(Exception):
            await self.secondary.qemu.kill()

    def _setup(
        self, host: Host, side: ReplicationMode, services: Any, other: Callable[[], DeviceGroup]
    ) -> GroupSetup:
        return GroupSetup(
            guest=GUEST,
            session=self.name,
            side=side,
            mode=self.mode,
            devices=host.config.devices,
            subkinds=self.subkinds,
            gates=GATES[self.mode],
            services=services,
            peer=lambda device: LoopPeer(device, other, self._relay),
            directory=host.overlays,
            local_address="127.0.0.1",
            peer_address="127.0.0.1",
            progress=self.progress,
            bwlimit_bytes_per_s=self.bwlimit,
        )

    progress: Progress = staticmethod(no_progress)
    primary_class: type[QemuPrimary] = QemuPrimary

    async def open(self) -> None:
        """Up to a copy that waits and disks that are mirrored; the guest runs."""
        self.primary = await self.primary_class.open(
            self.running, self.mode, self.p_disks, self.running.kill, checkpoint_delay_ms=self.delay_ms
        )
        self.s_group = DeviceGroup(
            self._setup(self.beta, ReplicationMode.SECONDARY, self.secondary.services, lambda: self.p_group)
        )
        self.p_group = DeviceGroup(
            self._setup(self.alpha, ReplicationMode.PRIMARY, self.primary.services, lambda: self.s_group)
        )
        await self.s_group.new()
        await self.secondary.launch(self.s_group)
        self._watching = [
            asyncio.create_task(self._watch(self.primary, self.events.append)),
            asyncio.create_task(self._watch(self.secondary, self.copy_events.append)),
        ]
        self.receiving = asyncio.create_task(self.secondary.receive(self.channels, self.s_group))
        await self.p_group.new()

    async def _watch(self, domain: QemuPrimary | QemuSecondary, tell: Callable[[DomainEvent], None]) -> None:
        async for event in domain.watch():
            tell(event)

    async def replicate(self) -> None:
        await self.primary.replicate(self.p_group, self.channels, self.progress)
        assert self.receiving is not None
        await self.receiving

    async def protect(self) -> None:
        """All the way to the first acknowledged checkpoint."""
        await self.open()
        await self.replicate()
        await self.primary.hurry()
        await self.ack()

    async def ack(self, times: int = 1) -> list[Checkpoint]:
        """Make or await checkpoints, with errors asked and committed on both sides."""
        made = []
        for _ in range(times):
            self.epoch += 1
            made.append(await self.primary.checkpoint(self.epoch, GroupPhases(self.p_group, self.s_group)))
            for group in (self.p_group, self.s_group):
                await group.get_error_all()
            for group in (self.p_group, self.s_group):
                await group.commit(self.epoch)
        return made

    async def ack_at(self, epoch: int) -> list[Checkpoint]:
        """Make checkpoint `epoch`."""
        self.epoch = epoch - 1
        return await self.ack()

    async def fail_over(self, generation: int = 5) -> int:
        """Promote the copy; return how many checkpoints it held."""
        loaded = await self.secondary.sever("test")
        assert loaded > 0
        await self.secondary.promote(self.s_group, record(RecordState.PROMOTING, "beta", generation))
        await self.secondary.open_outlet(record(RecordState.ALONE, "beta", generation + 1))
        self.beta.qemu = self.secondary.qemu
        await self.s_group.teardown(Verdict.KEEP)
        await self.secondary.close()
        return loaded

    async def go_on_alone(self) -> None:
        """Leave protection on the primary's side; then the copy is discarded."""
        await self.primary.sever("test")
        await self.primary.resume_alone(self.p_group)
        await self.p_group.teardown(Verdict.KEEP)
        await self.secondary.discard()
        await self.s_group.teardown(Verdict.DISCARD)

    async def kill_primary(self) -> None:
        await self.running.process.kill()

    async def kill_secondary(self) -> None:
        await self.secondary.qemu.process.kill()

    def hang_secondary(self) -> None:
        """Stop the copy's process without a word."""
        self.secondary.qemu.process.suspend()

    async def close(self) -> None:
        if self.receiving is not None:
            self.receiving.cancel()
            with suppress(Exception, asyncio.CancelledError):
                await self.receiving
            self.receiving = None
        for domain in filter(None, (self.primary, self.secondary)):
            await domain.close()
        for task in self._watching:
            await task
        for relay in self.relays:
            await relay.close()
        self.channels.close()


class Bed:
    """Makes hosts and sessions, and ends whatever of them is left."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.accel = Accel.TCG
        self.hosts: list[Host] = []
        self.sessions: list[Session] = []

    def host(self, name: str, disks: int = 1) -> Host:
        self.hosts.append(Host(name, self.root / name, self.accel, disks))
        return self.hosts[-1]

    def session(self, alpha: Host, beta: Host, **options: Any) -> Session:
        self.sessions.append(Session(alpha, beta, **options))
        return self.sessions[-1]

    async def protected(self, disks: int = 1, **options: Any) -> Session:
        alpha, beta = self.host("alpha", disks), self.host("beta", disks)
        await alpha.start()
        session = self.session(alpha, beta, **options)
        await session.protect()
        return session

    async def close(self) -> None:
        for session in self.sessions:
            await session.close()
        for host in self.hosts:
            await host.kill()


async def survives(host: Host) -> None:
    """Assert that the guest counts on, and that in the end every count is on every disk."""
    last = await host.counts_on(3)
    await host.quit()
    for counts in host.disk_counts():
        assert counts == list(range(1, len(counts) + 1))
        assert len(counts) >= last


async def traces(qemu: Qemu) -> Mapping[str, Any]:
    """Return everything of a QEMU that a session could leave behind."""
    nodes = await qemu.monitor.execute("query-named-block-nodes", {"flat": True})
    capabilities = await qemu.monitor.execute("query-migrate-capabilities")
    return {
        "nodes": sorted(node["node-name"] for node in nodes if not node["node-name"].startswith("#block")),
        "chardevs": sorted(entry["label"] for entry in await qemu.monitor.execute("query-chardev")),
        "objects": sorted(
            entry["name"] for entry in await qemu.monitor.execute("qom-list", {"path": "/objects"})
        ),
        "jobs": await qemu.monitor.execute("query-jobs"),
        "yank": [entry for entry in await qemu.oob.yankable() if entry["type"] != "chardev"],
        "capabilities": {entry["capability"]: entry["state"] for entry in capabilities},
        "parameters": await qemu.monitor.execute("query-migrate-parameters"),
        "sockets": sorted(path.name for path in qemu.paths.runtime.iterdir()),
        "descriptors": len(descriptors(qemu)),
    }


def descriptors(qemu: Qemu) -> list[Path]:
    return list(Path(f"/proc/{qemu.process.pid}/fd").iterdir())


def told(session: Session) -> set[DomainEventKind]:
    return {event.kind for event in session.events}


def exists(qemu: Qemu) -> bool:
    return Path(f"/proc/{qemu.process.pid}").exists()


def files(host: Host) -> set[str]:
    return {str(path.relative_to(host.root)) for path in host.root.rglob("*") if path.is_file()}
