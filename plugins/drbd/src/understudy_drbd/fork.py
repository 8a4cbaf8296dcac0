"""The subkind ``drbd-checkpoint``: a disk on the Remus fork of DRBD, whose protocol D has checkpoints of its own.

The primary sends a barrier while the guest is stopped, and waits for its acknowledgement before the guest runs on; a
secondary that takes over leaves the connection, at which the fork drops what came after the last barrier.

The fork's secondary writes an epoch to its disk at the barrier, which is before the memory of that checkpoint is there.
If the primary dies in between, the disk is one epoch ahead of memory: the preflight says so.

Source: libxl's libxl_remus_disk_drbd.c; the fork's drivers/block/drbd/drbd_receiver.c (receive_Barrier, defer_ee).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from understudy.device import (
    Decline,
    Finding,
    Gate,
    Kind,
    Mode,
    OpenContext,
    ProbeContext,
    ProtectedDevice,
    ReplicationMode,
    Severity,
    Subkind,
    Verdict,
)
from understudy_drbd.checkpoints import CheckpointRefused, Checkpoints
from understudy_drbd.control import Control, disk_path
from understudy_drbd.findings import of_state
from understudy_drbd.status import State

__all__ = ["DRBD_CHECKPOINT", "ForkPrimary", "ForkSecondary", "answering"]

_PROTOCOL: Final = "D"
_SEND_S: Final = 2.0
_WAIT_S: Final = 5.0


class ForkPrimary(ProtectedDevice):
    """One disk of the guest on the primary's host.

    Args:
        checkpoints: Of its DRBD device; closed by `teardown`.
        demand_mirrored: Raises unless DRBD is connected and up to date on both hosts.
    """

    __slots__ = ("_checkpoints", "_demand_mirrored", "_empty_epochs", "_owed")

    def __init__(self, checkpoints: Checkpoints, demand_mirrored: Callable[[], Awaitable[State]]) -> None:
        self._checkpoints = checkpoints
        self._demand_mirrored = demand_mirrored
        self._owed = False  # an acknowledgement is waited for
        self._empty_epochs = 0

    async def postsuspend(self, epoch: int) -> None:  # noqa: ARG002 - the contract's
        """Put a barrier behind what the guest wrote; it is stopped.

        Raises:
            CheckpointRefused: There is none: the epoch is not on the other host.
            TimeoutError: DRBD does not answer.
        """
        self._owed = await self._checkpoints.send(timeout_s=_SEND_S)
        self._empty_epochs += not self._owed

    async def preresume(self, epoch: int) -> None:  # noqa: ARG002 - the contract's
        """Wait until the other host has all of it.

        Raises:
            CheckpointRefused: It has not.
            TimeoutError: It did not say so.
        """
        if self._owed:
            await self._checkpoints.wait(timeout_s=_WAIT_S)
            self._owed = False

    async def error(self) -> None:
        """Raise if an acknowledgement is missing, or the two hosts do not mirror each other.

        Raises:
            UnderstudyError: What is wrong.
        """
        if self._owed:
            raise CheckpointRefused("DRBD_WAIT_CHECKPOINT_ACK", self._checkpoints.device, errno.EPROTO)
        await self._demand_mirrored()

    async def teardown(self, verdict: Verdict) -> None:  # noqa: ARG002 - nothing is held here
        """Close the device; DRBD stays as it is."""
        self._checkpoints.close()

    def counters(self) -> Mapping[str, int | float]:
        """Return how many epochs had no writes."""
        return {"empty_epoch_count": self._empty_epochs}


class ForkSecondary(ProtectedDevice):
    """One disk of the copy on the secondary's host.

    Args:
        control: Its DRBD resource.
    """

    __slots__ = ("_control",)

    def __init__(self, control: Control) -> None:
        self._control = control

    async def error(self) -> None:
        """Raise if the two hosts do not mirror each other.

        Raises:
            UnderstudyError: How they are.
        """
        await self._control.demand_mirrored()

    async def stop(self, *, failover: bool) -> None:
        """Take over: drop what no barrier ended, and become DRBD's primary.

        Raises:
            UnderstudyError: DRBD refuses.
        """
        if failover:
            await self._control.disconnect()
            await self._control.promote()


async def _claimed(context: OpenContext | ProbeContext) -> tuple[Path, Control, State] | Decline:
    path = disk_path(context.device)
    if path is None or (control := await Control.find(path)) is None:
        return Decline(f"{path or 'it'} is no DRBD device")
    state = await control.state()
    if state.protocol != _PROTOCOL:
        return Decline(f"DRBD resource {control.resource.name} does not use the Remus fork's protocol D")
    return path, control, state


async def _open(context: OpenContext) -> ProtectedDevice | Decline:
    claimed = await _claimed(context)
    if isinstance(claimed, Decline):
        return claimed
    path, control, _ = claimed
    if context.side is ReplicationMode.SECONDARY:
        return ForkSecondary(control)
    return await answering(Checkpoints(path), control.demand_mirrored)


async def answering(
    checkpoints: Checkpoints, demand_mirrored: Callable[[], Awaitable[State]]
) -> ForkPrimary | Decline:
    """Take the disk if DRBD really answers both ioctls; a checkpoint of a disk that is not protected yet is harmless.

    Raises:
        CheckpointRefused: It has checkpoints, and this one failed.
        TimeoutError: It does not answer.

    Guarantees:
        `checkpoints` is closed unless the disk is taken.
    """
    taken = False
    try:
        if await checkpoints.send(timeout_s=_SEND_S):
            await checkpoints.wait(timeout_s=_WAIT_S)
        taken = True
    except CheckpointRefused as refused:
        if refused.errno != errno.ENOTTY:
            raise
        return Decline(str(refused))
    finally:
        if not taken:
            checkpoints.close()
    return ForkPrimary(checkpoints, demand_mirrored)


async def _probe(context: ProbeContext) -> Sequence[Finding] | Decline:
    claimed = await _claimed(context)
    if isinstance(claimed, Decline):
        return claimed
    _, control, state = claimed
    subject = f"{context.device.name} on the {context.side.value}"
    problem = (
        "DRBD's Remus fork writes an epoch to the secondary's disk before the memory of that checkpoint is there: a "
        "takeover at that moment finds the disk one epoch ahead."
    )
    remedy = "use protocol C with a thin volume below DRBD (the subkind drbd), which has no such moment."
    return [
        *of_state(subject, control.resource, state, context.side),
        Finding(Severity.WARNING, subject, problem, remedy),
    ]


DRBD_CHECKPOINT: Final = Subkind(
    name="drbd-checkpoint",
    kind=Kind.DISK,
    modes=frozenset({Mode.REMUS}),
    open=_open,
    probe=_probe,
    priority=20,
    needs=frozenset({Gate.POSTSUSPEND, Gate.PRERESUME}),
)
