"""The commands by name; a command's module is imported when the command, or the help of all, is asked for."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import click

from understudy._version import __version__
from understudy.config import CONFIG_VARIABLE

if TYPE_CHECKING:
    from understudy.hookspecs import CommandOffer
    from understudy.plugins import Plugins

__all__ = ["COMMANDS", "program"]

#: Name → (module and attribute, help in one line).
COMMANDS: dict[str, tuple[str, str]] = {
    "agent": ("understudy.cli.daemon:agent", "Run the agent of this host."),
    "start": ("understudy.cli.guests:start", "Start a guest on this host."),
    "stop": ("understudy.cli.guests:stop", "Shut a guest down."),
    "list": ("understudy.cli.overview:list_", "List the guests of this host and its peers."),
    "status": (
        "understudy.cli.overview:status",
        "Show this host, its peers and guests, or one guest in detail.",
    ),
    "check": (
        "understudy.cli.overview:check",
        "Find out whether a guest can be protected, and what is in the way.",
    ),
    "protect": (
        "understudy.cli.protection:protect",
        "Keep a live second copy of a running guest on another host.",
    ),
    "unprotect": ("understudy.cli.protection:unprotect", "End the protection; the guest runs on here."),
    "failover": ("understudy.cli.protection:failover", "Let this host's copy go on with the guest."),
    "history": ("understudy.cli.overview:history", "Show what happened to a guest."),
    "plugins": ("understudy.cli.plugins:plugins", "Look at the installed plugins."),
    "completion": ("understudy.cli.completion:completion", "Print the shell's completion script."),
}


class _Program(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the signature is click's
        return [*COMMANDS, *(offer.name for offer in _offers())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name in COMMANDS:
            module, attribute = COMMANDS[cmd_name][0].split(":")
            return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
        return next((offer.load() for offer in _offers() if offer.name == cmd_name), None)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        # click would import every command for its first line.
        rows = [(name, short_help) for name, (_, short_help) in COMMANDS.items()]
        rows += [(offer.name, offer.short_help) for offer in _offers()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib  # noqa: PLC0415 - for mistakes alone

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            for info in _plugins().problems:
                hint += f"\n\nThe plugin {info.name} ({info.distribution}) is left out: {info.problem}"
            raise click.UsageError(error.format_message() + hint, ctx) from None


@cache
def _plugins() -> Plugins:
    from understudy.plugins import Plugins  # noqa: PLC0415 - takes its time, and is rarely needed

    # What cannot be loaded is said where it matters: by `plugins list`, the agent, and for a command that is missing.
    logging.getLogger("understudy").addHandler(logging.NullHandler())
    return Plugins.discover()


def _offers() -> Sequence[CommandOffer]:
    return [offer for offer in _plugins().commands() if offer.name not in COMMANDS]


@click.group(
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes and every option: docs/reference/. A command's own help: understudy COMMAND --help.",
)
@click.version_option(__version__, prog_name="understudy", message="%(prog)s %(version)s")
@click.option("--config", metavar="FILE", envvar=CONFIG_VARIABLE, help="The agent's configuration.")
@click.pass_context
def program(ctx: click.Context, config: str | None) -> None:
    """Keep a live second copy of a running virtual machine on another host."""
    ctx.obj = config
