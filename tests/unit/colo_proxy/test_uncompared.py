"""The filter for what cannot be compared, on a real tap in the kernel: IPv4 and ARP pass, nothing else does."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.testbeds.bed import missing_for_namespaces, need
from understudy.errors import HypervisorError
from understudy_colo_proxy.uncompared import PREFERENCE, UncomparedFilter

pytestmark = pytest.mark.qemu

TUNSETIFF = 0x400454CA
TAP_NO_PI = 0x1002
GUEST, CLIENT = bytes.fromhex("525400770002"), bytes.fromhex("525400770001")
IPV4 = CLIENT + GUEST + b"\x08\x00" + bytes.fromhex("45000014000000004001664d0a4d00020a4d0001")
ARP = CLIENT + GUEST + b"\x08\x06" + bytes(28)
# No next header, 20 bytes of payload, from fd00::2 to fd00::1: the kernel's bridge drops what is malformed.
IPV6 = (
    CLIENT
    + GUEST
    + bytes.fromhex("86dd 60000000 0014 3b 40")
    + (b"\xfd" + bytes(14)).join((b"", b"\x02", b"\x01"))
    + bytes(20)
)
VLAN = CLIENT + GUEST + b"\x81\x00\x00\x05" + IPV4[12:]
LLDP = CLIENT + GUEST + b"\x88\xcc" + bytes(46)


@dataclass
class Taps:
    """A guest's tap and a client's tap on one bridge; we are both."""

    guest: int
    client: int
    interface: str

    def arrives(self, frame: bytes) -> bool:
        """Send a frame from the guest, then an ARP with a mark; tell whether the frame came before the mark."""
        mark = ARP[:-8] + uuid.uuid4().bytes[:8]
        os.write(self.guest, frame)
        os.write(self.guest, mark)
        came = False
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if select.select([self.client], [], [], 0.1)[0]:
                seen = os.read(self.client, 2048)
                if seen[: len(mark)] == mark:
                    return came
                came = came or seen[: len(frame)] == frame
        raise AssertionError("not even the mark arrived")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def taps() -> Iterator[Taps]:
    missing = missing_for_namespaces()
    need("qemu", missing + ([] if shutil.which("tc") else ["the program tc"]))
    number = uuid.uuid4().hex[:6]
    bridge, names = f"uub{number}", (f"uug{number}", f"uuc{number}")
    fds = []
    ip("link", "add", bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0", "mcast_snooping", "0")
    try:
        for name in names:
            fds.append(os.open("/dev/net/tun", os.O_RDWR))
            fcntl.ioctl(fds[-1], TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_NO_PI))
            ip("link", "set", name, "master", bridge, "up")
        ip("link", "set", bridge, "up")
        made = Taps(fds[0], fds[1], names[0])
        until = time.monotonic() + 5
        while not made.arrives(ARP):  # a port may take a moment to forward
            assert time.monotonic() < until
        yield made
    finally:
        for fd in fds:
            os.close(fd)
        ip("link", "del", bridge)


OTHER = ("bpf", "direct-action", "bytecode", "1,6 0 0 4294967295")  # lets everything pass


def tc(*arguments: str) -> str:
    return subprocess.run(["tc", *arguments], check=True, capture_output=True, text=True).stdout


def hooks(taps: Taps) -> str:
    return tc("qdisc", "show", "dev", taps.interface)


async def test_only_ipv4_and_arp_pass(taps: Taps) -> None:
    filter_ = UncomparedFilter(taps.interface)
    # The control: without the filter everything arrives.
    assert [taps.arrives(frame) for frame in (IPV4, ARP, IPV6, VLAN, LLDP)] == [True] * 5
    await filter_.install()
    assert await filter_.installed()
    assert [taps.arrives(frame) for frame in (IPV4, ARP)] == [True, True]
    assert [taps.arrives(frame) for frame in (IPV6, VLAN, LLDP)] == [False, False, False]
    assert await filter_.dropped_packets() >= 3
    await filter_.remove()
    assert taps.arrives(IPV6)


async def test_nothing_is_left(taps: Taps) -> None:
    before = hooks(taps)
    filter_ = UncomparedFilter(taps.interface)
    await filter_.install()
    await filter_.install()  # again is harmless
    assert "clsact" in hooks(taps)
    await filter_.remove()
    assert hooks(taps) == before
    await filter_.remove()


async def test_a_hook_without_a_filter_is_taken_away(taps: Taps) -> None:
    # So it looks when putting the filter in place is called off in the middle.
    before = hooks(taps)
    filter_ = UncomparedFilter(taps.interface)
    await filter_._tc("qdisc", "add", "dev", taps.interface, "clsact")
    assert hooks(taps) != before
    await filter_.remove()
    assert hooks(taps) == before


async def test_the_filters_of_others_stay(taps: Taps) -> None:
    ours = UncomparedFilter(taps.interface)
    await ours.install()
    tc("filter", "add", "dev", taps.interface, "ingress", "pref", "7", *OTHER)
    await ours.remove()
    assert not await ours.installed()
    assert "clsact" in hooks(taps)


async def test_a_filter_of_another_kind_in_its_place_is_not_ours(taps: Taps) -> None:
    ours = UncomparedFilter(taps.interface)
    tc("qdisc", "add", "dev", taps.interface, "clsact")
    tc("filter", "add", "dev", taps.interface, "ingress", "pref", str(PREFERENCE), *OTHER)
    assert not await ours.installed()


async def test_an_interface_that_is_not_there_is_told_and_nothing_to_clean(taps: Taps) -> None:
    filter_ = UncomparedFilter("uunothing")
    with pytest.raises(HypervisorError, match="uunothing"):
        await filter_.install()
    await filter_.remove()


async def test_without_tc_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HypervisorError, match="install the package iproute2"):
        await UncomparedFilter("tap0").install()
