"""A secondary's session without engine and agents: the real copy, libxl and hypervisor, and a primary made of bytes.

The primary says a stream's beginning on a TCP connection, as an agent's would, and then no more. How it ends is the
test's choice: in order, by a reset, or by nothing at all, as when its host has died.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from tests.xen.recorded import NAME
from understudy.arbiter import Record, RecordState
from understudy.device import Mode, ReplicationMode
from understudy.errors import LinkLost
from understudy.group import DeviceGroup, GroupSetup
from understudy.hypervisor import DomainEvent, DomainEventKind, HostContext, Protection, SecondaryDomain
from understudy.testing.hypervisor_bed import record_of
from understudy_xen.coding import Encoder
from understudy_xen.guestfile import XenConfig
from understudy_xen.hypervisor import XenHypervisor
from understudy_xen.primary import CHANNEL, GATES
from understudy_xen.wire import Ack, Answers, Coding, Hello, Refusal
from understudy_xen.xenstore import XenStore

__all__ = [
    "STEP_S",
    "Played",
    "Primary",
    "config_of",
    "hypervisor_of",
    "left_behind",
    "owned",
    "until",
]

STEP_S: Final = 60.0  # for any step; the bed shares two processors
_LOOK_S: Final = 0.02
_PIECE_BYTES: Final = 100_000


def hypervisor_of(directory: Path) -> XenHypervisor:
    """Return this host's hypervisor, as the agent of beta has it."""
    return XenHypervisor(HostContext("beta", "127.0.0.1", directory, directory, directory))


def config_of(hypervisor: XenHypervisor) -> XenConfig:
    """Return the tiny guest as its file describes it."""
    source: Any = Path("/etc/understudy/guests/tiny.toml")
    return hypervisor.parse(
        {"config": "/run/tiny.cfg"}, name=NAME, source=source, protection=Protection(Mode.REMUS)
    )


def owned(state: RecordState) -> Record:
    """Return a record that gives the guest to this host."""
    return record_of(NAME, state, ReplicationMode.SECONDARY, 7)


async def until(done: Any, what: str, timeout_s: float = STEP_S) -> None:
    """Wait until `done` returns something true."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(_LOOK_S)


class Primary:
    """The primary's end of a stream's connection.

    Args:
        said: the beginning of a stream, from its preamble on.
        torn: coded only: what follows it, of which the piece that carries it is torn.
        coding: how it is said.
    """

    def __init__(self, said: bytes, *, torn: bytes = b"", coding: Coding = Coding.PLAIN) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._sock = socket.create_connection(server.getsockname())
            self._peer: socket.socket | None = server.accept()[0]
        self.acks: list[Ack] = []
        self.refusals: list[Refusal] = []
        self.ended = ""  #: how the secondary has ended the connection
        self._said = Hello(coding).encode() + (said if coding is Coding.PLAIN else _pieces(said, torn))
        self._sent = threading.Event()
        self._closing = False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._listen)]

    async def accept(self, name: str, *, timeout_s: float) -> socket.socket:
        """Be the secondary's channels; from here on the primary talks."""
        assert name == CHANNEL
        assert self._peer is not None
        peer, self._peer = self._peer, None
        for thread in self._threads:
            thread.start()
        return peer

    async def connect(self, name: str, *, timeout_s: float) -> socket.socket:
        """Refuse: a secondary connects nothing."""
        raise LinkLost(f"a secondary wants to connect {name}")

    def more(self, said: bytes) -> None:
        """Say on, plainly."""
        self._sock.sendall(said)

    async def said(self) -> None:
        """Return when everything was said."""
        await until(self._sent.is_set, "the beginning of the stream was said")

    async def end(self) -> None:
        """End the connection in order, when everything was said."""
        await self.said()
        self._sock.shutdown(socket.SHUT_WR)

    async def reset(self) -> None:
        """Break the connection; what has not been read yet may be lost, in both directions."""
        await self.said()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A socket that another thread waits in is not closed before that one comes back.
        self._closing = True
        await asyncio.to_thread(self._threads[1].join, STEP_S)
        self._sock.close()

    async def over(self) -> None:
        """Return when the secondary has ended the connection: nothing more will be heard."""
        await until(lambda: self.ended, "the secondary has ended the connection")

    async def close(self) -> None:
        """Let go of both ends."""
        self._closing = True
        with suppress(OSError):  # it may be closed; else whoever still writes comes back
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._peer is not None:
            self._peer.close()
        for thread in self._threads:
            if thread.ident is not None:
                await asyncio.to_thread(thread.join, STEP_S)
                assert not thread.is_alive()
        self._sock.close()

    def _talk(self) -> None:
        with suppress(OSError):
            self._sock.sendall(self._said)
        self._sent.set()

    def _listen(self) -> None:
        answers = Answers()
        ended = "in order"
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        try:
            while not self._closing:
                if not poll.poll(_LOOK_S * 1000):
                    continue
                data = self._sock.recv(4096)
                if not data:
                    break
                for answer in answers.feed(data):
                    (self.acks if isinstance(answer, Ack) else self.refusals).append(answer)  # type: ignore[arg-type]
        except OSError as error:
            ended = str(error)
        self.ended = ended


