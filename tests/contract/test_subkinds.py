"""The contract, run on every subkind that an installed distribution offers and declares a bed for.

A distribution declares the bed in its entry-point group ``understudy.testing``. The sample's is found the same way; it
stands for a third party's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from understudy.plugins import PluginInfo, Plugins
from understudy.testing import clock
from understudy.testing.subkind_bed import Make
from understudy.testing.subkind_kit import CHECKS, check_subkind, declared_beds

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Subkinds whose hosts cannot be made of a few lines: where they are tried instead.
ELSEWHERE = {
    "filter-buffer": "tests/contract/test_filter_buffer.py",
    "block-replication": "tests/qemu/test_domains.py",
    "colo-proxy": "tests/qemu/test_colo_proxy.py",
    "netbuffer": "tests/kernel/test_netbuffer_contract.py",
    "drbd": "tests/kernel/test_drbd_contract.py",
    "drbd-checkpoint": "tests/kernel/test_drbd_checkpoints.py",
    "unreplicated": "tests/contract/test_xen_unprotected.py",
    "unbuffered": "tests/contract/test_xen_unprotected.py",
}


@contextmanager
def sample_installed() -> Iterator[None]:
    """Put the sample distribution where installed ones are, for as long as the block lasts."""
    sys.path.insert(0, str(HERE / "sample"))
    try:
        yield
    finally:
        sys.path.remove(str(HERE / "sample"))


with sample_installed():
    BEDS: dict[str, Make] = declared_beds()
    PLUGINS = Plugins.discover()


@pytest.mark.parametrize("name", BEDS)
def test_the_contract(name: str) -> None:
    ran = clock.run(check_subkind(BEDS[name]))
    assert set(CHECKS) - set(ran) <= {"error-told", "output-commit"}
    if name == "sample-buffer":
        assert "output-commit" in ran


def test_every_subkind_is_tried_somewhere() -> None:
    offered = {subkind.name for subkind in PLUGINS.subkinds()}
    assert offered == set(BEDS) | set(ELSEWHERE)
    assert "sample-buffer" in offered
    for where in ELSEWHERE.values():
        assert (ROOT / where).is_file()


def test_every_installed_plugin_loads() -> None:
    assert PLUGINS.problems == ()


def test_the_sample_came_from_its_own_distribution() -> None:
    [info] = [each for each in PLUGINS.infos if each.name == "sample"]
    expected = PluginInfo(
        "sample", "understudy-sample", "0", "understudy_sample", str(HERE / "sample" / "understudy_sample.py")
    )
    assert info == expected
