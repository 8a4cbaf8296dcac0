"""Two hosts of the Xen bed: commands, network, shares, guests of each kind, a crash. All tests share one pair."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.testbeds.bed import need
from tests.testbeds.host import CommandFailed
from tests.testbeds.machine import running
from tests.testbeds.racing import RACER, new_seed, newest, read, ready
from tests.testbeds.rounds import rounds
from tests.testbeds.xen.guests import COUNTER_PORT, GUEST, SHELL_PORT, Nic, linux, tiny
from tests.testbeds.xen.image import missing_for_xen
from tests.testbeds.xen.machine import XenDied
from tests.testbeds.xen.pair import XenPair, XenPlace

pytestmark = [pytest.mark.xen, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

SWAPS = rounds(12, 400)  # of each racer
GUEST_S = 600.0  # a deadline; on an idle machine a PVH guest is up in 8 s and an HVM guest in 25 s


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[XenPair]:
    need("xen", missing_for_xen())
    async with XenPair() as booted:
        yield booted


async def create(place: XenPlace, config: str) -> None:
    await place.run("sh", "-ec", "cat >/run/guest.cfg; xl create /run/guest.cfg", text=config, timeout_s=120)


async def answer(pair: XenPair, address: str) -> socket.socket:
    """Return a connection to a guest's counter, as soon as there is one."""
    deadline = time.monotonic() + GUEST_S
    while True:
        try:
            return await asyncio.to_thread(pair.client.connect, address, COUNTER_PORT, 5.0)
        except OSError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.3)


async def ask(connection: socket.socket, number: int) -> list[str]:
    """Send a number to a guest's counter and return the four words of its reply."""
    connection.settimeout(30)
    await asyncio.to_thread(connection.sendall, b"%d\n" % number)
    return (await asyncio.to_thread(connection.recv, 200)).decode().split()


async def in_guest(pair: XenPair, address: str, command: str) -> str:
    """Run a command in a guest's shell and return what it wrote."""

    def talk() -> str:
        with pair.client.connect(address, SHELL_PORT, 30.0) as shell, shell.makefile("rb") as said:
            shell.sendall(f"{command}\nexit\n".encode())
            return said.read().decode()

    return await asyncio.to_thread(talk)


async def test_commands_and_their_ends(pair: XenPair) -> None:
    done = await pair.alpha.run("sh", "-c", "hostname; cat; echo oops >&2; exit 3", check=False, text="typed")
    assert (done.status, done.output, done.errors) == (3, "alpha\ntyped", "oops\n")
    with pytest.raises(CommandFailed, match="ended with 5 and said:\nno"):
        await pair.beta.run("sh", "-c", "echo no >&2; exit 5")
    with pytest.raises(TimeoutError, match="did not end within 1 s"):
        await pair.beta.run("sh", "-c", "echo $$ >/run/number; exec sleep 3600", timeout_s=1)
    await pair.beta.run("sh", "-ec", "sleep 1; ! kill -0 $(cat /run/number)")


async def test_much_output_and_two_commands_at_once(pair: XenPair) -> None:
    await pair.alpha.run("mkfifo", "/run/pipe")
    slow = asyncio.create_task(pair.alpha.run("sh", "-c", "read x </run/pipe; echo $x"))
    done = await pair.alpha.run("seq", "200000")
    assert done.output.splitlines() == [str(number) for number in range(1, 200001)]
    await pair.alpha.run("sh", "-c", "echo through >/run/pipe")
    assert (await slow).output == "through\n"


async def test_hosts_and_client_reach_each_other(pair: XenPair) -> None:
    await pair.alpha.run("busybox", "ping", "-c", "1", "beta")
    await pair.beta.run("busybox", "ping", "-c", "1", "10.9.0.100")
    assert "10.9.0.100/24" in pair.client.run("ip", "-brief", "address")
    # Nothing of the network is seen by the machine itself.
    assert not {"switch", "host1", "host2"} & {name for _, name in socket.if_nameindex()}


async def test_what_is_shared_is_the_same_for_all(pair: XenPair) -> None:
    (pair.common / "from-outside").write_text("1")
    assert (await pair.alpha.run("cat", pair.common / "from-outside")).output == "1"
    for number in range(5):
        await pair.alpha.run("sh", "-c", f"echo {number} >{pair.common}/changing")
        assert (await pair.beta.run("cat", pair.common / "changing")).output == f"{number}\n"
        assert (pair.common / "changing").read_text() == f"{number}\n"
    await pair.alpha.run("touch", pair.alpha.directory / "own")
    assert (pair.alpha.directory / "own").exists()
    assert (await pair.beta.run("ls", pair.alpha.directory, check=False)).status


