"""What this distribution offers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from understudy.hookspecs import CommandOffer, HypervisorOffer, hookimpl

if TYPE_CHECKING:
    import click

    from understudy.device import Subkind
    from understudy.hypervisor import HostContext, Hypervisor

__all__ = ["understudy_commands", "understudy_hypervisors", "understudy_subkinds"]

# Imports wait until something is really needed: the command line loads all plugins to learn their commands.


def _hypervisor(here: HostContext) -> Hypervisor:
    from understudy_xen.hypervisor import XenHypervisor  # noqa: PLC0415

    return XenHypervisor(here)


def _stream() -> click.Command:
    from understudy_xen.streams.command import stream  # noqa: PLC0415

    return stream


def _xen() -> click.Command:
    from understudy_xen.interop.command import xen  # noqa: PLC0415

    return xen


@hookimpl
def understudy_commands() -> Iterable[CommandOffer]:
    """Offer the look at migration streams, and the work with stock tools."""
    return (
        CommandOffer("stream", "Verify, inspect and split migration streams of Xen.", _stream),
        CommandOffer("xen", "Work with Xen hosts that have only the stock tools.", _xen),
    )


@hookimpl
def understudy_hypervisors() -> Iterable[HypervisorOffer]:
    """Offer Xen."""
    return (HypervisorOffer("xen", _hypervisor),)


@hookimpl
def understudy_subkinds() -> Iterable[Subkind]:
    """Offer what an operator may choose to leave unprotected."""
    from understudy_xen.unprotected import UNBUFFERED, UNREPLICATED  # noqa: PLC0415

    return (UNREPLICATED, UNBUFFERED)
