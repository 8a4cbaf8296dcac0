"""Xen's libraries with a real guest: what is told of it, and its way into a pause and out of it."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.testbeds.rounds import rounds
from tests.testbeds.xen.guests import Nic, linux, tiny
from understudy_xen import inventory
from understudy_xen.inventory import XenbusState
from understudy_xen.libs import (
    DomainGone,
    DomainType,
    HvmParam,
    NoPrivilege,
    Precopy,
    PrecopyStats,
    ShutdownReason,
    Stream,
    Suspender,
    SuspendFailed,
    SuspendFailure,
    Way,
    Xen,
    XenCallFailed,
    XenVersion,
    open_xen,
    save,
)
from understudy_xen.libs.loading import call
from understudy_xen.libs.suspending import choose_way
from understudy_xen.savers import Savers, helper_directories
from understudy_xen.xenstore import BlockingStore, XenStore

pytestmark = [pytest.mark.xen(inside=True), pytest.mark.timeout(300)]

PATIENT_S = 60.0  # the bed shares its processors


def xl(*words: str, text: str | None = None) -> str:
    done = subprocess.run(["xl", *words], check=True, capture_output=True, text=True, timeout=120, input=text)
    return done.stdout


def start(config: str, *, paused: bool = False) -> int:
    place = Path("/run/test.cfg")
    place.write_text(config)
    # To a file: what it leaves behind for the guest's life holds its output.
    with Path("/run/test.out").open("w") as output:
        done = subprocess.run(
            ["xl", "create", *(["-p"] if paused else []), str(place)],
            check=False,
            stdout=output,
            stderr=output,
            timeout=120,
        )
    assert not done.returncode, Path("/run/test.out").read_text()
    return int(xl("domid", json.loads(config.splitlines()[0].partition("=")[2])))


def seen(condition: Callable[[], object], what: str, timeout_s: float = PATIENT_S) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


CONSOLE = Path("/var/log/xen/guest-web.log")


def counted() -> int:
    text = CONSOLE.read_text() if CONSOLE.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith("COUNT ")]
    # The last line may be written just now.
    return int(lines[-2].split()[1]) if len(lines) > 1 else 0


def program_of(pid: int) -> str:
    return Path(f"/proc/{pid}/exe").readlink().name


@pytest.fixture(scope="module")
def xen() -> Iterator[Xen]:
    with open_xen() as xen:
        yield xen


@pytest.fixture(scope="module")
def web(xen: Xen) -> Iterator[int]:
    """A PVH guest with Linux, an interface and a disk, that counts."""
    image = Path("/run/web.img")
    with image.open("wb") as file:
        file.truncate(8 << 20)
    CONSOLE.unlink(missing_ok=True)  # what an earlier guest of this name has said
    domid = start(
        linux(
            "web", nics=(Nic(),), disks=(f"format=raw,vdev=xvda,access=rw,backendtype=qdisk,target={image}",)
        )
    )
    seen(counted, "the guest counts", 120)
    yield domid
    xl("destroy", str(domid))


@pytest.fixture
def small(xen: Xen) -> Iterator[int]:
    """A PVH guest of 4 MB that knows nothing of Xen; it stays when it has ended."""
    domid = start(tiny(preserve=True))
    yield domid
    if xen.domain(domid):
        xl("destroy", str(domid))


def test_the_hypervisor_is_the_one_that_xl_tells_of(xen: Xen) -> None:
    told = dict(line.split(":", 1) for line in xl("info").splitlines() if ":" in line)
    told = {key.strip(): value.strip() for key, value in told.items()}
    assert xen.version == XenVersion(int(told["xen_major"]), int(told["xen_minor"]))
    capabilities = xen.capabilities()
    assert capabilities.total_pages * 4096 >> 20 == int(told["total_memory"])
    assert abs((capabilities.free_pages * 4096 >> 20) - int(told["free_memory"])) <= 1
    words = told["virt_caps"].split()
    for name in ("hvm", "pv", "hap", "shadow"):
        assert getattr(capabilities, name) == (name in words)
    # Debian's hypervisor: no shadow paging, so no PV guest can be protected.
    assert (capabilities.hap, capabilities.shadow) == (True, False)


def test_the_domains_are_those_of_xl(xen: Xen, web: int, small: int) -> None:
    listed = json.loads(xl("list", "-l"))
    ours = {info.domid: info for info in xen.domains()}
    assert ours.keys() == {entry["domid"] for entry in listed}
    assert ours[0].kind is DomainType.PV
    for domid in (web, small):
        config = next(entry["config"] for entry in listed if entry["domid"] == domid)
        info = ours[domid]
        assert info == xen.domain(domid) or info.cpu_ns
        assert info.uuid == uuid.UUID(config["c_info"]["uuid"])
        assert info.kind is DomainType.PVH
        assert info.hap
        assert info.max_vcpus == info.online_vcpus == 1
        assert info.shutdown is None
        assert not info.dying
        assert not info.paused
    assert 90 << 8 < ours[web].pages <= ours[web].max_pages
    assert xen.find(ours[web].uuid)[0].domid == web
    assert xen.domain(4711) is None


async def test_what_a_guest_consists_of(xen: Xen, web: int) -> None:
    async with await XenStore.open(deadline_s=PATIENT_S) as store:
        found = await inventory.find(store, xen, "web")
        assert found
        assert await inventory.find(store, xen, "nobody") is None
        assert [domain.name for domain in await inventory.domains(store, xen)] == ["web"]
        (nic,) = found.nics
        (disk,) = found.disks
        assert (found.domid, found.kind, found.stubdom) == (web, DomainType.PVH, None)
        assert found.console_tty.startswith("/dev/pts/")
        assert (nic.name, nic.interface, nic.mac, nic.bridge) == ("nic0", f"vif{web}.0", Nic().mac, "xenbr0")
        assert socket.if_nametoindex(nic.interface)
        assert Path(nic.script).name == Nic().script
        assert (nic.backend_domid, nic.emulated, nic.state) == (0, False, XenbusState.CONNECTED)
        assert (disk.vdev, disk.backend, disk.format) == ("xvda", "qdisk", "raw")
        assert (disk.target, disk.writable, disk.cdrom) == ("/run/web.img", True, False)
        assert disk.state is XenbusState.CONNECTED
        # No device model, but a QEMU that serves the disk.
        assert found.device_model_pid
        assert "qemu" in program_of(found.device_model_pid)


def test_a_domain_that_is_destroyed_is_nobody(xen: Xen) -> None:
    domid = start(tiny("gone"), paused=True)
    info = xen.domain(domid)
    assert info
    assert info.paused
    xl("destroy", str(domid))
    assert xen.domain(domid) is None
    with pytest.raises(DomainGone) as caught:
        xen.shutdown_reason(domid)
    assert caught.value.domid == domid
    for action in (xen.pause, xen.unpause, xen.destroy):
        with pytest.raises(DomainGone, match=f"xc_domain_{action.__name__} failed for domain {domid}"):
            action(domid)

    async def look() -> None:
        async with await XenStore.open(deadline_s=PATIENT_S) as store:
            assert await inventory.domain_of(store, info) is None

    asyncio.run(look())


def test_a_guest_suspends_and_goes_on_time_and_again(xen: Xen, web: int) -> None:
    before = counted()
    took = []
    with Suspender(xen, web) as suspender:
        assert suspender.way is Way.XENSTORE
        for _ in range(rounds(10, 100)):
            suspended = suspender.suspend(timeout_s=PATIENT_S)
            info = xen.domain(web)
            assert info
            assert info.suspended
            suspender.resume()
            assert xen.shutdown_reason(web) is None
            took.append(suspended.took_ns / 1e6)
    print(f"suspend: {len(took)} times, {min(took):.1f} to {max(took):.1f} ms")  # noqa: T201 - a figure for the report
    seen(lambda: counted() > before + 5, "the guest counts on")


def test_a_guest_that_does_not_take_up_the_request_runs_on(xen: Xen, web: int) -> None:
    before = counted()
    xen.pause(web)  # it cannot
    try:
        with Suspender(xen, web) as suspender, pytest.raises(SuspendFailed) as caught:
            suspender.suspend(timeout_s=0.3)
        assert caught.value.failure is SuspendFailure.PAUSED
        with BlockingStore() as store:
            assert not store.read(f"/local/domain/{web}/control/shutdown")  # withdrawn
    finally:
        xen.unpause(web)
    seen(lambda: counted() > before + 5, "the guest counts on")
    assert xen.shutdown_reason(web) is None


@pytest.mark.parametrize(
    "reason",
    [ShutdownReason.CRASH, ShutdownReason.REBOOT, ShutdownReason.POWEROFF],
    ids=lambda reason: reason.name.lower(),
)
def test_a_guest_that_ends_by_itself_meanwhile(xen: Xen, small: int, reason: ShutdownReason) -> None:
    with Suspender(xen, small) as suspender:
        ending = threading.Timer(0.2, xen.shutdown, (small, reason))
        ending.start()
        with pytest.raises(SuspendFailed) as caught:
            suspender.suspend(timeout_s=PATIENT_S)
        ending.join()
    assert caught.value.failure is SuspendFailure.SHUTDOWN
    assert caught.value.detail == reason.name.lower()
    info = xen.domain(small)
    assert info
    assert info.shutdown is reason
    assert not info.suspended


def test_a_guest_that_is_destroyed_meanwhile(xen: Xen, small: int) -> None:
    with Suspender(xen, small) as suspender:
        ending = threading.Timer(0.2, xl, ("destroy", str(small)))
        ending.start()
        with pytest.raises(SuspendFailed) as caught:
            suspender.suspend(timeout_s=PATIENT_S)
        ending.join()
    assert caught.value.failure is SuspendFailure.GONE


def test_a_guest_is_suspended_from_outside(xen: Xen, small: int) -> None:
    with Suspender(xen, small, way=Way.OUTSIDE) as suspender:
        for _ in range(3):
            assert suspender.suspend(timeout_s=PATIENT_S).way is Way.OUTSIDE
            info = xen.domain(small)
            assert info
            used = info.cpu_ns
            time.sleep(0.1)
            again = xen.domain(small)
            assert again
            assert again.cpu_ns == used  # it stands still
            suspender.resume()
            seen(partial(_ran_more_than, xen, small, used), "it runs again")


def _ran_more_than(xen: Xen, domid: int, used_ns: int) -> bool:
    info = xen.domain(domid)
    return info is not None and info.cpu_ns > used_ns


def test_a_guest_that_offers_an_event_channel_is_asked_by_it(xen: Xen, small: int) -> None:
    # The guest's half is played: what offers the channel, and what suspends when it is notified.
    path = f"/local/domain/{small}/device/suspend/event-channel"
    port = call(xen.libraries.ctrl["xc_evtchn_alloc_unbound"], xen.handle, small, 0, domid=small)
    with BlockingStore(deadline_s=PATIENT_S) as store:
        assert choose_way(xen, store, small) == (Way.XENSTORE, -1)
        store.write(path, str(port))
        assert choose_way(xen, store, small) == (Way.EVENT_CHANNEL, port)
    with Suspender(xen, small) as suspender:
        assert suspender.way is Way.EVENT_CHANNEL
        with pytest.raises(XenCallFailed, match="xc_suspend_evtchn_init_exclusive"):
            Suspender(xen, small)  # its lock is held
        for _ in range(3):
            guest = threading.Timer(0.1, xen.shutdown, (small, ShutdownReason.SUSPEND))
            guest.start()
            suspender.suspend(timeout_s=PATIENT_S)
            guest.join()
            suspender.resume()
            assert xen.shutdown_reason(small) is None
        with pytest.raises(SuspendFailed) as caught:
            suspender.suspend(timeout_s=0.2)
        assert caught.value.failure is SuspendFailure.TIMEOUT
    # Closed: whoever comes next can use it, and the hypervisor tells xenstored of a suspend again.
    with BlockingStore(deadline_s=PATIENT_S) as store, Suspender(xen, small, way=Way.OUTSIDE) as suspender:
        store.watch("@releaseDomain", "t")
        assert store.wait(PATIENT_S)
        suspender.suspend(timeout_s=PATIENT_S)
        assert store.wait(PATIENT_S)
        suspender.resume()


def test_parameters_tell_a_guest_with_drivers_from_one_without(xen: Xen, web: int, small: int) -> None:
    assert xen.hvm_param(web, HvmParam.CALLBACK_IRQ)
    assert not xen.hvm_param(small, HvmParam.CALLBACK_IRQ)
    with BlockingStore() as store:
        assert xen.hvm_param(web, HvmParam.STORE_EVTCHN) == int(store.read(f"/local/domain/{web}/store/port"))
        assert xen.hvm_param(web, HvmParam.STORE_PFN) == int(
            store.read(f"/local/domain/{web}/store/ring-ref")
        )


def test_a_process_without_privilege_is_told_so() -> None:
    script = "from understudy_xen.libs import open_xen; open_xen()"
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, user=65534, timeout=120
    )
    assert done.returncode == 1
    assert (
        f"{NoPrivilege.__module__}.{NoPrivilege.__name__}: /dev/xen/privcmd may not be opened" in done.stderr
    )
    assert "run the agent as root in dom0" in done.stderr


class Cycle:
    """Callbacks that take some checkpoints of a guest that knows nothing of it."""

    def __init__(self, suspender: Suspender, checkpoints: int) -> None:
        self.calls: list[str] = []
        self.rest = checkpoints
        self.raises_at = ""
        self._suspender = suspender

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.raises_at:
            raise LookupError(call)

    def suspend(self) -> None:
        self._suspender.suspend(timeout_s=PATIENT_S)
        self._note("suspend")

    def precopy(self, stats: PrecopyStats) -> Precopy:
        self._note("precopy")
        return Precopy.STOP if stats.iteration else Precopy.CONTINUE

    def postcopy(self) -> None:
        self._note("postcopy")
        self._suspender.resume()

    def checkpoint(self) -> bool:
        self._note("checkpoint")
        self.rest -= 1
        return self.rest > 0

    def wait_checkpoint(self) -> bool:
        raise NotImplementedError

    def switch_qemu_logdirty(self, domid: int, *, enable: bool) -> None:
        self._note(f"logdirty {enable}")


@pytest.fixture
def suspender(xen: Xen, small: int) -> Iterator[Suspender]:
    with Suspender(xen, small, way=Way.OUTSIDE) as suspender:
        yield suspender
        if xen.domain(small) and xen.shutdown_reason(small) is ShutdownReason.SUSPEND:
            suspender.resume()


def test_checkpoints_are_written_in_the_order_of_remus(xen: Xen, small: int, suspender: Suspender) -> None:
    cycle = Cycle(suspender, 3)
    told: list[tuple[str, int, int]] = []
    place = Path("/run/stream")
    with place.open("wb") as file:
        save(xen, small, file.fileno(), cycle, progress=lambda *step: told.append(step))
    calls = [name for name in cycle.calls if name != "precopy"]
    assert calls == ["logdirty True", *["suspend", "postcopy", "checkpoint"] * 3, "logdirty False"]
    assert "precopy" in cycle.calls
    assert any(total and done == total for _, done, total in told)
    assert place.read_bytes()[:16] == b"\xff" * 8 + b"XENF" + b"\0\0\0\x03"
    assert xen.shutdown_reason(small) is None
    place.unlink()


@pytest.mark.parametrize("step", ["precopy", "suspend", "postcopy", "checkpoint"])
def test_what_a_callback_raises_is_raised(xen: Xen, small: int, suspender: Suspender, step: str) -> None:
    cycle = Cycle(suspender, 3)
    cycle.raises_at = step
    with Path(os.devnull).open("wb") as file, pytest.raises(LookupError, match=step) as caught:
        save(xen, small, file.fileno(), cycle)
    assert caught.value.__notes__[0].startswith(f"xc_domain_save of domain {small} returned")
    assert cycle.calls[-1] == "logdirty False"
    # It stands still exactly where the caller has to resume it.
    suspended = xen.shutdown_reason(small) is ShutdownReason.SUSPEND
    assert suspended == (step in {"suspend", "postcopy"})


def test_a_stream_that_breaks(xen: Xen, small: int, suspender: Suspender) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(XenCallFailed, match="xc_domain_save failed for domain") as caught:
        save(xen, small, writing, Cycle(suspender, 3))
    os.close(writing)
    assert caught.value.domid == small
    assert caught.value.detail  # libxc's own words


def test_a_domain_that_is_gone(xen: Xen) -> None:
    class Never(Cycle):
        def __init__(self) -> None:
            self.calls = []

    with Path(os.devnull).open("wb") as file, pytest.raises(XenCallFailed) as caught:
        save(xen, 4711, file.fileno(), Never(), stream=Stream.PLAIN)
    assert (caught.value.function, caught.value.domid) == ("xc_domain_save", 4711)


def test_the_sizes_of_the_table_are_those_of_the_library(xen: Xen) -> None:
    # What lies behind the struct is not touched, and everything in it is written.
    for function, size, arguments in (
        ("xc_domain_getinfolist", xen.libraries.facts.info_bytes, (0, 1)),
        ("xc_physinfo", xen.libraries.facts.physinfo_bytes, ()),
    ):
        raw = ctypes.create_string_buffer(b"\xa5" * (size + 64), size + 64)
        call(xen.libraries.ctrl[function], xen.handle, *arguments, raw)
        assert raw.raw[size:] == b"\xa5" * 64
        assert b"\xa5" * 8 not in raw.raw[:size]


def test_a_helper_that_came_and_went_is_told_by_the_kernel_of_dom0() -> None:
    (directory,) = helper_directories()
    savers = Savers(4711, lambda _: None)
    try:
        assert savers.fileno() >= 0
        assert savers.look() == ""
        subprocess.run([directory / "libxl-save-helper"], check=False, capture_output=True, timeout=PATIENT_S)
        assert "came and went before it was seen for which domain" in savers.look()
    finally:
        savers.close()
