"""What is done to a DRBD resource: through the kernel where a takeover waits for it, else with DRBD's own tools.

Every run of a tool has a deadline; none is started while a guest is paused for a checkpoint. At a takeover the only one
is the one that applies the activity log, as long as DRBD is 8.4. Of any other DRBD all is asked through its tools.

Source: drbdadm(8), drbdsetup(8), drbdmeta(8).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from understudy.device import DeviceInfo
from understudy.errors import UnderstudyError
from understudy.threads import TimedThreads
from understudy_drbd.genl import DrbdRefused, Genl
from understudy_drbd.resource import Resource, resource_of
from understudy_drbd.status import PROC, State, read_json, read_proc, version_of

__all__ = ["DISK_KEYS", "MAJOR", "Control", "ToolFailed", "disk_path", "minor_of", "run_tool", "threads"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

#: Under which of these properties a hypervisor tells what a disk is on the host.
DISK_KEYS: Final = ("path", "pdev_path")

MAJOR: Final = 147  #: device number of DRBD's block devices; Linux Documentation/admin-guide/devices.txt

MAPPER_S: Final = 5.0  #: for what the device mapper does without waiting for a disk

_TOOL_S: Final = 20.0
_LOOK_S: Final = 2.0
_POLL_S: Final = 0.02
_RELEASE_S: Final = 10.0
_RELEASE_POLL_S: Final = 0.2
_IN_USE: Final = "held open"  # of what the kernel's SS_DEVICE_IN_USE is called; drbd_strings.c
_NINE: Final = (9,)
_FORCE_IS_AN_OPTION: Final = (8, 4)  # of drbdadm's; before, it was drbdsetup's, and passed on
_ALONE: Final = frozenset({"StandAlone", "Unconfigured"})

#: Where everything of this plugin that may block in the kernel is run.
threads: Final = TimedThreads("understudy-drbd")


class ToolFailed(UnderstudyError):
    """One of DRBD's tools failed.

    Args:
        argv: How it was called.
        problem: How it ended, with its own words.
    """

    def __init__(self, argv: tuple[str, ...], problem: str) -> None:
        super().__init__(f"{' '.join(argv)}: {problem}")
        self.argv = argv
        self.problem = problem


def run_tool(*argv: str, timeout_s: float = _TOOL_S) -> str:
    """Run one of DRBD's tools and return what it prints; blocks.

    Args:
        argv: The tool and its arguments.
        timeout_s: How long it may take, seconds.

    Raises:
        ToolFailed: It is not installed, did not end in time (it and what it started are killed), or failed; with its
            words.
    """
    try:
        tool = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise ToolFailed(argv, f"it cannot be started: {error.strerror}") from error
    with tool:
        try:
            printed, complained = tool.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(tool.pid, signal.SIGKILL)
            raise ToolFailed(argv, f"it did not end within {timeout_s:g} s") from None
    if tool.returncode:
        words = " ".join((complained + printed).decode(errors="replace").split())
        raise ToolFailed(argv, f"status {tool.returncode}: {words[:400] or 'no word'}")
    return printed.decode(errors="replace")


def disk_path(device: DeviceInfo) -> Path | None:
    """Return what a guest's disk is on the host, ``None`` if the hypervisor does not tell."""
    found = next((device.properties[key] for key in DISK_KEYS if device.properties.get(key)), None)
    return None if found is None else Path(str(found))


def minor_of(path: Path) -> int | None:
    """Return the minor number of the DRBD device at `path`, ``None`` if it is none. Blocks."""
    try:
        number = path.stat().st_rdev
    except OSError:
        return None
    return os.minor(number) if path.is_block_device() and os.major(number) == MAJOR else None


