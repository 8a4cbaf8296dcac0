"""Drop what colo-compare cannot compare, in the kernel, before it leaves the host.

colo-compare parses IPv4. Everything else it passes on uncompared and at once: ARP, which must pass (a guest without
ARP is mute), but also IPv6, VLAN tags and any other protocol, whose packets would tell the world what the copy has
never said. While the guest is protected a filter on the ingress of its tap (what the guest sends) lets IPv4 and ARP
through and drops the rest.

The filter is one classic BPF program in tc's direct-action mode: it needs no action module and no other package than
iproute2, is put in place with one command, and its text is read back afterwards.

Source: tc-bpf(8); Linux Documentation/networking/filter.rst; QEMU net/colo.c (parse_packet_early).
"""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import DEVNULL, PIPE
from typing import Any, Final

from understudy.errors import HypervisorError

__all__ = ["PREFERENCE", "UncomparedFilter"]

PREFERENCE: Final = 0x5553  #: tc's priority of our filter, by which it is known again
_DEADLINE_S: Final = 5.0
_DROP: Final = 2  # TC_ACT_SHOT
_NEXT: Final = 0xFFFFFFFF  # TC_ACT_UNSPEC: ask the filters after this one

# (code, jump if true, jump if false, value) of struct sock_filter
_PROGRAM: Final = (
    (0x20, 0, 0, 0xFFFFF000 + 48),  # load whether there is a VLAN tag (SKF_AD_VLAN_TAG_PRESENT)
    (0x15, 0, 3, 0),  # yes: drop
    (0x28, 0, 0, 12),  # load the EtherType
    (0x15, 2, 0, 0x0800),  # IPv4: pass
    (0x15, 1, 0, 0x0806),  # ARP: pass
    (0x06, 0, 0, _DROP),
    (0x06, 0, 0, _NEXT),
)


class UncomparedFilter:
    """The filter on one interface.

    Args:
        interface: The guest's tap.
    """

    def __init__(self, interface: str) -> None:
        self.interface = interface

    async def install(self) -> None:
        """Put the filter in place; right also when it is there already.

        Raises:
            HypervisorError: It cannot be, or is not what was asked for when read back.

        Guarantees:
            After a failure or cancellation nothing of it is left.
        """
        try:
            await self._tc("qdisc", "add", "dev", self.interface, "clsact", unless="Exclusivity flag on")
            await self._tc(
                *("filter", "replace", "dev", self.interface, "ingress", "pref", str(PREFERENCE)),
                *("handle", "1", "bpf", "direct-action", "bytecode", _bytecode()),
            )
            if not await self.installed():
                raise HypervisorError(f"the filter on {self.interface} is not there when it is read back")
        except BaseException:
            await asyncio.shield(self.remove())
            raise

    async def installed(self) -> bool:
        """Tell whether exactly our filter is in place."""
        wanted = [{"code": code, "jt": true, "jf": false, "k": k} for code, true, false, k in _PROGRAM]
        for entry in await self._show("filter", "show", "dev", self.interface, "ingress"):
            options = entry.get("options", {})
            program = options.get("bytecode", {}).get("insns")
            if entry.get("pref") == PREFERENCE and program == wanted and options.get("direct-action"):
                return True
        return False

    async def remove(self) -> None:
        """Take the filter away, and the hook it hangs on if nobody else uses it; right also when nothing is there.

        Raises:
            HypervisorError: tc failed for another reason than that there is nothing.
        """
        gone = (
            "Cannot find device",
            "Cannot find specified",  # qdisc, or the filter's chain where there is only the hook
            "not found",
            "Parent Qdisc doesn't exists",
        )
        where = ("dev", self.interface)
        await self._tc("filter", "del", *where, "ingress", "pref", str(PREFERENCE), unless=gone)
        for direction in ("ingress", "egress"):
            if await self._show("filter", "show", *where, direction, unless=gone):
                return
        await self._tc("qdisc", "del", *where, "clsact", unless=(*gone, "Invalid handle", "No such"))

    async def dropped_packets(self) -> int:
        """Return how many packets were dropped since the hook was made."""
        for entry in await self._show("-s", "qdisc", "show", "dev", self.interface, "clsact"):
            if entry.get("kind") == "clsact":
                return int(entry.get("drops", 0))
        return 0

    async def _show(self, *arguments: str, unless: str | tuple[str, ...] = ()) -> list[dict[str, Any]]:
        text = await self._tc("-json", *arguments, unless=unless)
        answer = json.loads(text or "[]")
        return [entry for entry in answer if isinstance(entry, dict)]

    async def _tc(self, *arguments: str, unless: str | tuple[str, ...] = ()) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                "tc", *arguments, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
            )
        except FileNotFoundError:
            raise HypervisorError("tc is missing; install the package iproute2") from None
        try:
            async with asyncio.timeout(_DEADLINE_S):
                out, err = await process.communicate()
        except BaseException as error:
            if process.returncode is None:
                process.kill()
                await process.wait()
            if isinstance(error, TimeoutError):
                said = " ".join(arguments)
                raise HypervisorError(f"tc {said}: not finished within {_DEADLINE_S:g} s") from None
            raise
        if process.returncode:
            said = err.decode(errors="replace").strip()
            if any(word in said for word in ((unless,) if isinstance(unless, str) else unless)):
                return ""
            raise HypervisorError(f"tc {' '.join(arguments)}: {said}")
        return out.decode()


def _bytecode() -> str:
    lines = (f"{code} {true} {false} {k}" for code, true, false, k in _PROGRAM)
    return f"{len(_PROGRAM)}," + ",".join(lines)
