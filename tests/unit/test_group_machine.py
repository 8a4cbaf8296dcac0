"""Random lives of a device group: slow, failing, late, deaf and cancelled steps in any order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import fields
from enum import Enum
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.device_fakes import FakeWorld, Script, deaf, fails, takes
from understudy.device import ReplicationMode, Verdict
from understudy.errors import DeviceError, PhaseTimeout, StateError
from understudy.group import DeviceGroup
from understudy.phases import Deadlines
from understudy.testing.clock import VirtualLoop

LIMITS = Deadlines(**{field.name: 5.0 for field in fields(Deadlines)} | {"grace_s": 1.0})
STEPS = (
    "open",
    "start",
    "postsuspend",
    "checkpoint",
    "preresume",
    "postresume",
    "error",
    "commit",
    "stop",
    "teardown",
)


class How(Enum):
    """What a device makes of a step."""

    QUICK = "quick"
    SLOW = "slow"
    FAILS = "fails"
    FAILS_LATER = "fails later"
    LATE = "late"
    DEAF = "deaf"


class Outcome:
    """How a device takes a step, when it is over, and when it fails; times are seconds from the step's begin."""

    def __init__(self, how: How, index: int) -> None:
        self.how = how
        # No two at the same moment, so that the order of failures is defined.
        moment = {How.QUICK: 0.0, How.SLOW: 3.0, How.FAILS: 1.0, How.FAILS_LATER: 4.0}.get(
            how, 5.0
        ) + index / 100
        self.over_s = {How.LATE: 5.0, How.DEAF: 6.0}.get(how, moment)
        self.fails_s = None if how in {How.QUICK, How.SLOW} else (self.over_s, index)
        self.moment = moment

    def script(self, now: float) -> Script:
        if self.how in {How.QUICK, How.SLOW}:
            return takes(self.moment)
        if self.how is How.LATE:
            return takes(999)
        if self.how is How.DEAF:
            return deaf(now + 8)
        return fails("scripted", self.moment)


OUTCOMES = st.lists(
    st.one_of(st.just(How.QUICK), st.just(How.SLOW), st.sampled_from(How)), min_size=3, max_size=3
)
CANCEL = st.one_of(st.none(), st.none(), st.sampled_from([0.5, 2.0, 4.5]))


