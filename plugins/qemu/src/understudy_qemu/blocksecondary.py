"""The secondary's half of block replication: the image, the two overlays, and what QEMU is made of.

::

    quorum disk0 <- replication (secondary) <- active <- hidden <- image <== NBD export <== the primary's writes

The image takes the primary's writes as they come; before each, its old content goes to `hidden`. The copy's own
writes go to `active`. A checkpoint empties both. At takeover QEMU commits `active` into the image while the guest
already runs, and takes both overlays out of its graph; only then may their files go. The replication node stays
below the quorum, done, for as long as the process lives; later sessions as a primary pass it by.

Source: QEMU block/replication.c, replication_start and replication_stop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from understudy.device import OpenContext, ProtectedDevice, Verdict
from understudy.errors import HypervisorError, PeerError
from understudy_qemu.disksession import DISKS, block_nodes
from understudy_qemu.machine import file_node, image_nodes, quorum_node

__all__ = ["SecondaryDisk"]

_log = logging.getLogger(__name__)

_POLL_S = 0.05
_COMMIT_S = 20.0  # how long a teardown waits for QEMU's commit before it leaves the rest to the background

# Commits that outlived their session; kept referenced until their overlays are gone.
_committing: set[asyncio.Task[None]] = set()


class SecondaryDisk(ProtectedDevice):
    """One disk of the copy on the secondary's host; a `DriveProvider` for its QEMU.

    Args:
        context: What `Subkind.open` got.
    """

    __slots__ = ("_context", "_disk", "_failover", "_own_directory", "_session", "active", "hidden")

    def __init__(self, context: OpenContext) -> None:
        self._context = context
        self._session = context.services.get(DISKS)
        self._disk = self._session.replica(context.device.name).disk
        self._failover = False
        elsewhere = self._session.overlay_directory
        directory = context.directory if elsewhere is None else elsewhere / context.guest
        self._own_directory = None if elsewhere is None else directory  # made and removed by us
        disk = self._disk
        self.active = directory / f"{disk.name}-active.qcow2"  #: the copy's own writes since the checkpoint
        self.hidden = (
            directory / f"{disk.name}-hidden.qcow2"
        )  #: what the primary's writes have replaced since

    # --- Before the copy is launched -----------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Make the image fit and the overlays anew.

        Raises:
            HypervisorError: The image may not be overwritten, or does not fit; no room; ``qemu-img`` failed.

        Guarantees:
            After a failure or cancellation no overlay is left.
        """
        size_bytes = self._session.replica(self._disk.name).size_bytes
        try:
            if self._own_directory is not None:
                self._own_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            await self._session.prepare_image(self._disk.name)
            for overlay in (self.active, self.hidden):
                await self._session.create_overlay(overlay, size_bytes)
        except BaseException:
            self._unlink()
            raise

    @property
    def top_node(self) -> str:
        """Name of the quorum below the guest's device."""
        return self._disk.name

    def blockdevs(self) -> Sequence[Mapping[str, Any]]:
        """Return the image's nodes, and the quorum with everything between.

        The overlays are made inside the quorum, so that nothing else holds them: they close when QEMU has committed.
        """
        name = self._disk.name
        hidden = {
            "driver": "qcow2",
            "node-name": f"{name}-hidden",
            "file": file_node(self.hidden, f"{name}-hidden-file"),
            "backing": f"{name}-image",
        }
        active = {
            "driver": "qcow2",
            "node-name": f"{name}-active",
            "file": file_node(self.active, f"{name}-active-file"),
            "backing": hidden,
        }
        replication = {
            "driver": "replication",
            "node-name": f"{name}-replication",
            "mode": "secondary",
            "top-id": name,
            "file": active,
        }
        quorum = quorum_node(name, "")
        quorum["children"] = [replication]
        return (*image_nodes(self._disk), quorum)

    # --- The session ---------------------------------------------------------------------------------------------

    async def serve(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002 - none is needed
        """Answer ``export``: make the image writable for the primary, and say where."""
        if method != "export":
            raise PeerError(f"{self._disk.name} knows no request {method!r}")
        # Nobody finds the image who does not know the session.
        return await self._session.export(
            name=f"{self._context.session}/{self._disk.name}",
            node=f"{self._disk.name}-image",
            export_id=f"{self._disk.name}-export",
            address=self._context.local_address,
        )

    async def error(self) -> None:
        """Raise if an overlay or the image failed.

        Raises:
            HypervisorError: With QEMU's words.
        """
        fault = await self._session.fault(self._disk.name)
        if fault:
            raise HypervisorError(fault)

    async def stop(self, *, failover: bool) -> None:
        """Let nothing of the primary reach the images any more; the takeover itself is the domain's command.

        A planned end needs nothing: the copy is killed, and the image is a replica of some moment.
        """
        if failover:
            self._failover = True
            await self._session.stop_server()

    async def teardown(self, verdict: Verdict) -> None:
        """Remove the overlays: at once if the copy is discarded, else when QEMU has committed them.

        Guarantees:
            An overlay that still holds data of a guest that runs is never removed. If the commit takes long it goes
            on in the background, and the overlays are removed at its end.

        Raises:
            HypervisorError: QEMU could not commit: the overlays hold data and stay.
        """
        if verdict is Verdict.DISCARD or not self._failover:
            self._unlink()
            return
        committing = asyncio.create_task(self._after_commit(), name=f"commit of {self._disk.name}")
        _committing.add(committing)
        committing.add_done_callback(_committing.discard)
        done, _ = await asyncio.wait({committing}, timeout=_COMMIT_S)
        if done:
            await committing
        else:
            _log.info("%s of %s: QEMU still commits %s", self._disk.name, self._context.guest, self.active)

    async def _after_commit(self) -> None:
        overlays = {f"{self._disk.name}-active", f"{self._disk.name}-hidden"}
        while overlays & (nodes := await block_nodes(self._session.monitor)).keys():
            # While QEMU commits, a mirror's filter stands above the overlay; replication's own status is no guide,
            # it calls every takeover an I/O error until the commit has ended.
            if "mirror_top" not in nodes.values():
                status = await self._session.status()
                if status:
                    problem = f"the commit into {self._disk.path} failed, {self.active} holds data and stays: {status}"
                    _log.error("%s of %s: %s", self._disk.name, self._context.guest, problem)
                    raise HypervisorError(problem)
            await asyncio.sleep(_POLL_S)
        self._unlink()

    def _unlink(self) -> None:
        for overlay in (self.active, self.hidden):
            overlay.unlink(missing_ok=True)
        if self._own_directory is not None:
            # The last disk to go removes it.
            with suppress(OSError):
                self._own_directory.rmdir()
