"""What an operator does wrong, and hosts that are not as they should be: said in words, and the guest runs on.

What can be found before there is a copy is found by `understudy check`, all at once, without a session. The guests that
are only looked at are paused, and hardly larger than their page tables.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.testbeds.bed import need
from tests.testbeds.rounds import LONG
from tests.testbeds.xen.guests import Nic, linux, tiny
from tests.testbeds.xen.image import missing_for_xen
from tests.testbeds.xen.pair import XenPlace
from tests.xen.site import Site, XenSite
from tests.xen.test_endings import until

pytestmark = [
    pytest.mark.xen,
    pytest.mark.timeout(1800 if LONG else 900),
    pytest.mark.asyncio(loop_scope="module"),
]

STEP_S: Final = 90.0
LEFT_MIB = 60  # less than a guest of 96 MiB needs
LOOK: Final = (
    "import sys; from understudy_xen.libs import open_xen\ntry: open_xen()\nexcept Exception as e: print(e)"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[XenSite]:
    need("xen", missing_for_xen())
    async with Site() as site:
        yield site


async def made(place: XenPlace, config: str) -> None:
    """Create a domain, paused, as an administrator does."""
    await place.run("sh", "-c", "cat >/run/made.cfg; xl create -q -p -e /run/made.cfg", text=config)


async def described(site: XenSite, name: str, more: str = "") -> None:
    """Write a guest file that needs no more than the domain's name, on both hosts."""
    text = f'name = "{name}"\nhypervisor = "xen"\nconfig = "/etc/xen/{name}.cfg"\n{more}\n'
    text += '[protection]\nmode = "remus"\ninterval = "fixed"\n'
    for place in (site.pair.alpha, site.pair.beta):
        await site.put(place, f"/etc/understudy/guests/{name}.toml", text)


async def found(site: XenSite, guest: str, *more: str) -> list[dict[str, Any]]:
    """Return what `check` finds on alpha."""
    answer = await site.ask(
        site.pair.alpha, "check", guest, *more, "--format", "json", check=False, timeout_s=STEP_S
    )
    return list(json.loads(answer.output)["findings"])


async def running(site: XenSite) -> None:
    """See that the guest ``web`` runs on alpha, unprotected."""
    await site.describe("web")
    if (await site.pair.alpha.run("xl", "domid", "web", check=False)).status:
        await site.ask(site.pair.alpha, "start", "web", timeout_s=STEP_S)


def said(findings: list[dict[str, Any]], severity: str = "error") -> str:
    """Return the problems of one severity, each with what it is about."""
    return "\n".join(
        f"{each['subject']}: {each['problem']}" for each in findings if each["severity"] == severity
    )


async def test_another_version_of_xen_is_named(site: XenSite) -> None:
    script = (
        'echo 23 >/run/minor; mount --bind /run/minor /sys/hypervisor/version/minor; exec python3 -c "$0"'
    )
    told = await site.pair.alpha.run("unshare", "-m", "sh", "-c", script, LOOK)
    assert "Xen 4.23 runs here, and its libraries are not known to understudy-xen" in told.output


async def test_without_privilege_nothing_is_done(site: XenSite) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    told = await site.pair.alpha.run(*nobody, "python3", "-c", LOOK)
    assert "root" in told.output
    asked = await site.pair.alpha.run(*nobody, "understudy", "status", check=False)
    assert asked.status != 0
    assert "agent" in asked.errors


async def test_what_the_secondary_lacks_is_found_before_there_is_a_copy(site: XenSite) -> None:
    alpha, beta = site.pair.alpha, site.pair.beta
    await described(site, "small", '[[nic]]\nbridge = "xenbr0"\nscript = "vif-understudy"\n')
    await beta.run("sed", "-i", "s/xenbr0/none0/", "/etc/understudy/guests/small.toml")
    await made(alpha, tiny("small", preserve=True, memory=96, vif=[str(Nic(mac="00:16:3e:00:00:41"))]))
    for name in ("small", "small--incoming"):
        await made(beta, tiny(name))
    free_mib = int((await beta.run("sh", "-c", "xl info free_memory")).output)
    await made(beta, tiny("filler", memory=free_mib - LEFT_MIB))
    await beta.run("sh", "-c", "mv /etc/xen/scripts/vif-understudy /run/")
    try:
        problems = said(await found(site, "small"))
    finally:
        await beta.run("sh", "-c", "mv /run/vif-understudy /etc/xen/scripts/")
        for name in ("small", "small--incoming", "filler"):
            await beta.run("xl", "destroy", name)
        await alpha.run("xl", "destroy", "small")
    assert "nic0 on beta: its hotplug script /etc/xen/scripts/vif-understudy cannot be run" in problems
    assert "nic0 on beta: there is no interface none0" in problems
    assert "memory on beta: the hypervisor has" in problems
    assert "small--incoming" in problems


