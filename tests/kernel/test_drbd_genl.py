"""What DRBD's kernel module is asked without its tools, on a real pair."""

from __future__ import annotations

import pytest

from tests.kernel.drbdpair import PRIMARY, SECONDARY, DrbdPair
from tests.kernel.thinpool import run
from understudy_drbd.genl import DrbdRefused, Genl

pytestmark = pytest.mark.kernel


@pytest.fixture
def genl(pair: DrbdPair) -> Genl:
    """The way to the secondary's device."""
    found = Genl.find(1)
    assert found is not None
    return found


async def test_a_disk_is_attached_with_the_options_that_it_had(pair: DrbdPair, genl: Genl) -> None:
    run("drbdsetup", "disk-options", "1", "--resync-rate=7M", "--al-extents=67", "--on-io-error=pass_on")
    before = run("drbdsetup", "show", "beta")
    assert "7168k" in before
    options = genl.options()
    assert options is not None
    genl.disconnect()
    genl.detach()
    assert genl.options() is None
    run("drbdadm", "apply-al", "beta")
    genl.attach(options)
    run("drbdadm", "connect", "beta")
    await pair.mirrored()
    assert run("drbdsetup", "show", "beta") == before
    run("drbdadm", "adjust", "beta")


async def test_what_has_been_done_is_done(pair: DrbdPair, genl: Genl) -> None:
    for _ in range(2):
        genl.disconnect()
        assert (await pair.state(SECONDARY)).connection == "StandAlone"
    for _ in range(2):
        genl.promote()
        assert (await pair.state(SECONDARY)).role == "Primary"
    assert not (await pair.state(SECONDARY)).out_of_sync_bytes
    genl.distrust_peer()
    size_bytes = int(run("blockdev", "--getsize64", pair.devices[SECONDARY]))
    assert (await pair.state(SECONDARY)).out_of_sync_bytes == size_bytes


async def test_a_refusal_says_what_and_why(pair: DrbdPair, genl: Genl) -> None:
    with pytest.raises(DrbdRefused, match=r"^DRBD minor 1: primary: SS_TWO_PRIMARIES \(-1\)$"):
        genl.promote()
    options = genl.options()
    assert options is not None
    with pytest.raises(DrbdRefused, match=r"minor 1: attach: ERR_DISK_CONFIGURED \(124\)"):
        genl.attach(options)
    genl.disconnect()
    genl.detach()
    with pytest.raises(DrbdRefused, match=r"minor 1: attach: ERR_MD_UNCLEAN \(165\)"):
        genl.attach(options)
    nowhere = Genl.find(9)
    assert nowhere is not None
    with pytest.raises(DrbdRefused, match=r"minor 9: detach: ERR_MINOR_INVALID \(127\); unknown minor"):
        nowhere.detach()
    assert (await pair.state(PRIMARY)).role == "Primary"
