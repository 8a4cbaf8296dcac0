"""Programs that misbehave on a host of the laboratory; each prints one line when it is ready or done.

``peer ADDRESS PORT OTHER``      an agent of host beta that speaks another version of the protocol
``garbage ADDRESS PORT...``      sends what is no agent's to every port, in every way it knows, then ends
``take FIRST LAST``              occupies every second TCP port from FIRST to LAST
``silent PATH``                  a Unix socket that accepts and says nothing
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress

from understudy.link.frame import Decoder, encode, preamble

OTHER_VERSION = 2
LIMIT_S = 3.0
CROWD = 48  # more than an agent hears at once


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def peer(address: str, port: int, other: str) -> None:
    """Dial an agent again and again, and refuse it when it dials, as a later version would do both."""
    who = {"host": "beta", "agent": "9.9", "protocol": OTHER_VERSION, "incarnation": "other"}

    async def dialled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reason = f"protocol version 1 is not version {OTHER_VERSION} of agent 9.9 on beta"
        with suppress(OSError):
            writer.write(
                preamble(OTHER_VERSION) + encode({"t": "refuse", "kind": "protocol", "reason": reason})
            )
            await reader.read()
            writer.close()

    async with await asyncio.start_server(dialled, address, port):
        _say("ready")
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(other, port)
                writer.write(preamble(OTHER_VERSION) + encode({"t": "hello", "peer": "alpha", **who}))
                answers = Decoder().feed(await reader.read())
                _say(" ".join(f"{answer.header['t']}: {answer.header.get('reason')}" for answer in answers))
                writer.close()
            await asyncio.sleep(0.2)


def garbage(address: str, ports: Sequence[int]) -> None:
    """Send garbage to every port, wait until the other end has hung up or fallen silent, and say so."""
    noise = random.Random(7).randbytes(4096)
    hello = encode({"t": "hello", "host": "nobody", "peer": "nobody", "protocol": 1, "incarnation": "x"})
    words = (
        noise,
        b"GET / HTTP/1.1\r\nHost: understudy\r\n\r\n",
        preamble() + noise,
        preamble() + struct.pack(">II", 1 << 31, 1 << 31),
        preamble() + struct.pack(">II", 7, 0) + b"not {} ",
        preamble() + encode({"t": "request", "id": 1, "to": "agent", "m": "yield", "p": {"guest": "demo"}}),
        preamble() + hello,
        preamble() + encode({"t": "welcome"}),
        preamble(65535) + hello * 100,
        b"",
    )
    for port in ports:
        # Most say nothing for as long as they are let.
        silent = [socket.create_connection((address, port), LIMIT_S) for _ in range(CROWD)]
        for word in words:
            with suppress(OSError), socket.create_connection((address, port), LIMIT_S) as sock:
                sock.sendall(word)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
        for sock in silent:
            sock.close()
    _say("done")


def take(first: int, last: int) -> None:
    """Occupy every second port and keep it."""
    held = [socket.create_server(("0.0.0.0", port)) for port in range(first, last + 1, 2)]  # noqa: S104
    _say(f"{len(held)} ports are taken")
    sys.stdin.read()


def silent(path: str) -> None:
    """Accept for ever and say nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        _say("ready")
        _kept = [listener.accept()[0] for _ in itertools.count()]


def main(argv: Sequence[str]) -> None:
    """Do what the arguments say."""
    what, *rest = argv
    if what == "peer":
        asyncio.run(peer(rest[0], int(rest[1]), rest[2]))
    elif what == "garbage":
        garbage(rest[0], [int(port) for port in rest[1:]])
    elif what == "take":
        take(int(rest[0]), int(rest[1]))
    else:
        silent(os.fspath(rest[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
