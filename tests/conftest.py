"""What all tests share."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.testbeds.rounds import LONG, rounds

pytest_plugins = ("tests.phases", "tests.testbeds.kernel.plugin", "tests.testbeds.xen.plugin")

# No deadline for an example: the machine's other work is not the example's fault. What falsified a property is
# printed in a form that repeats it.
settings.register_profile(
    "understudy",
    max_examples=rounds(100, 2000),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # it measures the machine
)
settings.load_profile("understudy")

# A shell that runs the tests in the background ignores SIGINT, and everything that the tests start would ignore it
# too; but Ctrl-C is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Whoever ends the tests politely, as timeout(1) does, gets the fixtures' cleaning, too: QEMUs, kernels, interfaces.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out of a short run what its long form alone has: no test of this run, so it is not skipped, either."""
    left_out = [item for item in items if not LONG and item.get_closest_marker("long") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
