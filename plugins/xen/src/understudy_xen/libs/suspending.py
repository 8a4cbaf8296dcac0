"""Suspend a guest, see that it is suspended, and let it run on: the way into and out of each checkpoint's pause.

A guest is asked in one of three ways:

* by its suspend event channel, where it offers one (old XenLinux kernels, some Windows drivers);
* by ``control/shutdown`` in xenstore, which every guest with PV drivers watches;
* not at all: an HVM guest without PV drivers is suspended from outside, and never knows.

What is waited for is always the same: the hypervisor says that the domain is shut down with the reason *suspend*.

Source: Xen tools/libs/light/libxl_dom_suspend.c (domain_suspend_callback_common, suspend_common_wait_guest_check,
domain_suspend_common_pvcontrol_suspending), tools/libs/guest/xg_suspend.c, xen/common/domain.c (domain_shutdown,
__domain_finalise_shutdown), docs/misc/xenstore-paths.pandoc (control/shutdown, device/suspend/event-channel).
"""

from __future__ import annotations

import ctypes
import select
import time
from dataclasses import dataclass
from enum import Enum
from typing import Final, Self

from understudy_xen.libs.domain import DomainType, ShutdownReason
from understudy_xen.libs.errors import DomainGone, SuspendFailed, SuspendFailure, XenCallFailed
from understudy_xen.libs.loading import call
from understudy_xen.libs.xen import HvmParam, Xen
from understudy_xen.xenstore import BlockingStore, XenStoreConflict, XenStoreMissing, asking

__all__ = ["Suspended", "Suspender", "Way", "choose_way", "withdraw"]

# The hypervisor's word wakes xenstored, and xenstored's wakes us. Looking by ourselves all the time is no faster, and
# takes the processor from the guest that is to suspend. This is for a word that got lost on the way.
_LOOK_S: Final = 0.1
_ALL: Final = "@releaseDomain"
_TOKEN: Final = "suspend"  # noqa: S105 - of a watch
_WITHDRAWALS: Final = 50
_REQUEST: Final = "suspend"


class Way(Enum):
    """How a guest is asked to suspend."""

    EVENT_CHANNEL = "event channel"
    XENSTORE = "control/shutdown"
    OUTSIDE = "from outside"


@dataclass(frozen=True, slots=True)
class Suspended:
    """A guest that was asked, and did."""

    way: Way
    asked_ns: int  #: just before it was asked, monotonic clock
    seen_ns: int  #: when it was seen suspended, likewise

    @property
    def took_ns(self) -> int:
        """How long it took, nanoseconds."""
        return self.seen_ns - self.asked_ns


def choose_way(xen: Xen, store: BlockingStore, domid: int) -> tuple[Way, int]:
    """Return how a guest is best asked to suspend, and the port of its suspend event channel, or -1.

    Args:
        xen: The hypervisor.
        store: Xenstore.
        domid: Of the guest.

    Raises:
        DomainGone: There is no such domain.
    """
    info = xen.domain(domid)
    if info is None:
        raise DomainGone("xc_domain_getinfolist", 3, domid)
    if info.kind is DomainType.HVM and (
        not xen.hvm_param(domid, HvmParam.CALLBACK_IRQ) or xen.hvm_param(domid, HvmParam.ACPI_S_STATE)
    ):
        return Way.OUTSIDE, -1
    port = store.get(f"/local/domain/{domid}/device/suspend/event-channel")
    if port and port.isdecimal():
        return Way.EVENT_CHANNEL, int(port)
    return Way.XENSTORE, -1


def withdraw(store: BlockingStore, domid: int) -> bool:
    """Take back a request to suspend that a guest has not taken up yet, and tell whether there was one.

    A guest takes it up by writing nothing in its place; then it cannot be taken back any more.

    Args:
        store: Xenstore.
        domid: Of the guest.

    Raises:
        XenStoreLost: Xenstored is gone. Whether the guest will suspend is not known.
    """
    for _ in range(_WITHDRAWALS):
        try:
            return store.write_if(_control(domid), _REQUEST, "")
        except XenStoreMissing:
            return False
        except XenStoreConflict:
            continue
    return False


def _control(domid: int) -> str:
    return f"/local/domain/{domid}/control/shutdown"


class _EventChannel:
    # The guest's suspend event channel. libxc's lock file keeps a second toolstack from using it at the same time.

    def __init__(self, xen: Xen, domid: int, port: int) -> None:
        self._xen = xen
        self._domid = domid
        library = xen.libraries.evtchn
        ctypes.set_errno(0)
        self._handle = library["xenevtchn_open"](None, 0)
        if not self._handle:
            raise XenCallFailed("xenevtchn_open", ctypes.get_errno(), domid)
        self._lock = ctypes.c_int(-1)
        self._local = -1
        try:
            self._local = call(
                xen.libraries.guest["xc_suspend_evtchn_init_exclusive"],
                xen.handle,
                self._handle,
                domid,
                port,
                ctypes.byref(self._lock),
                domid=domid,
            )
            self.fd = int(library["xenevtchn_fd"](self._handle))
        except BaseException:
            library["xenevtchn_close"](self._handle)
            raise

    def notify(self) -> None:
        call(self._xen.libraries.evtchn["xenevtchn_notify"], self._handle, self._local, domid=self._domid)

    def wait(self, timeout_s: float) -> None:
        # Until something comes on it; what, the domain's flags say.
        waiting = select.poll()
        waiting.register(self.fd, select.POLLIN)
        if waiting.poll(timeout_s * 1000):
            library = self._xen.libraries.evtchn
            port = call(library["xenevtchn_pending"], self._handle)
            call(library["xenevtchn_unmask"], self._handle, port)

    def close(self) -> None:
        # With nobody on the channel the hypervisor would tell nobody of a suspend, not even `xl save`.
        library = self._xen.libraries
        library.ctrl["xc_domain_subscribe_for_suspend"](self._xen.handle, self._domid, 0)
        library.guest["xc_suspend_evtchn_release"](
            self._xen.handle, self._handle, self._domid, self._local, ctypes.byref(self._lock)
        )
        library.evtchn["xenevtchn_close"](self._handle)