class Control:
    """One resource on this host.

    Args:
        resource: Which.
        version: Of the DRBD that is loaded, e.g. ``(8, 4, 11)``.
        genl: The way to its kernel module; ``None``: through its tools.

    Make one with `find`.
    """

    def __init__(self, resource: Resource, version: tuple[int, ...], genl: Genl | None) -> None:
        self.resource = resource
        self.version = version
        self._genl = genl
        self._options: bytes | None = None  # of the disk that was let go
        self._apply_al: tuple[str, ...] = ("drbdadm", "apply-al", resource.name)
        # A request whose caller was cancelled goes on in its thread; what undoes its work must come after it.
        self._lock = threading.Lock()

    @classmethod
    async def find(cls, path: Path) -> Control | None:
        """Return the resource of the DRBD device at `path`, ``None`` if that is no such device.

        Raises:
            UnderstudyError: DRBD is not loaded, or its configuration on this host does not know the device.
        """
        minor = await threads.run(minor_of, path, timeout_s=_LOOK_S)
        if minor is None:
            return None
        try:
            proc = await threads.run(_read, PROC, timeout_s=_LOOK_S)
        except FileNotFoundError:
            raise UnderstudyError(f"{path} is a DRBD device, but DRBD is not loaded here") from None
        host = os.uname().nodename
        resource = resource_of(await _in_thread("drbdadm", "dump-xml"), host, minor)
        if resource is None:
            raise UnderstudyError(f"DRBD's configuration has no resource with {path} on host {host}")
        version = version_of(proc)
        genl = None if version >= _NINE else await threads.run(Genl.find, minor, timeout_s=_LOOK_S)
        return cls(resource, version, genl)

    async def prepare(self) -> None:
        """Ask beforehand what a takeover would have to wait for.

        Raises:
            ToolFailed: ``drbdadm`` does not tell how it would apply the activity log.
            TimeoutError: It hangs.
        """
        if self._genl is not None:
            # It would start the same program; the guest is not to wait for its reading the configuration.
            told = await _in_thread("drbdadm", "--dry-run", "apply-al", self.resource.name)
            lines = told.splitlines()
            if len(lines) == 1 and lines[0].endswith(" apply-al"):
                self._apply_al = tuple(lines[0].split())

    async def state(self) -> State:
        """Return the resource's state at this moment.

        Raises:
            UnderstudyError: It cannot be told.
            TimeoutError: DRBD does not answer.
        """
        if self.version < _NINE:
            return read_proc(await threads.run(_read, PROC, timeout_s=_LOOK_S), self.resource.minor)
        printed = await _in_thread("drbdsetup", "status", self.resource.name, "--json", timeout_s=_LOOK_S)
        return read_json(printed, self.resource.minor)

    async def demand_mirrored(self) -> State:
        """Return the state, which must be that every write that has ended is on both hosts.

        Raises:
            UnderstudyError: It is not, and how it is.
        """
        state = await self.state()
        if not state.mirrored:
            raise UnderstudyError(
                f"DRBD resource {self.resource.name} is not Connected and UpToDate on both hosts: {state}"
            )
        return state

    async def until(self, *connections: str, timeout_s: float) -> State:
        """Wait until the connection is in one of these states.

        Raises:
            UnderstudyError: It was not in time.
        """
        state = await self.state()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while state.connection not in connections:
                    await asyncio.sleep(_POLL_S)
                    state = await self.state()
        if state.connection not in connections:
            wanted = " or ".join(connections)
            raise UnderstudyError(
                f"DRBD resource {self.resource.name} is not {wanted} within {timeout_s:g} s: {state}"
            )
        return state

    async def generation(self) -> str:
        """Return DRBD's identifier of the data, which is the same on two hosts whose data are.

        Source: drbdmeta(8), "get-gi"; the lowest bit tells whether the host is primary.
        """
        printed = await _in_thread("drbdadm", "get-gi", self.resource.name)
        try:
            current = int(printed.split(":", 1)[0].split()[-1], 16)
        except (IndexError, ValueError):
            raise UnderstudyError(f"DRBD's generation identifier makes no sense: {printed[:100]!r}") from None
        return f"{current & ~1:016X}"

    # --- Changes -----------------------------------------------------------------------------------------------------

    async def disconnect(self) -> None:
        """Give the peer up, without its consent; harmless when there is none any more."""
        if (await self.state()).connection in _ALONE:
            return
        try:
            if self.version >= _FORCE_IS_AN_OPTION:
                await self._change(Genl.disconnect, "disconnect", "--force")
            else:
                await self._drbdadm("--", "--force", "disconnect")
        except (ToolFailed, DrbdRefused):
            # DRBD may have given it up by itself at this moment, for instance over a split brain.
            if (await self.state()).connection not in _ALONE:
                raise

    async def connect(self, *, discard_mine: bool = False) -> None:
        """Look for the peer again.

        Args:
            discard_mine: If the two disagree, this host's writes are the ones to go.
        """
        if (await self.state()).connection == "StandAlone":
            await self._drbdadm("connect", *(("--discard-my-data",) if discard_mine else ()))

    async def detach(self) -> None:
        """Let go of the disk below; harmless when that has been done."""
        if (await self.state()).disk == "Diskless":
            return
        if self._genl is not None:
            # Not told any more while an earlier attempt is under way.
            self._options = await self._ask("show", self._genl.options) or self._options
        await self._change(Genl.detach, "detach")

    async def attach(self) -> None:
        """Take the disk below as it is now, its activity log applied first: nobody closed it properly."""
        await self._ask("apply-al", partial(run_tool, *self._apply_al))
        if self._genl is None or self._options is None:
            await self._drbdadm("attach")
        else:
            await self._ask("attach", partial(self._genl.attach, self._options))

    async def promote(self) -> None:
        """Become DRBD's primary."""
        await self._change(Genl.promote, "primary")

    async def demote(self) -> None:
        """Become DRBD's secondary; whoever has the device open is given some seconds to let go of it.

        A domain of Xen's is gone before the kernel has closed its disks.

        Raises:
            ToolFailed: DRBD refuses; also if somebody still has it open.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + _RELEASE_S
        while True:
            try:
                return await self._drbdadm("secondary")
            except ToolFailed as failed:
                if _IN_USE not in failed.problem or loop.time() > until:
                    raise
            await asyncio.sleep(_RELEASE_POLL_S)

    async def distrust_peer(self) -> None:
        """Have the next resynchronisation copy the whole disk; as DRBD's primary, without a connection.

        Guarantees:
            It is written down on this disk, and true whichever host turns out to be the one that is copied to.
        """
        await self._change(Genl.distrust_peer, "invalidate-remote")

    async def distrust_own(self) -> None:
        """Have the next resynchronisation copy the whole disk to here; as DRBD's secondary, without a connection."""
        await self._drbdadm("invalidate")

    async def _change(self, direct: Callable[[Genl], None], command: str, *arguments: str) -> None:
        if self._genl is None:
            await self._drbdadm(command, *arguments)
        else:
            await self._ask(command, partial(direct, self._genl))

    async def _drbdadm(self, command: str, *arguments: str) -> None:
        words = " ".join((command, *arguments))
        await self._ask(words, partial(run_tool, "drbdadm", command, *arguments, self.resource.name))

    async def _ask(self, words: str, call: Callable[[], T]) -> T:
        _log.info("DRBD resource %s: %s", self.resource.name, words)
        return await threads.run(self._one_at_a_time, call, timeout_s=2 * _TOOL_S)

    def _one_at_a_time(self, call: Callable[[], T]) -> T:
        # What hangs in the kernel holds this for good; those who come later must not hang with it.
        if not self._lock.acquire(timeout=_TOOL_S):
            raise UnderstudyError(
                f"DRBD resource {self.resource.name}: an earlier request still hangs in the kernel"
            )
        try:
            return call()
        finally:
            self._lock.release()


async def _in_thread(*argv: str, timeout_s: float = _TOOL_S) -> str:
    return await threads.run(partial(run_tool, *argv, timeout_s=timeout_s), timeout_s=timeout_s + 1)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii")
