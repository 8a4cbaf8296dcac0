"""The inner end of the post of the Xen bed: a port of a virtio console, as quick as a pipe and of any length.

Source:
    drivers/char/virtio_console.c (a port that the outside has closed reads as ended), hw/char/virtio-serial-bus.c.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from tests.testbeds.post import Post

__all__ = ["PORT", "inside"]

PORT: Final = "understudy"
PORT_S: Final = 5.0


def inside() -> Post:
    """Return dom0's end.

    Raises:
        FileNotFoundError: there is no such port.
    """
    deadline = time.monotonic() + PORT_S
    while True:
        # No udev makes /dev/virtio-ports here.
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == PORT:
                return Post(os.open(f"/dev/{name.parent.name}", os.O_RDWR | os.O_CLOEXEC))
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"no virtio port is named {PORT}")
        time.sleep(0.01)
