"""What a testbed needs: skip with a sentence when it is not there, fail when it was demanded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def need(bed: str, missing: list[str]) -> None:
    """Skip the test if anything is missing, or fail it if UNDERSTUDY_REQUIRE names the bed.

    Args:
        bed: name of the testbed, such as ``qemu``.
        missing: what is not there, as in "the bed needs ...".
    """
    if not missing:
        return
    sentence = f"testbed {bed} needs {', '.join(missing)}"
    if bed in os.environ.get("UNDERSTUDY_REQUIRE", "").split(","):
        pytest.fail(f"{sentence}, and UNDERSTUDY_REQUIRE demands it")
    pytest.skip(sentence)


def missing_for_namespaces() -> list[str]:
    """Return what the laboratory of namespaces lacks here."""
    missing = [] if os.geteuid() == 0 else ["root"]
    missing += [f"the program {name}" for name in ("ip", "bridge") if shutil.which(name) is None]
    if not Path("/dev/net/tun").exists():
        missing.append("/dev/net/tun")
    return missing


def missing_for_qemu() -> list[str]:
    """Return what the tests with real QEMU processes lack here."""
    programs = ("qemu-system-x86_64", "qemu-img", "gcc", "nft")
    missing = [f"the program {name}" for name in programs if shutil.which(name) is None]
    if not Path("/bin/busybox").exists():
        missing.append("/bin/busybox (busybox-static)")
    return missing_for_namespaces() + missing
