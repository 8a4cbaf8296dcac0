"""The pytest plugin of `understudy.testing`: thin fixtures over what works without pytest.

Environment variables: ``UNDERSTUDY_SEED`` repeats a run, ``UNDERSTUDY_ROUNDS=long`` asks for full counts,
``UNDERSTUDY_REQUIRE=kernel,qemu`` names the testbeds whose absence is a failure and no reason to skip.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

import pytest

__all__ = ["VirtualClock", "require", "rounds", "understudy_seed", "virtual_clock"]

T = TypeVar("T")


class VirtualClock:
    """Runs coroutines in virtual time; see `understudy.testing.clock`."""

    def run(self, main: Coroutine[Any, Any, T], *, strict: bool = True) -> T:
        """Run a coroutine to its end. As `understudy.testing.clock.run`."""
        from understudy.testing import clock  # noqa: PLC0415 - every pytest run loads this module, few use it

        return clock.run(main, strict=strict)


@pytest.fixture
def virtual_clock() -> VirtualClock:
    """Give a test virtual time: ``virtual_clock.run(coroutine)``."""
    return VirtualClock()


@pytest.fixture
def understudy_seed(record_property: Callable[[str, object], None]) -> int:
    """Give a test its seed: ``UNDERSTUDY_SEED`` if set, else a new one; printed, so that a failure shows it."""
    text = os.environ.get("UNDERSTUDY_SEED")
    seed = int(text, 0) if text else random.SystemRandom().getrandbits(32)
    record_property("understudy_seed", seed)
    print(f"UNDERSTUDY_SEED={seed}")  # noqa: T201 - pytest shows what a failed test printed
    return seed


@pytest.fixture
def rounds() -> Callable[[int, int], int]:
    """Give a test its number of rounds: ``rounds(short, long)``, long with ``UNDERSTUDY_ROUNDS=long``."""

    def choose(short: int, long: int) -> int:
        return long if os.environ.get("UNDERSTUDY_ROUNDS") == "long" else short

    return choose


def require(bed: str, reason: str) -> NoReturn:
    """Skip the test because a testbed is missing, or fail it if ``UNDERSTUDY_REQUIRE`` names the bed.

    Args:
        bed: The testbed, e.g. ``"kernel"``.
        reason: What is missing, one sentence.
    """
    named = [each.strip() for each in os.environ.get("UNDERSTUDY_REQUIRE", "").split(",")]
    if bed in named:
        pytest.fail(f"{reason} (UNDERSTUDY_REQUIRE names {bed})")
    pytest.skip(reason)