async def test_the_arbiter_on_the_share_has_one_winner_of_each_generation(pair: XenPair) -> None:
    seed = new_seed()

    async def racer(place: XenPlace, number: int) -> str:
        argv = (sys.executable, RACER, pair.common, f"{place.name}-{number}", str(SWAPS), str(seed + number))
        return (await place.run(*argv, timeout_s=rounds(250, 1500))).output

    racing = [
        asyncio.create_task(racer(place, number)) for number, place in enumerate((pair.alpha, pair.beta))
    ]
    await ready(pair.common, len(racing), 120.0)
    winners, lost = read(await asyncio.gather(*racing))
    assert sorted(winners) == list(range(1, await newest(pair.common, winners) + 1))
    assert len(winners) + lost == len(racing) * SWAPS
    # Else there was no race: both hosts won, and somebody was beaten.
    assert {attempt.partition("-")[0] for attempt in winners.values()} == {"alpha", "beta"}
    assert lost


async def test_a_pvh_guest_with_a_card_and_a_disk(pair: XenPair) -> None:
    await pair.alpha.run("truncate", "--size", "8M", "/run/disk")
    await create(pair.alpha, linux("web", disks=("/run/disk,raw,xvda,w",)))
    counter = await answer(pair, GUEST)
    with counter:
        assert (await ask(counter, 7))[:3] == ["1", "7", "1"]
        assert (await ask(counter, 8))[:3] == ["2", "8", "2"]
    with await answer(pair, GUEST) as another:
        assert (await ask(another, 9))[:3] == ["1", "9", "3"]
    # The backends are the kernel's, the frontends connected.
    states = "for d in vif vbd; do xenstore-read $(xenstore-ls -f backend/$d | grep -o '.*/state'); done"
    said = (
        await pair.alpha.run("sh", "-c", f"cd /; {states.replace('backend/', '/local/domain/0/backend/')}")
    ).output
    assert said.split() == ["4", "4"]
    await in_guest(pair, GUEST, "echo written by the guest | dd of=/dev/xvda conv=fsync 2>/dev/null")
    found = await pair.alpha.run("head", "-c", "20", "/run/disk")
    assert found.output == "written by the guest"


async def test_a_tiny_guest_counts(pair: XenPair) -> None:
    await create(pair.beta, tiny("small"))
    listed = (await pair.beta.run("xl", "list", "small")).output.split()
    assert listed[-6] == "small"
    assert listed[-4] == "4"
    await pair.beta.run("xl", "destroy", "small")


async def test_a_guest_is_kept_after_its_end(pair: XenPair) -> None:
    await create(pair.beta, tiny("dead", preserve=True))
    await pair.beta.run("xl", "trigger", "dead", "nmi", check=False)  # it has no handler for anything
    config = (await pair.beta.run("xl", "list", "-l", "dead")).output
    assert config.count('"preserve"') == 5
    await pair.beta.run("xl", "destroy", "dead")


@pytest.mark.timeout(900)
@pytest.mark.long  # test_takeover_hvm.py boots one, too
async def test_an_hvm_guest(pair: XenPair) -> None:
    address = "10.9.0.51"
    nic = Nic(mac="00:16:3e:00:00:33")
    await create(pair.beta, linux("full", kind="hvm", memory_mib=128, address=address, nics=(nic,)))
    with await answer(pair, address) as counter:
        assert (await ask(counter, 1))[:3] == ["1", "1", "1"]
    driver = await in_guest(pair, address, "readlink /sys/class/net/eth0/device/driver")
    assert Path(driver.strip()).name == "vif"
    # It has a device model of its own, and says where.
    domain = (await pair.beta.run("xl", "domid", "full")).output.strip()
    await pair.beta.run("test", "-S", f"/var/run/xen/qmp-libxl-{domain}")
    await pair.beta.run("xl", "destroy", "full")


async def test_a_crash_and_the_return(pair: XenPair) -> None:
    host = pair.alpha.host
    assert host is not None
    group, place = host.machine.pid, host.machine.run
    waiting = asyncio.create_task(pair.alpha.run("sleep", "3600", timeout_s=3700))
    await asyncio.sleep(0.5)
    await pair.crash(pair.alpha)
    with pytest.raises(XenDied, match=r"died; the end of its console:"):
        await waiting
    assert running(group) == []
    assert not place.exists()
    with pytest.raises(OSError, match=r"timed out|No route to host"):
        await asyncio.to_thread(pair.client.connect, GUEST, COUNTER_PORT, 3.0)
    await pair.start(pair.alpha)
    assert "web" not in (await pair.alpha.run("xl", "list")).output
    await pair.alpha.run("busybox", "ping", "-c", "1", "beta")
