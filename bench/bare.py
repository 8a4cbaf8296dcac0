"""QEMU driven by its own documented commands and nothing else: what Understudy is compared with.

One blocking socket, one command at a time, no checks and no deadlines but one. Standard library alone, because as a
program, ``python -m bench.bare takeover`` or ``checkpoints``, it runs inside a host of the laboratory, in the place of
that host's agent.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["NEVER_MS", "Qmp", "Refused", "checkpoint_ms"]

NEVER_MS = 100_000_000  #: more than a day: QEMU takes no checkpoint by itself

_CONNECT_S = 20.0
_ANSWER_S = 20.0
_SETTLE_S = 0.5
# Source: QEMU qapi/net.json, AnnounceParameters; milliseconds.
_ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}


class Refused(Exception):
    """Say what QEMU said instead of carrying out a command."""


class Qmp:
    """A connected monitor.

    Args:
        path: Its socket; it may still be to come.
    """

    def __init__(self, path: Path) -> None:
        self.events: list[Mapping[str, Any]] = []  #: that nobody has taken yet
        self._socket = _connected(path)
        self._lines = self._socket.makefile("rb")
        self._message()
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Give a command and wait for its answer.

        Raises:
            Refused: QEMU did not carry it out.
        """
        request = {"execute": command, "arguments": dict(arguments or {})}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._message()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise Refused(f"{command}: {message['error']['desc']}")
            self.events.append(message)

    def event_ns(self, name: str) -> int:
        """Wait for the next event `name` and return when QEMU saw it, realtime; what came before it is dropped."""
        while True:
            event = self.events.pop(0) if self.events else self._message()
            if event["event"] == name:
                stamp = event["timestamp"]
                return int(stamp["seconds"]) * 1_000_000_000 + int(stamp["microseconds"]) * 1000

    def close(self) -> None:
        """Let go of it."""
        self._lines.close()
        self._socket.close()

    def _message(self) -> Mapping[str, Any]:
        line = self._lines.readline()
        if not line:
            raise Refused("QEMU has ended")
        message: Mapping[str, Any] = json.loads(line)
        return message


def _connected(path: Path) -> socket.socket:
    until = time.monotonic() + _CONNECT_S
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(_ANSWER_S)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return sock


def take_over(qmp: Qmp, taps: Mapping[str, str]) -> tuple[int, int]:
    """Make the guest of a copy: what QEMU's document on COLO says for a lost primary, then the network.

    Args:
        qmp: The copy's monitor.
        taps: Bridge of each of its taps.

    Returns:
        When it began and when the guest ran with its network, CLOCK_MONOTONIC in ns.

    Source: QEMU docs/COLO-FT.txt, "Primary Failover".
    """
    # Names that a script knows beforehand. The rewriter stays: connections need it.
    objects = [entry["name"] for entry in qmp.execute("qom-list", {"path": "/objects"}) if _redirects(entry)]
    wires = [entry["label"] for entry in qmp.execute("query-chardev") if "primary" in entry["label"]]
    began_ns = time.monotonic_ns()
    qmp.execute("nbd-server-stop")
    qmp.execute("x-colo-lost-heartbeat")
    for name in objects:
        qmp.execute("object-del", {"id": name})
    for name in wires:
        qmp.execute("chardev-remove", {"id": name})
    while qmp.execute("query-status")["status"] != "running":
        time.sleep(0.001)
    for tap, bridge in taps.items():
        subprocess.run(["ip", "link", "set", tap, "master", bridge, "up"], check=True)
    qmp.execute("announce-self", _ANNOUNCE)
    return began_ns, time.monotonic_ns()


def checkpoint_ms(qmp: Qmp, held: Sequence[str] = ()) -> float:
    """Take one checkpoint of a guest that COLO copies; return how long it stood still, by QEMU's own events.

    Args:
        qmp: The primary's monitor; the guest runs.
        held: Interfaces whose output two filter-buffer objects hold, ``NAME-epoch`` and ``NAME-ended``: what was sent
            is put apart while the guest stands still.

    Source: QEMU qapi/migration.json, x-checkpoint-delay; each write of it begins a checkpoint.
    """
    qmp.events.clear()
    qmp.execute("stop")
    for name in held:
        _pass_on(qmp, f"{name}-epoch")
    qmp.execute("migrate-set-parameters", {"x-checkpoint-delay": NEVER_MS})
    stopped_ns = qmp.event_ns("STOP")
    return (qmp.event_ns("RESUME") - stopped_ns) / 1e6


def _pass_on(qmp: Qmp, name: str) -> None:
    for status in ("off", "on"):
        qmp.execute("qom-set", {"path": f"/objects/{name}", "property": "status", "value": status})


def checkpoints(qmp: Qmp, count: int, run_s: float, held: Sequence[str]) -> dict[str, list[float]]:
    """Take checkpoints in turns, without and with what `held` asks for.

    Args:
        qmp: The primary's monitor.
        count: How many of each kind.
        run_s: How long the guest runs before each.
        held: As for `checkpoint_ms`.

    Returns:
        The pauses, ``plain_ms`` and ``held_ms``.
    """
    # Whoever drove this guest before may have gone in the middle of a checkpoint; the first one here ends that, too.
    qmp.execute("migrate-set-parameters", {"x-checkpoint-delay": NEVER_MS})
    qmp.event_ns("RESUME")
    time.sleep(_SETTLE_S)
    qmp.execute("query-status")  # reads what was told until now
    pauses: dict[str, list[float]] = {"plain_ms": [], "held_ms": []}
    for _ in range(count):
        time.sleep(run_s)
        pauses["plain_ms"].append(checkpoint_ms(qmp))
        time.sleep(run_s)
        pauses["held_ms"].append(checkpoint_ms(qmp, held))
        for name in held:
            _pass_on(qmp, f"{name}-ended")
    return pauses


def _redirects(entry: Mapping[str, Any]) -> bool:
    return bool(entry["type"] == "child<filter-redirector>")


def main(argv: Sequence[str]) -> int:
    """Do what is asked for; print what was measured as one line of JSON.

    ``takeover`` waits for a line with the moment of suspicion, connects before it, takes over then, and prints two
    moments. ``checkpoints`` prints pauses.
    """
    parser = argparse.ArgumentParser(prog="bench.bare", description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    takeover = what.add_parser("takeover")
    takeover.add_argument("socket", type=Path, help="the copy's monitor")
    takeover.add_argument("taps", nargs="*", metavar="TAP=BRIDGE")
    cycle = what.add_parser("checkpoints")
    cycle.add_argument("socket", type=Path, help="the primary's monitor")
    cycle.add_argument("count", type=int)
    cycle.add_argument("run_ms", type=float)
    cycle.add_argument("held", nargs="*", metavar="NIC")
    chosen = parser.parse_args(argv)
    if chosen.what == "takeover":
        taps = dict(pair.split("=", 1) for pair in chosen.taps)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        suspect_ns = int(sys.stdin.readline())
        qmp = Qmp(chosen.socket)
        time.sleep(max(0.0, (suspect_ns - time.monotonic_ns()) / 1e9))
        began_ns, running_ns = take_over(qmp, taps)
        told: Mapping[str, Any] = {"began_ns": began_ns, "running_ns": running_ns}
    else:
        told = checkpoints(Qmp(chosen.socket), chosen.count, chosen.run_ms / 1e3, chosen.held)
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
