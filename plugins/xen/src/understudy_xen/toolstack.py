"""What is left to Xen's own tools: create a guest from its xl configuration, shut it down, destroy it with all it has.

`xl create` reads the configuration that an administrator wrote, which libxl cannot; the others are libxl's functions,
called in a process of their own (understudy_xen.restorer).

Source: xl(1), xl.cfg(5) of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from understudy.errors import HypervisorError
from understudy_xen.domainconfig import EVENTS, PRESERVE
from understudy_xen.guestfile import XenConfig
from understudy_xen.inventory import Domain
from understudy_xen.libs import Xen
from understudy_xen.xenstore import XenStore

if TYPE_CHECKING:
    from understudy.arbiter import Record

__all__ = [
    "configuration",
    "create",
    "destroy",
    "destroy_unnamed",
    "is_known",
    "is_ours",
    "mark",
    "queues",
    "shut_down",
]

_log = logging.getLogger(__name__)

_CREATE_S: Final = 55.0
_XL_S: Final = 20.0
_GONE_S: Final = 5.0  # for a domain to be dying once libxl has destroyed it
_LOOK_S: Final = 0.05
_KILLED_S: Final = 5.0
_WORDS: Final = 200


async def create(config: XenConfig) -> None:
    """Start a guest from its xl configuration, under the guest file's name, and preserved whatever ends it.

    Raises:
        HypervisorError: xl failed, with its words.
    """
    settings = [f'name="{config.name}"', *(f'{event}="{PRESERVE}"' for event in EVENTS)]
    await _xl("create", "-q", "-e", str(config.config), *settings, timeout_s=_CREATE_S)


async def configuration(domid: int) -> bytes:
    """Return a domain's configuration, libxl's JSON, as the head of a stream has it.

    Raises:
        HypervisorError: xl does not tell it.
    """
    # xl asks libxl for the same, in a tenth of the time that a process of ours takes to begin.
    told = await _xl("list", "-l", str(domid), timeout_s=_XL_S)
    try:
        config = next(each["config"] for each in json.loads(told) if each["domid"] == domid)
    except (ValueError, TypeError, KeyError, StopIteration):
        raise HypervisorError(
            f"xl does not tell the configuration of domain {domid}: {told[:_WORDS]}"
        ) from None
    return json.dumps(config).encode()


async def shut_down(xen: Xen, domain: Domain, timeout_s: float) -> None:
    """Ask a guest to shut down, and wait until it has.

    Raises:
        HypervisorError: It has not, and runs on.
    """
    await _xl("shutdown", "-F", str(domain.domid), timeout_s=_XL_S)
    deadline = time.monotonic() + timeout_s
    while (info := xen.domain(domain.domid)) is not None and info.shutdown is None:
        if time.monotonic() > deadline:
            raise HypervisorError(f"{domain.name} did not shut down within {timeout_s:g} s and runs on")
        await asyncio.sleep(_LOOK_S)


async def destroy(xen: Xen, domid: int) -> None:
    """Destroy a domain with its devices and its device model, and see that it never runs again.

    It may be there a little longer, without a name: packets of the guest that a gate holds lie in its memory, which is
    freed with the last of them. libxl waits for its interfaces no longer than 10 s.

    Raises:
        HypervisorError: It is still alive.

    Guarantees:
        It runs no more from the first step on, whatever libxl takes for the rest.
    """
    info = xen.domain(domid)
    if info is None:
        return
    if not info.dying:
        xen.pause(domid)
        try:
            await _xl("destroy", str(domid), timeout_s=_XL_S)
        except HypervisorError:
            # An administrator's own `xl destroy` may have been quicker.
            if (info := xen.domain(domid)) is not None and not info.dying:
                raise
    deadline = time.monotonic() + _GONE_S
    while (info := xen.domain(domid)) is not None and not info.dying:
        if time.monotonic() > deadline:
            raise HypervisorError(f"domain {domid} was destroyed, and is alive")
        await asyncio.sleep(_LOOK_S)


async def destroy_unnamed(xen: Xen, known: uuid.UUID) -> bool:
    """Destroy the domains of a UUID that have no name: libxl was killed when it had just made them.

    Returns:
        Whether there was any.
    """
    destroyed = False
    async with await XenStore.open() as store:
        for info in xen.find(known):
            if await store.get(f"/local/domain/{info.domid}/name") is None:
                await destroy(xen, info.domid)
                destroyed = True
    return destroyed


async def queues(interface: str) -> list[str]:
    """Return the interfaces to which everything that comes in by `interface` is led, such as the IFB of a gate."""
    told = await _program(
        "tc", "-j", "filter", "show", "dev", interface, "ingress", timeout_s=_XL_S, check=False
    )
    try:
        actions = [
            each for rule in json.loads(told or "[]") for each in rule.get("options", {}).get("actions", ())
        ]
    except (ValueError, AttributeError):
        return []
    return [str(each["to_dev"]) for each in actions if "to_dev" in each]


async def mark(store: XenStore, domid: int, record: Record) -> None:
    """Note beside a domain that it is the guest by a record; it goes with the domain."""
    await store.write(_mark(domid), json.dumps({"generation": record.generation, "owner": record.owner}))


async def is_ours(store: XenStore, domid: int) -> bool:
    """Tell whether a domain was made the guest by an agent."""
    return bool(await store.get(_mark(domid)))  # without a value it is only the parent of what else was noted


async def is_known(store: XenStore, domid: int) -> bool:
    """Tell whether an agent has ever noted anything beside a domain: as the guest, it has run."""
    return await store.get(_mark(domid)) is not None


def _mark(domid: int) -> str:
    return f"/local/domain/{domid}/understudy"


async def _xl(*arguments: str, timeout_s: float) -> str:
    # Nothing of xl stays behind: with -e it waits for no domain's end.
    return await _program("xl", *arguments, timeout_s=timeout_s)


async def _program(name: str, *arguments: str, timeout_s: float, check: bool = True) -> str:
    try:
        process: Any = await asyncio.create_subprocess_exec(
            name,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as failed:
        needed = "install Debian's xen-utils and iproute2"
        raise HypervisorError(f"{name} cannot be run ({failed}); {needed}") from failed
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
    except TimeoutError:
        raise HypervisorError(f"{name} {arguments[0]} did not end within {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            # Its scripts, too: they hold the pipe, whose end is waited for.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(TimeoutError):
                async with asyncio.timeout(_KILLED_S):
                    await process.wait()
    words = output.decode(errors="replace").strip()
    if process.returncode:
        if not check:
            return ""
        raise HypervisorError(f"{name} {arguments[0]} failed with status {process.returncode}: {words}")
    return str(words)
