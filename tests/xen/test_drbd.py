"""A guest with its disk on DRBD: a host dies at a bad moment and comes back, then the other, and so on.

One guest, one connection to a program in it that writes blocks and says which. After each takeover the connection goes
on, and the disk holds exactly what the guest's memory says it wrote: every write that anybody was told of, and nothing
later than the checkpoint that was promoted. The host that died holds more than that: it is undone when it comes back.
Then the guest is taken from a healthy host, and in the end a disk that is not set back is seen for what it is.

The cases share the hosts and the guest, because a boot is what costs; each leaves the guest where it went.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import pytest
import pytest_asyncio

from tests.kernel.wishes import AFTER_CUT, AFTER_LOAD, NO_WAY_BACK, Wishes
from tests.testbeds.bed import need
from tests.testbeds.xen.image import missing_for_xen
from tests.testbeds.xen.pair import XenPlace
from tests.xen.client import CounterClient
from tests.xen.mirror import DEVICE, DISKS_MIB, Mirror, Write, Writer, blocks, expected
from tests.xen.site import Site, XenSite

pytestmark = [
    pytest.mark.xen,
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.asyncio(loop_scope="module"),
]

AT_RANDOM: Final = ""
STEP_S: Final = 90.0
SOME: Final = 20
_DISK: Final = f"""
[[disk]]
vdev = "xvda"
path = "{DEVICE}"
subkind = "drbd"
"""


@dataclass
class Story:
    """Two hosts with a mirror, the guest, where it runs, and the two who are connected to it."""

    site: XenSite
    mirror: Mirror
    home: XenPlace
    writer: Writer
    client: CounterClient

    @property
    def other(self) -> XenPlace:
        return self.site.other(self.home)

    async def protected(self) -> None:
        """Protect the guest from its home to the other host, and see it go on."""
        await self.site.protect(self.home)
        await self.writer.more(SOME, timeout_s=STEP_S)
        row = await self.site.row(self.home)
        assert row["state"] == "protected", row
        assert row["counters"]["disk0.cut_ns"] > 0, row

    async def dies(self, moment: str, chance: random.Random) -> int | None:
        """Kill the guest's host at a moment; return the checkpoint that was under way, where that is known."""
        epoch = None
        wishes = wishes_of(self.site, self.home)
        if moment == AT_RANDOM:
            await asyncio.sleep(chance.random())
        else:
            wishes.wish(moment)
            epoch = await wishes.there(STEP_S)
        await self.site.pair.crash(self.home)
        wishes.wish()
        return epoch

    async def goes_on(self) -> list[Write]:
        """See the guest go on at the other host, with the disk of its memory; return what it wrote, and let it rest."""
        await self.writer.more(SOME, timeout_s=STEP_S)
        await self.client.more(SOME, timeout_s=STEP_S)
        self.client.verify()
        wrote = await self.writer.rest(timeout_s=STEP_S)
        assert wrote == self.writer.told
        assert blocks(await self.mirror.upper(self.other)) == expected(wrote)
        row = await self.site.row(self.other)
        assert (row["role"], row["state"]) == ("primary", "alone"), row
        return wrote

    async def comes_back(self) -> dict[int, str]:
        """Boot the host that died, its mirror and its agent; return what its disk held before it met the other one."""
        await self.site.pair.start(self.home)
        await self.mirror.lay(self.home)
        left = blocks(await self.mirror.lower(self.home))
        await self.mirror.bring_up(self.home)
        await equip(self.site, self.home)
        await describe(self.site)
        return left

    async def moved(self, wrote: list[Write]) -> None:
        """See the old home hold the same as the new one; there the guest writes on."""
        await self.mirror.whole(self.other)
        assert blocks(await self.mirror.lower(self.home)) == expected(wrote)
        await self.writer.go_on(timeout_s=STEP_S)
        self.home = self.other


def wishes_of(site: XenSite, place: XenPlace) -> Wishes:
    return Wishes(site.pair.common, place.name)


