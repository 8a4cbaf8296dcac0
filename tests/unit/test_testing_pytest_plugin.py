"""The fixtures of the pytest plugin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from understudy.testing.clock import TasksLeft
from understudy.testing.pytest_plugin import VirtualClock, require


def test_the_virtual_clock(virtual_clock: VirtualClock) -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert virtual_clock.run(main()) == 4600

    async def forgets() -> None:
        forgets.task = asyncio.ensure_future(asyncio.sleep(1))  # type: ignore[attr-defined]

    with pytest.raises(TasksLeft):
        virtual_clock.run(forgets())
    virtual_clock.run(forgets(), strict=False)


def test_the_seed_is_printed(understudy_seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    # The fixture printed it before this test's capture began; what it is must fit into 32 bits.
    assert 0 <= understudy_seed < 1 << 32
    assert capsys.readouterr().out in ("", f"UNDERSTUDY_SEED={understudy_seed}\n")


class TestGivenSeed:
    @pytest.fixture(autouse=True)
    def given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UNDERSTUDY_SEED", "0x2a")

    def test_it_is_repeated(self, understudy_seed: int) -> None:
        assert understudy_seed == 42


def test_rounds(rounds: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNDERSTUDY_ROUNDS", raising=False)
    assert rounds(3, 1000) == 3
    monkeypatch.setenv("UNDERSTUDY_ROUNDS", "long")
    assert rounds(3, 1000) == 1000


def test_what_is_missing_is_a_reason_to_skip_unless_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_REQUIRE", "qemu")
    with pytest.raises(pytest.skip.Exception, match="no linux binary"):
        require("kernel", "there is no linux binary of user-mode-linux")
    monkeypatch.setenv("UNDERSTUDY_REQUIRE", "qemu, kernel")
    with pytest.raises(pytest.fail.Exception, match="UNDERSTUDY_REQUIRE names kernel"):
        require("kernel", "there is no linux binary of user-mode-linux")
