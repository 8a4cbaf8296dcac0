"""What the benchmarks with whole hosts stand on: hosts that go away, echoes that are counted rightly."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import remus
from bench.echoes import Echoes
from bench.lab import guest_pair
from tests.qemu.test_lab import alive
from tests.testbeds.bed import missing_for_qemu, need
from understudy_qemu.demo.pair import GuestPlan

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(120)]


class Failed(Exception):
    pass


async def test_a_benchmark_that_fails_leaves_nothing_behind() -> None:
    need("qemu", missing_for_qemu())
    roots: list[Path] = []
    running: dict[int, list[str]] = {}

    async def fail() -> None:
        async with guest_pair(GuestPlan(mode="remus")) as pair:
            roots.append(pair.lab.root)
            for machine in pair.lab.machines:
                running.update(machine.processes())
            raise Failed

    with pytest.raises(Failed):
        await fail()
    assert any(words and "qemu-system" in words[0] for words in running.values())
    assert not [pid for pid in running if alive(pid)]
    assert not [root for root in roots if root.exists()]


def test_a_protected_guest_is_measured_beside_itself() -> None:
    need("qemu", missing_for_qemu())
    figures = {figure.name: figure for figure in remus.measure(intervals_ms=(50,), rounds=1, window_s=2)}
    assert len(figures["remus_50ms_checkpoints_per_s"].samples) == 2
    assert figures["remus_50ms_checkpoints_per_s"].value >= 1
    assert figures["remus_50ms_pause_ms"].value > 0
    assert figures["remus_unprotected_latency_ms"].value > 0
    assert figures["remus_50ms_added_latency_ms"].value > 0, "nothing was held"


def test_echoes_that_are_not_answered_are_counted() -> None:
    need("qemu", missing_for_qemu())
    echoes = Echoes("127.0.0.1", 0x1234)
    for _ in range(50):
        echoes.ask()
    while echoes.waiting:
        before = echoes.waiting
        echoes.take(5.0)
        assert echoes.waiting < before, "the kernel answers"
    echoes.ask()  # nobody takes the answer
    asked, answered = (sum(column) for column in list(zip(*echoes.slices(), strict=True))[1:])
    assert (asked, answered) == (51, 50)
    echoes.close()
