"""Run a benchmark inside a kernel of its own; imported on both sides of the boundary."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.testbeds.kernel.machine import Machine
from tests.testbeds.machine import INSIDE

__all__ = ["answer", "is_inside", "measured_inside"]

_ANSWER = "samples.json"


def measured_inside(module: str, deadline_s: float) -> Mapping[str, list[float]]:
    """Boot a kernel, run ``python -m MODULE`` in it and return the samples that it answers with.

    Args:
        module: What to run.
        deadline_s: For all of it, seconds.

    Raises:
        RuntimeError: It failed; the message ends with what it said.
        KernelDied: The kernel did, or the time was over.
    """
    root = Path(__file__).parents[1]
    machine = Machine([sys.executable, "-m", module], cwd=root, env={"PYTHONPATH": "."})
    try:
        if machine.wait(deadline_s):
            raise RuntimeError(f"{module} failed inside the kernel bed:\n{machine.console_tail()}")
        samples: dict[str, list[float]] = json.loads((machine.run / _ANSWER).read_text())
    finally:
        machine.close()
    return samples


def is_inside() -> bool:
    """Tell whether this is the side of the kernel bed."""
    return bool(os.environ.get(INSIDE))


def answer(samples: Mapping[str, Sequence[float]]) -> None:
    """Hand the samples out of the kernel bed."""
    Path(os.environ["BED_RUN"], _ANSWER).write_text(json.dumps(samples))
