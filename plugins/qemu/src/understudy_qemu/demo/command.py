"""``understudy demo``."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import click

from understudy.errors import UnderstudyError
from understudy_qemu.demo.page import render
from understudy_qemu.demo.pair import GuestPlan
from understudy_qemu.demo.result import DemoResult
from understudy_qemu.demo.run import DemoOptions, run_demo

__all__ = ["demo"]


@click.command()
@click.option("--mode", type=click.Choice(["colo", "remus"]), default="colo", show_default=True)
@click.option("--disks", type=click.IntRange(1, 8), default=1, show_default=True, help="Disks of the guest.")
@click.option(
    "--nics", type=click.IntRange(1, 4), default=1, show_default=True, help="Interfaces of the guest."
)
@click.option(
    "--interval",
    "interval_ms",
    type=click.IntRange(min=5),
    default=50,
    show_default=True,
    help="Milliseconds between two checkpoints (remus).",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=8.0,
    show_default=True,
    help="How long the guest is protected before each loss.",
)
@click.option(
    "--page",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("understudy-demo.html"),
    show_default=True,
    help="Where the page with the timeline goes.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the built guest is kept. [env: UNDERSTUDY_CACHE]",
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the hosts' files and logs in this directory.",
)
@click.option("--format", "output", type=click.Choice(["text", "json"]), default="text", help="How to print.")
def demo(  # noqa: PLR0913 - one argument per option
    *,
    mode: str,
    disks: int,
    nics: int,
    interval_ms: int,
    seconds: float,
    page: Path,
    cache: Path | None,
    keep: Path | None,
    output: str,
) -> None:
    """Lose both hosts of a real guest in turn, while a client talks to it.

    Builds a tiny guest from Debian packages, starts two hosts with an agent each in namespaces of this machine, and
    a client with one TCP connection. Needs root. Ends with a table and a page with the timeline. Exit code 0 means
    that the client never noticed.
    """
    as_json = output == "json"
    plan = GuestPlan(disks=disks, nics=nics, mode=mode, period_ms=interval_ms)
    options = DemoOptions(plan=plan, protected_s=seconds, cache=cache, keep=keep, show_progress=not as_json)
    try:
        result = asyncio.run(run_demo(options, lambda line: click.echo(line, err=as_json)))
    except UnderstudyError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.ClickException("called off; everything the demo made is gone") from None
    page.write_text(render(result), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        _print(result)
        click.echo(f"\nthe timeline: {page.resolve().as_uri()}")
    for problem in result.problems:
        click.echo(f"! {problem}", err=True)
    sys.exit(0 if result.passed else 1)


def _print(result: DemoResult) -> None:
    if result.failovers:
        rows = result.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        click.echo()
        for row in rows:
            cells = [
                cell.rjust(w) if i else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            click.echo("  ".join(cells))
    click.echo()
    if result.epochs:
        pause = result.pause_ms
        click.echo(f"{len(result.epochs)} checkpoints, pause p50 {pause['p50']} ms, p99 {pause['p99']} ms")
    click.echo(
        f"{result.client.get('acknowledged', 0)} words acknowledged, {result.client.get('bad', 0)} wrong replies"
    )
