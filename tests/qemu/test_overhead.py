"""What being protectable costs a guest that is not protected: a quorum of one, and nothing else.

How much that is in time is measured by ``bench/overhead.py``.
"""

from __future__ import annotations

import pytest

from bench import overhead
from tests.qemu.conftest import Bed

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]


async def test_an_unprotected_guest_has_nothing_of_a_session(bed: Bed) -> None:
    agent = bed.agent()
    config = bed.guest(disk=[{"path": "a.qcow2"}, {"path": "b.raw"}])
    await agent.start(config, bed.alone())
    qemu = await agent.running(config)
    assert qemu is not None
    monitor = qemu.monitor
    assert {chardev["label"] for chardev in await monitor.execute("query-chardev")} == {
        "qmp",
        "oob",
        "serial",
    }
    objects = await monitor.execute("qom-list", {"path": "/objects"})
    assert {item["name"] for item in objects} == {"type", "pc.ram"}
    assert await monitor.execute("query-iothreads") == []
    assert await monitor.execute("query-block-exports") == []
    assert await monitor.execute("query-block-jobs") == []
    nodes = {node["node-name"] for node in await monitor.execute("query-named-block-nodes")}
    assert nodes == {f"disk{index}{part}" for index in range(2) for part in ("", "-image", "-file")}


def test_the_measurement_measures_both(tmp_path: object) -> None:
    figures = {figure.name: figure for figure in overhead.measure(rounds=1, requests=2000)}
    assert figures["disk_quorum_us"].value > 0
    assert figures["disk_plain_us"].value > 0
    assert figures["disk_quorum_vs_plain_ratio"].value > 0
