"""The errors of Understudy.

Policy: an error names a situation, not a cause ("the peer is lost", not "ECONNRESET"). Every error carries its
facts as attributes and says in its text what was wrong, where, and what state the guest is in. Errors are wrapped
once, at the boundary where the situation becomes known; the cause stays in ``__cause__``. Cancellation is never
wrapped. What fails together is an ``ExceptionGroup`` whose first member is the first failure in time.

::

    UnderstudyError
     +-- ConfigError              a file says something that is wrong; file, key and what is allowed
     +-- PluginError              a plugin could not be loaded or broke its contract; names it
     +-- PreflightFailed          the guest cannot be protected; carries every finding
     +-- DeviceError              a device's step failed; device, subkind, phase, epoch
     |    +-- DeviceNotSupported  no subkind claimed the device; lists who was asked and why not
     |    +-- PhaseTimeout        a step did not finish before its deadline
     +-- HypervisorError          the hypervisor refused, failed or broke its promise
     |    +-- MonitorSilent       the monitor did not answer in time
     |    +-- NotReplicating      the copy ended as a plain migration
     +-- LinkError
     |    +-- LinkLost            the connection to the other agent is gone or silent
     |    +-- PeerError           the other agent broke the protocol, or refused a request
     +-- ArbiterError
     |    +-- ArbiterUnavailable  no answer: nothing may be concluded from it
     |    +-- IllegalChange       a swap that the ownership rules forbid
     +-- StateError               the caller asked for something that this state does not allow
     +-- GuestNotFound / GuestBusy
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from understudy.device import Finding

__all__ = [
    "ArbiterError",
    "ArbiterUnavailable",
    "ConfigError",
    "DeviceError",
    "DeviceNotSupported",
    "GuestBusy",
    "GuestNotFound",
    "HypervisorError",
    "IllegalChange",
    "LinkError",
    "LinkLost",
    "MonitorSilent",
    "NotReplicating",
    "PeerError",
    "PhaseTimeout",
    "PluginError",
    "PreflightFailed",
    "StateError",
    "UnderstudyError",
]


class UnderstudyError(Exception):
    """The root of all errors that Understudy raises on purpose."""


class ConfigError(UnderstudyError):
    """A configuration or guest file is wrong.

    Args:
        source: The file, as the user knows it.
        key: The dotted key, or ``""`` when the file as a whole is meant.
        problem: What is wrong with it.
        allowed: What would be right, in words or as a list of values.
    """

    def __init__(self, source: str, key: str, problem: str, allowed: str = "") -> None:
        where = f"{source}: {key}" if key else source
        super().__init__(f"{where}: {problem}" + (f" (allowed: {allowed})" if allowed else ""))
        self.source = source
        self.key = key
        self.problem = problem
        self.allowed = allowed


class PluginError(UnderstudyError):
    """A plugin failed to load or broke its contract.

    Args:
        plugin: Entry point or module name.
        distribution: The distribution that ships it, ``"?"`` if unknown.
        problem: What happened.
    """

    def __init__(self, plugin: str, distribution: str, problem: str) -> None:
        super().__init__(f"plugin {plugin} (distribution {distribution}): {problem}")
        self.plugin = plugin
        self.distribution = distribution
        self.problem = problem


class PreflightFailed(UnderstudyError):
    """The guest cannot be protected as it is; nothing was changed.

    Args:
        guest: The guest's name.
        findings: Every finding of the preflight, errors first.
    """

    def __init__(self, guest: str, findings: Sequence[Finding]) -> None:
        lines = "".join(f"\n  - {finding}" for finding in findings)
        super().__init__(f"guest {guest} cannot be protected; it runs on as before:{lines}")
        self.guest = guest
        self.findings = tuple(findings)


class DeviceError(UnderstudyError):
    """A step of one device failed.

    Args:
        device: Name of the device, e.g. ``"disk0"``.
        subkind: Name of the subkind that protects it.
        phase: The step, e.g. ``"postsuspend"``.
        epoch: The epoch it was asked for, or ``None`` outside the cycle.
        problem: What happened.
    """

    def __init__(self, device: str, subkind: str, phase: str, epoch: int | None, problem: str) -> None:
        at = f" in epoch {epoch}" if epoch is not None else ""
        super().__init__(f"device {device} ({subkind}): {phase}{at}: {problem}")
        self.device = device
        self.subkind = subkind
        self.phase = phase
        self.epoch = epoch
        self.problem = problem


class DeviceNotSupported(DeviceError):
    """No subkind claimed the device.

    Args:
        device: Name of the device.
        declined: Pairs of subkind name and the reason it gave, in the order asked.
        remedy: What would change that, if anything is known to.
    """

    def __init__(self, device: str, declined: Sequence[tuple[str, str]], remedy: str = "") -> None:
        asked = "; ".join(f"{name}: {reason}" for name, reason in declined) or "no subkind serves it"
        problem = f"no subkind protects this device ({asked})" + (f": {remedy}" if remedy else "")
        super().__init__(device, "none", "open", None, problem)
        self.declined = tuple(declined)
        self.remedy = remedy


class PhaseTimeout(DeviceError):
    """A step did not finish before the deadline of its phase and was cancelled."""


class HypervisorError(UnderstudyError):
    """The hypervisor refused a command, failed, or broke its promise."""


class MonitorSilent(HypervisorError):
    """The hypervisor's monitor did not answer before the deadline."""


class NotReplicating(HypervisorError):
    """The copy ended as a plain migration: the secondary runs and the primary does not."""


class LinkError(UnderstudyError):
    """Something between the two agents went wrong."""


class LinkLost(LinkError):
    """The connection to the other agent is closed, or silent for longer than its limit.

    Args:
        problem: What happened.
        silent_ns: How long nothing had been heard when it was noticed, nanoseconds; 0 if that is not known.
    """

    def __init__(self, problem: str, *, silent_ns: int = 0) -> None:
        super().__init__(problem)
        self.silent_ns = silent_ns


class PeerError(LinkError):
    """The other agent refused a request or broke the protocol.

    Args:
        problem: What it said or did.
        kind: Class name of the error on the other side, if it sent one.
    """

    def __init__(self, problem: str, kind: str = "") -> None:
        super().__init__(problem)
        self.kind = kind


class ArbiterError(UnderstudyError):
    """Something between this host and the arbiter went wrong."""


class ArbiterUnavailable(ArbiterError):
    """The arbiter gave no answer. The change may or may not have been made: nothing follows from it."""


class IllegalChange(ArbiterError):
    """A change of the record that the ownership rules forbid; it was not sent to the arbiter."""


class StateError(UnderstudyError):
    """The caller asked for something that the present state does not allow; nothing was changed."""


class GuestNotFound(UnderstudyError):
    """No guest of this name is known on this host."""


class GuestBusy(StateError):
    """Another operation on the same guest is under way."""
