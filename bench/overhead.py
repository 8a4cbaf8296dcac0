"""What it costs a guest that its disks are below a quorum while it is not protected.

QEMU's own block layer is driven without a guest, so that nothing hides the cost: a guest's virtio request costs
several times as much as what is measured here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.figures import Figure, ratio
from understudy_qemu.machine import quorum_node

__all__ = ["measure"]

_IMAGE_BYTES = 64 << 20
_REQUEST_BYTES = 4096
_DEPTH = 16


def measure(rounds: int = 7, requests: int = 60_000) -> list[Figure]:
    """Write 4 KiB blocks through a quorum of one and without it, in turns.

    Args:
        rounds: How many samples of each.
        requests: How many writes one sample takes.
    """
    tool = Path(os.environ.get("UNDERSTUDY_QEMU", "")).with_name("qemu-img") if _other() else Path("qemu-img")
    plain, quorum = [], []
    with tempfile.TemporaryDirectory(prefix="understudy-bench-", dir=_memory()) as place:
        image = Path(place, "disk.qcow2")
        create = [
            str(tool),
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "preallocation=full",
            str(image),
            str(_IMAGE_BYTES),
        ]
        subprocess.run(create, check=True)
        below = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
        above = {**quorum_node("disk0", ""), "children": [below]}
        for options in (below, above):
            _request_us(tool, options, requests // 10)  # what is read only once is read now
        for _ in range(rounds):
            plain.append(_request_us(tool, below, requests))
            quorum.append(_request_us(tool, above, requests))
    ours, theirs = Figure("disk_quorum_us", quorum), Figure("disk_plain_us", plain)
    return [ours, theirs, ratio("disk_quorum_vs_plain_ratio", ours, theirs)]


def _request_us(tool: Path, options: Mapping[str, Any], requests: int) -> float:
    named = {key: value for key, value in options.items() if key != "node-name"}
    command = [str(tool), "bench", "-w", "-t", "writeback", "-c", str(requests), "-d", str(_DEPTH)]
    command += ["-s", str(_REQUEST_BYTES), f"json:{json.dumps(named)}"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1e6 / requests


def _other() -> bool:
    return "/" in os.environ.get("UNDERSTUDY_QEMU", "")


def _memory() -> str | None:
    # Where the disk itself costs as little as can be.
    return "/dev/shm" if shutil.disk_usage("/dev/shm").free > 2 * _IMAGE_BYTES else None  # noqa: S108
