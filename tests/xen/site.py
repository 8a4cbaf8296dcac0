"""Two Xen hosts as a site has them: an agent on each, one arbiter, one guest file, and clients on the network.

Everything is done through `understudy`, in dom0, as an operator does it; the tests only crash hosts and look.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from tests.testbeds.host import Completed
from tests.testbeds.xen.guests import COUNTER_PORT, GUEST, linux
from tests.testbeds.xen.pair import XenPair, XenPlace

__all__ = ["Site", "XenSite"]

_AGENT: Final = """
host = "{host}"
insecure = true
plugins = {plugins}
[listen]
address = "{address}"
[peers.{other}]
address = "{other_address}"
[arbiter]
kind = "directory"
path = "{arbiter}"
[limits]
heartbeat_limit_ms = {silence_ms}
"""
_GUEST: Final = """
name = "{name}"
hypervisor = "xen"
config = "/etc/xen/{name}.cfg"
compression = "{compression}"
{tables}[[nic]]
bridge = "xenbr0"
script = "vif-understudy"
subkind = "{subkind}"
[protection]
mode = "remus"
interval = "fixed"
interval_options = {{ period_ms = {interval_ms} }}
"""
_READY_S: Final = 60.0
_PROTECT_S: Final = 180.0


class XenSite:
    """Two hosts with agents.

    Args:
        pair: The hosts, booted.
        silence_ms: After which a host is taken for lost. Two dom0s under TCG share two processors with everything else.
        plugins: The agents', besides Xen's and the gate's.
    """

    def __init__(self, pair: XenPair, *, silence_ms: int = 3000, plugins: Sequence[str] = ()) -> None:
        self.pair = pair
        self._silence_ms = silence_ms
        self._plugins = ("xen", "netbuffer", *plugins)

    def other(self, place: XenPlace) -> XenPlace:
        """Return the other host."""
        return self.pair.beta if place is self.pair.alpha else self.pair.alpha

    async def equip(self, place: XenPlace, *program: str | Path) -> None:
        """Configure a host's agent and start it; `program` is run in place of ``understudy``."""
        other = self.other(place)
        arbiter = self.pair.common / "arbiter"
        arbiter.mkdir(exist_ok=True)
        text = _AGENT.format(
            host=place.name,
            address=place.address,
            other=other.name,
            other_address=other.address,
            arbiter=arbiter,
            plugins=json.dumps(self._plugins),
            silence_ms=self._silence_ms,
        )
        await self.put(place, "/etc/understudy/agent.toml", text)
        log = place.directory / f"agent-{time.monotonic_ns()}.log"
        words = shlex.join(map(str, program or ("understudy",)))
        start = f"setsid {words} agent run >{log} 2>&1 </dev/null &"
        await place.run("sh", "-c", start)
        # Not asked by the command line, whose start would take the only processor from the agent's.
        ready = f"until grep -qs 'listens on' {log}; do sleep 0.2; done"
        await place.run("timeout", str(int(_READY_S)), "sh", "-c", ready, timeout_s=_READY_S + 5)

    async def describe(
        self,
        name: str = "web",
        *,
        interval_ms: int = 200,
        subkind: str = "auto",
        compression: str = "auto",
        tables: str = "",
        **guest: Any,
    ) -> None:
        """Write a guest's file, with more `tables` in it, and its xl configuration on both hosts."""
        text = _GUEST.format(
            name=name, interval_ms=interval_ms, subkind=subkind, compression=compression, tables=tables
        )
        for place in (self.pair.alpha, self.pair.beta):
            await self.put(place, f"/etc/xen/{name}.cfg", linux(name, preserve=True, **guest))
            await self.put(place, f"/etc/understudy/guests/{name}.toml", text)

    async def put(self, place: XenPlace, path: str, text: str) -> None:
        """Write a file in a dom0."""
        await place.run("sh", "-c", f"mkdir -p {Path(path).parent}; cat >{path}", text=text)

    async def ask(
        self, place: XenPlace, *words: str, check: bool = True, timeout_s: float = 60.0
    ) -> Completed:
        """Run `understudy` on a host."""
        return await place.run("understudy", *words, check=check, timeout_s=timeout_s)

    async def row(self, place: XenPlace, guest: str = "web") -> dict[str, Any]:
        """Return what `understudy status` on a host says of the guest there: one row of its table."""
        answer = await self.ask(place, "status", guest, "--format", "json")
        rows = [row for row in json.loads(answer.output)["guests"] if row["host"] == place.name]
        assert len(rows) == 1, answer.output
        return dict(rows[0])

    async def protect(self, place: XenPlace, guest: str = "web", *more: str) -> dict[str, Any]:
        """Protect a guest, and return what the command says."""
        words = ("protect", guest, *more, "--format", "json")
        return dict(json.loads((await self.ask(place, *words, timeout_s=_PROTECT_S)).output))

    def logs(self) -> str:
        """Return the agents' logs, for a failure."""
        paths = sorted(self.pair.root.glob("*/agent-*.log"))
        return "\n".join(f"--- {path}\n{path.read_text()[-6000:]}" for path in paths)


@asynccontextmanager
async def Site(  # noqa: N802 - reads like the class
    prepare: Callable[[XenSite], Awaitable[None]] | None = None,
    *,
    disks_mib: tuple[int, ...] = (),
    **options: Any,
) -> AsyncIterator[XenSite]:
    """Enter with both hosts up and their agents running.

    Args:
        prepare: Called when the hosts are up; it starts the agents. By default that is all that is to be done.
        disks_mib: As for `XenPair`.
        options: As for `XenSite`.
    """
    async with XenPair(disks_mib=disks_mib) as pair:
        site = XenSite(pair, **options)
        try:
            if prepare is not None:
                await prepare(site)
            else:
                await asyncio.gather(*(site.equip(place) for place in (pair.alpha, pair.beta)))
            yield site
        except BaseException:
            print(site.logs())  # noqa: T201 - pytest shows it with the failure
            raise


async def counted(pair: XenPair, words: Sequence[int], *, address: str = GUEST) -> list[str]:
    """Send words to the guest's counter on one connection and return its replies."""
    sock = await asyncio.to_thread(pair.client.connect, address, COUNTER_PORT, 5.0)
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        replies = []
        for word in words:
            writer.write(f"{word}\n".encode())
            replies.append((await reader.readline()).decode().strip())
        return replies
    finally:
        writer.close()
