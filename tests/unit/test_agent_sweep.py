"""The janitors of subkinds: called once a verdict stands, never above a guest that runs undecided."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tests.testbeds.twoagents import TwoHosts, two_hosts
from understudy.agent.agent import Agent
from understudy.arbiter import RecordState, following
from understudy.device import Decline, Kind, Mode, OpenContext, Subkind, SweepContext, Verdict
from understudy.hookspecs import hookimpl
from understudy.hypervisor import GuestState
from understudy.plugins import PluginInfo


class Sweeper:
    """A plugin with a NIC subkind that protects nothing and has a janitor."""

    def __init__(self) -> None:
        self.swept: list[SweepContext] = []

    @hookimpl
    def understudy_subkinds(self) -> Sequence[Subkind]:
        async def declines(context: OpenContext) -> Decline:
            return Decline("it only sweeps")

        async def sweep(context: SweepContext) -> Sequence[str]:
            self.swept.append(context)
            return ["a gate was left: removed"]

        wanted: Callable[[SweepContext], Awaitable[Sequence[str]]] = sweep
        return [Subkind("zz-sweeper", Kind.NIC, frozenset({Mode.REMUS}), declines, priority=99, sweep=wanted)]


async def boot(hosts: TwoHosts, host: str) -> tuple[Agent, Sweeper]:
    sweeper = Sweeper()
    agent = hosts.make(host)
    agent.plugins.add(sweeper, PluginInfo("sweeper", "tests", "1", "tests"))
    await agent.start()
    return agent, sweeper


async def protected_by_alpha(hosts: TwoHosts) -> None:
    """Write the record of a protection by alpha whose agent has died since."""
    await hosts.call("alpha", "start", guest="web")
    arbiter = hosts.agents["beta"].need_arbiter()
    await hosts.crash("alpha")
    record = await arbiter.read("web")
    assert record
    wanted = following(
        record, state=RecordState.PROTECTED, standby="beta", session="s", writer="alpha", attempt="a"
    )
    assert (await arbiter.swap(record, wanted))[0]


async def test_output_is_let_out_only_after_the_own_swap_to_alone(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected_by_alpha(hosts)
        arbiter = hosts.agents["beta"].need_arbiter()
        _, sweeper = await boot(hosts, "alpha")
        await hosts.until(lambda: sweeper.swept)
        record = await arbiter.read("web")
        assert record
        assert (record.state, record.owner) == (RecordState.ALONE, "alpha")
        assert [(each.guest, each.verdict) for each in sweeper.swept] == [("web", Verdict.KEEP)]
        (nic,) = sweeper.swept[0].devices
        assert (nic.name, nic.properties) == ("nic0", {"interface": "fake0"})


async def test_nothing_is_swept_while_a_guest_runs_undecided(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected_by_alpha(hosts)
        with hosts.arbiter_lost():
            _, sweeper = await boot(hosts, "alpha")
            tenure = hosts.agents["alpha"].tenure("web")
            await hosts.until(lambda: "waiting for the arbiter" in tenure.problem)
            assert sweeper.swept == []
        await hosts.until(lambda: sweeper.swept)


async def test_what_was_held_is_discarded_where_the_guest_does_not_live(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected_by_alpha(hosts)
        hosts.world.guests.pop(("alpha", "web"))
        _, sweeper = await boot(hosts, "alpha")
        await hosts.until(lambda: sweeper.swept)
        assert sweeper.swept[0].verdict is Verdict.DISCARD
        assert [dict(device.properties) for device in sweeper.swept[0].devices] == [{}]
        assert hosts.world.state("alpha", "web") is GuestState.ABSENT
