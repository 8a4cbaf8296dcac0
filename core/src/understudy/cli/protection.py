"""``protect``, ``unprotect`` and ``failover``."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from understudy.cli.common import (
    Context,
    Failure,
    allow_unsafe_option,
    command_options,
    guest_argument,
    show_findings,
)
from understudy.schema import parse_bytes

__all__ = ["failover", "protect", "unprotect"]


def _rate(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@guest_argument
@click.option("--mode", type=click.Choice(["remus", "colo"]), help="Instead of the guest file's.")
@click.option(
    "--peer", metavar="HOST", help="The host that shall hold the copy, instead of the guest file's."
)
@click.option(
    "--interval",
    "interval_ms",
    type=click.IntRange(min=1),
    help="Milliseconds between two checkpoints (remus).",
)
@click.option(
    "--bwlimit",
    callback=_rate,
    metavar="RATE",
    help="Upper bound for the first copy, bytes per second; 10MiB and the like.",
)
@allow_unsafe_option
@click.option(
    "--wait/--no-wait", default=True, help="Wait until it is protected (the default), or only begin."
)
@command_options
def protect(
    context: Context,
    guest: str,
    *,
    mode: str | None,
    peer: str | None,
    interval_ms: int | None,
    bwlimit: int | None,
    allow_unsafe: bool,
    wait: bool,
) -> None:
    """Keep a live second copy of the running GUEST on another host.

    Copies disks and memory first, then returns; Ctrl-C meanwhile leaves the guest unprotected and both hosts clean.
    """
    params = {
        "guest": guest,
        "mode": mode,
        "peer": peer,
        "interval_ms": interval_ms,
        "bwlimit_bytes_per_s": bwlimit,
        "allow_unsafe": allow_unsafe,
        "wait": wait,
    }
    try:
        with _progress(quiet=context.as_json) as tell:
            result = context.ask(
                "protect", params, progress=tell, note=lambda text: click.echo(text, err=True)
            )
    except Failure as failure:
        if failure.fault.get("findings") and not context.as_json:
            click.echo(f"understudy: {guest} cannot be protected as it is; it runs on as before", err=True)
            show_findings(failure.fault["findings"])
            click.get_current_context().exit(failure.exit_code)
        raise

    def text(result: Mapping[str, Any]) -> None:
        if result["state"] == "protected":
            took_s = result["took_ms"] / 1000
            click.echo(
                f"{guest} is protected: {result['peer']} holds a copy (mode {result['mode']}, {took_s:.1f} s)"
            )
        else:
            click.echo(f"the protection of {guest} on {result['peer']} has begun")

    context.show(result, text)


@click.command()
@guest_argument
@command_options
def unprotect(context: Context, guest: str) -> None:
    """End the protection of GUEST, on the host where it runs; it runs on there."""
    result = context.ask("unprotect", {"guest": guest})
    context.show(result, lambda _: click.echo(f"{guest} runs on {result['host']}, unprotected"))


@click.command()
@guest_argument
@click.option(
    "--force", is_flag=True, help="Also when the pair is healthy, or the record prefers the primary."
)
@click.option("--reason", help="Why, for the history; needed with --force.")
@command_options
def failover(context: Context, guest: str, force: bool, reason: str | None) -> None:  # noqa: FBT001
    """Let this host's copy go on with GUEST; to be run on the standby's host.

    Happens by itself when the primary's host is lost. Of a healthy pair only with --force and --reason: the guest is
    then stopped on the other host, and what it did since the last checkpoint is undone.
    """
    if force and not reason:
        raise click.UsageError("--force needs --reason TEXT: it is kept in the history")
    params = {"guest": guest, "force": force, "reason": reason or "", "operator": getpass.getuser()}
    result = context.ask("failover", params)
    context.show(
        result, lambda _: click.echo(f"{guest} runs on {result['host']} (generation {result['generation']})")
    )


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Any]:
    # Bars on a terminal; a line per tenth elsewhere; nothing where JSON is wanted.
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console  # noqa: PLC0415 - only where something is drawn
    from rich.progress import (  # noqa: PLC0415 - as above
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}
        totals: dict[str, int] = {}

        def tell(progress: Mapping[str, Any]) -> None:
            what, done, total = progress["what"], progress["done_bytes"], progress["total_bytes"]
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            totals[what] = total
            bars.update(tasks[what], completed=done, total=total)

        yield tell
        # What went well went all the way, also where the last step was too quick to be told.
        for what, task in tasks.items():
            bars.update(task, completed=totals[what])


class _Lines:
    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def __call__(self, progress: Mapping[str, Any]) -> None:
        what, done, total = progress["what"], progress["done_bytes"], progress["total_bytes"]
        tenth = 10 * done // total if total else 10
        if tenth > self._told.get(what, -1):
            self._told[what] = tenth
            click.echo(f"{what}: {10 * tenth} %", err=True)
