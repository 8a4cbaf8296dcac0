"""What the janitor does with a guest that runs here by its record, and with what lies about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.xen.hypervisor import Domains, Played
from tests.unit.xen.xenstored import Xenstored
from understudy.arbiter import Record, RecordState
from understudy_xen.claim import claimed
from understudy_xen.guestfile import XenConfig
from understudy_xen.hypervisor import XenHypervisor
from understudy_xen.pauses import StoredPauses

ALONE = Record("web", 4, RecordState.ALONE, "alpha", None, None, "alpha", "a4")
PAUSES = "/local/domain/7/understudy/pauses"


@pytest.fixture
def guest(domains: Domains, store: Xenstored) -> Played:
    store["/local/domain/7/name"] = "web"
    domains[7] = Played()
    return domains[7]


async def test_a_domain_that_was_only_protected_was_not_made_by_an_agent(
    hypervisor: XenHypervisor, guest: Played, store: Xenstored
) -> None:
    store[PAUSES] = "1"
    assert [(each.name, each.ours) for each in await hypervisor.found()] == [("web", False)]
    await hypervisor.mark(7, ALONE)
    assert [(each.name, each.ours) for each in await hypervisor.found()] == [("web", True)]


@pytest.mark.parametrize("is_marked", [True, False])
async def test_an_administrators_pause_stays(
    hypervisor: XenHypervisor, config: XenConfig, guest: Played, store: Xenstored, is_marked: bool
) -> None:
    if is_marked:
        await hypervisor.mark(7, ALONE)
    store[PAUSES] = "1"
    guest.pauses = 2
    assert await hypervisor.sweep(config, ALONE) == ["web was left paused: it runs"]
    assert (guest.pauses, PAUSES in store) == (1, False)
    assert await hypervisor.sweep(config, ALONE) == []
    assert guest.pauses == 1


async def test_what_libxl_has_restored_and_nobody_has_let_run_is_let_run(
    hypervisor: XenHypervisor, config: XenConfig, guest: Played, restorer_is: Callable[[str], None]
) -> None:
    restorer_is("reads")
    guest.pauses = 1
    assert await hypervisor.sweep(config, ALONE) == ["web was left paused: it runs"]


async def test_a_guest_that_an_agent_once_paused_keeps_an_administrators_pause(
    hypervisor: XenHypervisor, config: XenConfig, guest: Played, store: Xenstored
) -> None:
    store[PAUSES] = "1"
    await StoredPauses(7).write(0)
    guest.pauses = 1
    assert await hypervisor.sweep(config, ALONE) == []
    assert guest.pauses == 1


STATE = "understudy-devices-"


def lay_about(directory: Path, *whose: str) -> None:
    directory.mkdir(exist_ok=True)
    for each in whose:
        (directory / f"{STATE}{each}").touch()


def left_in(directory: Path) -> set[str]:
    return {place.name.removeprefix(STATE) for place in directory.glob(f"{STATE}*")}


async def test_states_of_devices_that_lie_about_are_removed(
    hypervisor: XenHypervisor, config: XenConfig, guest: Played, domains: Domains, run_directory: Path
) -> None:
    domains[9] = Played()
    lay_about(run_directory, "7", "8", "9", "backup")
    with claimed(7):
        await hypervisor.sweep(config, None)
    assert left_in(run_directory) == {"7", "9", "backup"}
    done = await hypervisor.sweep(config, None)
    assert done == ["a state of the devices of domain 7 lay about: removed"]
    lay_about(run_directory, "7")
    await hypervisor.stop(config, force=True, timeout_s=1)
    assert left_in(run_directory) == {"9", "backup"}