class GroupMachine(RuleBasedStateMachine):
    """Drives one group and a model of it side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.epoch = 0
        self.is_open = self.is_started = self.start_tried = self.is_void = self.is_down = False
        self.running: set[str] = set()
        self.stops = self.teardowns = 0
        self.asked_afterwards = False

    # --- Playing ---

    def play(
        self,
        call: Callable[[], Coroutine[Any, Any, None]],
        hows: list[How],
        cancel_s: float | None,
        *,
        who: set[str],
    ) -> bool:
        """Run a group operation in which devices behave as told; check what comes out. True if all went well."""
        names = list(self.world.scripts)
        outcomes = {name: Outcome(how, i) for i, (name, how) in enumerate(zip(names, hows, strict=False))}
        for name, outcome in outcomes.items():
            # One dictionary per device for its whole life; teardown and serve keep scripts of their own.
            script = outcome.script(self.loop.time())
            self.world.scripts[name].update(
                {step: script for step in STEPS if step not in {"teardown", "stop"}}
            )
        taking = {name: outcome for name, outcome in outcomes.items() if name in who}
        return self._expect(call, taking, cancel_s)

    def _expect(
        self,
        call: Callable[[], Coroutine[Any, Any, None]],
        taking: dict[str, Outcome],
        cancel_s: float | None,
    ) -> bool:
        over_s = max((outcome.over_s for outcome in taking.values()), default=0.0)
        failing = sorted((o.fails_s, name) for name, o in taking.items() if o.fails_s is not None)
        told: BaseException | None = None
        try:
            self.loop.run_until_complete(_cancelling(call(), cancel_s))
        except (asyncio.CancelledError, ExceptionGroup) as error:
            told = error
        if cancel_s is not None and over_s > cancel_s:
            assert isinstance(told, asyncio.CancelledError)
        elif failing:
            assert isinstance(told, ExceptionGroup)
            errors = [each for each in told.exceptions if isinstance(each, DeviceError)]
            assert [each.device for each in errors] == [name for _, name in failing]
            assert len(errors) == len(told.exceptions)
            for each in errors:
                late = taking[each.device].how in {How.LATE, How.DEAF}
                assert isinstance(each, PhaseTimeout) == late
        else:
            assert told is None
        return told is None

    @property
    def is_late(self) -> bool:
        # A life that has begun well goes on for some epochs before its end may come.
        return self.epoch >= 4 or (self.start_tried and not self.is_started)

    @property
    def names(self) -> set[str]:
        return set(self.world.scripts)

    # --- The life ---

    @initialize(count=st.sampled_from([2, 3, 1, 0]), side=st.sampled_from(ReplicationMode))
    def make(self, count: int, side: ReplicationMode) -> None:
        self.world = FakeWorld({f"disk{i}": {} for i in range(count)})
        self.group = DeviceGroup(self.world.setup(side=side, deadlines=LIMITS))

    @precondition(lambda self: not self.is_open and not self.is_down)
    @rule(
        hows=OUTCOMES,
        cancel_s=CANCEL,
    )
    def new(self, hows: list[How], cancel_s: float | None) -> None:
        # The first failure ends the setup: the others are cancelled, and only one that will not end is told, too.
        hows = hows[: len(self.names)]
        fails = [how for how in (How.FAILS, How.FAILS_LATER) if how in hows]
        if fails:
            first = hows.index(fails[0])
            hows = [
                how if i == first or how in {How.QUICK, How.SLOW, How.DEAF} else How.SLOW
                for i, how in enumerate(hows)
            ]
            cancel_s = None
        self.is_open = self.play(self.group.new, hows, cancel_s, who=self.names)
        self.is_down = not self.is_open

    @precondition(lambda self: self.is_open and not self.start_tried and not self.is_down)
    @rule(hows=OUTCOMES, cancel_s=CANCEL)
    def start_all(self, hows: list[How], cancel_s: float | None) -> None:
        self.start_tried = True
        stops = len(self._entries("stop"))
        self.is_started = self.play(
            lambda: self.group.start_all(self.group.side), hows, cancel_s, who=self.names
        )
        self.is_void |= not self.is_started
        well = [e.split(":")[0] for e in self.world.journal.entries if e.endswith(":start done")]
        if self.is_started:
            self.running = set(self.names)
        else:
            # What was started, in time to be known of, was stopped: exactly that.
            stopped = {e.split(":")[0] for e in self._entries("stop")[stops:]}
            assert stopped <= set(well)
            deaf_ones = {name for name, how in zip(self.world.scripts, hows, strict=False) if how is How.DEAF}
            assert stopped >= set(well) - deaf_ones

    def _entries(self, step: str) -> list[str]:
        return [
            e for e in self.world.journal.entries if e.split(":")[1].split()[0] == step and "done" not in e
        ]

    @precondition(lambda self: self.is_started and not self.is_down)
    @rule(
        step=st.sampled_from(
            ["postsuspend", "do_checkpoint_all", "preresume", "postresume", "get_error_all"]
        ),
        hows=OUTCOMES,
        cancel_s=CANCEL,
        further=st.booleans(),
    )
    def cycle(self, step: str, hows: list[How], cancel_s: float | None, further: bool) -> None:
        if step == "preresume" and self.group.side is ReplicationMode.SECONDARY:
            return
        self.epoch += further
        operation: Callable[..., Coroutine[Any, Any, None]] = getattr(self.group, step)
        call = operation if step == "get_error_all" else (lambda: operation(self.epoch))
        well = self.play(call, hows, cancel_s, who=self.names)
        self.is_void |= not well

    @precondition(lambda self: self.is_started and not self.is_down)
    @rule(hows=OUTCOMES, cancel_s=CANCEL)
    def commit(self, hows: list[How], cancel_s: float | None) -> None:
        self.epoch += 1
        if self.is_void:
            before = len(self.world.journal.entries)
            self._refused(lambda: self.group.commit(self.epoch))
            # Steps that were left behind may end meanwhile; nothing begins.
            assert not [e for e in self.world.journal.entries[before:] if ":commit " in e and "done" not in e]
            return
        self.is_void |= not self.play(lambda: self.group.commit(self.epoch), hows, cancel_s, who=self.names)

    @precondition(lambda self: self.stops < 2 and self.is_open and not self.is_down and self.is_late)
    @rule(failover=st.booleans())
    def stop_all(self, failover: bool) -> None:
        self.stops += 1
        before = len(self._entries("stop"))
        self.loop.run_until_complete(self.group.stop_all(failover=failover))
        asked = {e.split(":")[0] for e in self._entries("stop")[before:]}
        assert asked >= self.running
        self.running = set()
        self.is_void = True

    @precondition(lambda self: self.teardowns < 2 and (self.is_down or self.is_late))
    @rule(cancel_s=CANCEL, verdict=st.sampled_from(Verdict))
    def teardown_all(self, cancel_s: float | None, verdict: Verdict) -> None:
        self.teardowns += 1
        try:
            self.loop.run_until_complete(_cancelling(self.group.teardown(verdict), cancel_s))
        except asyncio.CancelledError:
            assert cancel_s is not None
        self.is_down = True

    @rule()
    def time_passes(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(1))

    @precondition(lambda self: self.is_down and not self.asked_afterwards)
    @rule()
    def nothing_works_afterwards(self) -> None:
        self.asked_afterwards = True
        for call in (self.group.new, self.group.get_error_all, lambda: self.group.postsuspend(99)):
            self._refused(call)

    def _refused(self, call: Callable[[], Awaitable[None]]) -> None:
        async def asked() -> None:
            await call()

        try:
            self.loop.run_until_complete(asked())
        except StateError:
            return
        raise AssertionError("it was not refused")

    # --- What always holds ---

    @invariant()
    def steps_are_in_order(self) -> None:
        for name in self.names if hasattr(self, "world") else ():
            steps = [entry.split()[0] for entry in self.world.journal.of(name) if "done" not in entry]
            assert steps[:1] in ([], ["open"])
            assert steps.count("teardown") <= 1
            if "teardown" in steps:
                assert steps[-1] == "teardown"
            if "commit" in steps:
                assert steps.index("start") < steps.index("commit")
            assert steps.count("start") <= 1

    def teardown(self) -> None:
        if hasattr(self, "group"):
            self.loop.run_until_complete(self.group.teardown(Verdict.DISCARD))
            # Let those that were left behind end.
            self.loop.run_until_complete(asyncio.sleep(20))
            for name in self.names:
                journal = self.world.journal.of(name)
                opened = "open done" in journal
                torn = [entry for entry in journal if entry.startswith("teardown ") and "done" not in entry]
                assert len(torn) == int(opened)
            assert not asyncio.all_tasks(self.loop)
        self.loop.close()


async def _cancelling(work: Coroutine[Any, Any, None], cancel_s: float | None) -> None:
    task = asyncio.ensure_future(work)
    if cancel_s is not None:
        asyncio.get_running_loop().call_later(cancel_s, task.cancel)
        # And once more, while it cleans up.
        asyncio.get_running_loop().call_later(cancel_s + 0.5, task.cancel)
    await task


TestGroupMachine = GroupMachine.TestCase
