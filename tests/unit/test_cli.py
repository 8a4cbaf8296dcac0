"""The command line as a process, against agents in this one."""

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.testbeds.twoagents import TwoHosts, two_hosts
from understudy._version import __version__
from understudy.cli.exits import MEANINGS, Exit, exit_for
from understudy.cli.program import COMMANDS, program
from understudy.device import Finding, Severity
from understudy.hypervisor import GuestState

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "UNDERSTUDY_CONFIG"}


async def spawn(config: Path | None, *arguments: str) -> Process:
    more = ["--config", str(config)] if config else []
    argv = [sys.executable, "-m", "understudy", *arguments, *more]
    return await asyncio.create_subprocess_exec(*argv, stdout=PIPE, stderr=PIPE, env=ENVIRONMENT)


async def run(config: Path | None, *arguments: str) -> tuple[int, str, str]:
    process = await spawn(config, *arguments)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode is not None
    assert "Traceback" not in err.decode()
    return process.returncode, out.decode(), err.decode()


async def run_json(config: Path, *arguments: str) -> tuple[int, Any]:
    code, out, _ = await run(config, *arguments, "--format", "json")
    return code, json.loads(out)


async def test_version_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv[1:] = ['--version']; from understudy.cli import main; main(); print(*sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=PIPE)
    out, _ = await process.communicate()
    version, modules = out.decode().splitlines()
    assert version == f"understudy {__version__}"
    assert {"click", "rich", "asyncio", "importlib.metadata"}.isdisjoint(modules.split())


def test_version_is_the_distributions() -> None:
    text = (Path(__file__).parents[2] / "core/pyproject.toml").read_text()
    assert f'version = "{__version__}"' in text


