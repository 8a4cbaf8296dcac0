"""Open connections to the tiny guest at given moments and talk over each of them until told to end.

Standard input: one moment a line (seconds of the realtime clock), then ``end``. Standard output: one JSON list with one
object for each connection: ``connect_s``, ``first_reply_s``, ``longest_s`` (of any reply), ``words``, ``lost``.
Runs in a network namespace of its own; the standard library alone.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from typing import Any

_TIMEOUT_S = 15.0
_PAUSE_S = 0.05


def talk(number: int, moment: float, stop: threading.Event, out: list[dict[str, Any]]) -> None:
    """Open connection `number` at `moment` and send a word again and again."""
    time.sleep(max(0.0, moment - time.time()))
    told: dict[str, Any] = {"connect_s": 0.0, "first_reply_s": 0.0, "longest_s": 0.0, "words": 0, "lost": ""}
    out.append(told)
    began = time.monotonic()
    try:
        with socket.create_connection(("10.77.0.2", 5001), timeout=_TIMEOUT_S) as sock:
            told["connect_s"] = time.monotonic() - began
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            replies = sock.makefile("rb")
            ask(sock, replies, f"HELLO {number + 1:016x}", told)
            told["first_reply_s"] = time.monotonic() - began
            while not stop.is_set():
                answer = ask(sock, replies, f"word-{told['words']}", told)
                told["words"] += 1
                if answer.split()[0] != str(told["words"]).encode():
                    raise ValueError(f"wrong reply {answer!r}")
                stop.wait(_PAUSE_S)
    except (OSError, ValueError, EOFError) as error:
        told["lost"] = repr(error)


def ask(sock: socket.socket, replies: Any, word: str, told: dict[str, Any]) -> bytes:
    """Send one word and return its answer."""
    began = time.monotonic()
    sock.sendall(word.encode() + b"\n")
    answer: bytes = replies.readline()
    told["longest_s"] = max(told["longest_s"], time.monotonic() - began)
    if not answer:
        raise EOFError("the guest closed the connection")
    return answer


def main() -> None:
    """Do what standard input says."""
    stop = threading.Event()
    out: list[dict[str, Any]] = []
    threads: list[threading.Thread] = []
    for line in sys.stdin:
        if line.startswith("end"):
            break
        arguments = (len(threads), float(line), stop, out)
        threads.append(threading.Thread(target=talk, args=arguments, daemon=True))
        threads[-1].start()
    stop.set()
    for thread in threads:
        thread.join(2 * _TIMEOUT_S)
    sys.stdout.write(json.dumps(out))


if __name__ == "__main__":
    main()
