"""The pytest plugin of the Xen bed: tests marked ``xen(inside=True)`` run in a dom0; see `tests.testbeds.plugin`.

Those of all modules share one dom0: a boot and the imports of pytest take 40 s of CPU. Whoever makes domains and
interfaces there removes them. Tests marked ``xen`` without it run outside, on hosts of their own: they are only skipped
where there is no bed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.testbeds.modulebed import Bed
from tests.testbeds.plugin import configure
from tests.testbeds.post import Post
from tests.testbeds.xen.checkout import packed
from tests.testbeds.xen.image import NotBuilt, image, missing_for_xen
from tests.testbeds.xen.machine import DOM0_MIB, MEMORY_MIB, XenDied, XenMachine
from tests.testbeds.xen.post import inside


def _boot(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], sizes: Mapping[str, int]
) -> tuple[XenMachine, Post]:
    try:
        built = image()
    except NotBuilt as problem:
        raise XenDied(str(problem)) from problem
    machine = XenMachine(
        built,
        packed(),
        command,
        cwd=cwd,
        env=env,
        memory_mib=sizes["memory_mib"],
        dom0_mib=sizes["dom0_mib"],
    )
    return machine, Post(machine.line.fileno())


XEN: Final = Bed(
    name="xen",
    missing=missing_for_xen,
    runs_inside=lambda mark: bool(mark.kwargs.get("inside")),
    sizes={"memory_mib": MEMORY_MIB, "dom0_mib": DOM0_MIB},
    boot=_boot,
    inside=inside,
    boot_s=240.0,  # 30 s on an idle machine
    shared=True,
    # Looking for plugins takes a third of the time; these are those that a test can tell from their absence.
    plugins=("pytest_asyncio.plugin", "pytest_timeout"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Be what `configure` says."""
    configure(config, XEN)
