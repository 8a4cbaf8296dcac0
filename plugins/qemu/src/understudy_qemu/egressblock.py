"""The block in the kernel: what comes out of a guest's tap passes only while the agent says so, and never for long.

What a guest sends enters the host at its tap's *ingress* hook. There a chain of nf_tables drops everything but what
comes from an interface that is an element of two sets; the only element that is ever put into them is that tap, and it
has a timeout. So the block closes by itself, in the kernel, whatever has become of the agent: stopped, killed, hung.

::

    QEMU → tap → ingress: in the sets `fresh` and `open`? → bridge → world
                            └ no: counted, dropped

`fresh` is renewed by every commit, for a minute; `open` is opened by every commit, for a moment. Why it takes
two is said in heldnic.py.

The element is never refreshed, which older kernels cannot do: it is taken away and put in anew by one transaction. A
lookup looks at the clock by itself; that the kernel removes expired elements only now and then does not matter.

The table is made by ``nft``; everything later goes through a raw socket (nfnetlink.py), without a process.
It is named after the tap, which is named after host, guest and interface, so that it is found without a list.

Somebody who empties the whole rule set (``nft flush ruleset``, as Debian's nftables.service does when it is reloaded)
takes the block away, too: the next commit notices it, before it lets anything out, and puts it back.

Source: nft(8); Linux net/netfilter/nf_tables_api.c, nft_set_hash.c (nft_rhash_lookup), net/core/dev.c (nf_ingress).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import shutil
import socket
import struct
import threading
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from understudy.errors import HypervisorError
from understudy.threads import TimedThreads
from understudy_qemu.nfnetlink import (
    Count,
    Nfnetlink,
    batch,
    counter_request,
    element_added,
    set_flushed,
    table_deleted,
)

__all__ = ["EgressBlock", "missing_for_block"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_DEADLINE_S: Final = 5.0
_OPEN: Final = "open"
_FRESH: Final = "fresh"
_PASSED: Final = "passed"
_REFUSED: Final = "refused"
_PRIORITY: Final = -300  # before anybody else's chains
_FAMILY: Final = "netdev"
_NOT_THERE: Final = frozenset({errno.ENOENT, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP})
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 1
_threads = TimedThreads("egress block")


class EgressBlock:
    """The block at one tap.

    Args:
        interface: The tap.

    Nothing is touched before `install`.
    """

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self.table = f"understudy-{interface}"
        self.lost_count = 0  #: how often somebody else had removed it
        self._wire: Nfnetlink | None = None
        self._lock = threading.Lock()
        self._closing = batch(set_flushed(self.table, _OPEN))
        self._requests = tuple(counter_request(self.table, name) for name in (_PASSED, _REFUSED))

    async def install(self, *, passing: bool = True) -> None:
        """Put the block in place, or anew; what was left of one by a dead agent is replaced.

        Args:
            passing: Whether everything passes until it is closed, as an unprotected guest needs it.

        Raises:
            HypervisorError: The tap does not exist, spreads its packets over processors (RPS), nft is missing, or the
                kernel lacks something.

        Guarantees:
            There is no moment at which a packet is treated by half of it. After a failure or cancellation nothing of
            it is left that was not there before, or it is removed by `remove`.
        """
        await self._in_thread("make", _check_interface, self.interface)
        await _nft("--file", "-", text=_text(self.table, self.interface, passing=passing))
        listed = json.loads(await _nft("--json", "list", "table", _FAMILY, self.table))
        chains = [entry["chain"] for entry in listed.get("nftables", ()) if "chain" in entry]
        if [(chain.get("hook"), chain.get("policy")) for chain in chains] != [("ingress", "drop")]:
            raise HypervisorError(
                f"the block of {self.interface} is not what it was made to be when it is read back: {chains}"
            )

    async def close(self) -> tuple[Count, Count]:
        """Let nothing pass any more.

        Returns:
            What has passed, and what was refused, since the block was made.

        Raises:
            HypervisorError: The kernel refuses, or there is no block.
        """
        return await self._in_thread("close", self._close)

    async def renew(self, for_ms: int) -> bool:
        """Say that what will leave next is fresh; for `for_ms` milliseconds windows have an effect.

        Returns:
            Whether the block was there; if somebody else had removed it, it has been put back, and counts anew.

        Raises:
            HypervisorError: The kernel refuses.
        """
        there = await self._put(_FRESH, for_ms)
        if not there:
            await self._put(_FRESH, for_ms)
        return there

    async def open_for(self, window_ms: int) -> bool:
        """Let packets pass for `window_ms` milliseconds, or until `close`, if the last `renew` is not over.

        Returns:
            Whether the block was there; if somebody else had removed it, it has been put back, closed and not fresh,
            and counts anew.

        Raises:
            HypervisorError: The kernel refuses; nothing passes.

        Guarantees:
            The kernel closes it again by itself, at the latest `window_ms` after this call has returned, even if this
            process never runs again.
        """
        return await self._put(_OPEN, window_ms)

    async def remove(self) -> bool:
        """Remove it, and with it every hindrance.

        Returns:
            Whether it was there.

        Raises:
            HypervisorError: The kernel refuses.
        """
        return await self._in_thread("remove", self._remove)

    async def remove_below_nothing(self) -> bool:
        """Remove it where its guest must never be heard again: only if the tap is down, or no more.

        Returns:
            Whether it was there.

        Raises:
            HypervisorError: The tap is up: a guest may run behind it. The block stays.
        """
        if await self._in_thread("look at", _is_up, self.interface):
            raise HypervisorError(
                f"the block of {self.interface} stays: the interface is up, and what its guest sends must not leave"
            )
        return await self.remove()

    async def _put(self, name: str, timeout_ms: int) -> bool:
        added = element_added(self.table, name, self.interface, timeout_ms)
        try:
            await self._in_thread("open", self._change, batch(set_flushed(self.table, name), added))
        except _TableGone:
            self.lost_count += 1
            _log.warning(
                "the block of %s was removed by somebody else (nft flush ruleset?): it is put back; what the guest "
                "sent was held by QEMU meanwhile",
                self.interface,
            )
            await self.install(passing=False)
            return False
        return True

    # --- In the thread -----------------------------------------------------------------------------------------------

    async def _in_thread(self, what: str, call: Callable[..., T], *arguments: Any) -> T:
        def alone() -> T:
            # One that is late must not have its answer taken by the next.
            with self._lock:
                return call(*arguments)

        try:
            return await _threads.run(alone, timeout_s=_DEADLINE_S)
        except TimeoutError as error:
            raise HypervisorError(
                f"cannot {what} the block of {self.interface}: the kernel does not answer ({error})"
            ) from error
        except OSError as error:
            kind = _TableGone if error.errno == errno.ENOENT else HypervisorError
            raise kind(f"cannot {what} the block of {self.interface}: {error.strerror}") from error

    def _change(self, transaction: bytes) -> None:
        self._opened().change(transaction)

    def _close(self) -> tuple[Count, Count]:
        wire = self._opened()
        wire.change(self._closing)
        passed, refused = (wire.counter(request) for request in self._requests)
        return passed, refused

    def _remove(self) -> bool:
        try:
            self._change(batch(table_deleted(self.table)))
        except OSError as error:
            if error.errno in _NOT_THERE:  # or the kernel has no nf_tables at all
                return False
            raise
        finally:
            wire, self._wire = self._wire, None
            if wire is not None:
                wire.close()
        return True

    def _opened(self) -> Nfnetlink:
        # Made here, not in the constructor: only who changes something needs one.
        if self._wire is None:
            self._wire = Nfnetlink()
        return self._wire


class _TableGone(HypervisorError):
    """There is no table of this name, or not with our set in it."""


async def missing_for_block() -> str:
    """Tell what this host lacks for a block, in words; ``""`` if nothing. Changes nothing."""
    if shutil.which("nft") is None:
        return "the program nft is missing (package nftables)"
    try:
        # Everything but the last step of a transaction, at an interface that every host has.
        await _nft("--check", "--file", "-", text=_text("understudy-check", "lo", passing=True))
    except HypervisorError as error:
        return f"the kernel takes no nf_tables chain at an interface's ingress ({error})"
    return ""


def _text(table: str, interface: str, *, passing: bool) -> str:
    # Made and deleted first: right whether there is one or not, and one transaction all the same.
    element = f'elements = {{ "{interface}" }}' if passing else ""
    return f"""
        add table {_FAMILY} {table}
        delete table {_FAMILY} {table}
        table {_FAMILY} {table} {{
            counter {_PASSED} {{ }}
            counter {_REFUSED} {{ }}
            set {_FRESH} {{
                type ifname
                flags timeout
                {element}
            }}
            set {_OPEN} {{
                type ifname
                flags timeout
                {element}
            }}
            chain gate {{
                type filter hook ingress device "{interface}" priority {_PRIORITY}; policy drop;
                iifname @{_FRESH} iifname @{_OPEN} counter name {_PASSED} accept
                counter name {_REFUSED} drop
            }}
        }}
    """


def _check_interface(interface: str) -> None:
    # Newer kernels take a chain at an interface that will come some day.
    try:
        socket.if_nametoindex(interface)
    except OSError:
        raise OSError(errno.ENODEV, f"there is no interface {interface}") from None
    # Where packets wait for another processor, what was let out may come to the hook when it is closed again.
    for mask in Path(f"/sys/class/net/{interface}/queues").glob("rx-*/rps_cpus"):
        if mask.read_text(encoding="ascii").strip("0,\n"):
            raise OSError(
                errno.EINVAL, f"its packets are spread over processors (RPS); write 0 to {mask} to end that"
            )


def _is_up(interface: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH22x", interface.encode(), 0))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
    return bool(struct.unpack_from("16xH", answer)[0] & _IFF_UP)


async def _nft(*arguments: str, text: str = "") -> str:
    said = f"nft {' '.join(arguments)}"
    try:
        process = await asyncio.create_subprocess_exec(
            "nft", *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE
        )
    except FileNotFoundError:
        raise HypervisorError("nft is missing; install the package nftables") from None
    try:
        async with asyncio.timeout(_DEADLINE_S):
            out, err = await process.communicate(text.encode())
    except BaseException as error:
        if process.returncode is None:
            process.kill()
            await process.wait()
        if isinstance(error, TimeoutError):
            raise HypervisorError(f"{said}: not finished within {_DEADLINE_S:g} s") from None
        raise
    if process.returncode:
        raise HypervisorError(f"{said}: {' '.join(err.decode(errors='replace').split())}")
    return out.decode()
