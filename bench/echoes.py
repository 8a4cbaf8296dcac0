"""Ask a guest for numbered echoes at some rate and count those that never come: ``python -m bench.echoes ADDRESS``.

Standard library alone: it runs as root in the client's network namespace. Each line of its standard input is how many
echoes it asks for in a second from now on. It ends with its standard input, waits for what is still on its way, and
prints one line of JSON: for every tenth of a second of CLOCK_MONOTONIC how many echoes were asked for in it, and how
many of these were answered.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Sequence

__all__ = ["ECHO_BYTES", "SLICE_NS", "answered", "request"]

ECHO_BYTES = 400  #: of an echo, its ICMP header included; 20 more with its IP header
SLICE_NS = 100_000_000
_HEADER = struct.Struct("!BBHHHQ")  # ICMP's, then our number
_IP_BYTES = 20
_REQUEST, _REPLY = 8, 0
_TICK_S = 0.001
_AT_ONCE = 32  # what has come is taken in between
_BUFFER_BYTES = 256 << 20
_SO_RCVBUFFORCE = 33


def request(identity: int, number: int) -> bytes:
    """Return an echo request.

    Args:
        identity: Of the one who asks, 16 bits.
        number: Of the echo, 64 bits.

    Source: RFC 792, RFC 1071.
    """
    header = _HEADER.pack(_REQUEST, 0, 0, identity, number & 0xFFFF, number)
    total = sum(struct.unpack(f"!{_HEADER.size // 2}H", header))  # what follows is zeros
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return _HEADER.pack(_REQUEST, 0, ~total & 0xFFFF, identity, number & 0xFFFF, number).ljust(
        ECHO_BYTES, b"\0"
    )


def answered(packet: bytes, identity: int) -> int | None:
    """Return which echo an IP packet answers, `None` if it is no answer for `identity`."""
    if len(packet) < _IP_BYTES + _HEADER.size:
        return None
    kind, _, _, whose, _, number = _HEADER.unpack_from(packet, _IP_BYTES)
    return number if kind == _REPLY and whose == identity else None


class Echoes:
    """Echoes asked of one address.

    Args:
        address: IPv4.
        identity: As for `request`.
    """

    def __init__(self, address: str, identity: int) -> None:
        self._identity = identity
        self._sent: list[int] = []  # by number: when it was asked for
        self._missing: set[int] = set()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        # A gate that opens sends thousands of answers at once: none may be lost here.
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._socket.connect((address, 0))
        self._socket.settimeout(0)

    def ask(self) -> None:
        """Ask for the next echo."""
        number = len(self._sent)
        self._sent.append(time.monotonic_ns())
        self._missing.add(number)
        # What this side's own queue dropped would look like a loss on the way.
        select.select([], [self._socket], [])
        self._socket.send(request(self._identity, number))

    def take(self, wait_s: float) -> None:
        """Take what has been answered, waiting for the first answer for so long."""
        select.select([self._socket], [], [], wait_s)
        while True:
            try:
                number = answered(self._socket.recv(ECHO_BYTES + _IP_BYTES), self._identity)
            except BlockingIOError:
                return
            if number is not None:
                self._missing.discard(number)

    def close(self) -> None:
        """Ask and take no more."""
        self._socket.close()

    @property
    def asked(self) -> int:
        """How many echoes have been asked for."""
        return len(self._sent)

    @property
    def waiting(self) -> int:
        """How many echoes have not been answered."""
        return len(self._missing)

    def slices(self) -> list[tuple[int, int, int]]:
        """Return (which tenth of a second, asked for, answered) for each of them, in order."""
        asked = Counter(sent_ns // SLICE_NS for sent_ns in self._sent)
        missed = Counter(self._sent[number] // SLICE_NS for number in self._missing)
        return [(which, count, count - missed[which]) for which, count in sorted(asked.items())]


class Rates:
    """How many echoes are due, by the lines of standard input."""

    def __init__(self) -> None:
        self.ended = False
        self._rate_hz = 0.0
        self._since_s = time.monotonic()
        self._before = 0.0  # that were due at that time

    def due(self) -> int:
        """Return how many are due by now."""
        now_s = time.monotonic()
        self._before += (now_s - self._since_s) * self._rate_hz
        self._since_s = now_s
        if select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline()
            self.ended = not line
            self._rate_hz = float(line) if line else 0.0
        return int(self._before)


def main(argv: Sequence[str]) -> int:
    """Ask until standard input ends."""
    parser = argparse.ArgumentParser(prog="bench.echoes", description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--drain-s", type=float, default=10.0, help="how long the last answers may take")
    chosen = parser.parse_args(argv)
    echoes = Echoes(chosen.address, time.monotonic_ns() & 0xFFFF)
    rates = Rates()
    while not rates.ended:
        waits = True
        for _ in range(min(_AT_ONCE, rates.due() - echoes.asked)):
            echoes.ask()
            waits = False
        echoes.take(_TICK_S if waits else 0.0)
    until = time.monotonic() + chosen.drain_s
    while echoes.waiting and time.monotonic() < until:
        echoes.take(_TICK_S)
    sys.stdout.write(json.dumps(echoes.slices()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
