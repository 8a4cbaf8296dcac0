"""Two agents over real TCP with a fake hypervisor."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.testbeds.twoagents import TwoHosts, errors_of, two_hosts
from understudy.agent.faults import describe
from understudy.arbiter import RecordState
from understudy.device import Finding, Severity
from understudy.errors import (
    ArbiterUnavailable,
    ConfigError,
    GuestBusy,
    GuestNotFound,
    HypervisorError,
    PeerError,
    PreflightFailed,
    StateError,
)
from understudy.hypervisor import FoundGuest, GuestState


async def protected(hosts: TwoHosts, guest: str = "web", owner: str = "alpha") -> None:
    await hosts.call(owner, "start", guest=guest)
    result = await hosts.call(owner, "protect", guest=guest)
    assert result["state"] == "protected"


async def test_start_and_stop(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        result = await hosts.call("alpha", "start", guest="web")
        assert result["generation"] == 1
        assert hosts.world.running("web") == ["alpha"]
        with pytest.raises(StateError, match="not off on alpha"):
            await hosts.call("alpha", "start", guest="web")
        with pytest.raises(StateError, match="belongs to alpha"):
            await hosts.call("beta", "start", guest="web")
        await hosts.call("alpha", "stop", guest="web")
        assert hosts.world.running("web") == []
        assert hosts.role("alpha") == "off"
        assert (await hosts.call("alpha", "start", guest="web"))["generation"] == 3


async def test_protect_and_unprotect(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        await hosts.until(lambda: hosts.role("beta") == "standby")
        table = await hosts.call("alpha", "list")
        rows = {row["host"]: row for row in table["guests"]}
        assert rows["alpha"]["role"] == "primary"
        assert rows["alpha"]["state"] == "protected"
        assert rows["alpha"]["peer"] == "beta"
        assert rows["beta"]["role"] == "secondary"
        assert rows["beta"]["state"] == "standby"
        assert any("insecure" in warning for warning in table["warnings"])
        await hosts.until(lambda: hosts.agents["alpha"].figures.row("web", 0).get("epoch", 0) > 3)
        result = await hosts.call("alpha", "unprotect", guest="web")
        assert result["state"] == "unprotected"
        assert hosts.world.running("web") == ["alpha"]
        assert hosts.world.state("beta", "web") is GuestState.ABSENT
        assert hosts.world.open_devices == []
        await hosts.until(lambda: hosts.role("beta") == "none")
        assert [
            path for host in ("alpha", "beta") for path in (tmp_path / host / "state/overlays").iterdir()
        ] == []
        with pytest.raises(StateError, match="is not protected"):
            await hosts.call("alpha", "unprotect", guest="web")
        # Nothing is told that did not happen.
        history = hosts.agents["alpha"].history
        await hosts.until(lambda: history.read("web")[-1]["event"] == "unprotected")
        told = [event["event"] for event in history.read("web") if event["event"] not in {"state", "swap"}]
        assert told == ["started", "syncing", "protected", "unprotected"]


async def test_a_bound_that_the_interval_cannot_keep_is_told(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        bounds = "interval = 'adaptive'\ninterval_options = { max_latency_ms = 0.001 }"
        hosts.write_guest("alpha", "web", interval=bounds)
        await protected(hosts)
        await hosts.until(lambda: hosts.agents["alpha"].figures.row("web", 0).get("epoch", 0) > 3)
        rows = {row["host"]: row for row in (await hosts.call("alpha", "list"))["guests"]}
        assert re.search(r"output waits up to \d+ ms \(bound 0.001 ms\)", rows["alpha"]["problem"])
        assert "problem" not in rows["beta"]


async def test_a_gate_that_does_not_open_at_once_is_opened_later(tmp_path: Path) -> None:
    # What the guest sends is held until then, although nothing protects it any more.
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        hosts.world.fail.add("teardown")
        await hosts.call("alpha", "unprotect", guest="web")
        assert ("primary", "nic0") in hosts.world.open_devices
        with pytest.raises(
            StateError, match=r"still being removed: .*the gate does not open; try again later"
        ):
            await hosts.call("alpha", "protect", guest="web")
        assert ("primary", "nic0") in hosts.world.open_devices
        hosts.world.fail.clear()
        await hosts.until(lambda: hosts.world.open_devices == [])
        assert hosts.world.running("web") == ["alpha"]


async def test_a_device_that_does_not_stop_keeps_no_output_held(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        hosts.world.fail.add("stop device")
        await hosts.call("alpha", "unprotect", guest="web")
        await hosts.until(lambda: hosts.world.open_devices == [])
        assert hosts.world.running("web") == ["alpha"]
        history = hosts.agents["alpha"].history
        await hosts.until(lambda: any("does not stop" in str(event) for event in history.read("web")))


async def test_the_primary_dies_and_the_standby_goes_on(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        await hosts.until(lambda: hosts.role("beta") == "standby")
        await hosts.crash("alpha")
        hosts.world.guests.pop(("alpha", "web"))
        await hosts.until(lambda: hosts.role("beta") == "alone")
        await hosts.until(lambda: hosts.world.running("web") == ["beta"])
        # The dead host comes back; its janitor finds that the guest is another's; then it is protected there.
        await hosts.boot("alpha")
        await hosts.linked()
        await hosts.until(lambda: not hosts.agents["alpha"].tenure("web").busy)
        assert hosts.role("alpha") == "none"
        result = await hosts.call("beta", "protect", guest="web")
        assert result["peer"] == "alpha"
        await hosts.until(lambda: hosts.role("alpha") == "standby")
        await hosts.crash("beta")
        hosts.world.guests.pop(("beta", "web"))
        await hosts.until(lambda: hosts.world.running("web") == ["alpha"])
        await hosts.until(lambda: hosts.role("alpha") == "alone")
        # The history is written by a thread of its own.
        history = hosts.agents["alpha"].history
        await hosts.until(lambda: "promoted" in [event["event"] for event in history.read("web")])


async def test_the_secondary_dies_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        await hosts.until(lambda: hosts.role("beta") == "standby")
        await hosts.crash("beta")
        hosts.world.guests.pop(("beta", "web"))
        await hosts.until(lambda: hosts.role("alpha") == "alone")
        assert hosts.world.running("web") == ["alpha"]
        row = (await hosts.call("alpha", "list"))["guests"][0]
        assert row["state"] == "alone"
        assert row["problem"]


async def test_the_agent_of_the_primary_dies_and_its_guest_is_discarded(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        await hosts.until(lambda: hosts.role("beta") == "standby")
        await hosts.crash("alpha")
        await hosts.until(lambda: hosts.role("beta") == "alone")
        await hosts.boot("alpha")
        await hosts.until(lambda: hosts.world.running("web") == ["beta"])


async def test_an_agent_that_comes_back_adopts_its_unprotected_guest(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.crash("alpha")
        await hosts.boot("alpha")
        await hosts.until(lambda: hosts.role("alpha") == "alone")
        assert hosts.world.running("web") == ["alpha"]
        await hosts.linked()
        await hosts.until(lambda: not hosts.agents["alpha"].tenure("web").busy)
        assert (await hosts.call("alpha", "protect", guest="web"))["state"] == "protected"


async def test_a_stopped_agent_gives_up_each_protection_whatever_becomes_of_the_others(
    tmp_path: Path,
) -> None:
    async with two_hosts(tmp_path, ("web", "db")) as hosts:
        await protected(hosts, "web")
        await protected(hosts, "db")
        agent = hosts.agents["alpha"]

        def broken(event: object) -> None:
            raise OSError(f"{event} cannot be asked for")

        web = agent.tenure("web")
        assert web.driver
        web.driver.ask = broken  # type: ignore[method-assign, assignment]
        await agent.operations.withdraw()
        assert hosts.role("alpha", "db") == "unprotected"
        assert hosts.role("alpha", "web") == "protected"
        del web.driver.ask


async def test_both_hosts_die_and_the_owner_starts_its_guest_again(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        await hosts.until(lambda: hosts.role("beta") == "standby")
        # Both are gone before either of them can tell the arbiter.
        with hosts.arbiter_lost():
            await asyncio.gather(hosts.crash("alpha"), hosts.crash("beta"))
        hosts.world.guests.clear()
        await hosts.boot("alpha")
        await hosts.until(lambda: hosts.role("alpha") == "recovering")
        record = await hosts.agents["alpha"].need_arbiter().read("web")
        assert record is not None
        assert (record.state, record.owner) == (RecordState.PROTECTED, "alpha")
        assert hosts.world.running("web") == []  # protected entitles nobody to start
        # The standby says that it holds nothing of the guest.
        await hosts.boot("beta")
        await hosts.until(lambda: hosts.role("alpha") == "alone", timeout_s=10)
        await hosts.until(lambda: hosts.world.running("web") == ["alpha"])


async def test_ctrl_c_during_protect_leaves_the_guest_unprotected_and_both_hosts_clean(
    tmp_path: Path,
) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        hosts.world.slow_copy_s = 60
        protecting = asyncio.create_task(hosts.call("alpha", "protect", guest="web"))
        await asyncio.wait_for(hosts.world.copying.wait(), 5)
        with pytest.raises(GuestBusy, match="protect is under way"):
            await hosts.call("alpha", "protect", guest="web")
        protecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(protecting, 10)
        assert hosts.role("alpha") == "unprotected"
        assert hosts.world.running("web") == ["alpha"]
        assert hosts.world.state("beta", "web") is GuestState.ABSENT
        assert hosts.world.open_devices == []
        hosts.world.slow_copy_s = 0
        assert (await hosts.call("alpha", "protect", guest="web"))["state"] == "protected"


@pytest.mark.parametrize(("step", "words"), [("replicate", "on purpose"), ("launch", "cannot be launched")])
async def test_a_failed_protect_tells_the_first_cause_and_leaves_both_hosts_clean(
    tmp_path: Path, step: str, words: str
) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        hosts.world.fail.add(step)
        with pytest.raises(Exception, match=words):
            await hosts.call("alpha", "protect", guest="web")
        assert hosts.world.running("web") == ["alpha"]
        assert hosts.world.state("beta", "web") is GuestState.ABSENT
        assert hosts.world.open_devices == []
        hosts.world.fail.clear()
        assert (await hosts.call("alpha", "protect", guest="web"))["state"] == "protected"


@pytest.mark.parametrize("side", ["primary", "secondary"])
async def test_what_a_failed_protect_cannot_undo_is_told_and_undone_later(tmp_path: Path, side: str) -> None:
    async with two_hosts(tmp_path) as hosts:
        for host in ("alpha", "beta"):
            hosts.write_guest(host, "web", extra="nics = 2\n")
        await hosts.call("alpha", "start", guest="web")
        hosts.world.fail |= {f"open nic1 of the {side}", f"teardown of the {side}"}
        protecting = asyncio.create_task(hosts.call("alpha", "protect", guest="web"))
        host = "alpha" if side == "primary" else "beta"
        history = hosts.agents[host].history
        await hosts.until(
            lambda: any("the gate does not open" in str(event) for event in history.read("web"))
        )
        assert (side, "nic0") in hosts.world.open_devices
        assert hosts.world.running("web") == ["alpha"]
        hosts.world.fail.clear()
        with pytest.raises((ExceptionGroup, PeerError)) as caught:
            await protecting
        told = describe(caught.value)
        assert "nic1 cannot be opened" in told["message"]
        if side == "primary":
            assert any("the gate does not open" in each for each in told["also"])
        await hosts.until(lambda: hosts.world.open_devices == [])
        assert (await hosts.call("alpha", "protect", guest="web"))["state"] == "protected"


async def test_failover_of_a_healthy_pair_needs_force_and_reason(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        await hosts.until(lambda: hosts.role("beta") == "standby")
        with pytest.raises(StateError, match="holds no copy"):
            await hosts.call("alpha", "failover", guest="web")
        with pytest.raises(StateError, match="healthy"):
            await hosts.call("beta", "failover", guest="web")
        with pytest.raises(StateError, match="reason"):
            await hosts.call("beta", "failover", guest="web", force=True)
        result = await hosts.call("beta", "failover", guest="web", force=True, reason="drill", operator="ann")
        assert result["state"] == "alone"
        await hosts.until(lambda: hosts.world.running("web") == ["beta"])
        records = (await hosts.call("beta", "history", guest="web"))["records"]
        assert any(record["forced_by"] == "ann" and "drill" in record["reason"] for record in records)


async def test_a_primary_that_is_forced_out_learns_of_it_from_the_new_owner(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        await hosts.until(lambda: hosts.role("beta") == "standby")
        hosts.world.fail.add("notice")
        await hosts.call("beta", "failover", guest="web", force=True, reason="drill", operator="ann")
        await hosts.until(lambda: hosts.role("alpha") == "none")
        assert hosts.world.running("web") == ["beta"]
        hosts.world.fail.clear()
        assert (await hosts.call("beta", "protect", guest="web"))["peer"] == "alpha"


async def test_two_guests_in_opposite_directions(tmp_path: Path) -> None:
    async with two_hosts(tmp_path, ("web", "db")) as hosts:
        await asyncio.gather(protected(hosts, "web", "alpha"), protected(hosts, "db", "beta"))
        await hosts.until(lambda: hosts.role("beta", "web") == "standby")
        await hosts.until(lambda: hosts.role("alpha", "db") == "standby")
        await hosts.crash("alpha")
        hosts.world.guests.pop(("alpha", "web"))
        hosts.world.guests.pop(("alpha", "db"))
        await hosts.until(lambda: hosts.world.running("web") == ["beta"])
        await hosts.until(lambda: hosts.role("beta", "db") == "alone")
        assert hosts.world.running("db") == ["beta"]


async def test_a_stopped_agent_gives_up_protection_in_good_order(tmp_path: Path) -> None:
    async with two_hosts(tmp_path, ("web", "db")) as hosts:
        await protected(hosts, "web", "alpha")
        await protected(hosts, "db", "beta")
        await hosts.until(
            lambda: hosts.role("beta", "web") == "standby" and hosts.role("alpha", "db") == "standby"
        )
        await hosts.agents.pop("alpha").close()
        assert hosts.world.running("web") == ["alpha"]
        assert hosts.world.running("db") == ["beta"]
        assert hosts.world.state("beta", "web") is GuestState.ABSENT
        assert hosts.world.state("alpha", "db") is GuestState.ABSENT
        assert hosts.role("beta", "db") == "unprotected"
        assert hosts.world.open_devices == []


async def test_the_end_of_an_agent_is_bounded_whatever_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("operations.WITHDRAW_LIMIT_S", "agent.WITHDRAW_LIMIT_S", "agent.END_LIMIT_S"):
        monkeypatch.setattr(f"understudy.agent.{name}", 0.3)
    async with two_hosts(tmp_path, ("web", "db")) as hosts:
        await protected(hosts, "web")
        hosts.world.hold_close = asyncio.Event()
        try:
            async with asyncio.timeout(30):
                await hosts.agents.pop("alpha").close()
            assert "does not wait for the engine of web any more, after 0.3 s" in caplog.text
            assert "the engine of db" not in caplog.text
            assert hosts.world.running("web") == ["alpha"]
        finally:
            hosts.world.hold_close.set()


async def test_the_guest_shuts_down_while_nothing_protects_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("understudy.agent.recovery.POLL_S", 0.02)
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        hosts.world.guests["alpha", "web"] = GuestState.SHUTOFF
        await hosts.until(lambda: hosts.role("alpha") == "off")
        assert (await hosts.call("alpha", "status", guest="web"))["record"]["state"] == "stopped"


async def test_check_lists_everything_at_once(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        hosts.world.found.append(Finding(Severity.ERROR, "nic0", "the bridge is missing", "make it"))
        hosts.write_guest("beta", "web", extra="nics = 2\n")
        result = await hosts.call("alpha", "check", guest="web")
        assert not result["protectable"]
        problems = errors_of(result["findings"])
        assert "the bridge is missing" in problems
        assert "it does not run here" in problems
        assert any("no record" in problem for problem in problems)
        assert any("not the same on alpha and beta" in each["problem"] for each in result["findings"])
        assert all(each["remedy"] for each in result["findings"] if each["severity"] != "note")
        with pytest.raises(PreflightFailed, match="bridge is missing"):
            await hosts.call("alpha", "protect", guest="web")
        hosts.world.found.clear()
        await hosts.call("alpha", "start", guest="web")
        result = await hosts.call("alpha", "check", guest="web")
        assert result["protectable"], result


async def test_check_of_a_guest_that_understudy_did_not_start(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        found = FoundGuest(
            "old", GuestState.RUNNING, False, "its disks have no quorum node", "restart it here"
        )
        hosts.world.foreign["alpha"] = [found]
        result = await hosts.call("alpha", "check", guest="old")
        assert not result["protectable"]
        assert result["findings"][0]["remedy"] == "restart it here"
        rows = (await hosts.call("alpha", "list"))["guests"]
        assert any(row["guest"] == "old" and "quorum" in row["problem"] for row in rows)


async def test_check_without_the_other_host(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.crash("beta")
        result = await hosts.call("alpha", "check", guest="web")
        assert any("no link to beta" in problem for problem in errors_of(result["findings"]))
        with pytest.raises(PreflightFailed):
            await hosts.call("alpha", "protect", guest="web")


async def test_a_guest_file_that_only_one_host_has(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        (tmp_path / "beta/guests/web.toml").unlink()
        await hosts.call("alpha", "start", guest="web")
        result = await hosts.call("alpha", "check", guest="web")
        assert any("copy the guest's file" in problem for problem in errors_of(result["findings"]))


async def test_unknown_and_malformed_guests(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        with pytest.raises(GuestNotFound, match="describes a guest 'nope'"):
            await hosts.call("alpha", "start", guest="nope")
        with pytest.raises(GuestNotFound):
            await hosts.call("alpha", "stop", guest="nope")
        (tmp_path / "alpha/guests/bad.toml").write_text('hypervisor = "fake"\nnisc = 1\n')
        with pytest.raises(ConfigError, match="did you mean 'nics'"):
            await hosts.call("alpha", "start", guest="bad")
        assert any("nisc" in warning for warning in (await hosts.call("alpha", "list"))["warnings"])
        assert (await hosts.call("alpha", "start", guest="web"))["state"] == "unprotected"


async def test_a_failed_start_is_told_and_leaves_the_guest_off(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        hosts.world.fail.add("start")
        with pytest.raises(OSError, match="no such disk"):
            await hosts.call("alpha", "start", guest="web")
        assert hosts.world.running("web") == []
        hosts.world.fail.clear()
        await hosts.until(lambda: hosts.role("alpha") == "off")
        assert (await hosts.call("alpha", "start", guest="web"))["state"] == "unprotected"


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("stop", "did not shut down within 0.1 s and runs on; understudy stop web --force kills it"),
        ("stop at all", "has not answered within 0.3 s; understudy stop web --force kills it"),
        ("monitor", "monitor does not answer; understudy stop web --force kills it"),
    ],
)
async def test_a_guest_that_does_not_shut_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, words: str
) -> None:
    # One that cannot even be asked is told at once: nobody waits an hour for it here.
    timeout_s = 3600.0 if fails == "monitor" else 0.1
    monkeypatch.setattr("understudy.agent.operations.MARGIN_S", 0.1)
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        hosts.world.fail.add(fails)
        with pytest.raises(HypervisorError, match=f"guest web was not stopped: .*{words}"):
            async with asyncio.timeout(30):
                await hosts.call("alpha", "stop", guest="web", timeout_s=timeout_s)
        assert hosts.role("alpha") == "unprotected"
        assert hosts.world.running("web") == ["alpha"]
        hosts.world.fail.discard("stop at all")
        monkeypatch.undo()
        # What it was asked for once does not come true later, when it is protected and let go again.
        await hosts.call("alpha", "protect", guest="web")
        await hosts.call("alpha", "unprotect", guest="web")
        assert hosts.world.running("web") == ["alpha"]
        await hosts.call("alpha", "stop", guest="web", force=True)
        assert hosts.world.running("web") == []
        assert hosts.role("alpha") == "off"


async def test_nothing_else_begins_while_a_guest_is_asked_to_shut_down(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        hosts.world.fail.add("stop")
        stopping = asyncio.create_task(hosts.call("alpha", "stop", guest="web", timeout_s=3600))
        await hosts.until(lambda: hosts.agents["alpha"].tenure("web").busy == "stop")
        with pytest.raises(GuestBusy, match="stop is under way"):
            await hosts.call("alpha", "protect", guest="web")
        stopping.cancel()  # the operator has gone
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert (await hosts.call("alpha", "protect", guest="web"))["state"] == "protected"


async def test_a_second_agent_is_refused(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        first = hosts.agents["alpha"]
        with pytest.raises(StateError, match="another agent is running"):
            await hosts.boot("alpha")
        hosts.agents["alpha"] = first


async def test_without_the_arbiter_a_healthy_pair_goes_on_and_nothing_is_decided(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        await hosts.until(lambda: hosts.role("beta") == "standby")
        with hosts.arbiter_lost():
            epoch = hosts.agents["alpha"].figures.row("web", 0).get("epoch", 0)
            await hosts.until(lambda: hosts.agents["alpha"].figures.row("web", 0)["epoch"] > epoch + 5)
            await hosts.crash("beta")
            hosts.world.guests.pop(("beta", "web"))
            await hosts.until(lambda: hosts.role("alpha") == "suspect")
        await hosts.until(lambda: hosts.role("alpha") == "alone")
        assert hosts.world.running("web") == ["alpha"]


async def test_an_agent_that_comes_back_without_the_arbiter_touches_nothing(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.crash("alpha")
        hosts.world.swept.clear()
        with hosts.arbiter_lost():
            await hosts.boot("alpha")
            tenure = hosts.agents["alpha"].tenure("web")
            await hosts.until(lambda: "waiting for the arbiter" in tenure.problem)
            # Beta sweeps when it has time, also after alpha's crash; that is another matter.
            assert "alpha" not in [host for host, *_ in hosts.world.swept]
            assert hosts.world.running("web") == ["alpha"]
        await hosts.until(lambda: hosts.role("alpha") == "alone" and not tenure.busy)


async def test_a_directory_that_is_not_mounted_is_no_arbiter(tmp_path: Path) -> None:
    # An empty directory in its place says that the guest is new; this host knows better.
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.call("alpha", "stop", guest="web")
        with hosts.arbiter_lost(), pytest.raises(ArbiterUnavailable, match=r"has seen generation 2.*mounted"):
            await hosts.call("alpha", "start", guest="web")
        assert hosts.world.running("web") == []
        await hosts.call("alpha", "start", guest="web")


async def test_a_peer_of_another_protocol_version_is_told_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        await hosts.agents.pop("beta").close()
        beta = hosts.make("beta")
        beta.links.me = replace(beta.links.me, protocol=2)
        beta.links.peers["alpha"]._me = beta.links.me
        await beta.start()
        await hosts.until(lambda: "protocol version" in hosts.agents["alpha"].links.peers["beta"].problem)
        await hosts.until(lambda: "protocol version" in beta.links.peers["alpha"].problem)
        result = await hosts.call("alpha", "check", guest="web")
        assert any("install the same version" in problem for problem in errors_of(result["findings"]))


async def test_the_pair_survives_that_only_the_link_breaks(tmp_path: Path) -> None:
    # Both agents live, only their connection is lost: exactly one host goes on with the guest.
    async with two_hosts(tmp_path) as hosts:
        await protected(hosts)
        await hosts.until(lambda: hosts.role("beta") == "standby")
        connection = hosts.agents["alpha"].links.peers["beta"].connection
        assert connection
        connection.abort("the test cut it")
        await hosts.until(
            lambda: {hosts.role("alpha"), hosts.role("beta")} == {"alone", "none"}, timeout_s=10
        )
        assert len(hosts.world.running("web")) == 1
        owner = hosts.world.running("web")[0]
        await hosts.linked()
        assert (await hosts.call(owner, "protect", guest="web"))["state"] == "protected"
