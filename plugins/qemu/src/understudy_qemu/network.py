"""Taps: made, put on a bridge, taken off, removed; by the kernel's own calls, without a process of ours.

A tap of ours has a name made from host, guest and interface, so that the janitor finds it without a list. It stays
when QEMU dies (persistent), so that it can be taken off its bridge before anything else happens; it has no IPv6
address of its own, so that the host says nothing to the guest; and its MAC is high, so that the bridge does not take
it for its own.

Calls into the kernel's network may wait for a lock that somebody else holds; they run in threads of their own, with a
deadline, and one that hangs holds up neither the others nor the end of the agent (`understudy.threads`).

Source: Linux Documentation/networking/tuntap.rst; include/uapi/linux/{if_tun,rtnetlink,if_link}.h.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from understudy.errors import HypervisorError
from understudy.netlink import NLM_F_REQUEST, acknowledged, ask, attribute, attributes, message
from understudy.threads import TimedThreads

__all__ = [
    "close_way_out",
    "create_tap",
    "interface_exists",
    "is_bridge",
    "open_way_out",
    "remove_filters",
    "remove_tap",
    "tap_name",
]

T = TypeVar("T")

DEADLINE_S: Final = 5.0
_threads = TimedThreads("network")

# if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TUNSETPERSIST: Final = 0x400454CB
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
# rtnetlink.h, if_link.h
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_RTM_DELQDISC: Final = 37
_TC_H_CLSACT: Final = 0xFFFFFFF1
_IFLA_ADDRESS: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MASTER: Final = 10
_IFLA_LINKINFO: Final = 18
_IFLA_INFO_KIND: Final = 1
_IFF_UP: Final = 1

_LINK = struct.Struct("=BxHiII")
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
    await _in_thread(f"make the tap {name}", _create, name, vnet_hdr, mac)


async def open_way_out(name: str, bridge: str) -> None:
    """Put `name` on `bridge` and bring it up; right also when it is there already.

    Raises:
        HypervisorError: One of them does not exist, or `bridge` is no bridge.
    """
    await _in_thread(f"put {name} on {bridge}", _open, name, bridge)


async def close_way_out(name: str) -> None:
    """Bring `name` down, then take it off its bridge, whichever that is; right also when it does not exist.

    Guarantees:
        After a return nothing leaves by it.
    """
    await _in_thread(f"take {name} off its bridge", _close, name)


async def remove_filters(name: str) -> bool:
    """Remove all traffic filters at the tap's ends (``clsact``).

    Returns:
        Whether there were any.
    """
    return await _in_thread(f"remove the filters of {name}", _remove_filters, name)


async def remove_tap(name: str) -> bool:
    """Remove the tap `name`; what QEMU still writes to it is lost.

    Returns:
        Whether it was there.
    """
    return await _in_thread(f"remove the tap {name}", _remove, name)


async def interface_exists(name: str) -> bool:
    """Tell whether this host has a network interface `name`."""
    return await _in_thread(f"look for {name}", lambda: _index(name) is not None)


async def is_bridge(name: str) -> bool:
    """Tell whether `name` is a bridge."""
    return await _in_thread(f"look at {name}", lambda: _kind(name) == "bridge")


# --- In the thread ---------------------------------------------------------------------------------------------------


async def _in_thread(what: str, call: Callable[..., T], *arguments: Any) -> T:
    try:
        return await _threads.run(call, *arguments, timeout_s=DEADLINE_S)
    except TimeoutError as error:
        raise HypervisorError(f"cannot {what}: the kernel does not answer ({error})") from error
    except OSError as error:
        raise HypervisorError(f"cannot {what}: {error.strerror}") from error


def _create(name: str, vnet_hdr: bool, mac: str) -> None:  # noqa: FBT001 - called by position through the executor
    existed = _index(name) is not None
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_hdr else 0)
    try:
        with _tun() as fd:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            fcntl.ioctl(fd, _TUNSETPERSIST, 1)
        _close(name)
        with suppress(OSError):  # a kernel without IPv6
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1", encoding="ascii")
        address = bytes([0xFE]) + bytes.fromhex(mac.replace(":", ""))[1:]
        _change(_existing(name), more=attribute(_IFLA_ADDRESS, address))
    except OSError:
        if not existed:
            _remove(name)
        raise


def _open(name: str, bridge: str) -> None:
    master = _existing(bridge)
    if _kind(bridge) != "bridge":  # the kernel takes other masters, too
        raise OSError(errno.EINVAL, f"{bridge} is no bridge")
    index = _existing(name)
    # Two messages: of one, most kernels carry out the flags first, and the tap would be up and on no bridge.
    _change(index, more=attribute(_IFLA_MASTER, struct.pack("=I", master)))
    _change(index, flags=_IFF_UP)


def _close(name: str) -> None:
    index = _index(name)
    if index is not None:
        _change(index, flags=0)
        _change(index, more=attribute(_IFLA_MASTER, struct.pack("=I", 0)))


def _remove(name: str) -> bool:
    index = _index(name)
    if index is not None:
        _ask(_RTM_DELLINK, _LINK.pack(0, 0, index, 0, 0))
    return index is not None


def _remove_filters(name: str) -> bool:
    index = _index(name)
    if index is None:
        return False
    try:
        _ask(_RTM_DELQDISC, _TRAFFIC.pack(0, index, 0, _TC_H_CLSACT, 0))
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


def _existing(name: str) -> int:
    index = _index(name)
    if index is None:
        raise OSError(errno.ENODEV, f"there is no interface {name}")
    return index


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _kind(name: str) -> str:
    index = _index(name)
    if index is None:
        return ""
    link = _ask(_RTM_GETLINK, _LINK.pack(0, 0, index, 0, 0))
    info = dict(attributes(link[_LINK.size :])).get(_IFLA_LINKINFO, b"")
    return dict(attributes(info)).get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode()


def _change(index: int, *, flags: int | None = None, more: bytes = b"") -> None:
    mask = 0 if flags is None else _IFF_UP
    _ask(_RTM_NEWLINK, _LINK.pack(0, 0, index, flags or 0, mask) + more)


def _ask(kind: int, body: bytes) -> bytes:
    # The answer is the link that was asked for, or the acknowledgement.
    request = message(kind, NLM_F_REQUEST, body)
    return ask(socket.NETLINK_ROUTE, request if kind == _RTM_GETLINK else acknowledged(request))
