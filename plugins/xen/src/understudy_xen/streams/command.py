"""``understudy stream``: verify, inspect and split migration streams of Xen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from understudy.errors import UnderstudyError
from understudy_xen.streams.errors import StreamError
from understudy_xen.streams.formats import Form
from understudy_xen.streams.inspector import Inspector
from understudy_xen.streams.report import (
    ProgressLine,
    facts_of,
    fault_of,
    sentence_of,
)
from understudy_xen.streams.source import Source
from understudy_xen.streams.verifier import Verifier

__all__ = ["stream"]

_FILE = click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
_FORM = click.option(
    "--form",
    type=click.Choice([form.value for form in Form]),
    help="With which layer it begins.  [default: as its first bytes say]",
)
_FORMAT = click.option(
    "--format", "output", type=click.Choice(["text", "json"]), default="text", help="How to print."
)
_FAILED = 1


@click.group()
def stream() -> None:
    """Look at migration streams of Xen: what xl save, xl migrate, xl remus and this plugin write.

    FILE may be - for standard input, and may be compressed with gzip. Exit code 0: the stream is right; 1: it is
    not, or it cannot be read, and the message says where and why; 2: the command line is wrong.
    """


@stream.command()
@_FILE
@_FORM
@_FORMAT
def verify(file: str, form: str | None, output: str) -> None:
    """Check a stream against its specifications."""
    verifier = Verifier(_form(form))
    error = _run(Source(file), verifier)
    facts = facts_of(file, verifier)
    if output == "json":
        click.echo(json.dumps({**facts, **({"error": fault_of(error)} if error else {})}, indent=2))
    else:
        for remark in verifier.remarks:
            click.echo(f"remark: {remark}", err=True)
        if error is None:
            click.echo(sentence_of(facts))
    _leave(file, error, as_json=output == "json")


@stream.command()
@_FILE
@_FORM
@click.option("--checkpoints", is_flag=True, help="Only the checkpoints, without the records.")
@_FORMAT
def inspect(file: str, form: str | None, output: str, *, checkpoints: bool) -> None:
    """Show a stream's records and what each checkpoint brought; and verify it.

    PAGE_DATA records that follow each other are shown as one line.
    """
    from understudy_xen.streams.tables import JsonReport, TextReport  # noqa: PLC0415 - as above

    inspector = Inspector(_form(form))
    report = (
        JsonReport(lambda text: click.echo(text, nl=False), records=not checkpoints)
        if output == "json"
        else TextReport(click.echo, records=not checkpoints)
    )

    def show() -> None:
        for found in inspector.take():
            report.add(found)

    error = _run(Source(file), inspector, show)
    rest = inspector.close()
    show()
    report.end(rest, facts_of(file, inspector), error)
    _leave(file, error, as_json=output == "json")


@stream.command()
@_FILE
@click.argument("directory", metavar="DIRECTORY", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--by",
    type=click.Choice(["layer", "checkpoint", "plain"]),
    default="layer",
    show_default=True,
    help="What to write: each layer, each checkpoint, or one stream without checkpoints for xl restore.",
)
@click.option(
    "--checkpoint",
    type=click.IntRange(min=1),
    help="With --by plain: the guest as it was at this one.  [default: the last whole one]",
)
@_FORM
@_FORMAT
def split(file: str, directory: Path, by: str, checkpoint: int | None, form: str | None, output: str) -> None:
    """Take a stream apart into files in DIRECTORY, which is made if it is not there.

    The stream is verified first. Of one that is cut or broken, --by plain makes use of what was whole before; the
    others write nothing. No file is overwritten.
    """
    from understudy_xen.streams.splitting import (  # noqa: PLC0415 - for this subcommand alone
        Output,
        checkpoints_apart,
        kept,
        layers_apart,
        made_plain,
    )

    if checkpoint is not None and by != "plain":
        raise click.UsageError("--checkpoint goes with --by plain")
    verifier = Verifier(_form(form))
    failure: UnderstudyError | None = None
    sizes: dict[str, int] = {}
    try:
        with kept(Source(file), directory) as source:
            broken = _run(source, verifier)
            number = checkpoint or verifier.checkpoints
            if broken is not None and not (by == "plain" and 1 <= number <= verifier.checkpoints):
                raise broken
            if by == "plain" and not 1 <= number <= verifier.checkpoints:
                raise click.UsageError(f"the stream has {verifier.checkpoints} whole checkpoints")
            with Output.into(directory) as files:
                if by == "layer":
                    layers_apart(source, verifier, files)
                elif by == "checkpoint":
                    checkpoints_apart(source, files)
                else:
                    made_plain(source, verifier, number, files)
            sizes = files.sizes
            if broken is not None:
                click.echo(f"remark: {broken}", err=True)
    except UnderstudyError as error:
        failure = error
    if output == "json":
        facts: dict[str, Any] = {"file": file, "by": by, "directory": str(directory), "files": sizes}
        click.echo(json.dumps({**facts, **({"error": fault_of(failure)} if failure else {})}, indent=2))
    else:
        for name, size in sizes.items():
            click.echo(f"{size:>14}  {directory / name}")
    _leave(file, failure, as_json=output == "json")


def _form(name: str | None) -> Form | None:
    return Form(name) if name else None


def _run(source: Source, verifier: Verifier, seen: Any = None) -> UnderstudyError | None:
    # Returns the first thing that is wrong, after all that was right before has been seen.
    progress = ProgressLine()
    error: UnderstudyError | None = None
    try:
        for _ in source.frames(verifier, progress):
            if seen is not None:
                progress.clear()
                seen()
    except UnderstudyError as wrong:
        error = wrong
    finally:
        progress.clear()
    if error is None and source.trailing_bytes:
        verifier.remarks.append(f"{source.trailing_bytes} bytes follow the stream's END")
    return error


def _leave(file: str, error: UnderstudyError | None, *, as_json: bool) -> None:
    if error is None:
        return
    if not as_json:
        click.echo(f"{file}: {error}" if isinstance(error, StreamError) else str(error), err=True)
    sys.exit(_FAILED)
