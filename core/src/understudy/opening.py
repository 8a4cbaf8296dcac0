"""Open the devices of one guest, all at once; or leave nothing open.

What a failed setup leaves behind is the subtle part. A subkind whose `open` raises, or is cancelled, has cleaned up by
itself (`understudy.testing.check_subkind` tries it at every await); what *was* opened is torn down here, in reverse;
and an open that would not end is torn down when it does. A teardown that fails in its turn is told after the setup
error, and its device stays in `Opening.left` until a later teardown succeeds.

Source: checkpoint_devices_setup and its failure path in tools/libs/light/libxl_remus.c, where the setup error is lost
to the return code of the teardown.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from understudy.device import (
    DeviceInfo,
    Gate,
    Mode,
    OpenContext,
    Peer,
    Progress,
    ProtectedDevice,
    ReplicationMode,
    Subkind,
    Verdict,
    no_progress,
)
from understudy.matching import claim, fitting, options_of
from understudy.phases import Deadlines, Step, run_phase
from understudy.services import Services

__all__ = ["GroupSetup", "Member", "Opening", "led_by", "shielded"]

log = logging.getLogger(__name__)

# How often a device that opened too late is torn down, and the time between, in seconds: nobody else knows of it.
LATE_TRIES = 5
LATE_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class GroupSetup:
    """Everything that a group is made of, for one guest, session and side."""

    guest: str
    session: str  #: equal on both hosts
    side: ReplicationMode
    mode: Mode
    devices: Sequence[DeviceInfo]
    subkinds: Sequence[Subkind]  #: all that the plugins offer
    gates: frozenset[Gate]  #: what the hypervisor has in this mode
    services: Services  #: what the hypervisor offers
    peer: Callable[[str], Peer]  #: the way to the other half of the device of this name
    directory: Path  #: this guest's directory on this host; exists
    local_address: str  #: numeric address of this host on the link
    peer_address: str  #: numeric address of the other host on the link
    options: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: MappingProxyType({})
    )  #: by subkind
    source: str = "guest file"  #: where the options come from, for errors
    progress: Progress = no_progress
    bwlimit_bytes_per_s: int = 0  #: for initial copies, 0 = none
    deadlines: Deadlines = field(default_factory=Deadlines)


class Member:
    """One device's place in its group.

    Args:
        info: The device.
    """

    __slots__ = ("device", "info", "settled", "started", "subkind")

    def __init__(self, info: DeviceInfo) -> None:
        self.info = info
        self.subkind = info.subkind  #: who claimed it, once it is open
        self.device: ProtectedDevice | None = None  #: set once it is open
        self.started = False  #: its replication was started and not stopped since
        self.settled = asyncio.Event()  #: it is open, or never will be

    @property
    def opened(self) -> ProtectedDevice:
        """The device object of a member that is open."""
        assert self.device is not None  # noqa: S101 - callers have looked; this tells the type checker
        return self.device

    def step(self, call: Callable[..., Any]) -> Step:
        """Return a step of this device for `run_phase`."""
        return Step(self.info.name, self.subkind, call)


class Opening:
    """The setup of a group, once.

    Args:
        setup: What the group is made of.
    """

    def __init__(self, setup: GroupSetup) -> None:
        self.setup = setup
        self.members = {info.name: Member(info) for info in setup.devices}
        self.opened: list[Member] = []  #: in the order of time
        self.left: list[Member] = []  #: not torn down yet, once that was asked for
        self._over = False
        self._moved_at = 0.0
        self._done_bytes: dict[str, int] = {}

    async def run(self) -> None:
        """Open every device. As `understudy.group.DeviceGroup.new`."""
        parsed = self._options()
        self._moved_at = asyncio.get_running_loop().time()
        steps = [
            Step(name, asked, functools.partial(self._open_one, self.members[name], parsed))
            for name, asked in self._asked().items()
        ]
        limits = self.setup.deadlines
        try:
            await run_phase(
                "open",
                steps,
                deadline_s=limits.setup_s,
                grace_s=limits.grace_s,
                all_or_nothing=True,
                progressed=lambda: self._moved_at,
            )
        except BaseException as error:  # noqa: BLE001 - raised again, followed by what failed afterwards
            self.settle()
            raise led_by(error, await shielded(self._undo(), "undoing the setup")) from None
        self._over = True

    @property
    def verdict(self) -> Verdict:
        """Whether output that is held may leave when the setup fails.

        Setup begins from `alone`: until the first swap to `protected` the guest and its output are the primary's.
        """
        return Verdict.KEEP if self.setup.side is ReplicationMode.PRIMARY else Verdict.DISCARD

    async def tear_down(self, member: Member, verdict: Verdict) -> None:
        """Tear one device down; from then on it is not `left` any more."""
        await member.opened.teardown(verdict)
        if member in self.left:  # else a teardown that had been left behind came to its end first
            self.left.remove(member)

    def settle(self) -> None:
        """Tell everybody who waits for a device that is not open that it never will be."""
        self._over = True
        for member in self.members.values():
            member.settled.set()

    def _options(self) -> dict[str, Any]:
        # All options of all subkinds that may be asked, before anything is touched.
        setup = self.setup
        return {
            subkind.name: options_of(subkind, setup.options, setup.source)
            for info in setup.devices
            for subkind in fitting(setup.subkinds, info, setup.mode, setup.gates)[0]
        }

    def _asked(self) -> dict[str, str]:
        # Who will be asked for each device, for errors that come before anybody has claimed it.
        setup = self.setup
        names: dict[str, str] = {}
        for info in setup.devices:
            asked = fitting(setup.subkinds, info, setup.mode, setup.gates)[0]
            names[info.name] = " or ".join(subkind.name for subkind in asked) or "none"
        return names

    async def _open_one(self, member: Member, parsed: Mapping[str, Any]) -> None:
        setup = self.setup
        context = OpenContext(
            guest=setup.guest,
            device=member.info,
            side=setup.side,
            mode=setup.mode,
            session=setup.session,
            options=None,
            services=setup.services,
            peer=setup.peer(member.info.name),
            directory=setup.directory,
            local_address=setup.local_address,
            peer_address=setup.peer_address,
            progress=self._progress,
            bwlimit_bytes_per_s=setup.bwlimit_bytes_per_s,
        )
        claimed = await claim(setup.subkinds, setup.gates, context, lambda subkind: parsed[subkind.name])
        member.subkind = claimed.subkind.name
        if self._over:
            # It was left behind when its open would not end, and has ended now: nobody waits for it any more.
            await self._tear_down_late(member, claimed.device)
            return
        member.device = claimed.device
        self.opened.append(member)
        member.settled.set()

    def _progress(self, what: str, done_bytes: int, total_bytes: int) -> None:
        # Only what moves puts the deadline of the setup off: a stalled copy tells the same number for ever.
        if self._done_bytes.get(what) != done_bytes:
            self._done_bytes[what] = done_bytes
            self._moved_at = asyncio.get_running_loop().time()
        self.setup.progress(what, done_bytes, total_bytes)

    async def _undo(self) -> None:
        self.left = list(reversed(self.opened))
        failures: list[Exception] = []
        for member in tuple(self.left):
            try:
                await self._run_teardown(member.step(functools.partial(self.tear_down, member)))
            except ExceptionGroup as group:
                failures += group.exceptions
        if failures:
            raise ExceptionGroup("teardown after a failed setup failed, too", failures)

    async def _tear_down_late(self, member: Member, device: ProtectedDevice) -> None:
        for tries in range(LATE_TRIES):
            if tries:
                await asyncio.sleep(LATE_RETRY_S)
            try:
                await self._run_teardown(member.step(device.teardown))
            except ExceptionGroup as group:
                log.warning("after an open that ended too late: %s", group.exceptions[0])
            else:
                return
        log.error(
            "guest %s: device %s (%s) opened too late and could not be torn down; what it made is left on this host",
            self.setup.guest,
            member.info.name,
            member.subkind,
        )

    async def _run_teardown(self, step: Step) -> None:
        limits = self.setup.deadlines
        await run_phase(
            "teardown", [step], self.verdict, deadline_s=limits.teardown_s, grace_s=limits.grace_s
        )


async def shielded(work: Awaitable[None], what: str) -> ExceptionGroup[Exception] | None:
    """Let bounded work run to its end however often the caller is cancelled.

    Returns:
        Its failures, or ``None``.

    Raises:
        asyncio.CancelledError: The caller was cancelled meanwhile; the work has ended, its failures are logged.
    """
    task = asyncio.ensure_future(work)
    interrupted = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            interrupted = True
    error = None if task.cancelled() else task.exception()
    if interrupted or task.cancelled():
        if error is not None:
            log.warning("%s, while being cancelled: %s", what, error)
        raise asyncio.CancelledError(f"{what} finished, then cancelled")
    if error is None or isinstance(error, ExceptionGroup):
        return error
    raise error


def led_by(error: BaseException, later: ExceptionGroup[Exception] | None) -> BaseException:
    """Return the first failure, followed by what failed afterwards: in its group, or as its notes."""
    if later is None:
        return error
    if isinstance(error, ExceptionGroup):
        return ExceptionGroup(error.message, [*error.exceptions, *later.exceptions])
    for each in later.exceptions:
        error.add_note(f"afterwards: {each}")
        log.warning("while undoing after %r: %s", error, each)
    return error
