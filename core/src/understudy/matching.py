"""Find the subkind that protects a device: who is asked, in which order, with which options.

The order is data: ``(priority, name)``, never the order of installation, so that it is the same on both hosts. A
subkind claims a device by returning its object, declines by `Decline` or ``None`` (the next one is asked), and stops
the search by raising: mine, and broken.

Source: devices_setup's iteration over subkinds in tools/libs/light/libxl_checkpoint_device.c; there a subkind says
"does not match" by a return code and the user is never told why, here every reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from understudy.device import (
    Decline,
    DeviceInfo,
    Finding,
    Gate,
    Mode,
    OpenContext,
    ProbeContext,
    ProtectedDevice,
    Severity,
    Subkind,
)
from understudy.errors import ConfigError, DeviceError, DeviceNotSupported
from understudy.options import parse_options
from understudy.phases import in_words

__all__ = ["Claim", "claim", "fitting", "in_order", "options_of", "probe_device", "refusals"]

OptionTables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Claim:
    """A device that is open, and the subkind that claimed it."""

    subkind: Subkind
    device: ProtectedDevice


def in_order(subkinds: Iterable[Subkind]) -> tuple[Subkind, ...]:
    """Return the subkinds in the order in which they are asked: by priority, ties by name."""
    return tuple(sorted(subkinds, key=lambda subkind: (subkind.priority, subkind.name)))


def fitting(
    subkinds: Iterable[Subkind], device: DeviceInfo, mode: Mode, gates: frozenset[Gate]
) -> tuple[tuple[Subkind, ...], tuple[tuple[str, str], ...]]:
    """Tell which subkinds may be asked for a device, and why the others may not.

    Args:
        subkinds: All that the plugins offer.
        device: The device; its ``subkind`` restricts the search to that name unless it is ``"auto"``.
        mode: How the guest is protected.
        gates: The gates that the hypervisor has in this mode.

    Returns:
        The subkinds to ask, in order; and pairs of name and reason for those of the device's kind that do not fit.
    """
    asked: list[Subkind] = []
    passed_over: list[tuple[str, str]] = []
    wanted = device.subkind
    for subkind in in_order(subkinds):
        if wanted == "auto":
            if subkind.kind is not device.kind:
                continue
        elif subkind.name != wanted:
            continue
        reason = _misfit(subkind, device, mode, gates)
        if reason:
            passed_over.append((subkind.name, reason))
        else:
            asked.append(subkind)
    if wanted != "auto" and not asked and not passed_over:
        passed_over.append((wanted, "no installed plugin offers a subkind of this name"))
    return tuple(asked), tuple(passed_over)


def options_of(subkind: Subkind, tables: OptionTables, source: str) -> Any:
    """Return the typed options of a subkind from the guest file's ``[protection.options.SUBKIND]``.

    Args:
        subkind: Whose options.
        tables: All option tables by subkind name.
        source: The guest file, for errors.

    Returns:
        An instance of the subkind's ``options`` class, or ``None`` if it has none.

    Raises:
        ConfigError: A key is unknown, a value is wrong, or the subkind takes no options.
    """
    table = tables.get(subkind.name, {})
    where = f"protection.options.{subkind.name}"
    if subkind.options is None:
        if table:
            raise ConfigError(source, where, f"the subkind {subkind.name} takes no options")
        return None
    return parse_options(subkind.options, table, source=source, where=where)


async def claim(
    subkinds: Iterable[Subkind],
    gates: frozenset[Gate],
    context: OpenContext,
    options: Callable[[Subkind], Any],
) -> Claim:
    """Open a device with the first subkind that claims it.

    Args:
        subkinds: All that the plugins offer.
        gates: The gates that the hypervisor has in the context's mode.
        context: What `Subkind.open` gets; its ``options`` are filled in for each subkind that is asked.
        options: Returns a subkind's typed options.

    Raises:
        DeviceNotSupported: Nobody claims it; everybody asked or passed over is listed with the reason.
        DeviceError: A subkind claimed it and failed, or answered with something that is no answer.

    Guarantees:
        On failure and on cancellation nothing is open: a subkind whose `open` does not return a device has cleaned
        up what it made.
    """
    device = context.device
    asked, passed_over = fitting(subkinds, device, context.mode, gates)
    declined: list[tuple[str, str]] = []
    for subkind in asked:
        asking = replace(context, options=options(subkind))
        try:
            answer: object = await subkind.open(asking)
        except Exception as error:
            raise DeviceError(device.name, subkind.name, "open", None, in_words(error)) from error
        if isinstance(answer, ProtectedDevice):
            return Claim(subkind, answer)
        if answer is None:
            declined.append((subkind.name, "it is not its business"))
        elif isinstance(answer, Decline):
            declined.append((subkind.name, answer.reason))
        else:
            problem = f"its open returned {type(answer).__name__}, which is neither a device nor a Decline"
            raise DeviceError(device.name, subkind.name, "open", None, problem)
    # What the hypervisor can do in other modes is not known here; the preflight knows.
    modes = dict.fromkeys(Mode, frozenset(Gate)) | {context.mode: gates}
    remedy = _what_would_fit(in_order(subkinds), device, context.mode, modes)
    raise DeviceNotSupported(device.name, [*declined, *passed_over], remedy)


async def probe_device(
    subkinds: Iterable[Subkind],
    modes: Mapping[Mode, frozenset[Gate]],
    context: ProbeContext,
    options: Callable[[Subkind], Any],
) -> tuple[str | None, tuple[Finding, ...]]:
    """Answer for the preflight what `claim` would do, without touching anything.

    Args:
        subkinds: All that the plugins offer.
        modes: The modes that the hypervisor can protect in, with its gates in each; the context's is one of them.
        context: What `Subkind.probe` gets; its ``options`` are filled in for each subkind that is asked.
        options: Returns a subkind's typed options.

    Returns:
        The name of the subkind that would claim the device, or ``None``; and what is wrong or worth knowing. Never
        raises for what a subkind does: its failure is a finding.
    """
    device = context.device
    everybody = in_order(subkinds)
    asked, passed_over = fitting(everybody, device, context.mode, modes[context.mode])
    subject = f"{device.name} on the {context.side.value}'s host"
    declined: list[tuple[str, str]] = []
    for subkind in asked:
        try:
            answer = await subkind.probe(replace(context, options=options(subkind)))
        except ConfigError as error:
            return subkind.name, (Finding(Severity.ERROR, subject, str(error), "correct the guest file"),)
        except Exception as error:  # noqa: BLE001 - all findings at once: one broken probe must not hide the others
            problem = f"the subkind {subkind.name} could not look at it: {in_words(error)}"
            return subkind.name, (Finding(Severity.ERROR, subject, problem, "see the agent's log"),)
        if not isinstance(answer, Decline):
            return subkind.name, tuple(answer)
        declined.append((subkind.name, answer.reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in (*declined, *passed_over))
    problem = (
        f"no subkind protects it ({reasons or 'no installed plugin offers one for this kind of device'})"
    )
    remedy = _what_would_fit(everybody, device, context.mode, modes)
    return None, (Finding(Severity.ERROR, subject, problem, remedy),)


def refusals(
    hypervisor: str,
    modes: Mapping[Mode, frozenset[Gate]],
    subkinds: Iterable[Subkind],
    mode: Mode,
    devices: Sequence[DeviceInfo],
) -> tuple[Finding, ...]:
    """Say for the preflight which pairs of hypervisor and subkind do not fit, why, and what would.

    Args:
        hypervisor: Name of the guest's hypervisor.
        modes: The modes it can protect in, with its gates in each.
        subkinds: All that the plugins offer.
        mode: How the guest is to be protected.
        devices: The guest's devices.

    Returns:
        One error per device that no subkind may be asked for; empty if every device has at least one.
    """
    everybody = in_order(subkinds)
    if mode not in modes:
        can = ", ".join(sorted(each.value for each in modes)) or "no mode at all"
        problem = f"the hypervisor {hypervisor} cannot protect in mode {mode.value}"
        return (
            Finding(Severity.ERROR, f"mode {mode.value}", problem, f"set protection.mode to one of: {can}"),
        )
    found: list[Finding] = []
    for device in devices:
        asked, passed_over = fitting(everybody, device, mode, modes[mode])
        if asked:
            continue
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
        problem = f"no {device.kind.value} subkind fits {hypervisor} in mode {mode.value}"
        problem += f" ({reasons})" if reasons else " (none is installed)"
        remedy = _what_would_fit(everybody, device, mode, modes)
        found.append(Finding(Severity.ERROR, device.name, problem, remedy))
    return tuple(found)


def _misfit(subkind: Subkind, device: DeviceInfo, mode: Mode, gates: frozenset[Gate]) -> str:
    if subkind.kind is not device.kind:
        return f"it protects a {subkind.kind.value}, this is a {device.kind.value}"
    if subkind.hypervisors and device.hypervisor not in subkind.hypervisors:
        works_on = ", ".join(sorted(subkind.hypervisors))
        return f"it works on {works_on}, not on {device.hypervisor}"
    if mode not in subkind.modes:
        serves = ", ".join(sorted(each.value for each in subkind.modes))
        return f"it serves mode {serves}, not {mode.value}"
    missing = subkind.needs - gates
    if missing:
        named = ", ".join(sorted(gate.value for gate in missing))
        return f"it needs the guest to wait at {named}, which {device.hypervisor} does not do in mode {mode.value}"
    return ""


def _what_would_fit(
    subkinds: Sequence[Subkind], device: DeviceInfo, mode: Mode, modes: Mapping[Mode, frozenset[Gate]]
) -> str:
    anyone = replace(device, subkind="auto")
    passed = {subkind.name for subkind in fitting(subkinds, device, mode, modes[mode])[0]}
    ways: list[str] = []
    names = [s.name for s in fitting(subkinds, anyone, mode, modes[mode])[0] if s.name not in passed]
    if names and device.subkind != "auto":
        ways.append(f"set the device's subkind to one of: auto, {', '.join(names)}")
    for other in modes:
        names = [subkind.name for subkind in fitting(subkinds, anyone, other, modes[other])[0]]
        if names and other is not mode:
            chosen = [name for name in names if name == device.subkind] or names
            ways.append(f'set protection.mode = "{other.value}" (for {", ".join(chosen)})')
    if ways:
        return "; or ".join(ways)
    return f"install or allow a plugin with a {device.kind.value} subkind for {device.hypervisor}, mode {mode.value}"
