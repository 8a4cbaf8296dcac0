"""Ask the agent of this host. Blocking and small: a command line has nothing else to do meanwhile."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from understudy.config import config_path, read_config
from understudy.errors import UnderstudyError

__all__ = ["AgentUnreachable", "Refused", "ask", "socket_path"]

CONNECT_LIMIT_S = 5.0


class AgentUnreachable(UnderstudyError):
    """No agent answers on this host."""


class Refused(UnderstudyError):
    """The agent answered with an error.

    Args:
        fault: What it sent; see `understudy.agent.faults.describe`.
    """

    def __init__(self, fault: Mapping[str, Any]) -> None:
        super().__init__(str(fault.get("message", "the agent gave no reason")))
        self.fault = fault


def socket_path(config: str | None) -> Path:
    """Return where this host's agent listens.

    Raises:
        ConfigError: agent.toml cannot be read.
    """
    return read_config(config_path(config)).socket


def ask(
    path: Path,
    method: str,
    params: Mapping[str, Any],
    *,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Any:
    """Send one request to the agent and return its result.

    Args:
        path: The agent's socket.
        method: What to do.
        params: JSON-able arguments.
        progress: Told how far copies are.
        note: Told what the agent has to say meanwhile.

    Raises:
        AgentUnreachable: Nobody answers.
        Refused: The agent answered with an error. After Ctrl-C that is how the request ended: the agent is told to
            undo it, and its answer is waited for; a second Ctrl-C does not wait.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(CONNECT_LIMIT_S)
        try:
            sock.connect(str(path))
            sock.sendall(json.dumps({"method": method, "params": params}).encode() + b"\n")
        except OSError as error:
            raise _unreachable(path, error) from error
        sock.settimeout(None)
        lines = sock.makefile("rb")
        try:
            return _receive(lines, path, progress, note)
        except KeyboardInterrupt:
            if note:
                note("calling it off …")
            sock.shutdown(socket.SHUT_WR)
            return _receive(lines, path, progress, note)


def _receive(
    lines: Any,
    path: Path,
    progress: Callable[[Mapping[str, Any]], None] | None,
    note: Callable[[str], None] | None,
) -> Any:
    for line in lines:
        message = json.loads(line)
        if "result" in message:
            return message["result"]
        if "error" in message:
            raise Refused(message["error"])
        if "progress" in message and progress:
            progress(message["progress"])
        elif "note" in message and note:
            note(message["note"])
    raise AgentUnreachable(f"the agent on {path} closed the connection without an answer; its log says why")


def _unreachable(path: Path, error: OSError) -> AgentUnreachable:
    if isinstance(error, PermissionError):
        return AgentUnreachable(
            f"you may not talk to the agent on {path}: only root and the agent's own user may"
        )
    if isinstance(error, TimeoutError):
        return AgentUnreachable(f"the agent on {path} does not answer; its log may say why")
    return AgentUnreachable(
        f"no agent answers on {path}. Start it with 'systemctl start understudy', or by hand with "
        "'understudy agent run'"
    )