def test_help_lists_all_commands() -> None:
    result = CliRunner().invoke(program, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name}\s", result.output, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_examples_of_its_options(name: str) -> None:
    result = CliRunner().invoke(program, [name, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage:")


def test_a_misspelt_command_is_met_with_the_right_one() -> None:
    result = CliRunner().invoke(program, ["protct"])
    assert result.exit_code == Exit.USAGE
    assert "Did you mean 'protect'?" in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = CliRunner().invoke(program, ["completion", shell])
    assert result.exit_code == 0
    assert "_UNDERSTUDY_COMPLETE" in result.output


def test_every_error_of_the_tree_has_an_exit_code() -> None:
    assert exit_for("GuestNotFound") is Exit.UNKNOWN_GUEST
    assert exit_for("SomethingElse") is Exit.FAILED
    assert set(MEANINGS) == set(Exit)


async def test_without_a_configuration(tmp_path: Path) -> None:
    code, out, err = await run(tmp_path / "none.toml", "list")
    assert code == Exit.CONFIG
    assert out == ""
    assert "none.toml: cannot be read: No such file" in err


async def test_without_an_agent(tmp_path: Path) -> None:
    config = TwoHosts(tmp_path).config("alpha")
    code, _, err = await run(config, "list")
    assert code == Exit.NO_AGENT
    assert "Start it with 'systemctl start understudy'" in err
    code, answer = await run_json(config, "list")
    assert code == Exit.NO_AGENT
    assert answer["error"]["kind"] == "AgentUnreachable"
    assert answer["error"]["exit"] == Exit.NO_AGENT


async def test_a_whole_life(tmp_path: Path) -> None:  # noqa: PLR0915 - one life, told in order
    async with two_hosts(tmp_path) as hosts:
        alpha, beta = hosts.config("alpha"), hosts.config("beta")
        code, out, _ = await run(alpha, "list")
        assert code == Exit.OK
        assert out.startswith("GUEST")
        assert "insecure = true" in out

        assert (await run(alpha, "protect", "web"))[0] == Exit.NOT_PROTECTABLE  # it does not run yet
        code, out, _ = await run(alpha, "start", "web")
        assert (code, out) == (0, "web runs on alpha (generation 1)\n")
        assert (await run(alpha, "start", "web"))[0] == Exit.WRONG_STATE
        assert (await run(alpha, "start", "nope"))[0] == Exit.UNKNOWN_GUEST

        code, answer = await run_json(alpha, "check", "web")
        assert code == 0
        assert answer["protectable"]

        code, out, err = await run(alpha, "protect", "web")
        assert code == 0, err
        assert out.startswith("web is protected: beta holds a copy (mode remus")
        assert "memory: 50 %" in err
        await hosts.until(lambda: hosts.role("beta") == "standby")
        await hosts.until(lambda: hosts.agents["alpha"].figures.row("web", 0).get("epoch", 0) > 3)

        code, out, _ = await run(alpha, "list")
        assert re.search(r"^web +alpha +primary +protected +remus +beta +\d+ ", out, re.MULTILINE)
        assert re.search(r"^web +beta +secondary +standby ", out, re.MULTILINE)
        code, answer = await run_json(beta, "list")
        assert {row["host"]: row["state"] for row in answer["guests"]} == {
            "alpha": "protected",
            "beta": "standby",
        }
        primary = next(row for row in answer["guests"] if row["role"] == "primary")
        assert {"pause_p50_ms", "pause_p99_ms", "checkpoints_per_s", "lag_ms", "epoch"} <= set(primary)

        code, out, _ = await run(alpha, "status")
        assert "peer beta: linked" in out
        assert "arbiter directory: answers" in out
        code, out, _ = await run(beta, "status", "web")
        assert "record: protected, owner alpha, standby beta" in out

        code, _, err = await run(beta, "unprotect", "web")
        assert code == Exit.WRONG_STATE
        assert "do that on alpha" in err
        assert (await run(beta, "failover", "web"))[0] == Exit.WRONG_STATE
        assert (await run(beta, "failover", "web", "--force"))[0] == Exit.USAGE
        code, out, err = await run(beta, "failover", "web", "--force", "--reason", "a drill")
        assert code == 0, err
        assert out.startswith("web runs on beta")

        code, out, _ = await run(beta, "history", "web")
        assert "promoted" in out
        assert "a drill" in out
        code, answer = await run_json(beta, "history", "web", "--limit", "3")
        assert len(answer["events"]) == 3
        assert answer["records"][-1]["owner"] == "beta"

        await hosts.until(lambda: hosts.role("alpha") == "none")
        code, answer = await run_json(beta, "protect", "web", "--interval", "30", "--bwlimit", "10MiB")
        assert (code, answer["peer"], answer["state"]) == (0, "alpha", "protected")
        code, out, _ = await run(beta, "unprotect", "web")
        assert (code, out) == (0, "web runs on beta, unprotected\n")
        assert (await run(beta, "stop", "web"))[:2] == (0, "web is off\n")


async def test_ctrl_c_during_protect(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        alpha = hosts.config("alpha")
        await hosts.call("alpha", "start", guest="web")
        hosts.world.slow_copy_s = 60
        process = await spawn(alpha, "protect", "web")
        await asyncio.wait_for(hosts.world.copying.wait(), 10)
        assert process.stderr
        await asyncio.wait_for(process.stderr.readline(), 10)  # it shows progress, so it listens for Ctrl-C
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == Exit.CANCELLED
        assert "called off" in err.decode()
        assert "Traceback" not in err.decode()
        assert hosts.role("alpha") == "unprotected"
        assert hosts.world.state("beta", "web") is GuestState.ABSENT
        assert hosts.world.open_devices == []


async def test_findings_are_shown_with_what_to_do(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        hosts.world.found.append(
            Finding(Severity.ERROR, "nic0 on beta", "the bridge br7 is missing", "ip link add br7")
        )
        code, out, _ = await run(hosts.config("alpha"), "check", "web")
        assert code == Exit.NOT_PROTECTABLE
        assert "error   nic0 on beta: the bridge br7 is missing\n        → ip link add br7\n" in out
        code, out, err = await run(hosts.config("alpha"), "protect", "web")
        assert code == Exit.NOT_PROTECTABLE
        assert "it runs on as before" in err
        assert "br7" in out
        code, answer = await run_json(hosts.config("alpha"), "protect", "web")
        assert answer["error"]["findings"][0]["remedy"] == "ip link add br7"


async def test_what_is_unsafe_is_taken_upon_oneself(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        alpha = hosts.config("alpha")
        await hosts.call("alpha", "start", guest="web")
        hosts.world.found.append(
            Finding(Severity.ERROR, "disk0", "it is not replicated", "use DRBD", unsafe=True)
        )
        code, out, _ = await run(alpha, "protect", "web")
        assert code == Exit.NOT_PROTECTABLE
        assert "→ use DRBD; or take it upon yourself with --allow-unsafe" in out
        assert (await run(alpha, "check", "web", "--allow-unsafe"))[0] == 0
        code, _, err = await run(alpha, "protect", "web", "--allow-unsafe")
        assert code == 0, err
        assert "warning: disk0: it is not replicated" in err
        told = "! web on alpha: protected unsafely, as allowed: disk0: it is not replicated\n"
        assert told in (await run(alpha, "status", "web"))[1]
        assert told in (await run(hosts.config("beta"), "list"))[1]


async def test_protect_without_waiting(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        await hosts.call("alpha", "start", guest="web")
        code, out, _ = await run(hosts.config("alpha"), "protect", "web", "--no-wait")
        assert code == 0
        assert "has begun" in out
        await hosts.until(lambda: hosts.role("alpha") == "protected")
        await hosts.call("alpha", "unprotect", guest="web")
        hosts.world.fail.add("launch")
        assert (await run(hosts.config("alpha"), "protect", "web", "--no-wait"))[0] == 0
        tenure = hosts.agents["alpha"].tenure("web")
        await hosts.until(lambda: "cannot be launched" in tenure.problem)
        assert "! web on alpha: it was not protected:" in (await run(hosts.config("alpha"), "list"))[1]


async def test_bad_options(tmp_path: Path) -> None:
    config = TwoHosts(tmp_path).config("alpha")
    for arguments in (
        ("protect", "web", "--bwlimit", "fast"),
        ("protect", "web", "--mode", "magic"),
        ("protect",),
    ):
        assert (await run(config, *arguments))[0] == Exit.USAGE


async def test_plugins_list() -> None:
    process = await spawn(None, "plugins", "list", "--format", "json")
    out, _ = await process.communicate()
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["directory"]["distribution"] == "understudy"
    assert "arbiter directory" in rows["directory"]["offers"]


async def test_agent_run_is_a_well_behaved_daemon(tmp_path: Path) -> None:
    hosts = TwoHosts(tmp_path, guests=())
    config = hosts.config("alpha")
    process = await spawn(config, "agent", "run")
    assert process.stderr
    lines = []
    async with asyncio.timeout(20):
        while "listens on" not in (line := (await process.stderr.readline()).decode()):
            lines.append(line)
        assert "insecure = true" in (await process.stderr.readline()).decode()
    code, out, _ = await run(config, "status")
    assert code == 0
    assert "not linked" in out
    second = await run(config, "agent", "run")
    assert second[0] == Exit.WRONG_STATE
    assert "another agent is running" in second[2]
    process.send_signal(signal.SIGTERM)
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0
    assert "Traceback" not in err.decode()
    assert not (tmp_path / "alpha/run/agent.sock").exists()


async def test_agent_run_with_a_taken_port(tmp_path: Path) -> None:
    hosts = TwoHosts(tmp_path, guests=())
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", hosts.ports["alpha"])
    async with server:
        code, _, err = await run(hosts.config("alpha"), "agent", "run")
    assert code == Exit.CONFIG
    assert "cannot listen on 127.0.0.1 port" in err


async def test_agent_run_needs_insecure_to_be_said(tmp_path: Path) -> None:
    config = TwoHosts(tmp_path, guests=()).config("alpha")
    config.write_text(config.read_text().replace("insecure = true\n", ""))
    code, _, err = await run(config, "agent", "run")
    assert code == Exit.CONFIG
    assert "no encryption yet" in err
