"""Every way in which a protection can end, on two real Xen hosts: what is left, who runs the guest, what clients see.

The cases share one pair of hosts, because a boot is what costs; each leaves the guest running somewhere, unprotected,
and the next one protects it from there. A client's connection goes through all of those that it is to survive.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.testbeds.bed import need
from tests.testbeds.rounds import LONG
from tests.testbeds.xen.guests import GUEST, SHELL_PORT
from tests.testbeds.xen.image import missing_for_xen
from tests.testbeds.xen.pair import XenPlace
from tests.xen.client import CounterClient
from tests.xen.site import Site, XenSite

pytestmark = [
    pytest.mark.xen,
    pytest.mark.timeout(3000 if LONG else 1200),
    pytest.mark.asyncio(loop_scope="module"),
]

STEP_S: Final = 90.0  # for any step; two hosts share two processors with whatever else runs
LOOK_S: Final = 0.1
SOME: Final = 15  # replies that show that a connection lives
TRACES: Final = (
    "xl list | cut -d' ' -f1; tc qdisc show; ip -o link | cut -d: -f2; "
    "ps --ppid 2 -p 2 -N -o args= | grep -v 'ps --ppid' | grep -v '^sh -c' | grep -v '^grep ' | sort"
)
#: Prints a line for each domain of the guest's name that runs although no gate stands on this host.
FACE: Final = (
    "xl list web 2>/dev/null | awk 'NR > 1 && $5 !~ /[psd]/' | grep -q . && "
    "! tc qdisc show | grep -q '^qdisc plug' && echo face || true"
)


@dataclass
class Story:
    """The hosts, the guest ``web``, and where it runs."""

    site: XenSite
    home: XenPlace

    @property
    def other(self) -> XenPlace:
        return self.site.other(self.home)

    def record(self) -> dict[str, Any]:
        """Return the guest's record, read where the arbiter keeps it."""
        records = sorted((self.site.pair.common / "arbiter").glob("g-web/*.json"))
        return dict(json.loads(records[-1].read_text()))

    async def until_record(self, **wanted: Any) -> dict[str, Any]:
        """Wait until the record has these members."""

        async def has() -> dict[str, Any] | None:
            with suppress(ValueError, OSError):  # it is just being written
                record = self.record()
                return record if wanted.items() <= record.items() else None
            return None

        return dict(await until(has, f"the record says {wanted}"))

    async def started(self) -> None:
        """See that the guest runs, unprotected; start it if it is off."""
        if self.record()["state"] == "stopped":
            await self.site.ask(self.home, "start", "web", timeout_s=STEP_S)

    async def protected(self) -> None:
        """Protect the guest, from where it runs to the other host."""
        await self.started()
        await self.site.protect(self.home)

    async def state(self, place: XenPlace | None = None) -> tuple[str | None, str, str]:
        """Return the role, state and problem that a host's `status` tells of the guest."""
        row = await self.site.row(place or self.home)
        return row["role"], row["state"], str(row.get("problem", ""))

    async def becomes(self, place: XenPlace, *states: str) -> str:
        """Wait until a host's `status` says one of these states; return the problem it tells."""

        async def is_so() -> tuple[str] | None:
            _, state, problem = await self.state(place)
            return (problem,) if state in states else None

        return str((await until(is_so, f"{place.name} is one of {states}"))[0])

    async def moved(self) -> None:
        """See the guest go on at the other host, which is its home from now on."""
        await self.until_record(state="alone", owner=self.other.name)
        self.home = self.other
        await self.becomes(self.home, "alone")

    async def traces(self) -> dict[str, str]:
        """Return what both hosts have: domains, qdiscs, interfaces, processes."""
        pair = self.site.pair
        return {place.name: (await place.run("sh", "-c", TRACES)).output for place in (pair.alpha, pair.beta)}

    async def domains(self, place: XenPlace) -> set[str]:
        """Return the names of a host's domains, dom0 left out."""
        listed = (await place.run("xl", "list")).output.splitlines()[1:]
        return {line.split()[0] for line in listed} - {"Domain-0"}

    async def vanishes(self, place: XenPlace) -> None:
        """Wait until nothing of the guest is on a host: no domain, no gate."""

        async def is_gone() -> bool:
            gates = (await place.run("tc", "qdisc", "show")).output
            return not await self.domains(place) and "qdisc plug" not in gates

        await until(is_gone, f"nothing of the guest is left on {place.name}")

    async def agent(self, place: XenPlace, sign: str) -> None:
        """Send a host's agent a signal."""
        await place.run("sh", "-c", f"kill -{sign} $(pgrep -f 'understudy agent ru[n]')")

    async def shell(self, words: str) -> bytes:
        """Say something to the guest's shell, and return all that it answers until 3 s pass in silence."""
        sock = await asyncio.to_thread(self.site.pair.client.connect, GUEST, SHELL_PORT, 10.0)
        reader, writer = await asyncio.open_connection(sock=sock)
        heard = b""
        try:
            writer.write(words.encode() + b"\n")
            deadline_s = STEP_S
            while data := await asyncio.wait_for(reader.read(4096), deadline_s):
                heard, deadline_s = heard + data, 3.0
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.transport.abort()
        return heard