class Suspender:
    """Suspends and resumes one guest; for one thread, which may block.

    Args:
        xen: The hypervisor.
        domid: Of the guest.
        way: How to ask it; ``None`` for the best that it offers.

    Raises:
        DomainGone: There is no such domain.
        XenStoreLost: No xenstored can be reached.
        XenCallFailed: The event channel cannot be used, e.g. because another toolstack has its lock.
    """

    def __init__(self, xen: Xen, domid: int, *, way: Way | None = None) -> None:
        self.domid = domid
        self._xen = xen
        self._store = BlockingStore()
        self._channel: _EventChannel | None = None
        try:
            best, port = choose_way(xen, self._store, domid)
            self.way = best if way is None else way
            if self.way is Way.EVENT_CHANNEL:
                self._channel = _EventChannel(xen, domid, port)
            else:
                self._store.watch(_ALL, _TOKEN)
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        """Let go of the event channel and of xenstore; the guest stays as it is."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def suspend(self, *, timeout_s: float) -> Suspended:
        """Suspend the guest, and return when the hypervisor says that it is; blocks.

        One that is suspended already, by an earlier request that it took long over, is not asked: it would suspend
        again as soon as it runs.

        Args:
            timeout_s: How long it may take, seconds.

        Raises:
            SuspendFailed: It did not; with the reason and what state it is in. A request that it did not take up in
                time is withdrawn, in a transaction, so that it cannot suspend later by surprise.
            XenStoreLost: Xenstored is gone. Whether the guest was asked is not known.

        Guarantees:
            After it returned, the guest is suspended: its memory changes no more by its own doing.
        """
        asked = time.monotonic_ns()
        deadline = asked / 1e9 + timeout_s
        try:
            if self._xen.shutdown_reason(self.domid) is not ShutdownReason.SUSPEND:
                self._ask()
                if not self._seen(deadline):
                    self._give_up()
        except DomainGone:
            raise SuspendFailed(self.domid, SuspendFailure.GONE) from None
        return Suspended(self.way, asked, time.monotonic_ns())

    def resume(self) -> None:
        """Let the suspended guest run on as if nothing had happened, with the devices it has.

        Raises:
            DomainGone: There is no such domain any more.
            XenCallFailed: The hypervisor refuses.
        """
        self._xen.resume(self.domid, fast=True)
        # Xenstored tells of a shutdown once; after this it tells of the next one. Its answer says nothing of interest.
        self._store.post(asking.resume(self.domid))

    def _ask(self) -> None:
        if self._channel is not None:
            self._channel.notify()
        elif self.way is Way.OUTSIDE:
            self._xen.shutdown(self.domid, ShutdownReason.SUSPEND)
        else:
            # Its answer says nothing of interest: what counts is whether the guest suspends.
            self._store.post(asking.write(_control(self.domid), _REQUEST))

    def _seen(self, deadline: float) -> bool:
        # Told by whoever is told first of a shutdown. Only a guest that is suspended from outside may be at once.
        if self.way is not Way.OUTSIDE:
            self._wait(deadline)
        while True:
            reason = self._xen.shutdown_reason(self.domid)
            if reason is ShutdownReason.SUSPEND:
                return True
            if reason is not None:
                raise SuspendFailed(self.domid, SuspendFailure.SHUTDOWN, reason.name.lower())
            if time.monotonic() >= deadline:
                return False
            self._wait(deadline)

    def _wait(self, deadline: float) -> None:
        left = max(0.0, min(deadline - time.monotonic(), _LOOK_S))
        if self._channel is not None:
            self._channel.wait(left)
        else:
            self._store.wait(left)

    def _give_up(self) -> None:
        withdrawn = self.way is Way.XENSTORE and withdraw(self._store, self.domid)
        info = self._xen.domain(self.domid)
        is_paused = info is not None and info.paused
        if withdrawn:
            failure = SuspendFailure.PAUSED if is_paused else SuspendFailure.UNANSWERED
            raise SuspendFailed(self.domid, failure)
        # It may have done so between the last look and now.
        if self._xen.shutdown_reason(self.domid) is not ShutdownReason.SUSPEND:
            raise SuspendFailed(self.domid, SuspendFailure.TIMEOUT, "it is paused" if is_paused else "")
