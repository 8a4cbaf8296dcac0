"""The program of a host's agent, with places at which the host is to die, and with faults that must be seen.

Which of them is wished for is in a file that the test writes while the agent runs. At such a place nothing leaves the
host any more; the agent says so in another file, and its kernel is killed from outside.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tests.testbeds.kernel.whole import write_whole
from understudy.cli import main as understudy
from understudy.device import OpenContext, ProtectedDevice
from understudy.netlink import NLM_F_REQUEST, acknowledged, ask, message
from understudy_drbd.thin import ThinVolume
from understudy_netbuffer import subkind
from understudy_qemu.primary import QemuPrimary

AFTER_CUT: Final = (
    "after-cut"  #: the guest stands still, its disks are cut; nobody has asked QEMU for a checkpoint
)
IN_TRANSFER: Final = "in-transfer"  #: a part of the checkpoint has left this host
AFTER_LOAD: Final = (
    "after-load"  #: the copy holds the checkpoint and has said so; this host's agent has not heard it
)
NO_GATE: Final = "no-gate"  #: a fault: nothing holds the guest's output, from the next protection on
NO_WAY_BACK: Final = "no-way-back"  #: a fault: a disk on DRBD stays as new as it is, whatever the memory

_PLACES: Final = (AFTER_CUT, IN_TRANSFER, AFTER_LOAD)
_EPOCH_S: Final = 1.0
_PART_BYTES: Final = 32 << 10
_CABLE: Final = "vec0"
_SENT = Path(f"/sys/class/net/{_CABLE}/statistics/tx_bytes")
_RTM_NEWLINK: Final = 16
_IFF_UP: Final = 1


class Wishes:
    """What one host's agent is to do.

    Args:
        common: The directory that the test sees, too.
        host: The host's name.
    """

    def __init__(self, common: Path, host: str) -> None:
        self._file = common / f"{host}.wishes"
        self._there = common / f"{host}.there"

    # --- The test's side ---------------------------------------------------------------------------------------------

    def wish(self, *words: str) -> None:
        """Wish for these and nothing else."""
        self._there.unlink(missing_ok=True)
        write_whole(self._file, " ".join(words))

    async def there(self, timeout_s: float) -> int:
        """Wait until the agent is at the place that was wished for; return the epoch that it is at."""
        async with asyncio.timeout(timeout_s):
            while not self._there.exists():  # noqa: ASYNC110 - a file tells nobody
                await asyncio.sleep(0.002)
        return int(self._there.read_text())

    # --- The agent's side --------------------------------------------------------------------------------------------

    def wished(self, word: str) -> bool:
        """Tell whether this is wished for now."""
        return self._file.exists() and word in self._file.read_text().split()

    def arrive(self, epoch: int) -> None:
        """Tell the test, and do nothing any more."""
        self.tell(epoch)
        time.sleep(3600)  # the event loop stands still, and with it the agent, until its kernel dies

    def tell(self, epoch: int) -> None:
        """Tell the test."""
        write_whole(self._there, str(epoch))


class WatchedPhases:
    """A checkpoint's phases, with places.

    Args:
        phases: The engine's.
        wishes: This host's.
        place: What was wished for before the guest was stopped.
    """

    def __init__(self, phases: Any, wishes: Wishes, place: str) -> None:
        self._phases = phases
        self._wishes = wishes
        self._place = place

    async def postsuspend(self, epoch: int) -> None:
        """Set the barriers; QEMU is asked for the checkpoint when this returns."""
        await self._phases.postsuspend(epoch)
        if self._place == AFTER_CUT:
            self._wishes.arrive(epoch)
        if self._place == IN_TRANSFER:
            threading.Thread(target=self._watch, args=(epoch,), daemon=True).start()

    def _watch(self, epoch: int) -> None:
        # The guest stands still and DRBD has sent all it wrote: what leaves now is the checkpoint.
        began = int(_SENT.read_text())
        while int(_SENT.read_text()) < began + _PART_BYTES:
            time.sleep(0.002)  # a counter tells nobody
        _take_down(_CABLE)
        self._wishes.tell(epoch)

    async def checkpoint(self, epoch: int) -> None:
        """Hear that the copy holds it."""
        if self._place == AFTER_LOAD:
            self._wishes.arrive(epoch)
        await self._phases.checkpoint(epoch)

    async def preresume(self, epoch: int) -> None:
        """Let it run."""
        await self._phases.preresume(epoch)

    async def postresume(self, epoch: int) -> None:
        """Hear that it runs."""
        await self._phases.postresume(epoch)


def _take_down(interface: str) -> None:
    # Without a process, which would take as long as a part of the checkpoint.
    link = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(interface), 0, _IFF_UP)
    ask(socket.NETLINK_ROUTE, acknowledged(message(_RTM_NEWLINK, NLM_F_REQUEST, link)))


def _put_in(wishes: Wishes) -> None:
    take, back, hold = QemuPrimary.checkpoint, ThinVolume.roll_back, subkind.NETBUFFER.open

    async def checkpoint(self: QemuPrimary, epoch: int, phases: Any) -> Any:
        place = next((word for word in _PLACES if wishes.wished(word)), "")
        if place:
            await asyncio.sleep(_EPOCH_S)  # the guest is to do something in the epoch that is lost
        return await take(self, epoch, WatchedPhases(phases, wishes, place))

    def roll_back(self: ThinVolume, epoch: int) -> None:
        if not wishes.wished(NO_WAY_BACK):
            back(self, epoch)

    async def hold_or_not(context: OpenContext) -> Any:
        return ProtectedDevice() if wishes.wished(NO_GATE) else await hold(context)

    # In a process of its own, for as long as it lives; mypy is right that nothing else may.
    QemuPrimary.checkpoint = checkpoint  # type: ignore[method-assign]
    ThinVolume.roll_back = roll_back  # type: ignore[method-assign]
    subkind.NETBUFFER = replace(subkind.NETBUFFER, open=hold_or_not)  # type: ignore[misc]


def main() -> None:
    """Run ``understudy ARGUMENT…`` on a host whose wishes are heard; before them the common directory and its name."""
    common, host = sys.argv[1:3]
    _put_in(Wishes(Path(common), host))
    sys.argv[1:3] = []
    understudy()
