"""``start`` and ``stop``."""

from __future__ import annotations

import click

from understudy.cli.common import Context, command_options, guest_argument

__all__ = ["start", "stop"]


@click.command()
@guest_argument
@command_options
def start(context: Context, guest: str) -> None:
    """Start GUEST on this host, unprotected.

    The arbiter decides first: a guest that another host owns, or may take over, is not started.
    """
    result = context.ask("start", {"guest": guest})
    context.show(
        result, lambda _: click.echo(f"{guest} runs on {result['host']} (generation {result['generation']})")
    )


@click.command()
@guest_argument
@click.option("--force", is_flag=True, help="Kill it instead of asking it to shut down.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=1),
    default=60,
    help="Seconds to wait.",
    show_default=True,
)
@command_options
def stop(context: Context, guest: str, force: bool, timeout_s: float) -> None:  # noqa: FBT001 - click passes by name
    """Shut GUEST down and see it gone. A protected guest is shut down for good, on both hosts."""
    result = context.ask("stop", {"guest": guest, "force": force, "timeout_s": timeout_s})
    context.show(result, lambda _: click.echo(f"{guest} is off"))
