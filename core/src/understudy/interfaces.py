"""A host's network interfaces: whether a guest's output can leave by one, changed by the kernel's own calls.

A guest's interface on its host is a tap under QEMU and a vif under Xen; it has a way out when it is up and on a bridge.
The way is opened after a won promotion and closed before a guest is discarded: at such times a process costs more
than everything else.

Calls into the kernel's network may wait for a lock that somebody else holds; they run in threads of their own, with a
deadline, and one that hangs holds up neither the others nor the end of the agent (`understudy.threads`). What must
happen as one, a cancellation notwithstanding, is one function made of the blocking ones here, run by `in_thread`.

Source: rtnetlink(7); Linux include/uapi/linux/{rtnetlink,if_link}.h, net/core/rtnetlink.c (do_setlink).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import Any, Final, TypeVar

from understudy.errors import HypervisorError
from understudy.netlink import NLM_F_REQUEST, acknowledged, ask, attribute, attributes, message
from understudy.threads import TimedThreads

__all__ = [
    "ask_route",
    "close_way_out",
    "cut_off",
    "in_thread",
    "index_of",
    "interface_exists",
    "is_bridge",
    "open_way_out",
    "remove_interface",
    "set_address",
]

T = TypeVar("T")

DEADLINE_S: Final = 5.0
_threads = TimedThreads("network")

# rtnetlink.h, if_link.h
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_IFLA_ADDRESS: Final = 1
_IFLA_MASTER: Final = 10
_IFLA_LINKINFO: Final = 18
_IFLA_INFO_KIND: Final = 1
_IFF_UP: Final = 1

_LINK = struct.Struct("=BxHiII")


async def open_way_out(name: str, bridge: str) -> None:
    """Put `name` on `bridge` and bring it up; right also when it is there already.

    Raises:
        HypervisorError: One of them does not exist, or `bridge` is no bridge.
    """
    await in_thread(f"put {name} on {bridge}", _open, name, bridge)


async def close_way_out(name: str) -> None:
    """Bring `name` down, then take it off its bridge, whichever that is; right also when it does not exist.

    Raises:
        HypervisorError: The kernel refuses, or does not answer: the way is taken for open then.

    Guarantees:
        After a return nothing leaves by it.
    """
    await in_thread(f"take {name} off its bridge", cut_off, name)


async def interface_exists(name: str) -> bool:
    """Tell whether this host has a network interface `name`."""
    return await in_thread(f"look for {name}", lambda: index_of(name) is not None)


async def is_bridge(name: str) -> bool:
    """Tell whether `name` is a bridge."""
    return await in_thread(f"look at {name}", lambda: _kind(name) == "bridge")


async def in_thread(what: str, call: Callable[..., T], *arguments: Any) -> T:
    """Run blocking calls into the kernel's network in a thread of their own, within 5 s.

    Args:
        what: What is attempted, after "cannot".
        call: A function made of the blocking ones of this module and the like.
        arguments: Its arguments.

    Raises:
        HypervisorError: It raised `OSError`, or did not return in time.

    Guarantees:
        What was begun runs to its end, also when the caller is cancelled or told that it takes too long.
    """
    try:
        return await _threads.run(call, *arguments, timeout_s=DEADLINE_S)
    except TimeoutError as error:
        raise HypervisorError(f"cannot {what}: the kernel does not answer ({error})") from error
    except OSError as error:
        raise HypervisorError(f"cannot {what}: {error.strerror}") from error


# --- Blocking, for `in_thread` ---------------------------------------------------------------------------------------


def index_of(name: str) -> int | None:
    """Return the index of an interface, ``None`` if there is none of this name."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def cut_off(name: str) -> None:
    """Do what `close_way_out` does.

    Raises:
        OSError: The kernel refuses.
    """
    index = index_of(name)
    if index is not None:
        _change(index, flags=0)
        _change(index, more=attribute(_IFLA_MASTER, struct.pack("=I", 0)))


def set_address(name: str, address: bytes) -> None:
    """Set the interface's own MAC address.

    Raises:
        OSError: It does not exist, or the kernel refuses.
    """
    _change(_existing(name), more=attribute(_IFLA_ADDRESS, address))


def remove_interface(name: str) -> bool:
    """Remove the interface `name`, of a kind that can be removed.

    Returns:
        Whether it was there.

    Raises:
        OSError: The kernel refuses.
    """
    index = index_of(name)
    if index is not None:
        ask_route(_RTM_DELLINK, _LINK.pack(0, 0, index, 0, 0))
    return index is not None


def ask_route(kind: int, body: bytes) -> bytes:
    """Ask rtnetlink one thing and return the answer's body: the link that was asked for, or an acknowledgement.

    Args:
        kind: ``RTM_*``.
        body: The fixed header and the attributes.

    Raises:
        OSError: The kernel refuses.
    """
    request = message(kind, NLM_F_REQUEST, body)
    return ask(socket.NETLINK_ROUTE, request if kind == _RTM_GETLINK else acknowledged(request))


def _open(name: str, bridge: str) -> None:
    master = _existing(bridge)
    if _kind(bridge) != "bridge":  # the kernel takes other masters, too
        raise OSError(errno.EINVAL, f"{bridge} is no bridge")
    index = _existing(name)
    # Two messages: of one, most kernels carry out the flags first, and it would be up and on no bridge.
    _change(index, more=attribute(_IFLA_MASTER, struct.pack("=I", master)))
    _change(index, flags=_IFF_UP)


def _existing(name: str) -> int:
    index = index_of(name)
    if index is None:
        raise OSError(errno.ENODEV, f"there is no interface {name}")
    return index


def _kind(name: str) -> str:
    index = index_of(name)
    if index is None:
        return ""
    link = ask_route(_RTM_GETLINK, _LINK.pack(0, 0, index, 0, 0))
    info = dict(attributes(link[_LINK.size :])).get(_IFLA_LINKINFO, b"")
    return dict(attributes(info)).get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode()


def _change(index: int, *, flags: int | None = None, more: bytes = b"") -> None:
    mask = 0 if flags is None else _IFF_UP
    ask_route(_RTM_NEWLINK, _LINK.pack(0, 0, index, flags or 0, mask) + more)
