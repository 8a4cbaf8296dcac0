"""Whose gate it is: one guest's and nobody else's, also when its controller is killed; and what the janitor may do."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.kernel.netbuffer_bed import Lan, context, device, interfaces, no_trace, opened, run, spoken
from understudy.device import ReplicationMode, SweepContext, Verdict
from understudy.errors import HypervisorError
from understudy_netbuffer import installation
from understudy_netbuffer.installation import Claim, gate_name
from understudy_netbuffer.nic import BufferedNic
from understudy_netbuffer.subkind import NETBUFFER

pytestmark = pytest.mark.kernel

GUESTS = 20


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made, no_trace():
        yield made


def race(attempts: list[Claim]) -> list[str]:
    """Let a process for each claim make its gate at the same moment; tell what each one said."""
    go_read, go_write = os.pipe()
    installation.claims()  # what is imported now need not be imported twenty times
    children = []
    for claim in attempts:
        said_read, said_write = os.pipe()
        child = os.fork()
        if not child:
            os.read(go_read, 1)
            try:
                said = f"made {installation.install(claim, 1_000_000).ifb}"
            except HypervisorError as error:
                said = f"refused {error}"
            os.write(said_write, said.encode())
            os._exit(0)
        os.close(said_write)
        children.append((child, said_read))
    os.write(go_write, bytes(len(children)))
    answers = []
    for child, said_read in children:
        answers.append(os.read(said_read, 4096).decode())
        os.waitpid(child, 0)
        os.close(said_read)
    os.close(go_read)
    os.close(go_write)
    return answers


def test_twenty_guests_that_begin_at_once_get_twenty_gates() -> None:
    with Lan(GUESTS), no_trace():
        wanted = [Claim(f"guest{n}", "nic0", f"vif{n}", f"session{n}") for n in range(GUESTS)]
        answers = race(wanted)
        assert answers == [f"made {gate_name(claim.interface)}" for claim in wanted]
        assert len(set(answers)) == GUESTS
        assert sorted(installation.claims(), key=str) == sorted(wanted, key=str)
        for claim in wanted:
            installation.remove(claim, Verdict.KEEP)


def test_of_several_who_want_one_interface_one_gets_it(lan: Lan) -> None:
    wanted = [Claim(f"guest{n}", "nic0", "vif0", f"session{n}") for n in range(6)]
    answers = race(wanted)
    [winner] = [claim for claim, answer in zip(wanted, answers, strict=True) if answer.startswith("made")]
    assert installation.claims() == [winner]
    # Who lost has touched nothing: the winner's gate stands, and others cannot remove it.
    for claim in wanted:
        if claim != winner:
            assert installation.remove(claim, Verdict.DISCARD) == []
    assert installation.claims() == [winner]
    installation.remove(winner, Verdict.KEEP)


async def test_an_interface_with_an_ingress_qdisc_of_others_is_left_alone(lan: Lan) -> None:
    run("tc", "qdisc", "add", "dev", "vif0", "clsact")
    with pytest.raises(HypervisorError, match="vif0 has an ingress or clsact qdisc already"):
        await opened()
    assert "clsact" in run("tc", "qdisc", "show", "dev", "vif0")
    run("tc", "qdisc", "del", "dev", "vif0", "clsact")


async def test_numbers_of_ifbs_are_not_assumed(lan: Lan) -> None:
    names = [name for name in ("ifb2", "ifb7") if name not in interfaces()]
    for name in names:
        run("ip", "link", "add", name, "type", "ifb")
    nic = await opened()
    assert nic.gate.installed.ifb not in names
    await nic.teardown(Verdict.KEEP)
    for name in names:
        run("ip", "link", "del", name)


# --- A controller that is killed -------------------------------------------------------------------------------------


async def killed(lan: Lan, *, barrier: bool = False) -> None:
    """Let a controller hold the gate of guest 0 and be killed while it holds two packets."""
    process: Process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kernel.netbuffer_controller", "0"),
        stdin=PIPE,
        stdout=PIPE,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert process.stdin
    assert process.stdout
    assert (await process.stdout.readline()).strip() == b"ready"
    lan.send(1, [1, 2])
    assert await lan.numbers() == []
    if barrier:
        process.stdin.write(b"barrier 1\n")
        await process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    await process.wait()


def left(verdict: Verdict, guest: int = 0) -> SweepContext:
    return SweepContext(f"guest{guest}", (device(guest),), verdict)


@pytest.mark.parametrize(
    ("verdict", "barrier"), [(Verdict.KEEP, False), (Verdict.KEEP, True), (Verdict.DISCARD, True)]
)
async def test_the_gate_of_a_killed_controller_stays_closed_until_the_verdict(
    lan: Lan, verdict: Verdict, barrier: bool
) -> None:
    assert NETBUFFER.sweep
    await killed(lan, barrier=barrier)
    lan.send(2, [3])
    assert await lan.numbers() == []
    # Neither another session nor the janitor of another guest opens it.
    with pytest.raises(HypervisorError, match=r"gated already .* by guest guest0, session session-1"):
        await BufferedNic.open(context(0, session="another"))
    assert await NETBUFFER.sweep(SweepContext("guest1", (device(1),), Verdict.KEEP)) == []
    assert await lan.numbers() == []
    [done] = await NETBUFFER.sweep(left(verdict))
    assert "the gate of vif0 was left" in done
    assert await lan.numbers() == ([1, 2, 3] if verdict is Verdict.KEEP else [])
    assert await NETBUFFER.sweep(left(verdict)) == []
    if verdict is Verdict.DISCARD:
        assert "state DOWN" in run("ip", "link", "show", "vif0")
    else:
        lan.send(3, [4])
        assert await lan.numbers() == [4]
        # And the next session begins as ever.
        nic = await opened()
        await spoken(lan, nic, 1, [5])
        assert await lan.numbers() == []
        await nic.teardown(Verdict.KEEP)


async def test_the_janitor_finds_what_a_setup_that_was_killed_left(lan: Lan) -> None:
    assert NETBUFFER.sweep
    # An IFB that has not been given its alias yet; an ingress qdisc without its filter; a filter without its IFB.
    run("ip", "link", "add", gate_name("vif0"), "type", "ifb")
    assert await NETBUFFER.sweep(left(Verdict.KEEP))
    for lost in ("filter", "ifb"):
        nic = await BufferedNic.open(context(0))
        nic.gate._wire.leave(nic.gate)  # as if its process were killed
        if lost == "filter":
            run("tc", "filter", "del", "dev", "vif0", "parent", "ffff:", "pref", "1")
        else:
            run("ip", "link", "del", nic.gate.installed.ifb)
        assert await NETBUFFER.sweep(left(Verdict.KEEP))
        lan.send(0, [1])
        assert await lan.numbers() == [1]
    assert await NETBUFFER.sweep(left(Verdict.KEEP)) == []


async def test_the_janitor_sweeps_a_guest_that_has_gone_with_its_interface() -> None:
    assert NETBUFFER.sweep
    with Lan() as lan:
        await killed(lan)
        run("ip", "link", "del", "vif0")
        # Under another name in the guest's file by now: the claim says whose it is.
        [done] = await NETBUFFER.sweep(SweepContext("guest0", (device(0, "vif9"),), Verdict.DISCARD))
        assert "vif0" in done
        assert not [name for name in interfaces() if name.startswith("usg")]


async def test_the_secondary_needs_no_gate(lan: Lan) -> None:
    with no_trace():
        assert await NETBUFFER.open(replace(context(0), side=ReplicationMode.SECONDARY))
