"""Taps: made, brought into a known state, removed; by the kernel's own calls, without a process of ours.

A tap of ours has a name made from host, guest and interface, so that the janitor finds it without a list. It stays
when QEMU dies (persistent), so that it can be taken off its bridge before anything else happens; it has no IPv6
address of its own, so that the host says nothing to the guest; and its MAC is high, so that the bridge does not take
it for its own. Its way out is opened and closed as any interface's (`understudy.interfaces`).

Source: Linux Documentation/networking/tuntap.rst; include/uapi/linux/{if_tun,rtnetlink,pkt_sched}.h.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

from understudy.interfaces import ask_route, cut_off, in_thread, index_of, remove_interface, set_address

__all__ = ["create_tap", "remove_filters", "remove_tap", "tap_name"]

# if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TUNSETPERSIST: Final = 0x400454CB
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
# rtnetlink.h, pkt_sched.h
_RTM_DELQDISC: Final = 37
_TC_H_CLSACT: Final = 0xFFFFFFF1

_TRAFFIC = struct.Struct("=BxxxiIII")


def tap_name(host: str, guest: str, nic: str) -> str:
    """Return the name of the tap of one interface, at most 15 characters."""
    digest = hashlib.sha256(f"{host}/{guest}".encode()).hexdigest()[:8]
    return f"us{digest}n{nic.removeprefix('nic')}"


async def create_tap(name: str, *, vnet_hdr: bool, mac: str) -> None:
    """Make the tap `name`, down and on no bridge, or bring one that is there into this state.

    Args:
        name: As `tap_name` returned it.
        vnet_hdr: Whether packets carry a virtio-net header.
        mac: The guest's address on it; the tap's own is derived from it.

    Raises:
        HypervisorError: It is in use by another process, or the kernel refuses.

    Guarantees:
        Afterwards nothing can leave by it. After a failure no tap of this name is left that was not there before.
    """
    await in_thread(f"make the tap {name}", _create, name, vnet_hdr, mac)


async def remove_filters(name: str) -> bool:
    """Remove all traffic filters at the tap's ends (``clsact``).

    Returns:
        Whether there were any.
    """
    return await in_thread(f"remove the filters of {name}", _remove_filters, name)


async def remove_tap(name: str) -> bool:
    """Remove the tap `name`; what QEMU still writes to it is lost.

    Returns:
        Whether it was there.
    """
    return await in_thread(f"remove the tap {name}", remove_interface, name)


# --- In the thread ---------------------------------------------------------------------------------------------------


def _create(name: str, vnet_hdr: bool, mac: str) -> None:  # noqa: FBT001 - called by position through the executor
    existed = index_of(name) is not None
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_hdr else 0)
    try:
        with _tun() as fd:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            fcntl.ioctl(fd, _TUNSETPERSIST, 1)
        cut_off(name)
        with suppress(OSError):  # a kernel without IPv6
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1", encoding="ascii")
        set_address(name, bytes([0xFE]) + bytes.fromhex(mac.replace(":", ""))[1:])
    except OSError:
        if not existed:
            remove_interface(name)
        raise


def _remove_filters(name: str) -> bool:
    index = index_of(name)
    if index is None:
        return False
    try:
        ask_route(_RTM_DELQDISC, _TRAFFIC.pack(0, index, 0, _TC_H_CLSACT, 0))
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EINVAL}:  # there is none
            return False
        raise
    return True


class _tun:  # noqa: N801 - a context manager that reads like open()
    def __enter__(self) -> int:
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
