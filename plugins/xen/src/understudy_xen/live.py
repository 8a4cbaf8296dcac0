"""One running guest as the checkpoint loop needs it: stopped with its device model, and let go again, as libxl does it.

What a guest was asked for, and did not do while anybody waited, is taken back where that can be done; `LiveGuest.late`
says that it could not, and late.py then waits for the guest. Nobody resumes a guest while another has the claim on it.

Called in libxc's thread, which may block. Only the device model is asked through the event loop, where its connection
lives; it is connected before the guest is stopped, so that what libxl's socket takes to answer is no pause.

Source: tools/libs/light/libxl_dom_suspend.c (domain_suspend_common_guest_suspended, libxl__domain_resume) and
libxl_dom_save.c (libxl__save_emulator_xenstore_data) of Xen 4.17.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any, Final, Self, TypeVar

from understudy_xen.claim import claimed
from understudy_xen.devicemodel import DeviceModel
from understudy_xen.libs import Suspender, SuspendFailed, SuspendFailure, Way, Xen
from understudy_xen.libs.suspending import withdraw
from understudy_xen.streams.cursor import Buffer
from understudy_xen.streams.libxl import EmulatorContext, EmulatorXenstoreData
from understudy_xen.streams.writer import checkpoint, ending
from understudy_xen.xenstore import BlockingStore, XenStoreError, XenStoreMissing, asking

__all__ = ["SUSPEND_S", "LiveGuest"]

_log = logging.getLogger(__name__)
T = TypeVar("T")

_LOOK_S: Final = 0.01
SUSPEND_S: Final = 10.0  #: for the guest to suspend; what it does not do by then it is told to forget


class LiveGuest:
    """The guest of one domain; make one with `open`.

    Args:
        xen: The hypervisor.
        suspender: Of the guest; closed with this.
        model: Its device model, ``None`` for a guest without one.
        has_claim: Whoever made this has the claim on it, for as long as this is used.
    """

    def __init__(
        self, xen: Xen, suspender: Suspender, model: DeviceModel | None, *, has_claim: bool = False
    ) -> None:
        self.domid = suspender.domid
        self._xen = xen
        self._suspender = suspender
        self._model = model
        self._has_claim = has_claim
        self._loop = asyncio.get_running_loop()
        self._context: EmulatorContext | None = None
        self._keys: EmulatorXenstoreData | None = None
        self._asked = False  # and neither seen suspended nor was that taken back

    @classmethod
    async def open(
        cls,
        xen: Xen,
        domid: int,
        model: DeviceModel | None,
        *,
        way: Way | None = None,
        has_claim: bool = False,
    ) -> Self:
        """Connect to xenstored for a guest, in a thread: it may take its time.

        Args:
            xen: The hypervisor.
            domid: Of the guest.
            model: As above.
            way: How it is asked to suspend; ``None`` for the best that it offers.
            has_claim: As above.

        Raises:
            DomainGone: There is no such domain.
            HypervisorError: It cannot be asked to suspend that way, or no xenstored answers.
        """
        opening = asyncio.ensure_future(asyncio.to_thread(Suspender, xen, domid, way=way))
        try:
            suspender = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise
        return cls(xen, suspender, model, has_claim=has_claim)

    @property
    def way(self) -> Way:
        """How it is asked to suspend."""
        return self._suspender.way

    @property
    def late(self) -> bool:
        """Whether it may suspend yet, although nobody waits for it."""
        return self._asked

    def suspend(self) -> None:
        """Suspend it, stop its device model, and take the state of its devices.

        Raises:
            SuspendFailed: It did not, and runs on or has ended; the error says which.
            HypervisorError: Its device model refused, or does not answer. The guest may be suspended.
        """
        model = self._model
        if model is not None:
            self._in_loop(model.connect())
        self._asked = True
        try:
            self._suspender.suspend(timeout_s=SUSPEND_S)
        except SuspendFailed as failed:
            self._asked = failed.failure is SuspendFailure.TIMEOUT
            raise
        self._asked = False
        if model is None:
            return
        self._context = EmulatorContext(self._in_loop(_capture(model)))
        self._keys = EmulatorXenstoreData(_physmap(self.domid))

    def records(self) -> list[Buffer]:
        """Return libxl's part of a checkpoint: its device model as it was at the last `suspend`, and the end."""
        return checkpoint(self._context, self._keys)

    def last_records(self) -> list[Buffer]:
        """Return libxl's part of a stream that ends without checkpoints, likewise."""
        return ending(self._context, self._keys)

    def resume(self) -> None:
        """Let it run on, its device model first, as libxl does."""
        if self._model is not None:
            self._in_loop(self._model.proceed())
        self._suspender.resume()
        if self._model is not None:
            self._in_loop(self._model.release())

    def bring_back(self, timeout_s: float) -> None:
        """See the guest run again, from wherever a checkpoint was given up; blocks.

        Args:
            timeout_s: How long a guest that has taken up the request to suspend may take to do so, seconds.

        Raises:
            ClaimTaken: It is suspended, and somebody else is at work on it; it is left to them.
            HypervisorError: It does not run.

        Guarantees:
            It runs afterwards, unless somebody else has paused it or it has ended; its device model runs, too. A
            request to suspend that it had not taken up is taken back; if it may suspend yet, `late` says so.
        """
        if self._asked:
            self._take_back()
        deadline = time.monotonic() + timeout_s
        while True:
            info = self._xen.domain(self.domid)
            if info is None or info.dying:
                self._asked = False
                return
            if info.suspended:
                self._let_go()
                return
            if not self._asked or time.monotonic() > deadline:
                break
            time.sleep(_LOOK_S)
        if self._model is not None:
            self._in_loop(self._model.proceed())
            self._in_loop(self._model.release())

    def _take_back(self) -> None:
        if self.way is not Way.XENSTORE:
            return
        try:
            # On a connection of its own: the other one may be what failed.
            with BlockingStore() as store:
                self._asked = not withdraw(store, self.domid)
        except XenStoreError as error:
            _log.warning("domain %d may suspend yet: that cannot be taken back: %s", self.domid, error)

    def _let_go(self) -> None:
        with nullcontext() if self._has_claim else claimed(self.domid):
            # Nobody can have let it go since: it would be let go a second time.
            info = self._xen.domain(self.domid)
            if info is not None and info.suspended:
                self.resume()
        self._asked = False

    def log_dirty(self, *, enable: bool) -> None:
        """Have the device model mark the pages that it writes, or not any more."""
        if self._model is not None:
            self._in_loop(self._model.log_dirty(enable=enable))

    def close(self) -> None:
        """Let go of everything; the guest stays as it is. Idempotent."""
        self._suspender.close()

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _close(opened: asyncio.Future[Suspender]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()


async def _capture(model: DeviceModel) -> bytes:
    await model.stop()
    return await model.state()


def _physmap(domid: int) -> tuple[tuple[bytes, bytes], ...]:
    # Where the memory of devices was moved to. QEMU before 2.10 kept it here; newer ones write nothing.
    path = f"/local/domain/0/device-model/{domid}"
    pairs = []
    with BlockingStore() as store:
        try:
            offsets = store.ask(asking.directory(f"{path}/physmap"))
        except XenStoreMissing:
            return ()
        for offset in offsets:
            for name in store.ask(asking.directory(f"{path}/physmap/{offset}")):
                key = f"physmap/{offset}/{name}"
                pairs.append((key.encode(), store.read(f"{path}/{key}").encode()))
    return tuple(pairs)
