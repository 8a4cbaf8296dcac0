"""The place of a guest's engine on a host: which one sits there, where it stands, and who waits for that.

Engines follow each other in it (a promoted copy is an owner's business), so nobody should wait for an engine by itself.
"""

from __future__ import annotations

import asyncio

from understudy.engine import Driver
from understudy.errors import StateError
from understudy.phases import in_words
from understudy.session import PrimaryState, SecondaryState, State

__all__ = ["Seat"]


class Seat:
    """Where the engine of one guest sits.

    Args:
        guest: Name of the guest.
    """

    def __init__(self, guest: str) -> None:
        self.guest = guest
        self.driver: Driver | None = None  #: the engine, if there is one
        self._run: asyncio.Task[None] | None = None  # of the engine
        self._moved = asyncio.Event()

    def wake(self) -> None:
        """Tell those who wait that the engine was replaced or has moved."""
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def reach(self, *states: State, timeout_s: float | None = None) -> State:
        """Wait until whatever engine is here is in one of `states` and has done what leads there.

        No engine counts as discarded.

        Raises:
            StateError: The engine failed.
            TimeoutError: It did not come to that in time.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                moved, driver, run = self._moved, self.driver, self._run
                if driver is None:
                    if PrimaryState.DISCARDED in states or SecondaryState.DISCARDED in states:
                        return SecondaryState.DISCARDED
                elif driver.state in states:
                    await self.settle(driver)
                    if driver is self.driver and driver.state in states:
                        return driver.state
                    continue
                elif run is not None and run.done():
                    raise StateError(f"guest {self.guest}: {_end_of(run)}")
                await moved.wait()

    async def settle(self, driver: Driver) -> None:
        """Wait until `driver` has done what led to its state, or has ended."""
        # The state is set before its effects are carried out.
        run = self._run
        asking = asyncio.ensure_future(driver.settle())
        try:
            await asyncio.wait(
                {asking, run} if run is not None else {asking}, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            asking.cancel()
        if asking.done() and not asking.cancelled():
            asking.exception()  # an engine that has ended has done all it will

    def failure(self, default: str) -> BaseException:
        """Return why the last session failed: the engine's first failure, else its cause in words, else `default`."""
        driver = self.driver
        if driver is not None and driver.failure is not None:
            return driver.failure
        cause = driver.machine.cause if driver is not None else ""
        return StateError(f"{default}: {cause}" if cause else default)


def _end_of(run: asyncio.Task[None]) -> str:
    error = None if run.cancelled() else run.exception()
    return "the engine has ended" if error is None else f"the engine failed: {in_words(error)}"
