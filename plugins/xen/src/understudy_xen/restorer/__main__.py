"""The process that makes a domain from a stream: ``python -m understudy_xen.restorer CONTROL_FD [STREAM_FD]``.

It speaks JSON lines on the control socket. Out, unasked::

    {"event": "ready"}                         once, first; or, instead, and then it ends:
    {"event": "refused", "problem": ..., "remedy": ...}
    {"event": "log", "level": 30, "context": "libxl", "text": ...}
    {"event": "progress", "doing": ..., "done": ..., "total": ...}

In: ``{"id": 1, "do": "restore", ...}``, one at a time; each is answered by ``{"id": 1, "result": ...}`` or
``{"id": 1, "failed": {"operation", "code", "name", "domid", "said"}}``.

When the control socket closes, the agent is gone. What is under way has some time to end, because a stream that ends
with it is the moment at which the domain is made from it; then this process ends with its children, and leaves the
domain as it is.

As little as possible is imported: the start is part of the time that a takeover takes where it was not made before.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Final

from understudy_xen.libs.errors import LibxlFailed, XenCallFailed, XenUnavailable
from understudy_xen.libs.light import Light
from understudy_xen.libs.toollog import ToolLog
from understudy_xen.libs.versions import running_version

ORPHANED_S: Final = 20.0  #: for what is under way when the agent is gone

_Command = dict[str, Any]


class Control:
    """The agent's end of this process."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._lock = threading.Lock()
        self._commands: SimpleQueue[_Command | None] = SimpleQueue()
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def tell(self, **facts: Any) -> None:
        """Send a line; nobody may be there to read it."""
        line = json.dumps(facts).encode() + b"\n"
        with self._lock:
            try:
                self._socket.sendall(line)
            except OSError:
                return

    def commands(self) -> Iterator[_Command]:
        """Yield what the agent wants, until it is gone."""
        while (command := self._commands.get()) is not None:
            yield command

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines:
            try:
                for line in lines:
                    self._commands.put(json.loads(line))
            except OSError:
                pass  # as good as its end
        self._commands.put(None)
        # Still here after that time: libxl hangs, or spins in a stream that was cut where it does not expect it.
        threading.Event().wait(ORPHANED_S)
        os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Serve the agent until it closes the control socket; return the exit status."""
    control_fd = int(sys.argv[1])
    stream_fd = int(sys.argv[2]) if len(sys.argv) > 2 else -1  # noqa: PLR2004 - the name, the one, the other
    for fd in (control_fd, stream_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)  # not into libxl's children  # noqa: FBT003
    control = Control(control_fd)
    log = ToolLog(
        lambda level, context, text: control.tell(event="log", level=level, context=context, text=text),
        lambda doing, done, total: control.tell(event="progress", doing=doing, done=done, total=total),
    )
    try:
        light = Light(running_version(), log)
    except XenUnavailable as error:
        control.tell(event="refused", problem=error.problem, remedy=error.remedy)
        return 1
    except LibxlFailed as error:
        control.tell(
            event="refused",
            problem=str(error),
            remedy="run the agent as root in dom0, with xenstored running",
        )
        return 1
    control.tell(event="ready")
    for command in control.commands():
        try:
            result = carry_out(light, command, stream_fd)
        except LibxlFailed as error:
            failed = {
                "operation": error.operation,
                "code": error.code,
                "name": error.name,
                "domid": error.domid,
                "said": error.said,
            }
            control.tell(id=command["id"], failed=failed)
        except XenCallFailed as error:
            failed = {
                "operation": error.function,
                "code": -1,
                "name": str(error),
                "domid": error.domid,
                "said": (),
            }
            control.tell(id=command["id"], failed=failed)
        else:
            control.tell(id=command["id"], result=result)
    return 0


def carry_out(light: Light, command: _Command, stream_fd: int) -> object:
    """Do what one command says, and return its result."""
    match command["do"]:
        case "restore":
            try:
                return light.restore(command["config"], stream_fd, checkpointed=command["checkpointed"])
            finally:
                os.close(stream_fd)  # whoever writes the stream is to notice that nobody reads it any more
        case "create":
            return light.create(command["config"])
        case "config":
            return light.config(command["domid"])
        case "unpause":
            light.unpause(command["domid"])
        case "rename":
            light.rename(command["domid"], command["old"], command["new"])
        case "destroy":
            light.destroy(command["domid"])
        case unknown:
            raise XenCallFailed(f"the command {unknown!r}", 0)
    return None


if __name__ == "__main__":
    status = main()
    # Not through Python's end: a thread may be in the socket, and libxl's children are not waited for by anybody.
    sys.stdout.flush()
    os._exit(status)