async def until(done: Callable[[], Awaitable[Any]], what: str, timeout_s: float = STEP_S) -> Any:
    """Wait until `done` returns something true, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (found := await done()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(LOOK_S)
    return found


async def goes_on(client: CounterClient, count: int = SOME) -> None:
    """See a connection go on, nothing lost and nothing doubled."""
    await client.more(count, timeout_s=STEP_S)
    client.verify()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def story() -> AsyncIterator[Story]:
    need("xen", missing_for_xen())
    async with Site() as site:
        await site.describe()
        await site.ask(site.pair.alpha, "start", "web")
        yield Story(site, site.pair.alpha)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(story: Story) -> AsyncIterator[CounterClient]:
    """One connection, for the cases that a client is not to notice."""
    async with CounterClient(story.site.pair) as client:
        await goes_on(client)
        yield client


# --- What a client is not to notice ----------------------------------------------------------------------------------


async def test_unprotect_leaves_nothing(story: Story, client: CounterClient) -> None:
    before = await story.traces()
    await story.protected()
    await goes_on(client)
    assert (await story.traces())[story.home.name] != before[story.home.name]
    await story.site.ask(story.home, "unprotect", "web")
    assert await story.traces() == before
    await goes_on(client)


async def test_a_save_by_another_toolstack_is_ended_and_ends_the_protection(
    story: Story, client: CounterClient
) -> None:
    await story.protected()
    saved = await story.home.run("xl", "save", "web", "/run/web.save", check=False)
    assert saved.status != 0
    assert "resuming domain" in saved.errors
    await goes_on(client)
    problem = await story.becomes(story.home, "alone")
    assert "another toolstack has begun to save domain" in problem
    await story.vanishes(story.other)
    await story.home.run("rm", "-f", "/run/web.save")


@pytest.mark.long  # the short run has another that ends the same way
async def test_a_stock_remus_of_a_protected_guest_is_ended(story: Story, client: CounterClient) -> None:
    await story.protected()
    stock = await story.home.run("xl", "remus", "-Fnb", "web", "blackhole", check=False, timeout_s=STEP_S)
    assert stock.status != 0
    assert "another toolstack has begun to save" in await story.becomes(story.home, "alone")
    await story.vanishes(story.other)
    await goes_on(client)


@pytest.mark.long  # the short run has another that ends the same way
async def test_a_guest_that_an_administrator_pauses_stays_paused(story: Story, client: CounterClient) -> None:
    await story.protected()
    await story.home.run("xl", "pause", "web")
    problem = await story.becomes(story.home, "alone")
    assert "paused" in problem
    await story.vanishes(story.other)
    assert (
        await story.home.run("sh", "-c", "xl list web | awk 'NR > 1 {print $5}'")
    ).output.strip() == "--p---"
    await story.home.run("xl", "unpause", "web")
    await goes_on(client)


async def test_a_lost_link_leaves_one_face(story: Story, client: CounterClient) -> None:
    await story.protected()
    pair = story.site.pair
    # The agents alone cannot hear each other: the guest's clients and the arbiter are elsewhere.
    for place in (pair.alpha, pair.beta):
        await place.run("ip", "route", "add", "blackhole", f"{story.site.other(place).address}/32")
    try:
        decided = asyncio.ensure_future(story.until_record(state="alone"))
        while not decided.done():
            faces = [await place.run("sh", "-c", FACE) for place in (pair.alpha, pair.beta)]
            assert sum("face" in face.output for face in faces) <= 1
        owner = str((await decided)["owner"])
        story.home = pair.alpha if owner == "alpha" else pair.beta
        await story.vanishes(story.other)
        assert await story.domains(story.home) == {"web"}
        await goes_on(client)
    finally:
        for place in (pair.alpha, pair.beta):
            await place.run("ip", "route", "del", "blackhole", f"{story.site.other(place).address}/32")
    assert (await story.state())[:2] == ("primary", "alone")


@pytest.mark.long  # the short run has another that ends the same way
async def test_a_forced_failover_of_a_healthy_pair(story: Story, client: CounterClient) -> None:
    await story.protected()
    left = story.home
    await story.site.ask(story.other, "failover", "web", "--force", "--reason", "a test", timeout_s=STEP_S)
    await story.moved()
    assert story.record()["forced_by"]
    await goes_on(client)
    await story.vanishes(left)


async def test_a_destroyed_guest_goes_on_at_the_standby(story: Story, client: CounterClient) -> None:
    await story.protected()
    left = story.home
    await goes_on(client)
    await left.run("xl", "destroy", "web")
    await goes_on(client)
    await story.moved()
    await story.vanishes(left)


async def test_the_primarys_agent_is_killed(story: Story, client: CounterClient) -> None:
    await story.protected()
    left = story.home
    await story.agent(left, "KILL")
    # Nobody makes checkpoints any more. The guest's gate stays, whatever else it does there.
    await story.moved()
    assert "face" not in (await left.run("sh", "-c", FACE)).output
    await goes_on(client)
    await story.site.equip(left)
    await story.vanishes(left)
    assert await story.domains(story.home) == {"web"}


@pytest.mark.long  # the short run has another that ends the same way
async def test_the_secondarys_agent_is_killed(story: Story, client: CounterClient) -> None:
    await story.protected()
    await story.agent(story.other, "KILL")
    await story.until_record(state="alone", owner=story.home.name)
    await goes_on(client)
    assert (await story.state())[:2] == ("primary", "alone")
    await story.site.equip(story.other)
    await story.vanishes(story.other)


@pytest.mark.long  # the short run has another that ends the same way
async def test_the_secondarys_host_dies(story: Story, client: CounterClient) -> None:
    await story.protected()
    dead = story.other
    await story.site.pair.crash(dead)
    await goes_on(client)
    assert (await story.state())[:2] == ("primary", "alone")
    await story.site.pair.start(dead)
    await story.site.equip(dead)
    await story.site.describe()
    await story.protected()
    await goes_on(client)
    await story.site.ask(story.home, "unprotect", "web")
    await story.vanishes(dead)
    await goes_on(client)


@pytest.mark.long
async def test_what_a_dead_agent_has_asked_of_the_guest_is_withdrawn_or_undone(
    story: Story, client: CounterClient
) -> None:
    home = story.home
    await story.started()
    domid = (await home.run("xl", "domid", "web")).output.strip()
    control = f"/local/domain/{domid}/control/shutdown"

    async def withdrawn() -> bool:
        return (await home.run("xenstore-read", control)).output.strip() == ""

    async def restarted() -> None:
        await story.agent(home, "KILL")
        await story.site.equip(home)

    await home.run("xl", "pause", "web")  # it takes nothing up
    await home.run("xenstore-write", control, "suspend")
    await restarted()
    await until(withdrawn, "the request is withdrawn")
    await home.run("xl", "unpause", "web")
    await goes_on(client)
    # What was taken up before, and is done now.
    await restarted()
    await story.becomes(home, "alone")
    await home.run("xenstore-write", control, "suspend")
    await until(withdrawn, "the request is taken up")
    await goes_on(client)


# --- The guest's own end; a connection ends with it ------------------------------------------------------------------


async def _ended(story: Story, words: str) -> None:
    await story.protected()
    # Not its very last words: the guest's own driver closes the interface, and a bridge takes no packet from a port
    # whose other side is down.
    heard = await story.shell(f"echo first; sleep 2; {words}")
    await story.until_record(state="stopped", owner=story.home.name)
    assert heard == b"first\n"
    for place in (story.home, story.other):
        await story.vanishes(place)
    assert (await story.state())[:2] == (None, "off")
    await story.started()


async def test_a_guest_that_shuts_down_is_stopped(story: Story) -> None:
    await _ended(story, "poweroff -f")


@pytest.mark.long  # the short run has another that ends the same way
async def test_a_guest_that_reboots_is_stopped(story: Story) -> None:
    await _ended(story, "reboot -f")


@pytest.mark.long  # the short run has another that ends the same way
async def test_a_guest_that_crashes_is_stopped(story: Story) -> None:
    await _ended(story, "echo c >/proc/sysrq-trigger")


@pytest.mark.long  # the short run has another that ends the same way
async def test_stop_ends_the_protection_first(story: Story) -> None:
    await story.protected()
    forced = () if LONG else ("--force",)
    await story.site.ask(story.home, "stop", "web", *forced, timeout_s=STEP_S)
    assert story.record()["state"] == "stopped"
    for place in (story.home, story.other):
        await story.vanishes(place)
    await story.started()
    async with CounterClient(story.site.pair) as anew:
        await goes_on(anew)
        assert anew.replies[0].total == 1
