"""What the preflight says of a DRBD disk: what is missing, and what the site's configuration would do against us.

Who goes on with a guest is decided by the arbiter alone. A DRBD that fences its peer, settles a split brain by itself,
or stops the disk when its peer is lost, decides the same question by other rules.

Source: drbd.conf(5) of DRBD 8.4 and 9.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from understudy.device import Finding, ReplicationMode, Severity
from understudy_drbd.resource import Resource
from understudy_drbd.status import State
from understudy_drbd.thin import NotThin, PoolState, ThinVolume

__all__ = ["of_configuration", "of_disk", "of_pool", "of_state", "of_version", "of_volume"]

_TRIED: Final = (8, 4)
_FULL_RATIO: Final = 0.8
_ENDINGS: Final = ("reboot", "halt", "poweroff", "shutdown", "sysrq")
_DIRECT: Final = frozenset(
    {"none", "directsync"}
)  # what QEMU's cache modes without the page cache are called
_ONLY: Final = {"after-sb-0pri": "disconnect", "after-sb-1pri": "disconnect", "after-sb-2pri": "disconnect"}


def of_configuration(subject: str, resource: Resource) -> Iterator[Finding]:
    """Say what is wrong with the configuration of a resource.

    Args:
        subject: What the findings are about, e.g. ``"disk0 on the primary"``.
        resource: The resource.
    """
    for problem, remedy in (*_unfit(resource), *_contradicting(resource)):
        sentence = f"DRBD resource {resource.name} {problem}."
        yield Finding(Severity.ERROR, subject, sentence, f"{remedy}.")
    yield from _handlers(subject, resource)


def _unfit(resource: Resource) -> Iterator[tuple[str, str]]:
    if resource.volumes != 1:
        yield (
            f"has {resource.volumes} volumes, which can only be promoted together",
            "give each disk a resource of its own",
        )
    if resource.peers != 1:
        yield f"has {resource.peers} peers", "describe exactly the two hosts of the guest in it"
    if (protocol := resource.option("net", "protocol")) != "C":
        yield (
            f"uses protocol {protocol}: writes end before the other host has them",
            "set protocol C in its section net",
        )
    if not resource.internal:
        yield (
            f"has its metadata on {resource.metadata}, which does not go back in time with the disk",
            "set meta-disk internal",
        )


def _contradicting(resource: Resource) -> Iterator[tuple[str, str]]:
    if resource.option("net", "allow-two-primaries") == "yes":
        yield "allows two primaries", "remove allow-two-primaries"
    fencing = resource.option("net", "fencing") or resource.option("disk", "fencing")
    if fencing != "dont-care":
        yield (
            f"fences its peer by itself (fencing {fencing}), where the arbiter decides who goes on",
            "set fencing dont-care",
        )
    if (quorum := resource.option("options", "quorum")) not in {"", "off"}:
        yield f"stops the disk when the other host is lost (quorum {quorum})", "set quorum off"
    for name, value in _ONLY.items():
        if (found := resource.option("net", name)) != value:
            yield (
                f"settles a split brain by itself ({name} {found}), possibly against the host that goes on",
                f"set {name} {value}",
            )


def _handlers(subject: str, resource: Resource) -> Iterator[Finding]:
    for event, command in resource.handlers.items():
        ending = next((word for word in _ENDINGS if word in command), None)
        if ending is not None:
            problem = (
                f"the handler {event} of DRBD resource {resource.name} may end this host with all its guests "
                f"({ending} in {command!r})."
            )
            remedy = "replace it by one that only tells, such as notify.sh."
            yield Finding(Severity.WARNING, subject, problem, remedy)


def of_disk(subject: str, properties: Mapping[str, Any]) -> Iterator[Finding]:
    """Say what is wrong with how the hypervisor uses the disk, as far as it tells.

    Args:
        subject: As in `of_configuration`.
        properties: Of the device.
    """
    if (found := properties.get("format", "raw")) != "raw":
        problem = (
            f"the disk is {found}, and what is below it changes where a {found} driver would not expect it."
        )
        yield Finding(Severity.ERROR, subject, problem, 'put a raw disk on DRBD: format = "raw".')
    if (cache := properties.get("cache", "none")) not in _DIRECT:
        problem = f"the disk goes through this host's page cache (cache {cache}), which no other host has."
        yield Finding(Severity.ERROR, subject, problem, 'set cache = "none".')


def of_version(subject: str, version: tuple[int, ...]) -> Iterator[Finding]:
    """Say whether this DRBD has been tried.

    Args:
        subject: As in `of_configuration`.
        version: Of the DRBD that is loaded.
    """
    if version[:2] != _TRIED:
        told, tried = ".".join(map(str, version)), ".".join(map(str, _TRIED))
        problem = f"DRBD {told} is spoken to as its manuals say; what has been tried is DRBD {tried}."
        yield Finding(Severity.WARNING, subject, problem, "rehearse a failover and the way back first.")


def of_state(subject: str, resource: Resource, state: State, side: ReplicationMode) -> Iterator[Finding]:
    """Say what is wrong with the state of a resource.

    Args:
        subject: As in `of_configuration`.
        resource: The resource.
        state: Its state on this host.
        side: Which side this host would be.
    """
    name = resource.name
    if not state.mirrored:
        problem = f"DRBD resource {name} is not Connected and UpToDate on both hosts ({state})."
        yield Finding(Severity.ERROR, subject, problem, _towards_mirror(name, state))
    wanted = "Primary" if side is ReplicationMode.PRIMARY else "Secondary"
    if state.role not in {wanted, "Unknown"}:
        problem = f"DRBD resource {name} is {state.role} here, where the guest's {side.value} would be."
        remedy = f"make it {wanted}: drbdadm {wanted.lower()} {name}, with the device open nowhere here."
        yield Finding(Severity.ERROR, subject, problem, remedy)


def _towards_mirror(name: str, state: State) -> str:
    if state.connection == "Unconfigured":
        return f"bring it up: drbdadm up {name}"
    if state.connection == "StandAlone":
        return (
            f"connect both hosts: drbdadm connect {name}; after a split brain with --discard-my-data on the host whose "
            "disk is to be overwritten"
        )
    if state.connection in {"WFConnection", "Connecting"}:
        return f"see that it is up on the other host and can be reached: drbdadm up {name}"
    if "Sync" in state.connection or "BitMap" in state.connection:
        return "wait until it has synchronised: drbdadm status"
    return f"see drbdadm status {name} on both hosts"


def of_volume(
    subject: str, resource: Resource, volume: ThinVolume | NotThin, side: ReplicationMode
) -> Iterator[Finding]:
    """Say whether the disk below DRBD can be rolled back.

    Args:
        subject: As in `of_configuration`.
        resource: The resource.
        volume: The disk below it on this host, or why that is no thin volume.
        side: Which side this host would be.
    """
    if isinstance(volume, NotThin):
        problem = f"below DRBD resource {resource.name} there is no thin volume ({volume})."
        remedy = (
            "move the disk below it onto a volume of a dm-thin pool (for LVM: lvcreate --thin) with room for what the "
            f"guest writes in two epochs, and create its metadata there: drbdadm create-md {resource.name}"
        )
        if side is ReplicationMode.SECONDARY:
            yield Finding(Severity.ERROR, subject, problem, remedy)
        else:
            problem += " After a failover this host could not hold the copy."
            yield Finding(Severity.WARNING, subject, problem, remedy)
    elif not resource.log_covers(size_bytes := volume.sectors * 512):
        problem = (
            f"the activity log of DRBD resource {resource.name} ({resource.option('disk', 'al-extents')} extents) does "
            f"not cover its {size_bytes >> 20} MiB: after a failover the whole disk is copied back."
        )
        yield Finding(Severity.NOTE, subject, problem)


def of_pool(subject: str, pool: PoolState) -> Iterator[Finding]:
    """Say whether a thin pool can take cuts.

    Args:
        subject: As in `of_configuration`.
        pool: Its state.
    """
    if pool.trouble:
        problem = f"the thin pool below it cannot take a checkpoint: {pool.trouble}."
        yield Finding(Severity.ERROR, subject, problem, "mend the pool: dmsetup status, lvs -a")
    elif pool.fill_ratio >= _FULL_RATIO:
        problem = f"the thin pool below it is {pool.fill_ratio:.0%} full."
        yield Finding(Severity.WARNING, subject, problem, "extend it: a full pool ends the protection")
