"""What every command shares: its options, its output, its way to fail."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import click

from understudy.cli.client import AgentUnreachable, Refused, ask, socket_path
from understudy.cli.exits import Exit, exit_for
from understudy.config import CONFIG_VARIABLE
from understudy.errors import ConfigError, UnderstudyError

__all__ = [
    "Context",
    "Failure",
    "allow_unsafe_option",
    "command_options",
    "guest_argument",
    "leave",
    "print_table",
    "show_findings",
]

F = TypeVar("F", bound=Callable[..., Any])


class Failure(click.ClickException):
    """The end of a command that failed, told in the format that was asked for.

    Args:
        fault: ``kind``, ``message`` and what else is known.
        as_json: Print it as JSON on standard output.
    """

    def __init__(self, fault: Mapping[str, Any], *, as_json: bool) -> None:
        super().__init__(str(fault.get("message", "")))
        self.fault = fault
        self.as_json = as_json
        # A class variable to click's type hints; click itself reads it from the instance.
        self.exit_code = int(exit_for(str(fault.get("kind", ""))))  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        """Print it."""
        if self.as_json:
            click.echo(json.dumps({"error": {**self.fault, "exit": self.exit_code}}, indent=2))
            return
        click.echo(f"understudy: {self.message}", file=file, err=True)
        for also in self.fault.get("also", ()):
            click.echo(f"  afterwards: {also}", file=file, err=True)


class Context:
    """One run of a command.

    Args:
        config: Path of agent.toml, ``None`` for the default.
        as_json: Whether output is JSON.
    """

    def __init__(self, config: str | None, *, as_json: bool) -> None:
        self.config = config
        self.as_json = as_json

    def ask(self, method: str, params: Mapping[str, Any], **more: Any) -> Any:
        """Ask the agent; see `understudy.cli.client.ask`.

        Raises:
            Failure: Nobody answers, or the answer is an error.
        """
        try:
            return ask(socket_path(self.config), method, params, **more)
        except Refused as error:
            raise Failure(error.fault, as_json=self.as_json) from error
        except (AgentUnreachable, ConfigError) as error:
            raise self.failure(error) from error
        except KeyboardInterrupt:
            message = "not waiting for the agent any longer; it goes on calling it off"
            raise Failure({"kind": "Cancelled", "message": message}, as_json=self.as_json) from None

    def failure(self, error: UnderstudyError) -> Failure:
        """Return the end of a command that failed here, not in the agent."""
        return Failure({"kind": type(error).__name__, "message": str(error)}, as_json=self.as_json)

    def show(self, result: Any, text: Callable[[Any], None]) -> None:
        """Print a result: as JSON, or by `text`."""
        if self.as_json:
            click.echo(json.dumps(result, indent=2))
        else:
            text(result)


def command_options(function: F) -> F:
    """Give a command the options that all have; it gets a `Context` as its first argument."""

    @click.option(
        "--format", "output", type=click.Choice(["text", "json"]), default="text", help="How to print."
    )
    @click.option(
        "--config",
        metavar="FILE",
        envvar=CONFIG_VARIABLE,
        help=f"The agent's configuration. [env: {CONFIG_VARIABLE}]",
    )
    @click.pass_context
    @functools.wraps(function)
    def wrapper(ctx: click.Context, /, *args: Any, output: str, config: str | None, **kwargs: Any) -> Any:
        return function(Context(config or ctx.obj, as_json=output == "json"), *args, **kwargs)

    return cast("F", wrapper)


def guest_argument(function: F) -> F:
    """Give a command the argument GUEST, completed from the agent's list."""
    return click.argument("guest", metavar="GUEST", shell_complete=_complete_guest)(function)


def allow_unsafe_option(function: F) -> F:
    """Give a command the option ``--allow-unsafe``."""
    return click.option(
        "--allow-unsafe",
        is_flag=True,
        help="Take it upon yourself what the preflight calls unsafe: errors of that kind are warnings.",
    )(function)


def _complete_guest(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    # A shell that completes must not see an error.
    try:
        config = ctx.params.get("config") or ctx.obj
        result = ask(socket_path(config), "names", {})
    except (UnderstudyError, OSError, ValueError):
        return []
    return [name for name in result["guests"] if name.startswith(incomplete)]


def print_table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table.

    Args:
        columns: Pairs of key and heading.
        rows: What to print; a missing or empty value is a dash.
    """
    cells = [[heading for _, heading in columns]]
    cells += [[_cell(row.get(key)) for key, _ in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return str(value)


def show_findings(findings: Sequence[Mapping[str, Any]]) -> None:
    """Print the findings of a preflight, each with what to do."""
    colours = {"error": "red", "warning": "yellow", "note": "blue"}
    for finding in findings:
        severity = finding["severity"]
        click.echo(
            click.style(f"{severity:8}", fg=colours.get(severity))
            + f"{finding['subject']}: {finding['problem']}"
        )
        if finding.get("remedy"):
            click.echo(f"        → {finding['remedy']}")


def leave(code: Exit) -> None:
    """End the command with `code`."""
    click.get_current_context().exit(int(code))
