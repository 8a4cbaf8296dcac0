"""Send UDP to the tiny guest as fast as a busy client does, for so many seconds: ``flood.py SECONDS``."""

from __future__ import annotations

import socket
import sys
import time


def main() -> None:
    """Send until the time is over."""
    end = time.monotonic() + float(sys.argv[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        while time.monotonic() < end:
            for _ in range(20):
                sock.sendto(bytes(1400), ("10.77.0.2", 9999))
            time.sleep(0.0005)


if __name__ == "__main__":
    main()
