"""``plugins list``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import click

from understudy.cli.common import Context, command_options, print_table
from understudy.config import config_path, read_config
from understudy.errors import ConfigError

__all__ = ["plugins"]


@click.group()
def plugins() -> None:
    """Look at the installed plugins."""


@plugins.command("list")
@command_options
def list_(context: Context) -> None:
    """List the installed plugins, what they offer, and which could not be loaded.

    Needs no agent. The allow-list of agent.toml counts where that file can be read.
    """
    from understudy.plugins import Plugins  # noqa: PLC0415 - imports all plugins

    allowed = None
    try:
        allowed = read_config(config_path(context.config)).plugins
    except ConfigError as error:
        if context.config is not None:
            raise context.failure(error) from error
    logging.getLogger("understudy").addHandler(logging.NullHandler())  # the table below says it all
    loaded = Plugins.discover(None if allowed is None else sorted(allowed))
    offers: dict[str, list[str]] = {}
    for each in loaded.everything():
        offers.setdefault(each.plugin.name, []).append(f"{_kind(each.offer)} {each.offer.name}")
    rows = [
        {
            "name": info.name,
            "distribution": info.distribution,
            "version": info.version,
            "module": info.module,
            "state": _state(info.problem, allowed=info.allowed),
            "problem": info.problem,
            "offers": offers.get(info.name, []),
        }
        for info in loaded.infos
    ]

    def text(rows: list[Mapping[str, Any]]) -> None:
        columns = (
            ("name", "PLUGIN"),
            ("distribution", "DISTRIBUTION"),
            ("version", "VERSION"),
            ("state", "STATE"),
            ("offered", "OFFERS"),
        )
        print_table(columns, [{**row, "offered": ", ".join(row["offers"])} for row in rows])
        for row in rows:
            if row["problem"]:
                click.echo(f"! {row['name']}: {row['problem']}")

    context.show(rows, text)


def _state(problem: str, *, allowed: bool) -> str:
    if not allowed:
        return "not allowed"
    return "failed" if problem else "loaded"


def _kind(offer: object) -> str:
    # HypervisorOffer → hypervisor, Subkind → subkind
    return type(offer).__name__.removesuffix("Offer").lower()
