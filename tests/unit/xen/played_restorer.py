"""A restorer without libxl, a process: ``played_restorer.py BEHAVIOUR CONTROL_FD [STREAM_FD]``.

It reads its stream to the end and says that it has made domain 8; or, by its behaviour:

* ``refuses``: libxl fails at once;
* ``fails``: libxl fails when a part of the stream has come, and says so some time after it has closed it;
* ``makes-slowly``: takes its time to make the domain when its stream has ended;
* ``lingers``: takes its time for each command, and for its end;
* ``stuck``: cannot let a domain run;
* ``leaves``: as without, but a process that it has started keeps its standard error open;
* ``breeds``: likewise, but the process is in its group;
* ``fragile``: ends at a rename, if it has had a stream;
* ``fragile-and-strict``: likewise, and refuses one otherwise.

A command to rename a domain that is called ``die`` ends it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time


def main() -> None:
    behaviour, control_fd, *stream = sys.argv[1:]
    control = socket.socket(fileno=int(control_fd))
    lines = control.makefile("rw")

    def tell(**facts: object) -> None:
        lines.write(json.dumps(facts) + "\n")
        lines.flush()

    if behaviour in {"leaves", "breeds"}:
        subprocess.Popen(["sleep", "20"], start_new_session=behaviour == "leaves")
    tell(event="ready")
    for line in lines:
        command = json.loads(line)
        if behaviour == "lingers":
            time.sleep(0.2)
        renames = command["do"] == "rename"
        if command.get("old") == "die" or (behaviour.startswith("fragile") and stream and renames):
            os.write(2, b"libxl: assertion failed\n")
            os._exit(3)
        if command["do"] == "restore":
            tell(id=command["id"], **restored(behaviour, int(stream[0])))
        elif behaviour == "fragile-and-strict" and renames:
            tell(id=command["id"], failed=failure("libxl_domain_rename", "it has another name"))
        elif behaviour == "stuck" and command["do"] == "unpause":
            tell(id=command["id"], failed=failure("libxl_domain_unpause", "the device model is dead"))
        else:
            tell(id=command["id"], result=None)
    if behaviour == "lingers":
        time.sleep(0.3)


def restored(behaviour: str, stream: int) -> dict[str, object]:
    if behaviour != "refuses":
        while os.read(stream, 1 << 16) and behaviour != "fails":
            pass
    os.close(stream)
    if behaviour in {"fails", "makes-slowly"}:
        time.sleep(0.1)
    if behaviour in {"refuses", "fails"}:
        return {"failed": failure("libxl_domain_create_restore", "no such bridge")}
    return {"result": 8}


def failure(operation: str, said: str) -> dict[str, object]:
    return {"operation": operation, "code": -3, "name": "FAIL", "domid": 8, "said": [said]}


if __name__ == "__main__":
    main()
