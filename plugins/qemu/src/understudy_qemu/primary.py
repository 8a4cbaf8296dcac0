"""The guest on the primary's host for the length of one session: copied, checkpointed, and let go again.

What STOP and RESUME mean is in events.py. The order of a cut is the same everywhere: our end of the socket is shut
down first and QEMU is yanked on its second monitor, because its first one may be held by a dead peer; only then are
ordinary commands given.

In mode remus the guest stops when we say so: ``stop``, then the devices' postsuspend, then a write of
``x-checkpoint-delay``, which makes QEMU take one checkpoint and start the guest again when the secondary has loaded
it. In mode colo QEMU decides; every such write hurries it.

A guest that shuts itself down is preserved, stopped, and nothing more is triggered; but a checkpoint that QEMU takes
by itself (mode colo) ends with a RESUME all the same, so the end of such a session must not wait.

Source: QEMU migration/colo.c; migration/colo-failover.c.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from understudy.device import Gate, Mode, Progress, ReplicationMode
from understudy.errors import HypervisorError, MonitorSilent, NotReplicating, UnderstudyError
from understudy.group import DeviceGroup
from understudy.hypervisor import DomainEvent, Phases, PrimaryDomain
from understudy.report import Checkpoint
from understudy.services import MONITOR, Channels, Services
from understudy_qemu.disksession import DISKS, DiskSession
from understudy_qemu.events import Cycle, Stage, Timeline
from understudy_qemu.migration import CHANNEL, URI, Cable, Switches
from understudy_qemu.monitor import CommandRefused
from understudy_qemu.offered import OfferedMonitor
from understudy_qemu.running import Qemu

__all__ = ["GATES", "QemuPrimary"]

_log = logging.getLogger(__name__)

#: At which phases a guest really waits for its devices, by mode.
GATES: Mapping[Mode, frozenset[Gate]] = {
    Mode.REMUS: frozenset({Gate.POSTSUSPEND}),
    Mode.COLO: frozenset(),
}

_NEVER_MS = 100_000_000  # more than a day: in remus mode QEMU takes no checkpoint by itself
_CONNECT_S = 10.0
_STALL_S = 20.0  # the copy of the memory may take long, but not stand still
_ACK_S = 10.0  # for one checkpoint, from its beginning to the RESUME
_END_S = 10.0  # for QEMU to leave what it was doing
_POLL_S = 0.05


class QemuPrimary(PrimaryDomain):
    """A running QEMU guest under protection.

    Args:
        qemu: The running guest.
        mode: How it is protected.
        disks: What its disks share in this session.
        let_go: Takes the guest off the network, then kills it; in this order.
        checkpoint_delay_ms: In mode colo, the longest time between two checkpoints.
        bwlimit_bytes_per_s: Bound for the initial copies, 0 = none.

    Make one with `open`.
    """

    def __init__(
        self,
        qemu: Qemu,
        mode: Mode,
        disks: DiskSession,
        let_go: Callable[[], Awaitable[None]],
        *,
        checkpoint_delay_ms: int = 10_000,
        bwlimit_bytes_per_s: int = 0,
    ) -> None:
        self._qemu = qemu
        self._mode = mode
        self._disks = disks
        self._let_go = let_go
        self._delay_ms = checkpoint_delay_ms if mode is Mode.COLO else _NEVER_MS
        self._bwlimit = bwlimit_bytes_per_s
        self._timeline = Timeline(gone=self._cut)
        disks.lost = self._disk_lost
        self._cable: Cable | None = None
        self._switches: Switches | None = None
        offered = OfferedMonitor(lambda: qemu.monitor)
        self._services = Services((MONITOR, offered), (DISKS, disks))

    @classmethod
    async def open(
        cls,
        qemu: Qemu,
        mode: Mode,
        disks: DiskSession,
        let_go: Callable[[], Awaitable[None]],
        *,
        checkpoint_delay_ms: int = 10_000,
        bwlimit_bytes_per_s: int = 0,
    ) -> QemuPrimary:
        """Open a running guest for a session; arguments as for the class.

        Guarantees:
            No event of the guest is missed from here on.
        """
        domain = cls(
            qemu,
            mode,
            disks,
            let_go,
            checkpoint_delay_ms=checkpoint_delay_ms,
            bwlimit_bytes_per_s=bwlimit_bytes_per_s,
        )
        await disks.attach(qemu.monitor)
        await domain._timeline.open(qemu.monitor)
        return domain

    @property
    def gates(self) -> frozenset[Gate]:
        """The phases at which the guest waits: postsuspend in mode remus, none in mode colo."""
        return GATES[self._mode]

    @property
    def services(self) -> Services:
        """The monitor, and what the disks share."""
        return self._services

    @property
    def paced(self) -> bool:
        """Whether the engine decides when a checkpoint is taken."""
        return self._mode is Mode.REMUS

    # --- Into protection ---------------------------------------------------------------------------------------------

    async def replicate(self, group: DeviceGroup, channels: Channels, progress: Progress) -> None:
        """Copy the memory and begin COLO's checkpoints.

        Raises:
            NotReplicating: QEMU made a plain migration of it.
            HypervisorError: Any other failure.

        Guarantees:
            As the contract: after a failure the guest runs here again, confirmed.
        """
        try:
            self._cable = Cable(await channels.connect(CHANNEL, timeout_s=_CONNECT_S))
            self._switches = await Switches.set(
                self._monitor, checkpoint_delay_ms=self._delay_ms, bandwidth_bytes_per_s=self._bwlimit
            )
            await self._cable.give(self._monitor)
            await self._command("stop")
            await group.start_all(ReplicationMode.PRIMARY)
            await self._command("migrate", {"uri": URI})
            self._cable.used()
            await self._copied(progress)
        except BaseException:
            await _whole(self._run_again())
            raise

    async def _copied(self, progress: Progress) -> None:
        # Wait for COLO's first RESUME. Nothing is killed here when it does not come: that is the engine's decision,
        # taken when the guest runs again.
        follower = self._timeline.follower
        moved = -1
        deadline = time.monotonic() + _STALL_S
        while follower.stage is not Stage.CHECKPOINTS:
            if follower.stage is Stage.ENDED:
                if follower.status == "completed":
                    raise NotReplicating(
                        "this QEMU ended the copy as a plain migration instead of beginning to replicate; "
                        "the guest runs on here"
                    )
                raise HypervisorError(f"the copy of the memory failed: {await self._why()}")
            answer = await self._command("query-migrate")
            memory = answer.get("ram")
            if memory and memory["transferred"] != moved:
                moved = memory["transferred"]
                deadline = time.monotonic() + _STALL_S
                total = memory["total"]
                progress("memory", total - memory["remaining"], total)
            if time.monotonic() > deadline:
                raise HypervisorError(f"the copy of the memory did not move for {_STALL_S:g} s")
            with suppress(HypervisorError):
                await self._timeline.until(self._begun, timeout_s=_POLL_S, what="the copy")

    def _begun(self) -> bool | None:
        return self._timeline.follower.stage in {Stage.CHECKPOINTS, Stage.ENDED} or None

    async def _why(self) -> str:
        answer = await self._command("query-migrate")
        return str(answer.get("error-desc") or self._timeline.follower.reason)

    async def _run_again(self) -> None:
        # From wherever the copy stands, back to a guest that runs here without replication, confirmed.
        await self.sever("the copy was given up")
        deadline = time.monotonic() + _END_S
        while True:
            status = (await self._command("query-migrate")).get("status", "none")
            run = await self._qemu.status()
            if status == "colo":
                with suppress(CommandRefused):
                    await self._command("x-colo-lost-heartbeat")
            elif status in {"none", "completed", "failed", "cancelled"}:
                if run == "running" or self._timeline.shut_down:
                    break
                with suppress(CommandRefused):
                    await self._command("cont")
            elif time.monotonic() > deadline - _END_S / 2:
                # The cut stream has not ended the copy. Never given in state colo, which it would leave undefined.
                with suppress(CommandRefused):
                    await self._command("migrate_cancel")
            if time.monotonic() > deadline:
                raise HypervisorError(f"the guest does not run again: migration {status}, run state {run}")
            await asyncio.sleep(_POLL_S)
        await self._clean()

    # --- The cycle ---------------------------------------------------------------------------------------------------

    async def checkpoint(self, epoch: int, phases: Phases) -> Checkpoint:
        """Make the next checkpoint (remus), or wait for it (colo); see the contract.

        Raises:
            HypervisorError: Nothing was acknowledged: the stream is broken, the deadline passed, or the guest has
                shut itself down.
        """
        if self.paced:
            cycle, gated, parts = await self._gated(epoch, phases)
        else:
            limit_s = await self._delay_now_ms() / 1000 + _ACK_S
            cycle = await self._timeline.until(
                self._next_cycle, timeout_s=limit_s, what="the next checkpoint"
            )
            # The comparing proxy holds output ever since the stream began: no checkpoint is without its barrier.
            gated, parts = True, {}
        acknowledged_ns = max(time.time_ns(), cycle.resumed_ns)
        await phases.checkpoint(epoch)
        await phases.postresume(epoch)
        return Checkpoint(
            epoch=epoch,
            stopped_ns=cycle.stopped_ns,
            resumed_ns=cycle.resumed_ns,
            acknowledged_ns=acknowledged_ns,
            gated=gated,
            parts_ns=parts,
        )

    def _next_cycle(self) -> Cycle | None:
        if self._timeline.cycles:
            return self._timeline.cycles.popleft()
        self._check_stream()
        return None

    def _check_stream(self) -> None:
        if self._timeline.follower.stage is not Stage.CHECKPOINTS:
            why = self._timeline.follower.reason or "replication has not begun"
            raise HypervisorError(f"no checkpoint can be acknowledged: {why}")

    async def _gated(self, epoch: int, phases: Phases) -> tuple[Cycle, bool, Mapping[str, int]]:
        # The barriers of an epoch are in place in time if they are all set while the guest is stopped: after its
        # STOP and before the RESUME of the checkpoint that this STOP begins. It may be QEMU's own checkpoint that
        # stops the guest, but then its RESUME must not come before our barriers are set.
        timeline = self._timeline
        self._check_stream()
        if timeline.shut_down:
            raise HypervisorError("the guest has shut itself down; there is nothing to checkpoint")
        timeline.cycles.clear()
        stops = timeline.follower.stops
        began_ns = time.perf_counter_ns()
        await self._command("stop")
        await timeline.until(
            lambda: timeline.follower.stops > stops or timeline.follower.stage is Stage.ENDED or None,
            timeout_s=_ACK_S,
            what="STOP",
        )
        self._check_stream()
        stopped_ns = time.perf_counter_ns()
        await phases.postsuspend(epoch)
        ready_ns = time.perf_counter_ns()
        # Something else began and ended a checkpoint, or ran the guest, while the barriers were being set.
        gated = not timeline.follower.running and not timeline.cycles
        timeline.cycles.clear()
        await self._trigger()
        cycle = await timeline.until(
            self._next_cycle, timeout_s=_ACK_S, what=f"the acknowledgement of epoch {epoch}"
        )
        if timeline.severed:
            raise HypervisorError(f"no checkpoint can be acknowledged: {timeline.follower.reason}")
        parts = {
            "stop": stopped_ns - began_ns,
            "postsuspend": ready_ns - stopped_ns,
            "transfer": time.perf_counter_ns() - ready_ns,
        }
        return cycle, gated, parts

    async def hurry(self) -> None:
        """Have QEMU take a checkpoint at once (colo): any write of the delay does."""
        if not self.paced:
            await self._trigger()

    async def _trigger(self) -> None:
        await self._command("migrate-set-parameters", {"x-checkpoint-delay": await self._delay_now_ms()})

    async def _delay_now_ms(self) -> int:
        # In mode colo a NIC's subkind may have chosen another delay than ours.
        if self.paced:
            return self._delay_ms
        parameters = await self._command("query-migrate-parameters")
        return int(parameters.get("x-checkpoint-delay", self._delay_ms))

    # --- Out of protection -------------------------------------------------------------------------------------------

    async def sever(self, reason: str) -> None:
        """Cut memory's stream and the disks' connections at once, without the first monitor.

        Guarantees:
            As the contract; does its part even where QEMU does not answer at all.
        """
        self._timeline.sever(reason)
        # The disks' connections with it, by our duplicates. A block node is never yanked: docs/decisions/0009.
        self._cut()
        try:
            await self._qemu.oob.yank({"type": "migration"})
        except CommandRefused:
            return  # not there: nothing to cut
        except HypervisorError as error:
            _log.warning("%s: yank: %s", self._qemu.name, error)

    async def resume_alone(self, group: DeviceGroup) -> None:
        """Leave replication and run without the secondary; see the contract.

        Raises:
            ExceptionGroup: A device could not be stopped; the guest runs all the same.
            HypervisorError: The guest does not run.
        """
        # It may have been fenced by a signal: the standby could not take over and has given it back.
        self._qemu.process.resume()
        await self.sever("going on alone")
        await self._awake()
        failed: Exception | None = None
        try:
            await group.stop_all(failover=True)
        except Exception as error:  # noqa: BLE001 - told below; a device's failure must not stop the guest
            failed = error
        await self._run_again()
        if failed is not None:
            raise failed

    async def freeze(self) -> None:
        """Stop the guest and keep it stopped.

        Guarantees:
            After a return its virtual CPUs do not run: QEMU is paused or, if it does not answer, stopped by a signal.
        """
        await self.sever("fenced")
        try:
            await self._awake()
            # COLO may be in the middle of a checkpoint that ends with a RESUME; with the stream cut it is over soon.
            await self._left_colo()
            await self._command("stop")
            if (await self._qemu.status()) == "running":
                raise HypervisorError("it runs on after stop")
        except HypervisorError as error:
            _log.warning("%s: stopped by SIGSTOP: %s", self._qemu.name, error)
            self._qemu.process.suspend()

    async def _left_colo(self) -> None:
        # A primary whose stream broke waits for a decision, and no longer resumes the guest by itself.
        deadline = time.monotonic() + _END_S
        while (await self._command("query-migrate")).get("status") == "colo":
            if self._timeline.follower.left or time.monotonic() > deadline:
                return
            await asyncio.sleep(_POLL_S)

    async def discard(self) -> None:
        """Take the guest off the network, then kill it and see it dead."""
        await self.sever("discarded")
        await self._let_go()
        await self._close_cable()

    def watch(self) -> AsyncIterator[DomainEvent]:
        """Yield what happens unasked, until `close`."""
        return self._timeline.watch()

    async def close(self) -> None:
        """Let go of this session's handles; the guest stays as it is. Idempotent."""
        await self._close_cable()
        await self._disks.close()
        await self._timeline.close()

    # --- Private -----------------------------------------------------------------------------------------------------

    @property
    def _monitor(self) -> Any:
        return self._qemu.monitor

    async def _command(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = _ACK_S
    ) -> Any:
        # QEMU's main loop waits for the guest's disk writes whenever it stops the guest, and they wait for a
        # secondary that may hang; the monitor is mute meanwhile. The cut ends their waiting and the monitor answers:
        # it is not the guest that is silent, and it must not be taken for dead.
        answering = asyncio.ensure_future(
            self._qemu.monitor.execute(command, arguments, timeout_s=timeout_s + _END_S)
        )
        try:
            done, _ = await asyncio.wait({answering}, timeout=timeout_s)
            if not done and not self._timeline.severed:
                await self.sever(
                    f"{command} got no answer within {timeout_s:g} s: the disks wait for the peer"
                )
            return await answering
        finally:
            answering.cancel()

    async def _awake(self) -> None:
        # A monitor that was silent while a dead peer held QEMU answers again after the cut.
        try:
            await self._qemu.status()
        except MonitorSilent:
            await self._qemu.reconnect()
            await self._disks.attach(self._qemu.monitor)

    async def _clean(self) -> None:
        await self._close_cable()
        switches, self._switches = self._switches, None
        if switches is not None:
            with suppress(CommandRefused):
                await switches.restore()

    def _disk_lost(self, why: str) -> None:
        # What the guest writes from now on does not reach the secondary, and QEMU would go on with checkpoints: the
        # stream is cut at once, so that the secondary stays at one whose disk writes it has.
        if (
            self._timeline.follower.stage in {Stage.STARTING, Stage.CHECKPOINTS}
            and not self._timeline.severed
        ):
            _log.warning("%s: the stream is cut: %s", self._qemu.name, why)
            self._cut()

    def _cut(self) -> None:
        # Also when QEMU is gone: our duplicates of the sockets would keep them open for the other side.
        if self._cable is not None:
            self._cable.cut()
        self._disks.cut_clients()

    async def _close_cable(self) -> None:
        cable, self._cable = self._cable, None
        if cable is not None:
            await cable.close()


async def _whole(work: Any) -> None:
    # Brought to its end whatever happens to the caller; what fails is logged, the first cause is on its way up.
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.error("after a failed start of replication: %s", error)
        if not isinstance(error, UnderstudyError):
            _log.exception("unexpected", exc_info=error)
