"""A gate that somebody else touches is lost: nothing uncommitted leaves by a release, and it is made anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from tests.kernel.netbuffer_bed import Lan, interfaces, no_trace, opened, run, spoken, until
from understudy.device import Verdict
from understudy.errors import HypervisorError
from understudy_netbuffer import installation
from understudy_netbuffer.nic import BufferedNic

pytestmark = pytest.mark.kernel

# What an administrator, or another program, may do to a gate. {ifb} and {vif} are put in.
TOUCHES = {
    "flap": ("ip link set {ifb} down", "ip link set {ifb} up"),
    "ifb down": ("ip link set {ifb} down",),
    "ifb deleted": ("ip link del {ifb}",),
    "qdisc deleted": ("tc qdisc del dev {ifb} root",),
    "qdisc replaced": ("tc qdisc replace dev {ifb} root pfifo",),
    "qdisc opened": ("tc qdisc change dev {ifb} root handle 1: plug release_indefinite",),
    "one released": ("tc qdisc change dev {ifb} root handle 1: plug release",),
    "limit changed": ("tc qdisc change dev {ifb} root handle 1: plug limit 1",),
    "filter deleted": ("tc filter del dev {vif} parent ffff: pref 1",),
    "filter replaced": (
        "tc filter del dev {vif} parent ffff: pref 1",
        "tc filter add dev {vif} parent ffff: pref 1 matchall action pass",
    ),
    "filter added": ("tc filter add dev {vif} parent ffff: pref 9 matchall action pass",),
    "ingress deleted": ("tc qdisc del dev {vif} ingress",),
}


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made, no_trace():
        yield made


def touch(nic: BufferedNic, name: str) -> None:
    """Do what is called `name` to a gate."""
    for command in TOUCHES[name]:
        run(*command.format(ifb=nic.gate.installed.ifb, vif=nic.gate.claim.interface).split())


async def mended(nic: BufferedNic, times: int = 1) -> None:
    """Wait until a gate has been made anew and stands."""
    gate = nic.gate
    await until(lambda: gate.lost_count >= times and gate.stands, "the gate is made anew")
    assert not await asyncio.to_thread(installation.right, gate.installed)


@pytest.mark.parametrize(
    ("name", "barrier"),
    [
        *((name, True) for name in TOUCHES),
        *((name, False) for name in ("flap", "ifb deleted", "qdisc deleted", "ingress deleted")),
    ],
)
async def test_what_was_not_committed_never_leaves_after_a_touch(
    lan: Lan, name: str, barrier: bool, caplog: pytest.LogCaptureFixture
) -> None:
    nic = await opened()
    await spoken(lan, nic, 1, [1, 2, 3])
    await nic.postsuspend(1)
    await nic.commit(1)
    assert await lan.numbers() == [1, 2, 3]
    await spoken(lan, nic, 2, [4, 5, 6])
    if barrier:
        await nic.postsuspend(2)
    touch(nic, name)
    if not barrier:
        await nic.postsuspend(2)
    opened_by_others = await lan.numbers()
    # Only who opens the gate by hand lets out what it held, and only until that is noticed.
    assert opened_by_others == [] or name in {"qdisc opened", "one released"}
    # Uncommitted packets of the next epoch must not take the place of those that were lost.
    await mended(nic)
    await spoken(lan, nic, 3, [7, 8, 9, 10])
    await nic.error()
    await nic.commit(2)
    assert await lan.numbers() == []
    await nic.postsuspend(3)
    await nic.commit(3)
    assert await lan.numbers() == [7, 8, 9, 10]
    assert nic.counters()["lost_gate_count"] == 1
    assert "is lost, somebody else touched it" in caplog.text
    await nic.teardown(Verdict.KEEP)


async def test_a_touch_in_the_same_moment_as_the_release_is_noticed(lan: Lan) -> None:
    # The event lies in the socket, nobody has been told yet: the release must look there first.
    nic = await opened()
    await spoken(lan, nic, 1, [1, 2, 3])
    await nic.postsuspend(1)
    touch(nic, "flap")  # blocks the event loop: no callback of ours runs in between
    lan.send(2, [4, 5, 6])
    await nic.commit(1)
    assert await lan.numbers() == []
    await nic.teardown(Verdict.DISCARD)


async def test_an_action_that_is_changed_makes_the_gate_suspect(lan: Lan) -> None:
    nic = await opened()
    run("tc", "actions", "add", "action", "pass", "index", "77")
    await mended(nic)
    await spoken(lan, nic, 1, [1])
    assert await lan.numbers() == []
    await nic.postsuspend(1)
    await nic.commit(1)
    assert await lan.numbers() == [1]
    await nic.teardown(Verdict.KEEP)
    run("tc", "actions", "del", "action", "pass", "index", "77")


async def test_a_gate_that_is_touched_while_it_is_made_anew_is_made_again(lan: Lan) -> None:
    nic = await opened()
    for times in (1, 2, 3):
        touch(nic, "qdisc deleted")
        await until(lambda times=times: nic.gate.lost_count == times, "the loss is noticed")  # type: ignore[misc]
        assert not nic.gate.stands
        # The thread is at work; whether it sees this or makes it good by chance, in the end everything is held.
        run("ip", "-batch", "-", given=f"link set {nic.gate.installed.ifb} down")
        await until(lambda: nic.gate.stands, "the gate stands again")
        await nic.error()
        lan.send(1, [1])
        assert await lan.numbers() == []
    await nic.teardown(Verdict.DISCARD)


async def test_what_does_not_concern_a_gate_does_not_touch_it(lan: Lan) -> None:
    nic = await opened()
    run("ip", "link", "add", "other", "type", "bridge")
    run("tc", "qdisc", "add", "dev", "other", "root", "pfifo")
    run("ip", "link", "set", "vif0", "mtu", "1400")
    run(
        "tc", "qdisc", "add", "dev", "vif0", "root", "pfifo"
    )  # what the guest receives is no business of the gate
    run("ip", "link", "set", nic.gate.installed.ifb, "mtu", "1400")
    await nic.error()
    assert nic.counters()["lost_gate_count"] == 0
    run("tc", "qdisc", "del", "dev", "vif0", "root")
    run("ip", "link", "del", "other")
    run("ip", "link", "set", "vif0", "mtu", "1500")
    await spoken(lan, nic, 1, [1])
    await nic.postsuspend(1)
    await nic.commit(1)
    assert await lan.numbers() == [1]
    await nic.teardown(Verdict.KEEP)


async def test_an_interface_that_is_gone_ends_the_protection() -> None:
    with Lan():
        nic = await opened()
        run("ip", "link", "del", "vif0")
        with pytest.raises(HypervisorError, match="vif0 is gone"):
            await nic.error()
        with pytest.raises(HypervisorError, match="vif0 is gone"):
            await nic.commit(1)
        await nic.teardown(Verdict.KEEP)
        assert not [name for name in interfaces() if name.startswith("usg")]


async def test_a_gate_that_cannot_be_made_anew_ends_the_protection(
    lan: Lan, caplog: pytest.LogCaptureFixture
) -> None:
    nic = await opened()
    caplog.set_level(logging.ERROR)
    # Somebody takes the name of the IFB: it can be made neither anew nor otherwise.
    ifb = nic.gate.installed.ifb
    run("ip", "-batch", "-", given=f"link del {ifb}\nlink add {ifb} type bridge")
    await until(lambda: nic.gate.failure is not None, "the gate is given up")
    with pytest.raises(HypervisorError):
        await nic.error()
    run("ip", "link", "del", ifb)
    await nic.teardown(Verdict.KEEP)


async def test_a_breach_that_no_event_told_of_is_seen_by_the_counters(lan: Lan) -> None:
    # The kernel itself counts what leaves: more than what was released ends the protection.
    nic = await opened()
    await spoken(lan, nic, 1, [1, 2])
    gate = nic.gate
    await gate._wire.ask(gate._all, lambda _: None)
    await lan.outside()
    await nic.postsuspend(1)
    with pytest.raises(HypervisorError, match="has let out 120 bytes that were not acknowledged"):
        await nic.error()
    await nic.teardown(Verdict.DISCARD)
