"""``list``, ``status``, ``check`` and ``history``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from understudy.cli.common import (
    Context,
    allow_unsafe_option,
    command_options,
    guest_argument,
    leave,
    print_table,
    show_findings,
)
from understudy.cli.exits import Exit

__all__ = ["check", "history", "list_", "status"]

COLUMNS = (
    ("guest", "GUEST"),
    ("host", "HOST"),
    ("role", "ROLE"),
    ("state", "STATE"),
    ("mode", "MODE"),
    ("peer", "PEER"),
    ("epoch", "EPOCH"),
    ("checkpoints_per_s", "RATE/s"),
    ("pause", "PAUSE p50/p99 ms"),
    ("lag_ms", "LAG ms"),
)


@click.command("list")
@command_options
def list_(context: Context) -> None:
    """List the guests of this host and of the hosts it is linked to."""
    result = context.ask("list", {})
    context.show(result, _print_rows)


@click.command()
@click.argument("guest", required=False)
@command_options
def status(context: Context, guest: str | None) -> None:
    """Show this host, its peers and guests; or GUEST in detail."""
    result = context.ask("status", {"guest": guest} if guest else {})
    context.show(result, _print_guest if guest else _print_status)


@click.command()
@guest_argument
@click.option("--mode", type=click.Choice(["remus", "colo"]), help="Instead of the guest file's.")
@click.option("--peer", metavar="HOST", help="Instead of the guest file's.")
@allow_unsafe_option
@command_options
def check(context: Context, guest: str, *, mode: str | None, peer: str | None, allow_unsafe: bool) -> None:
    """Find out whether GUEST can be protected.

    Looks at both hosts, changes nothing, and lists everything it finds with what to do about it.
    """
    params = {"guest": guest, "mode": mode, "peer": peer, "allow_unsafe": allow_unsafe}
    result = context.ask("check", params)

    def text(result: Mapping[str, Any]) -> None:
        show_findings(result["findings"])
        if result["protectable"]:
            click.echo(f"{guest} can be protected on {result['peer']} in mode {result['mode']}")
        else:
            click.echo(f"{guest} cannot be protected as it is")

    context.show(result, text)
    if not result["protectable"]:
        leave(Exit.NOT_PROTECTABLE)


@click.command()
@guest_argument
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="How many events, the last ones.",
)
@command_options
def history(context: Context, guest: str, limit: int) -> None:
    """Show what happened to GUEST on this host, and the records that the arbiter keeps of it."""
    result = context.ask("history", {"guest": guest, "limit": limit})
    context.show(result, _print_history)


def _print_rows(result: Mapping[str, Any]) -> None:
    if not result["guests"]:
        click.echo("no guests")
    else:
        print_table(COLUMNS, [{**row, "pause": _pause(row)} for row in result["guests"]])
    for row in result["guests"]:
        if row.get("problem"):
            click.echo(f"! {row['guest']} on {row['host']}: {row['problem']}")
        for problem in row.get("unsafe") or ():
            click.echo(f"! {row['guest']} on {row['host']}: protected unsafely, as allowed: {problem}")
    for warning in result["warnings"]:
        click.echo(f"! {warning}")


def _pause(row: Mapping[str, Any]) -> str | None:
    if row.get("pause_p50_ms") is None:
        return None
    return f"{row['pause_p50_ms']:.1f}/{row['pause_p99_ms']:.1f}"


def _print_status(result: Mapping[str, Any]) -> None:
    click.echo(f"host {result['host']}, agent {result['agent']}, listens on {result['listen']}")
    for peer in result["peers"]:
        told = f"linked (agent {peer['agent']})" if peer["up"] else f"not linked: {peer['problem']}"
        click.echo(f"peer {peer['name']}: {told}")
    arbiter = result["arbiter"]
    click.echo(
        f"arbiter {arbiter['kind'] or 'none'}: " + ("answers" if arbiter["up"] else str(arbiter["problem"]))
    )
    click.echo("")
    _print_rows(result)


def _print_guest(result: Mapping[str, Any]) -> None:
    _print_rows(result)
    record = result.get("record")
    if record:
        standby = f", standby {record['standby']}" if record.get("standby") else ""
        click.echo(
            f"record: {record['state']}, owner {record['owner']}{standby}, generation {record['generation']}"
            + (f" ({record['reason']})" if record.get("reason") else "")
        )
    else:
        click.echo("record: none")
    for event in result["events"]:
        click.echo(_event(event))


def _print_history(result: Mapping[str, Any]) -> None:
    for event in result["events"]:
        click.echo(_event(event))
    if result["records"]:
        click.echo("records of the arbiter:")
    for record in result["records"]:
        standby = f" standby={record['standby']}" if record.get("standby") else ""
        forced = f" forced by {record['forced_by']}" if record.get("forced_by") else ""
        reason = f"  {record['reason']}" if record.get("reason") else ""
        when = record.get("written_at") or "-"
        click.echo(
            f"{when}  #{record['generation']} {record['state']} owner={record['owner']}{standby}{forced}{reason}"
        )


def _event(event: Mapping[str, Any]) -> str:
    known = {"time", "time_ns", "host", "guest", "event"}
    facts = " ".join(f"{key}={_fact(value)}" for key, value in event.items() if key not in known and value)
    return f"{event['time']}  {event['event']:16} {facts}".rstrip()


def _fact(value: Any) -> str:
    if isinstance(value, Mapping) and "generation" in value:
        return f"#{value['generation']}:{value.get('state')}:{value.get('owner')}"
    return str(value)