def _pieces(said: bytes, torn: bytes) -> bytes:
    # As over a slow link, where compression pays.
    encoder, out = Encoder(), bytearray()
    encoder.sent(1 << 20, 10**11)
    for at in range(0, len(said), _PIECE_BYTES):
        out += b"".join(encoder.encode(said[at : at + _PIECE_BYTES]))
    if torn:
        piece = b"".join(encoder.encode(torn))
        out += piece[: len(piece) // 2]
    return bytes(out)


class Played:
    """One session on the secondary's side; an asynchronous context manager that leaves nothing behind.

    Args:
        hypervisor: this host's.
        directory: the guest's on this host.
    """

    def __init__(self, hypervisor: XenHypervisor, directory: Path) -> None:
        self.hypervisor = hypervisor
        self.config = config_of(hypervisor)
        self._directory = directory
        self.events: list[DomainEvent] = []
        self._watching: asyncio.Task[None] | None = None
        self.receiving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        async with asyncio.timeout(STEP_S):
            self.copy = await self.hypervisor.secondary(self.config, {})
            self.group = DeviceGroup(self._setup(self.copy))
            await self.group.new()
            self._watching = asyncio.create_task(self._watch())
            try:
                await self.copy.launch(self.group)
            except BaseException:
                self._watching.cancel()
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._watching is not None
        self._watching.cancel()
        for task in (self._watching, self.receiving):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        async with asyncio.timeout(STEP_S):
            await self.copy.discard()
            await self.copy.close()

    def receive(self, primary: Primary) -> asyncio.Task[None]:
        """Begin to take a primary's stream."""
        self.receiving = asyncio.create_task(self.copy.receive(primary, self.group))
        return self.receiving

    def told(self, kind: DomainEventKind) -> list[DomainEvent]:
        """Return the events of one kind so far."""
        return [event for event in self.events if event.kind is kind]

    async def _watch(self) -> None:
        async for event in self.copy.watch():
            self.events.append(event)

    def _setup(self, domain: SecondaryDomain) -> GroupSetup:
        return GroupSetup(
            guest=NAME,
            session="cuts",
            side=ReplicationMode.SECONDARY,
            mode=Mode.REMUS,
            devices=self.config.devices,
            subkinds=(),
            gates=GATES[Mode.REMUS],
            services=domain.services,
            peer=_nobody,
            directory=self._directory,
            local_address="127.0.0.1",
            peer_address="127.0.0.1",
        )


def _nobody(device: str) -> Any:
    raise LinkLost(f"there is no device {device}")


async def left_behind(hypervisor: XenHypervisor) -> Mapping[str, Any]:
    """Return what there is of domains, processes, threads and descriptors, to compare before and after."""
    async with await XenStore.open(deadline_s=STEP_S) as store:
        domains = [info.domid for info in hypervisor.xen.domains()]
        known = {base: sorted(await store.directory(base)) for base in ("/local/domain", "/libxl", "/vm")}
    return {
        "domains": domains,
        "xenstore": known,
        "processes": sorted(processes()),
        "threads": sorted(each.name for each in threading.enumerate() if each.name.startswith("xen: ")),
        "descriptors": _descriptors(),
    }


def processes() -> list[str]:
    """Return the restorers and libxl's helpers that run."""
    found = []
    for place in Path("/proc").iterdir():
        with suppress(OSError):
            if place.name.isdecimal():
                command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "understudy_xen.restorer" in command or "libxl-save-helper" in command:
                    found.append(f"{place.name} {command}")
    return found


def _descriptors() -> list[str]:
    # By kind: numbers of pipes and sockets say nothing. The listing's own descriptor is gone by the time it is asked.
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(str(fd.readlink()).partition(":")[0])
    return sorted(found)
