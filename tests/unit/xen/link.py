"""A small checkpoint stream, and both ends of connections and pipes, for the tests of the stream's ends."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from understudy_xen.coding import Encoder
from understudy_xen.streams.formats import GuestType, LibxcType, LibxlType
from understudy_xen.streams.writer import (
    checkpoint,
    joined,
    libxc_headers,
    libxl_header,
    preamble,
    raw_record,
    record,
)
from understudy_xen.wire import Ack, Answers, Coding, Hello, Refusal

CONFIG = b'{"c_info": {"name": "web"}}'
HVM_CONTEXT = b"state" * 3


@dataclass(frozen=True)
class Stream:
    """What a primary writes: `head`, then `parts`, each of which ends with a CHECKPOINT_END."""

    head: bytes  #: the preamble, which libxl does not get
    parts: tuple[bytes, ...]

    @property
    def whole(self) -> bytes:
        return self.head + b"".join(self.parts)

    @property
    def ends(self) -> list[int]:
        """Offsets of the checkpoints' ends; the first one is the first copy's."""
        return [len(self.head) + sum(map(len, self.parts[:count])) for count in range(1, len(self.parts) + 1)]

    def handed(self, cut: int) -> bytes:
        """What libxl may get of a stream that is cut there: whole checkpoints, and of the first copy anything."""
        whole = max((end for end in self.ends if end <= cut), default=0)
        return self.whole[len(self.head) : max(whole, min(cut, self.ends[0]))]


def pages(count: int, fill: bytes) -> bytes:
    head = count.to_bytes(4, "little") + bytes(4)
    pfns = b"".join(number.to_bytes(8, "little") for number in range(count))
    return joined(raw_record(LibxcType.PAGE_DATA, head, pfns, (fill * 4096)[:4096] * count))


def stream(checkpoints: int, page_counts: Iterable[int] = ()) -> Stream:
    """Make one with so many checkpoints after the first copy; with pages in them only if so many are asked for."""
    counts = [*page_counts, *[0] * (checkpoints + 1)]
    parts = []
    for number in range(checkpoints + 1):
        part = b""
        if not number:
            part = libxl_header() + joined(record(LibxlType.LIBXC_CONTEXT))
            part += libxc_headers(GuestType.X86_HVM) + joined(record(LibxcType.STATIC_DATA_END))
        if counts[number]:
            part += pages(counts[number], bytes([number + 1]))
        part += joined(raw_record(LibxcType.HVM_CONTEXT, HVM_CONTEXT + bytes([number])))
        part += joined(record(LibxcType.CHECKPOINT)) + joined(checkpoint())
        parts.append(part)
    return Stream(preamble(CONFIG), tuple(parts))


def said(data: bytes, coding: Coding, seed: int | None = None) -> bytes:
    """Return what a primary sends for `data`; in pieces of random size if they are coded."""
    link = Hello(coding).encode()
    if coding is Coding.PLAIN:
        return link + data
    random_, encoder, at = random.Random(seed), Encoder(), 0
    while at < len(data):
        size = random_.randint(1, 700)
        header, body = encoder.encode(data[at : at + size])
        encoder.sent(len(header) + len(body), 10**9)  # slow: compresses whatever it can
        link += header + bytes(body)
        at += size
    return link


def pieces(data: bytes, seed: int, most: int = 300) -> Iterator[bytes]:
    random_, at = random.Random(seed), 0
    while at < len(data):
        size = random_.randint(1, most)
        yield data[at : at + size]
        at += size


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


class Listener:
    """Reads the secondary's answers.

    Args:
        sock: The primary's end of the connection.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.heard: list[Ack | Refusal] = []
        self._sock = sock
        self._sock.settimeout(10)
        self._answers = Answers()

    def next(self, count: int) -> list[Ack | Refusal]:
        """Read on until there are so many more; return those."""
        before = len(self.heard)
        while len(self.heard) < before + count:
            data = self._sock.recv(28)
            if not data:
                raise ConnectionResetError(f"the connection has ended after {self.heard}")
            self.heard += self._answers.feed(data)
        return self.heard[before:]

    def rest(self) -> list[Ack | Refusal]:
        """Read to the end of the connection; return all that was ever heard."""
        with suppress(ConnectionResetError):
            while data := self._sock.recv(4096):
                self.heard += self._answers.feed(data)
        return self.heard


class Reader:
    """libxl's stand-in: reads a pipe to its end in a thread, when it is let."""

    def __init__(self, *, reads: bool = True) -> None:
        self.fd, self.target = os.pipe2(os.O_CLOEXEC)
        self.got = bytearray()
        self.may_read = threading.Event()
        self.ended = threading.Event()
        if reads:
            self.may_read.set()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        self.may_read.wait()
        while data := os.read(self.fd, 1 << 16):
            self.got += data
        self.ended.set()

    def result(self) -> bytes:
        """What was read, to the end."""
        if not self.ended.wait(10):
            raise AssertionError(f"the restore's stream has not ended after {len(self.got)} bytes")
        return bytes(self.got)

    def close(self) -> None:
        self.may_read.set()
        self._thread.join(10)
        os.close(self.fd)


def descriptors() -> set[str]:
    """The process's open descriptors and what they are."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(f"{link.name} {link.readlink()}")
    return found
