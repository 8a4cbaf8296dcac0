"""The devices of one guest, on one side, as a group: open, replicate, checkpoint, tear down together.

The group's operations are those of QEMU's replication.h (`new`, `remove`, `start_all`, `do_checkpoint_all`,
`get_error_all`, `stop_all`) and libxl's checkpoint phases. What the originals get wrong is mended: a start that fails
half-way stops what it started, every error is kept and the first in time leads, a failed setup is told as itself and
never as the result of its teardown, and everything has a deadline.

A group goes one way: made → `new` → `start_all` → epochs → `stop_all` → `teardown`. After the first failure, or the
cancellation, of any step nothing is committed any more: the session has to end.

Source: replication.c of QEMU; tools/libs/light/libxl_checkpoint_device.c and libxl_remus.c of Xen.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

from understudy.device import ProtectedDevice, ReplicationMode, Verdict
from understudy.errors import DeviceError, PhaseTimeout, StateError, UnderstudyError
from understudy.opening import GroupSetup, Member, Opening, led_by, shielded
from understudy.phases import Step, first_failure, in_words, run_phase

__all__ = ["DeviceGroup", "GroupSetup"]

log = logging.getLogger(__name__)

Json = Mapping[str, Any]

# Steps of an epoch, whose methods take its number.
_CYCLE = ("postsuspend", "checkpoint", "preresume", "postresume", "commit")


class _State(Enum):
    MADE = "not set up"
    OPENING = "being set up"
    OPEN = "open"
    CLOSED = "torn down"


class DeviceGroup:
    """The devices of one guest on one side.

    Args:
        setup: What it is made of. Nothing is touched before `new`.

    Raises:
        StateError: Two devices have one name.
    """

    def __init__(self, setup: GroupSetup) -> None:
        self.setup = setup
        self._opening = Opening(setup)
        self._members = self._opening.members
        if len(self._members) != len(setup.devices):
            raise StateError(f"guest {setup.guest} has two devices of one name")
        self._state = _State.MADE
        self._steps: dict[str, tuple[Step, ...]] = {}
        self._start_asked = False
        self._void: BaseException | None = None  # the first failure: nothing is committed after it
        self._epochs = dict.fromkeys(_CYCLE, 0)  # the last one that each step was asked for
        self._checkpointed = 0
        self._took_ns: dict[str, int] = {}
        self._counting: list[Member] = []
        self._ending: asyncio.Task[None] | None = None
        self._verdict = Verdict.DISCARD

    @classmethod
    async def open(cls, setup: GroupSetup) -> DeviceGroup:
        """Make a group and set it up in one go, where nobody needs to `serve` meanwhile.

        As `new`; but nobody can ask again for a teardown that failed.
        """
        group = cls(setup)
        await group.new()
        return group

    @property
    def side(self) -> ReplicationMode:
        """Which of the two sides these devices are on."""
        return self.setup.side

    @property
    def devices(self) -> Mapping[str, ProtectedDevice]:
        """The opened devices by name, in the order of the guest's configuration."""
        return {name: m.device for name, m in self._members.items() if m.device is not None}

    @property
    def subkinds(self) -> Mapping[str, str]:
        """The name of the subkind that protects each opened device."""
        return {name: m.subkind for name, m in self._members.items() if m.device is not None}

    @property
    def phases_ns(self) -> Mapping[str, int]:
        """How long each step took when it ran last, nanoseconds; steps that no device has are missing."""
        return MappingProxyType(self._took_ns)

    @property
    def checkpointed(self) -> int:
        """The last checkpoint that every device has taken in, 0 for none.

        At a promotion this must be the checkpoint that the copy's memory holds; if memory is one ahead, because the
        primary died in between, `do_checkpoint_all` closes the gap first.
        """
        return self._checkpointed

    def has(self, phase: str) -> bool:
        """Tell whether any opened device has a step `phase`; those that none has need not be asked for."""
        return bool(self._steps.get(phase))

    # --- Setup and start ---------------------------------------------------------------------------------------------

    async def new(self) -> None:
        """Open every device, all at once, the guest running. Source: replication_new; libxl's setup.

        Raises:
            ConfigError: The options of a subkind are wrong; nothing was touched.
            ExceptionGroup: Of `DeviceError`; the setup failure leads, what failed while undoing it follows.

        Guarantees:
            All devices are open, or, after a failure or cancellation, none is: those that were opened are torn down
            in reverse, and the group is closed; those whose teardown failed in its turn are asked again by
            `teardown`. The other devices are cancelled at the first failure, because an initial copy may take hours.
            The guest is as before: output held meanwhile leaves on the primary, whose guest it is, and never on the
            secondary.
        """
        self._need(_State.MADE, "set up")
        self._state = _State.OPENING
        try:
            await self._opening.run()
        except BaseException:
            self._state = _State.CLOSED
            self._verdict = self._opening.verdict
            raise
        self._resolve()
        self._state = _State.OPEN

    async def start_all(self, side: ReplicationMode) -> None:
        """Begin to replicate; the guest is stopped on the primary. Source: replication_start_all.

        Args:
            side: This group's side, for the reader of the call; another one is refused.

        Raises:
            StateError: Not open, already started, or of the other side; nothing was changed.
            ExceptionGroup: Of `DeviceError`, the failed start leading.

        Guarantees:
            All devices replicate, or, after a failure or cancellation, none does: what was started is stopped.
        """
        self._need(_State.OPEN, "start")
        if side is not self.side:
            raise StateError(f"this group is the {self.side.value}'s and cannot start as {side.value}")
        if self._start_asked:
            raise StateError(f"the devices of guest {self.setup.guest} were started before in this session")
        self._start_asked = True
        try:
            await self._run("start", side)
        except BaseException as error:  # noqa: BLE001 - raised again, followed by what failed afterwards
            undoing = self._stop_started(failover=False)
            raise led_by(error, await shielded(undoing, "stopping what was started")) from None
        for member in self._opening.opened:
            member.started = True

    # --- The cycle ---------------------------------------------------------------------------------------------------

    async def postsuspend(self, epoch: int) -> None:
        """Run every device's postsuspend; the guest is stopped. As `run_phase` on failure; voids the epoch."""
        await self._step("postsuspend", epoch)

    async def do_checkpoint_all(self, epoch: int) -> None:
        """Have every device take in checkpoint `epoch`, which this side holds whole.

        Source: replication_do_checkpoint_all. As `run_phase` on failure; voids the epoch.
        """
        await self._step("checkpoint", epoch)
        self._checkpointed = epoch

    async def preresume(self, epoch: int) -> None:
        """Run every device's preresume before the guest runs again; on the primary alone. Voids on failure."""
        if self.side is not ReplicationMode.PRIMARY:
            raise StateError("preresume is asked of the primary's devices alone")
        await self._step("preresume", epoch)

    async def postresume(self, epoch: int) -> None:
        """Run every device's postresume; the guest runs. As `run_phase` on failure; voids the epoch."""
        await self._step("postresume", epoch)

    async def get_error_all(self) -> None:
        """Raise what was lost or failed on any device since the last call. Source: replication_get_error_all.

        Raises:
            ExceptionGroup: Of `DeviceError`, all of them; the acknowledgement of this epoch is void.
        """
        self._need(_State.OPEN, "ask for errors")
        await self._run("error")

    async def commit(self, epoch: int) -> None:
        """Let epoch `epoch` out: the secondary has acknowledged that it holds all of it.

        Raises:
            StateError: A step failed or was cancelled before; nothing was let out.
            ExceptionGroup: As `run_phase`; some devices may have let it out, which is safe: it is acknowledged.
        """
        if self._void is not None:
            raise StateError(
                f"epoch {epoch} cannot be committed after: {first_failure(self._void)}"
            ) from self._void
        if epoch <= self._epochs["commit"]:
            raise StateError(f"epoch {epoch} cannot be committed after epoch {self._epochs['commit']}")
        await self._step("commit", epoch)

    def sever_all(self) -> None:
        """Cut every device's connections to the other host at once; a device that fails is logged, the others go on."""
        for member in tuple(self._members.values()):
            if member.device is not None:
                try:
                    member.device.sever()
                except Exception:
                    log.exception("device %s (%s): sever failed", member.info.name, member.subkind)

    async def stop_all(self, *, failover: bool = False) -> None:
        """End replication of what was started. Source: replication_stop_all.

        Args:
            failover: True when this side goes on without the other; the guest may run then.

        Raises:
            ExceptionGroup: Of `DeviceError`; devices whose stop failed may be asked again.

        Guarantees:
            Nothing is committed afterwards. Asking again, or before anything was started, does nothing.
        """
        if self._state is _State.OPEN:
            self._void = self._void or StateError("replication was stopped")
            await self._stop_started(failover=failover)

    # --- The end -----------------------------------------------------------------------------------------------------

    async def teardown(self, verdict: Verdict) -> None:
        """Remove everything that the devices made on this host. Source: replication_remove; libxl's teardown.

        Args:
            verdict: Whether output that is still held may leave. The first verdict stands.

        Raises:
            StateError: The setup is still under way; cancel it instead.
            ExceptionGroup: Of `DeviceError`, every failure; the teardown of the other devices ran all the same.
            asyncio.CancelledError: The caller was cancelled; raised after the teardown has ended.

        Guarantees:
            Every opened device is asked, also when the caller is cancelled; bounded by ``teardown_s`` and the grace.
            Asking again, or after a setup that failed, waits for the end, then asks those that failed once more and no
            others.
        """
        if self._state is _State.OPENING:
            raise StateError(f"guest {self.setup.guest} is being set up; cancel that, it cleans up by itself")
        left = self._opening.left
        if (self._ending is not None or left) and verdict is not self._verdict:
            log.warning(
                "guest %s: teardown(%s) after teardown(%s): the first verdict stands",
                self.setup.guest,
                verdict.value,
                self._verdict.value,
            )
        if self._state is not _State.CLOSED:
            self._state = _State.CLOSED
            self._verdict = verdict
            self._opening.settle()
            left[:] = reversed(self._opening.opened)
        if self._ending is None or self._ending.done():
            if not left:
                return
            ending = run_phase(
                "teardown",
                [member.step(functools.partial(self._opening.tear_down, member)) for member in left],
                self._verdict,
                deadline_s=self.setup.deadlines.teardown_s,
                grace_s=self.setup.deadlines.grace_s,
            )
            self._ending = asyncio.get_running_loop().create_task(ending)
        error = await shielded(self._ending, "teardown")
        if error is not None:
            raise error

    async def remove(self, verdict: Verdict) -> None:
        """Take the devices out of replication: `teardown` under its name in replication.h."""
        await self.teardown(verdict)

    # --- At any time -------------------------------------------------------------------------------------------------

    async def serve(self, device: str, method: str, params: Json) -> Json:
        """Answer a request that the other host's half of a device sent.

        Works while any step runs; a request for a device that is still being opened waits for it.

        Raises:
            StateError: There is no such device here, or its setup failed.
            DeviceError: The device refused or failed, or did not answer in time.
        """
        member = self._members.get(device)
        if member is None:
            known = ", ".join(self._members) or "none"
            raise StateError(f"guest {self.setup.guest} has no device {device!r} here (devices: {known})")
        limit_s = self.setup.deadlines.serve_s
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                if self._state in {_State.MADE, _State.OPENING}:
                    await member.settled.wait()
                if member.device is None:
                    raise StateError(f"device {device} of guest {self.setup.guest} is not open here")
                return await member.device.serve(method, params)
        except Exception as error:
            if limit.expired():
                problem = f"no answer to {method!r} within {limit_s:g} s"
                raise PhaseTimeout(device, member.subkind, "serve", None, problem) from error
            if isinstance(error, UnderstudyError):
                raise
            problem = f"{method!r}: {in_words(error)}"
            raise DeviceError(device, member.subkind, "serve", None, problem) from error

    def counters(self) -> Mapping[str, int | float]:
        """Return the numbers of all devices, as ``disk0.name``; a device that fails to tell is logged once."""
        numbers: dict[str, int | float] = {}
        for member in tuple(self._counting):
            try:
                told = member.opened.counters()
                numbers |= {f"{member.info.name}.{name}": value for name, value in told.items()}
            except Exception:
                self._counting.remove(member)
                log.exception("device %s (%s): counters failed, left out", member.info.name, member.subkind)
        return numbers

    # --- Private -----------------------------------------------------------------------------------------------------

    def _need(self, state: _State, what: str) -> None:
        if self._state is not state:
            raise StateError(
                f"cannot {what}: the devices of guest {self.setup.guest} are {self._state.value}"
            )

    def _resolve(self) -> None:
        # Which devices have which step, once: a step that a class leaves alone costs nothing from here on.
        opened = [member for member in self._members.values() if member.device is not None]
        for phase in (*_CYCLE, "error"):
            self._steps[phase] = tuple(
                member.step(getattr(member.device, phase))
                for member in opened
                if _overrides(member.device, phase)
            )
        self._steps["start"] = tuple(
            member.step(functools.partial(self._start_one, member))
            for member in opened
            if _overrides(member.device, "start")
        )
        self._counting = [member for member in opened if _overrides(member.device, "counters")]

    async def _start_one(self, member: Member, side: ReplicationMode) -> None:
        await member.opened.start(side)
        member.started = True

    async def _stop_started(self, *, failover: bool) -> None:
        async def stop_one(member: Member) -> None:
            await member.opened.stop(failover=failover)
            member.started = False

        self._steps["stop"] = tuple(
            member.step(functools.partial(stop_one, member))
            for member in self._members.values()
            if member.started
        )
        await self._run("stop")

    async def _step(self, phase: str, epoch: int) -> None:
        self._need(_State.OPEN, phase)
        if not self._start_asked:
            raise StateError(
                f"{phase} of epoch {epoch} before the devices of guest {self.setup.guest} were started"
            )
        if epoch < self._epochs[phase]:
            raise StateError(f"{phase} of epoch {epoch} after {phase} of epoch {self._epochs[phase]}")
        self._epochs[phase] = epoch
        await self._run(phase, epoch, epoch=epoch)

    async def _run(self, phase: str, *arguments: object, epoch: int | None = None) -> None:
        steps = self._steps[phase]
        if not steps:
            return
        limits = self.setup.deadlines
        began_ns = time.perf_counter_ns()
        try:
            await run_phase(
                phase,
                steps,
                *arguments,
                epoch=epoch,
                deadline_s=getattr(limits, f"{phase}_s"),
                grace_s=limits.grace_s,
            )
        except BaseException as error:
            self._void = self._void or error
            raise
        finally:
            self._took_ns[phase] = time.perf_counter_ns() - began_ns


def _overrides(device: ProtectedDevice | None, phase: str) -> bool:
    return getattr(getattr(device, phase), "__func__", None) is not getattr(ProtectedDevice, phase)
