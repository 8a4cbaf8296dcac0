"""A restorer without libxl, a process: ``played_restorer.py BEHAVIOUR CONTROL_FD [STREAM_FD]``.

It reads its stream to the end and says that it has made domain 8; or, by its behaviour:

* ``refuses``: libxl fails at once;
* ``leaves``: as without, but a process that it has started keeps its standard error open.

A command to rename a domain that is called ``die`` ends it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys


def main() -> None:
    behaviour, control_fd, *stream = sys.argv[1:]
    control = socket.socket(fileno=int(control_fd))
    lines = control.makefile("rw")

    def tell(**facts: object) -> None:
        lines.write(json.dumps(facts) + "\n")
        lines.flush()

    if behaviour == "leaves":
        subprocess.Popen(["sleep", "20"], start_new_session=True)
    tell(event="ready")
    for line in lines:
        command = json.loads(line)
        if command.get("old") == "die":
            os.write(2, b"libxl: assertion failed\n")
            os._exit(3)
        elif command["do"] != "restore":
            tell(id=command["id"], result=None)
        elif behaviour == "refuses":
            failed = {"operation": "libxl_domain_create_restore", "code": -3, "name": "FAIL", "domid": 0}
            tell(id=command["id"], failed={**failed, "said": ["no such bridge"]})
            os.close(int(stream[0]))
        else:
            while os.read(int(stream[0]), 1 << 16):
                pass
            tell(id=command["id"], result=8)


if __name__ == "__main__":
    main()
