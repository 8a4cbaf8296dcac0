from __future__ import annotations

import pytest

from understudy_xen.libs import Precopy, PrecopyStats
from understudy_xen.libs.saving import _Bridge, _Stats


class Recorder:
    def __init__(self) -> None:
        self.calls: list[object] = []
        self.more = True
        self.problem: BaseException | None = None

    def _note(self, call: object) -> None:
        self.calls.append(call)
        if self.problem is not None:
            raise self.problem

    def suspend(self) -> None:
        self._note("suspend")

    def precopy(self, stats: PrecopyStats) -> Precopy:
        self._note(stats)
        return Precopy.STOP

    def postcopy(self) -> None:
        self._note("postcopy")

    def checkpoint(self) -> bool:
        self._note("checkpoint")
        return self.more

    def wait_checkpoint(self) -> bool:
        self._note("wait_checkpoint")
        return self.more

    def switch_qemu_logdirty(self, domid: int, *, enable: bool) -> None:
        self._note((domid, enable))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def suspends() -> list[int]:
    return []


@pytest.fixture
def bridge(recorder: Recorder, suspends: list[int]) -> _Bridge:
    return _Bridge(recorder, lambda: suspends.append(1))


# The functions are called as libxenguest calls them: through the pointers in the struct.


def test_what_the_library_is_told_of_success(bridge: _Bridge, recorder: Recorder) -> None:
    struct = bridge.struct
    assert struct.suspend(None) == 1
    assert struct.postcopy(None) == 1
    assert struct.checkpoint(None) == 1
    assert struct.wait_checkpoint(None) == 1
    assert struct.switch_qemu_logdirty(7, 1, None) == 0
    assert struct.precopy_policy(_Stats(2, 3000, 40), None) == Precopy.STOP
    assert recorder.calls == [
        "suspend",
        "postcopy",
        "checkpoint",
        "wait_checkpoint",
        (7, True),
        PrecopyStats(2, 3000, 40),
    ]
    assert bridge.first is None


def test_a_number_of_dirty_pages_that_is_not_known(bridge: _Bridge, recorder: Recorder) -> None:
    bridge.struct.precopy_policy(_Stats(0, 0, -1), None)
    assert recorder.calls == [PrecopyStats(0, 0, None)]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda struct: struct.suspend(None), 0),
        (lambda struct: struct.postcopy(None), 0),
        (lambda struct: struct.checkpoint(None), 0),
        (lambda struct: struct.wait_checkpoint(None), 0),
        (lambda struct: struct.switch_qemu_logdirty(7, 1, None), -1),
        (lambda struct: struct.precopy_policy(_Stats(0, 0, 0), None), Precopy.ABORT),
    ],
)
def test_an_exception_is_kept_and_the_library_told_to_end(
    bridge: _Bridge, recorder: Recorder, call: object, told: int
) -> None:
    recorder.problem = problem = RuntimeError("the gate did not close")
    assert callable(call)
    assert call(bridge.struct) == told
    assert bridge.first is problem


def test_the_first_exception_leads(bridge: _Bridge, recorder: Recorder) -> None:
    recorder.problem = first = KeyboardInterrupt()
    bridge.struct.suspend(None)
    recorder.problem = RuntimeError("later")
    bridge.struct.checkpoint(None)
    assert bridge.first is first


def test_an_end_that_was_wished_is_told_from_a_failure(bridge: _Bridge, recorder: Recorder) -> None:
    recorder.more = False
    assert bridge.struct.checkpoint(None) == 0
    assert bridge.ended
    assert bridge.first is None


def test_progress_ends_at_the_first_suspend(bridge: _Bridge, suspends: list[int]) -> None:
    bridge.struct.suspend(None)
    bridge.struct.suspend(None)
    assert suspends == [1]