async def equip(site: XenSite, place: XenPlace) -> None:
    await site.equip(place, "python3", "-m", "tests.xen.wishes", site.pair.common, place.name)


async def describe(site: XenSite) -> None:
    disk = f"format=raw,vdev=xvda,access=rw,target={DEVICE}"
    await site.describe(disks=(disk,), tables=_DISK)


async def prepare(site: XenSite) -> None:
    pair = site.pair
    await Mirror(pair).make(pair.alpha)
    await asyncio.gather(*(equip(site, place) for place in (pair.alpha, pair.beta)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def story() -> AsyncIterator[Story]:
    need("xen", missing_for_xen())
    async with Site(prepare, disks_mib=DISKS_MIB, plugins=("drbd",)) as site:
        home = site.pair.alpha
        await describe(site)
        await site.ask(home, "start", "web")
        async with CounterClient(site.pair) as client, Writer(site.pair) as writer:
            await client.more(5, timeout_s=STEP_S)
            await writer.more(SOME, timeout_s=STEP_S)
            yield Story(site, Mirror(site.pair), home, writer, client)


async def test_nothing_stands_against_such_a_guest(story: Story) -> None:
    said = (await story.site.ask(story.home, "check", "web", timeout_s=STEP_S)).output
    assert "disk0" not in said, said
    assert "web can be protected on beta" in said, said


#: How many checkpoints before the one that was under way the copy goes on from.
@pytest.mark.parametrize(("moment", "before"), [(AT_RANDOM, None), (AFTER_LOAD, 0), (AFTER_CUT, 1)])
async def test_the_host_dies_and_comes_back(story: Story, moment: str, before: int | None) -> None:
    seed = int(os.environ.get("UNDERSTUDY_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    tell(f"UNDERSTUDY_SEED={seed}")
    await story.protected()
    epoch = await story.dies(moment, random.Random(seed))
    died_s, told = time.monotonic(), story.writer.told[-1]
    await story.writer.more(SOME, timeout_s=STEP_S)
    took_s = time.monotonic() - died_s
    wrote = await story.goes_on()
    went_back_to = story.mirror.promoted_at(story.other)
    if epoch is not None and before is not None:
        assert went_back_to == epoch - before
    left = await story.comes_back()
    undone = unknown(left, wrote)
    assert undone or moment != AFTER_CUT, "nothing later than the checkpoint was on the disk"
    await story.moved(wrote)
    newest = max(int(content.split()[0]) for content in left.values())
    tell(
        f"told of write {told.number} when the host died, which had made {newest}, {len(undone)} of them undone; "
        f"checkpoint under way: {epoch}, promoted: {went_back_to}; {SOME} more writes were told of within "
        f"{took_s:.1f} s; {len(wrote)} in all"
    )


async def test_the_guest_is_taken_from_a_healthy_host(story: Story) -> None:
    # What the old home has written since is in nobody's log: all of its disk is copied.
    await story.protected()
    forced = ("failover", "web", "--force", "--reason", "a test")
    await story.site.ask(story.other, *forced, timeout_s=STEP_S)
    await story.moved(await story.goes_on())


async def test_a_disk_later_than_the_memory_is_seen(story: Story) -> None:
    wishes_of(story.site, story.other).wish(NO_WAY_BACK)
    await story.protected()
    await story.dies(AFTER_CUT, random.Random(0))
    await story.writer.more(SOME, timeout_s=STEP_S)
    wrote = await story.writer.rest(timeout_s=STEP_S)
    found = unknown(blocks(await story.mirror.upper(story.other)), wrote)
    assert found, "the disk was not set back, and nobody can tell"
    tell(f"{len(found)} blocks hold what the guest knows nothing of")


def unknown(found: dict[int, str], wrote: list[Write]) -> list[str]:
    """Return what of the blocks' contents the guest knows nothing of."""
    known = {write.content for write in wrote}
    return sorted(content for content in found.values() if content not in known)


def tell(what: str) -> None:
    """Say what pytest shows of a test that passes with -rP."""
    sys.stdout.write(what + "\n")
