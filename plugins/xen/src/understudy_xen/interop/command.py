"""``understudy xen``: work with a host that has only the stock tools."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from understudy.errors import UnderstudyError
from understudy.schema import parse_bytes
from understudy_xen.interop.ending import Outcome
from understudy_xen.interop.receive import promote, receive
from understudy_xen.interop.remus import RemusFigures, run_remus
from understudy_xen.interop.saving import save_to

__all__ = ["xen"]

T = TypeVar("T")

_FORMAT = click.option(
    "--format", "output", type=click.Choice(["text", "json"]), default="text", help="How to print."
)
_UNACKNOWLEDGED = (
    "the receiver acknowledges nothing and no output is held: a client may see what the copy does not know, as with "
    "xl remus -F -n -d. Use 'understudy protect' for a guest that must not stop, or add --allow-unsafe"
)


@click.group()
def xen() -> None:
    """Work with Xen hosts that have only the stock tools, without agents and without a record."""


@xen.command()
@click.argument("domain")
@click.argument("host", required=False)
@click.option(
    "-i",
    "--interval",
    "interval_ms",
    type=click.FloatRange(0),
    default=200.0,
    show_default=True,
    help="Milliseconds from the end of one checkpoint to the next.",
)
@click.option("-b", "--blackhole", is_flag=True, help="Send the stream nowhere, to measure.")
@click.option(
    "-s", "--command", metavar="COMMAND", help="Run this instead of 'ssh HOST xl migrate-receive -r -e'."
)
@click.option(
    "--count", type=click.IntRange(0), default=0, help="End after so many checkpoints.  [default: never]"
)
@click.option("--allow-unsafe", is_flag=True, help="Although nothing is acknowledged.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing of each checkpoint.")
@_FORMAT
def remus(  # noqa: PLR0913 - one argument per option
    domain: str,
    host: str | None,
    *,
    interval_ms: float,
    blackhole: bool,
    command: str | None,
    count: int,
    allow_unsafe: bool,
    quiet: bool,
    output: str,
) -> None:
    """Checkpoint the running DOMAIN to a stock receiver on HOST, until Ctrl-C; the guest runs on then.

    The receiver takes over when DOMAIN is gone here, or this command or its host. When the command ends as asked the
    receiver is told to drop its copy.

    Exit code 0: ended as asked; 1: the receiver was lost, or the guest could not be saved or is gone.
    """
    if sum(map(bool, (blackhole, host, command))) != 1:
        raise click.UsageError("give one of HOST, --command and --blackhole")
    if not allow_unsafe:
        raise click.UsageError(_UNACKNOWLEDGED)
    words = shlex.split(command) if command else ["ssh", str(host), "xl", "migrate-receive", "-r", "-e"]

    def tell(figures: RemusFigures) -> None:
        if output == "json":
            click.echo(json.dumps(asdict(figures)))
        else:
            click.echo(
                f"checkpoint {figures.checkpoint}: suspended after {figures.suspend_ms:.1f} ms, paused for "
                f"{figures.pause_ms:.1f} ms, written {figures.written_ms:.1f} ms later"
            )

    outcome = Outcome()
    work = run_remus(
        domain,
        command=None if blackhole else words,
        interval_ms=interval_ms,
        count=count,
        tell=None if quiet else tell,
        outcome=outcome,
    )
    _run(work, outcome)
    click.echo(f"understudy: {outcome.said}", err=True)
    sys.exit(0 if outcome.good else 1)


@xen.command("save")
@click.argument("domain")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-c", "--checkpoint", "keep", is_flag=True, help="Let the guest run on, and while it is saved, too."
)
def save_command(domain: str, file: Path, *, keep: bool) -> None:
    """Save the running DOMAIN to FILE, for 'xl restore'; the domain is destroyed then, as with 'xl save'.

    FILE is whole when it appears. On failure, and when this is interrupted before that, there is none, and the guest
    runs on.
    """
    outcome = Outcome()
    _run(save_to(domain, file, outcome, keep=keep), outcome)
    click.echo(outcome.said)


@xen.command("receive")
@click.option("--hold-limit", metavar="SIZE", default="1GiB", show_default=True, help="How much may be held.")
@click.option(
    "--silence",
    "silence_s",
    type=click.FloatRange(0),
    default=0.0,
    help="Take the sender for lost after so many seconds without a byte.  [default: never]",
)
def receive_command(*, hold_limit: str, silence_s: float) -> None:
    """Receive a guest from a stock 'xl remus', as its command behind -s; standard input is the stream.

    What arrives is held until a checkpoint is whole. When the stream ends the copy is left paused, as NAME--incoming:
    no record says whose guest it is. See 'understudy xen promote'.
    """
    try:
        limit_bytes = parse_bytes(hold_limit)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--hold-limit") from None
    outcome = Outcome()
    work = receive(
        sys.stdin.fileno(),
        sys.stdout.fileno(),
        outcome,
        hold_limit_bytes=limit_bytes,
        silence_s=silence_s,
        copied=lambda name: click.echo(f"{name}: the first copy is whole, checkpoints follow", err=True),
    )
    _run(work, outcome)
    click.echo(outcome.said, err=True)


@xen.command("promote")
@click.argument("name")
@click.option("--force", is_flag=True, help="No record says whose guest it is: you do.")
@click.option("--reason", help="Why, for the log; needed with --force.")
def promote_command(name: str, *, force: bool, reason: str | None) -> None:
    """Make the copy that 'understudy xen receive' left the guest NAME, and let it run.

    Only when the guest is surely dead on the other host: nothing else keeps two of them apart.
    """
    if not force or not reason:
        raise click.UsageError(
            "such a copy has no record that proves it may go on: --force and --reason TEXT are needed, and the "
            "certainty that the guest is dead on the other host"
        )
    outcome = Outcome()
    _run(promote(name, outcome, reason=reason), outcome)
    click.echo(outcome.said)


def _run(work: Coroutine[Any, Any, object], outcome: Outcome) -> None:
    # Interrupted, it may have done all the same what it is for: the outcome knows.
    async def bounded() -> None:
        task = asyncio.ensure_future(work)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await task

    try:
        asyncio.run(bounded())
    except asyncio.CancelledError:
        click.echo(f"understudy: interrupted; {outcome.said}", err=True)
        sys.exit(0 if outcome.good else 1)
    except (UnderstudyError, ExceptionGroup) as error:
        click.echo(f"understudy: {error}; {outcome.said}", err=True)
        sys.exit(1)
