"""Talk to the tiny guest and verify every reply: ``python -m understudy_qemu.demo.client``.

Runs as a process of its own, because it lives in a network namespace. Standard library only. Prints
one JSON object a line: first ``{"greeting": ...}``, then one object per word with ``t_send_ns`` and
``t_reply_ns`` (CLOCK_MONOTONIC), ``wall_ns`` (of the reply), ``n``, ``ok``, ``hash`` and, when not
ok, ``why``; last ``{"summary": ...}``. SIGTERM and SIGINT end it in an orderly way.
"""

from __future__ import annotations

import argparse
import json
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from understudy_qemu.demo.chain import WORDS_PORT, BrokenChain, Chain, Greeting, Reply


@dataclass(slots=True)
class Totals:
    """What a client has seen, for its last line."""

    words: int = 0
    acknowledged: int = 0
    bad: int = 0
    unanswered: int = 0
    connection_kept: bool = True
    longest_gap_ms: float = 0.0
    rtt_ms: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """Return the totals with the round-trip times as p50, p99 and max."""
        out = asdict(self)
        rtt = sorted(self.rtt_ms)
        out["rtt_ms"] = (
            {"p50": rtt[len(rtt) // 2], "p99": rtt[len(rtt) * 99 // 100], "max": rtt[-1]} if rtt else None
        )
        return out


class Client:
    """One connection to the guest.

    Args:
        sock: connected; becomes non-blocking.
        interval_s: between words. A word is sent only when fewer than ``window`` wait for an answer.
        timeout_s: a word without answer for this long is a lost connection.
        window: words under way at a time.
    """

    def __init__(self, sock: socket.socket, *, interval_s: float, timeout_s: float, window: int = 1) -> None:
        self._sock = sock
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._window = window
        self._received = b""
        self._waiting: list[tuple[str, int]] = []
        self._stopped = False
        self._last = 0.0  # when the last reply came, CLOCK_MONOTONIC
        self.totals = Totals()

    def stop(self) -> None:
        """Send no more words; wait for the outstanding replies and end."""
        self._stopped = True

    def run(self, connection_id: int, *, count: int = 0, duration_s: float = 0.0) -> Totals:
        """Send words until ``count`` or ``duration_s`` is reached (0 is no limit) or :meth:`stop`.

        Guarantees:
            Everything observed has been printed; the connection is closed.
        """
        try:
            self._sock.sendall(f"HELLO {connection_id:016x}\n".encode())
            greeting = Greeting.parse(self._line(time.monotonic() + self._timeout_s))
            _print({"greeting": asdict(greeting)})
            self._talk(Chain(greeting), count, duration_s)
        except (OSError, BrokenChain, EOFError) as error:
            self._lost(str(error) or type(error).__name__)
        finally:
            self._sock.close()
        self.totals.unanswered = len(self._waiting)
        return self.totals

    def _talk(self, chain: Chain, count: int, duration_s: float) -> None:
        totals = self.totals
        start = due = self._last = time.monotonic()
        while True:
            now = time.monotonic()
            if (count and totals.words >= count) or (duration_s and now - start >= duration_s):
                self._stopped = True
            if self._stopped and (not self._waiting or now - self._last > self._timeout_s):
                return
            free = not self._stopped and len(self._waiting) < self._window
            if free and now >= due:
                self._send_word()
                due = max(due + self._interval_s, now)
                continue
            oldest_ns = self._waiting[0][1] if self._waiting else time.monotonic_ns()
            lost_at = oldest_ns / 1e9 + self._timeout_s
            try:
                self._answer(chain, self._line(min(lost_at, due) if free else lost_at))
            except TimeoutError:
                if self._waiting and time.monotonic() >= lost_at:
                    raise

    def _send_word(self) -> None:
        self.totals.words += 1
        word = f"word-{self.totals.words}"
        self._waiting.append((word, time.monotonic_ns()))
        self._sock.sendall(word.encode() + b"\n")

    def _answer(self, chain: Chain, line: str) -> None:
        now = time.monotonic_ns()
        if not self._waiting:
            raise BrokenChain(f"a reply that nobody asked for: {line!r}")
        word, sent = self._waiting.pop(0)
        report: dict[str, object] = {
            "t_send_ns": sent,
            "t_reply_ns": now,
            "wall_ns": time.time_ns(),
            "n": chain.n + 1,
            "ok": True,
        }
        try:
            reply = Reply.parse(line)
            report["hash"] = reply.hash
            chain.follow(word, reply)
        except BrokenChain as error:
            report.update(ok=False, why=str(error))
            self.totals.bad += 1
            self.totals.problems = [*self.totals.problems, str(error)][:10]
        if self.totals.acknowledged:
            gap_ms = round(now / 1e6 - self._last * 1e3, 3)
            self.totals.longest_gap_ms = max(self.totals.longest_gap_ms, gap_ms)
        self._last = now / 1e9
        self.totals.acknowledged += 1
        self.totals.rtt_ms.append(round((now - sent) / 1e6, 3))
        _print(report)

    def _line(self, limit: float) -> str:
        while b"\n" not in self._received:
            left = limit - time.monotonic()
            # A signal handler may have set the flag while select slept: wake up often enough.
            ready, _, _ = select.select([self._sock], [], [], min(max(left, 0.0), 0.1))
            if ready:
                data = self._sock.recv(65536)
                if not data:
                    raise EOFError("the guest closed the connection")
                self._received += data
            elif left <= 0 or self._stopped:
                raise TimeoutError(f"no reply for {self._timeout_s} s")
        line, self._received = self._received.split(b"\n", 1)
        return line.decode(errors="replace")

    def _lost(self, why: str) -> None:
        self.totals.connection_kept = False
        self.totals.problems = [*self.totals.problems, why][:10]
        _print({"lost": why, "t_ns": time.monotonic_ns(), "wall_ns": time.time_ns()})


def _print(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """Connect within ``timeout_s``, trying again while the guest is not up yet.

    Raises:
        OSError: the last reason why it did not work.
    """
    limit = time.monotonic() + timeout_s
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=2.0)
        except OSError:
            if time.monotonic() >= limit:
                raise
            time.sleep(0.1)
        else:
            sock.settimeout(timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock


def main(argv: Sequence[str] | None = None) -> int:
    """Run one client; exit code 0 when every word was acknowledged rightly, else 1."""
    parser = argparse.ArgumentParser(prog="understudy_qemu.demo.client", description=__doc__)
    parser.add_argument("--host", default="10.77.0.2")
    parser.add_argument("--port", type=int, default=WORDS_PORT)
    parser.add_argument("--id", type=lambda text: int(text, 16), help="16 hexadecimal digits")
    parser.add_argument("--interval-ms", type=float, default=50.0)
    parser.add_argument("--count", type=int, default=0, help="words to send, 0 for no limit")
    parser.add_argument("--duration-s", type=float, default=0.0)
    parser.add_argument("--timeout-s", type=float, default=20.0)
    parser.add_argument("--connect-timeout-s", type=float, default=30.0)
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the default and only format")
    options = parser.parse_args(argv)
    try:
        sock = connect(options.host, options.port, options.connect_timeout_s)
    except OSError as error:
        totals = Totals(connection_kept=False, problems=[f"cannot connect: {error}"])
    else:
        client = Client(
            sock,
            interval_s=options.interval_ms / 1e3,
            timeout_s=options.timeout_s,
            window=options.window,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: client.stop())
        chosen = secrets.randbits(64) if options.id is None else options.id
        totals = client.run(chosen, count=options.count, duration_s=options.duration_s)
    _print({"summary": totals.summary()})
    sound = totals.connection_kept and not totals.bad and not totals.unanswered
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
