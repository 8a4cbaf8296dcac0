"""``agent run``."""

from __future__ import annotations

import click

from understudy.cli.common import Context, command_options
from understudy.cli.exits import Exit

__all__ = ["agent"]


@click.group()
def agent() -> None:
    """Run the agent of this host."""


@agent.command()
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="The least that is logged.",
)
@command_options
def run(context: Context, log_level: str) -> None:
    """Run the agent in the foreground, until SIGTERM or SIGINT.

    Logs to standard error, or to the journal under systemd (Type=notify). Guests run on when it ends.
    """
    from understudy.agent.daemon import run_agent  # noqa: PLC0415 - the daemon's imports are its own business
    from understudy.errors import UnderstudyError  # noqa: PLC0415

    try:
        run_agent(context.config, log_level)
    except UnderstudyError as error:
        raise context.failure(error) from error
    except KeyboardInterrupt:
        click.get_current_context().exit(int(Exit.CANCELLED))
