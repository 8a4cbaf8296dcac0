"""The identity of a whole guest in its images: claimed when it starts here, refused when they are not its disks."""

from __future__ import annotations

from pathlib import Path

from understudy.device import ReplicationMode
from understudy.errors import HypervisorError
from understudy_qemu.guestfile import QemuConfig
from understudy_qemu.images import ImageIdentity, Images

__all__ = ["check_startable", "claim", "known", "overlays"]


def claim(images: Images, config: QemuConfig, generation: int, guest_id: str) -> None:
    """Write down that the guest runs from this host's images from now on.

    Args:
        images: This host's.
        config: The guest.
        generation: Of the record of state ``alone`` with this host as owner.
        guest_id: The guest's id, from the images or from the primary's facts.
    """
    for disk in config.disks:
        identity = ImageIdentity(guest_id, config.name, disk.name, generation, ReplicationMode.PRIMARY)
        images.write_identity(disk.path, identity)


def known(images: Images, config: QemuConfig) -> tuple[str, int]:
    """Return the guest's id and the highest generation in this host's images (``""`` and 0: nobody wrote any).

    Raises:
        HypervisorError: The images belong to different guests.
    """
    found = {disk.path: images.identity(disk.path) for disk in config.disks}
    written = {path: identity for path, identity in found.items() if identity is not None}
    ids = {identity.id for identity in written.values()}
    if len(ids) > 1:
        words = "; ".join(f"{path} holds {identity}" for path, identity in written.items())
        raise HypervisorError(f"the disks of {config.name} belong to different guests: {words}")
    return (ids.pop() if ids else ""), max((i.generation for i in written.values()), default=0)


async def check_startable(images: Images, config: QemuConfig, overlay_directory: Path) -> None:
    """Make sure that this host's images are the guest's disks.

    Raises:
        HypervisorError: One is missing, is only a replica, belongs to something else, or lacks what lies in an
            overlay.
    """
    leftover = [path.name for path in overlays(overlay_directory)]
    if leftover:
        raise HypervisorError(
            f"{overlay_directory} holds overlays of {config.name} that were never written into its images "
            f"({', '.join(leftover)}): the images alone are not the guest's disks"
        )
    for disk in config.disks:
        await images.size_bytes(disk.path, disk.format)
        found = images.identity(disk.path)
        if found is None:
            continue
        if found.guest != config.name or found.disk != disk.name:
            raise HypervisorError(f"{disk.path} is not {disk.name} of {config.name}: it holds {found}")
        if found.role is ReplicationMode.SECONDARY:
            raise HypervisorError(
                f"{disk.path} is a replica that never became the guest's disk: {found}; if it is what you want to "
                f"start from, remove the file that says so ({disk.path.name}.understudy)"
            )
    known(images, config)


def overlays(directory: Path) -> list[Path]:
    """Return the overlays that lie in a guest's overlay directory."""
    return sorted(directory.glob("*.qcow2"))