async def test_a_pv_guest_needs_shadow_paging(site: XenSite) -> None:
    await described(site, "old")
    await made(site.pair.alpha, linux("old", kind="pv", nics=(), preserve=True))
    try:
        problems = said(await found(site, "old"))
    finally:
        await site.pair.alpha.run("xl", "destroy", "old")
    assert "shadow paging, which this Xen was built without; PVH and HVM guests work" in problems


@pytest.mark.long  # it starts a QEMU for the guest
async def test_an_emulated_card_and_a_disk_are_unsafe(site: XenSite) -> None:
    alpha = site.pair.alpha
    await described(site, "full", '[[disk]]\nvdev = "xvda"\n[[nic]]\nbridge = "xenbr0"\n')
    await alpha.run("truncate", "-s", "8M", "/run/full.img")
    disk = "format=raw,vdev=xvda,access=rw,backendtype=qdisk,target=/run/full.img"
    await made(alpha, linux("full", kind="hvm", memory_mib=128, preserve=True, disks=(disk,)))
    try:
        refused, allowed = await found(site, "full"), await found(site, "full", "--allow-unsafe")
    finally:
        await alpha.run("xl", "destroy", "full")
    for words in ("emulated card", "it is not replicated"):
        assert words in said(refused)
        assert words not in said(allowed)
        assert words in said(allowed, "warning")


@pytest.mark.long  # a guest is started and protected for it
async def test_a_checkpoint_that_is_too_large_is_refused_and_the_guest_runs_on(site: XenSite) -> None:
    alpha = site.pair.alpha
    await site.describe("web", dirty_kib=8192)
    for place in (alpha, site.pair.beta):
        edit = "sed -i 's/^config =/hold_limit = \"1MiB\"\\nconfig =/' /etc/understudy/guests/web.toml"
        await place.run("sh", "-c", edit)
    await site.ask(alpha, "start", "web", timeout_s=STEP_S)
    refused = await site.ask(alpha, "protect", "web", "--allow-unsafe", check=False, timeout_s=STEP_S)
    # Found with the first checkpoint, or with a later one: there are always more pages than that.
    assert refused.status != 0 or await _ended(site)
    told = refused.errors + (await site.ask(alpha, "history", "web")).output
    assert "hold" in told
    row = await site.row(alpha)
    assert (row["role"], row["state"]) in {("primary", "alone"), ("primary", "unprotected")}
    assert (await alpha.run("sh", "-c", "xl list web | awk 'NR > 1 {print $5}'")).output.strip()[3] == "-"


async def _ended(site: XenSite) -> bool:
    async def is_alone() -> bool:
        return bool((await site.row(site.pair.alpha))["state"] == "alone")

    return bool(await until(is_alone, "the protection has ended"))


@pytest.mark.long  # a guest is started and protected for it
async def test_a_guest_that_is_gone_in_the_middle_of_the_first_copy(site: XenSite) -> None:
    alpha, beta = site.pair.alpha, site.pair.beta
    await running(site)
    protecting = asyncio.ensure_future(site.ask(alpha, "protect", "web", check=False, timeout_s=STEP_S))
    copying = "until xl list web--incoming >/dev/null 2>&1; do sleep 0.1; done"
    await beta.run("timeout", str(int(STEP_S)), "sh", "-c", copying, timeout_s=STEP_S + 5)
    await alpha.run("xl", "destroy", "web")
    told = await protecting
    assert told.status != 0
    assert "could not be protected; it is off" in told.errors

    async def is_clean() -> bool:
        return "web" not in (await beta.run("xl", "list")).output

    await until(is_clean, "the half copy is destroyed")


@pytest.mark.long  # a guest is started and protected for it
async def test_xenstored_stands_still_and_ends(site: XenSite) -> None:
    alpha = site.pair.alpha
    await running(site)
    await site.protect(alpha)
    await alpha.run("sh", "-c", "kill -STOP $(cat /run/xenstored.pid)")
    # Nobody hangs: the table is told, of the guest no more than is known.
    told = await site.ask(alpha, "status", "--format", "json", timeout_s=STEP_S)
    assert ("web", "alpha") in {(row["guest"], row["host"]) for row in json.loads(told.output)["guests"]}
    await alpha.run("sh", "-c", "kill -CONT $(cat /run/xenstored.pid)")
    # The last case of these hosts: a xenstored that has ended is not started again, and no guest suspends without it.
    await alpha.run("sh", "-c", "kill -KILL $(cat /run/xenstored.pid)")

    async def owner() -> str:
        told = await site.ask(site.pair.beta, "status", "web", "--format", "json")
        record = json.loads(told.output)["record"]
        return str(record["owner"]) if record["state"] == "alone" else ""

    alone = await until(owner, "one host goes on alone")
    place = {"alpha": alpha, "beta": site.pair.beta}[alone]
    row = await site.row(place)
    assert (row["role"], row["state"]) == ("primary", "alone")
    if place is alpha:
        assert "xenstored is gone" in row["problem"]
