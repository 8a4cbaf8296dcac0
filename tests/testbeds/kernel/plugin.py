"""The pytest plugin of the kernel bed: tests marked ``kernel`` run inside it; see `tests.testbeds.plugin`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.testbeds.kernel.machine import MEMORY_MIB, Machine, missing_for_kernel
from tests.testbeds.kernel.post import inside, outside
from tests.testbeds.modulebed import Bed
from tests.testbeds.plugin import configure
from tests.testbeds.post import Post


def _boot(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], sizes: Mapping[str, int]
) -> tuple[Machine, Post]:
    machine = Machine(command, cwd=cwd, env=env, memory_mib=sizes["memory_mib"])
    return machine, outside(machine.line.fileno(), machine.run)


KERNEL: Final = Bed(
    name="kernel",
    missing=missing_for_kernel,
    runs_inside=lambda _: True,
    sizes={"memory_mib": MEMORY_MIB},
    boot=_boot,
    inside=inside,
    boot_s=60.0,  # 4 s on an idle machine
)


def pytest_configure(config: pytest.Config) -> None:
    """Be what `configure` says."""
    configure(config, KERNEL)
