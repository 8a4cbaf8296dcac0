"""The reference of the command line says what the code does."""

import re
from pathlib import Path

import click
import pytest

from understudy.cli.exits import MEANINGS
from understudy.cli.program import COMMANDS, program
from understudy.config import AgentConfig, read_config

REFERENCE = Path(__file__).parents[2] / "docs/reference"


def text(name: str) -> str:
    return (REFERENCE / name).read_text()


def test_exit_codes() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", text("exit-codes.md"), re.MULTILINE)
    assert rows == [(str(int(code)), code.name, meaning) for code, meaning in MEANINGS.items()]


def test_every_command_and_option_is_in_the_reference() -> None:
    reference = text("command-line.md")
    context = click.Context(program)
    for name in COMMANDS:
        command = program.get_command(context, name)
        assert command is not None
        commands = command.commands.values() if isinstance(command, click.Group) else [command]
        for each in commands:
            full = name if each is command else f"{name} {each.name}"
            assert f"`{full}" in reference, full
            for option in each.params:
                if isinstance(option, click.Option) and option.name not in {"output", "config", "log_level"}:
                    names = [*option.opts, *option.secondary_opts]
                    assert any(f"{opt}" in reference for opt in names), f"{full} {names}"


def test_the_example_of_agent_toml_is_right(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.+?)```", text("agent-toml.md"), re.DOTALL)
    assert example
    path = tmp_path / "agent.toml"
    path.write_text(example[1])
    config = read_config(path)
    assert isinstance(config, AgentConfig)
    assert config.arbiter_kind == "directory"


@pytest.mark.parametrize(
    "key",
    [
        "host", "insecure", "plugins", "listen.address", "listen.port", "peers.NAME.address", "peers.NAME.port",
        "directories.state", "directories.runtime", "directories.guests", "directories.overlays", "arbiter.kind",
        "limits.heartbeat_interval_ms", "limits.heartbeat_limit_ms", "limits.bwlimit",
    ],
)  # fmt: skip
def test_every_key_of_agent_toml_is_in_the_reference(key: str) -> None:
    assert f"| `{key}` |" in text("agent-toml.md")
