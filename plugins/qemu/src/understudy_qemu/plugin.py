"""What this distribution offers: the hypervisor ``qemu``, block replication, and the command ``demo``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from understudy.hookspecs import CommandOffer, HypervisorOffer, ObserverOffer, hookimpl

if TYPE_CHECKING:
    import click

    from understudy.device import Subkind
    from understudy.hypervisor import HostContext, Hypervisor
    from understudy.report import Observer

__all__ = ["understudy_commands", "understudy_hypervisors", "understudy_observers", "understudy_subkinds"]

# Imports wait until something is really needed: the command line loads all plugins to learn their commands.


def _hypervisor(here: HostContext) -> Hypervisor:
    from understudy_qemu.hypervisor import QemuHypervisor  # noqa: PLC0415

    return QemuHypervisor(here)


def _demo() -> click.Command:
    from understudy_qemu.demo.command import demo  # noqa: PLC0415

    return demo


def _trace() -> Observer:
    from understudy_qemu.demo.trace import Trace  # noqa: PLC0415

    return Trace()


@hookimpl
def understudy_hypervisors() -> Iterable[HypervisorOffer]:
    """Offer QEMU."""
    return (HypervisorOffer("qemu", _hypervisor),)


@hookimpl
def understudy_subkinds() -> Iterable[Subkind]:
    """Offer block replication, for disks in both modes, and filter-buffer, for interfaces in mode remus."""
    from understudy_qemu.blockreplication import BLOCK_REPLICATION  # noqa: PLC0415
    from understudy_qemu.filterbuffer import FILTER_BUFFER  # noqa: PLC0415

    return (BLOCK_REPLICATION, FILTER_BUFFER)


@hookimpl
def understudy_commands() -> Iterable[CommandOffer]:
    """Offer the demonstration."""
    return (CommandOffer("demo", "Protect a real guest and kill its host, twice.", _demo),)


@hookimpl
def understudy_observers() -> Iterable[ObserverOffer]:
    """Offer the trace of every epoch and event, if ``$UNDERSTUDY_TRACE`` names a file for it."""
    return (ObserverOffer("trace", _trace),) if os.environ.get("UNDERSTUDY_TRACE") else ()
