"""Disk images: what ``qemu-img`` knows of them, and whose they are.

An image carries the identity of the guest whose data it holds, in a file beside it (``IMAGE.understudy``; for a
block device in the plugin's state directory). It decides what may be overwritten on a secondary: a replica of the
same guest that is no newer than what the primary has; anything else only when the operator says so.

====================  ==================================================================
member                meaning
====================  ==================================================================
``id``                UUID of the guest, made when Understudy first started it; the same for all its disks
``guest``, ``disk``   names, for people and against a mixed-up path
``generation``        of the record when this host last became owner (primary) or was copied to (secondary)
``role``              ``primary``: the guest ran from it; ``secondary``: a copy was written to it
====================  ==================================================================
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from understudy.device import ReplicationMode
from understudy.errors import HypervisorError

__all__ = ["ImageIdentity", "ImageInfo", "Images", "free_bytes", "is_volatile"]

DEADLINE_S: Final = 30.0
_SUFFIX: Final = ".understudy"
_VOLATILE: Final = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What ``qemu-img info`` says."""

    format: str
    size_bytes: int  #: as the guest sees it
    allocated_bytes: int  #: what it takes on the host
    backing: str  #: name of the backing file, ``""`` if there is none
    corrupt: bool  #: a qcow2 image that was found damaged


@dataclass(frozen=True, slots=True)
class ImageIdentity:
    """Whose data an image holds; the table in the module's documentation."""

    id: str
    guest: str
    disk: str
    generation: int
    role: ReplicationMode

    def __str__(self) -> str:
        return f"{self.disk} of guest {self.guest} ({self.role.value}, generation {self.generation}, id {self.id})"


class Images:
    """The images of one host.

    Args:
        qemu_img: The program, found on PATH unless it is a path.
        state: Where the identities of block devices are kept.
        deadline_s: Deadline of one ``qemu-img``, seconds.
    """

    def __init__(self, qemu_img: str, state: Path, deadline_s: float = DEADLINE_S) -> None:
        self._qemu_img = qemu_img
        self._state = state
        self._deadline_s = deadline_s

    async def info(self, path: Path) -> ImageInfo:
        """Look at an image, also while a guest uses it.

        Raises:
            HypervisorError: It does not exist, or is no image; ``qemu-img``'s words are in the text.
        """
        output = await self._run("info", "-U", "--output=json", str(path))
        facts: Mapping[str, Any] = json.loads(output)
        specific = facts.get("format-specific", {}).get("data", {})
        return ImageInfo(
            format=str(facts["format"]),
            size_bytes=int(facts["virtual-size"]),
            allocated_bytes=int(facts.get("actual-size", 0)),
            backing=str(facts.get("backing-filename", "")),
            corrupt=bool(specific.get("corrupt", False)),
        )

    async def size_bytes(self, path: Path, image_format: str) -> int:
        """Return the size of a disk as its guest sees it, bytes.

        Args:
            path: The image.
            image_format: As the guest file has it; never guessed, because a guest can write any header into a raw
                image.
        """
        output = await self._run("info", "-U", "-f", image_format, "--output=json", str(path))
        return int(json.loads(output)["virtual-size"])

    async def create(self, path: Path, image_format: str, size_bytes: int) -> None:
        """Make an empty image; one that is there is replaced.

        Raises:
            HypervisorError: ``qemu-img`` failed: no room, no such directory.

        Guarantees:
            After a failure or cancellation `path` is as before.
        """
        draft = path.with_name(f".{path.name}.new")
        try:
            await self._run("create", "-q", "-f", image_format, str(draft), str(size_bytes))
            os.replace(draft, path)  # noqa: PTH105 - a rename takes no time
        finally:
            draft.unlink(missing_ok=True)

    async def check(self, path: Path, image_format: str) -> str:
        """Look for damage in an image that nobody uses.

        Returns:
            What is wrong, ``""`` if nothing is (raw images cannot tell).
        """
        if image_format == "raw":
            return ""
        try:
            await self._run("check", "-q", "-f", image_format, str(path), timeout_s=20 * self._deadline_s)
        except HypervisorError as error:
            return str(error)
        return ""

    # --- Identity ------------------------------------------------------------------------------------------------

    def identity(self, path: Path) -> ImageIdentity | None:
        """Return whose data an image holds, ``None`` if nobody wrote it down.

        Raises:
            HypervisorError: It is written down, but not so that it can be read.
        """
        place = self._identity_file(path)
        try:
            data = json.loads(place.read_text(encoding="utf-8"))
            return ImageIdentity(**{**data, "role": ReplicationMode(data["role"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise HypervisorError(
                f"the identity of the image {path} in {place} cannot be read: {error}"
            ) from error

    def write_identity(self, path: Path, identity: ImageIdentity) -> None:
        """Write down whose data an image holds.

        Guarantees:
            A crash leaves the old identity or the new one.
        """
        place = self._identity_file(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f"{place.name}.new")
        with draft.open("w", encoding="utf-8") as sink:
            json.dump({**asdict(identity), "role": identity.role.value}, sink, indent=1)
            sink.flush()
            os.fsync(sink.fileno())
        draft.replace(place)

    def forget_identity(self, path: Path) -> None:
        """Remove what is written down about an image. Idempotent."""
        self._identity_file(path).unlink(missing_ok=True)

    def why_not_overwrite(self, path: Path, wanted: ImageIdentity) -> str:
        """Tell why an image must not be overwritten by a copy.

        Args:
            path: The secondary's image.
            wanted: The identity that it would get, with the primary's generation.

        Returns:
            One sentence, ``""`` if it may be: it does not exist, or holds an older replica of the same disk.
        """
        if not path.exists():
            return ""
        try:
            found = self.identity(path)
        except HypervisorError as error:
            return str(error)
        if found is None:
            return f"{path} exists and is not known to be a replica of {wanted.disk} of guest {wanted.guest}"
        if found.id != wanted.id or found.disk != wanted.disk:
            return f"{path} holds something else: {found}"
        if found.generation > wanted.generation:
            return f"{path} is newer than the primary's disk (generation {wanted.generation}): {found}"
        return ""

    async def prepare_replica(
        self, path: Path, image_format: str, size_bytes: int, wanted: ImageIdentity, *, overwrite: bool
    ) -> None:
        """Make an image ready to be overwritten by a copy of the primary's disk.

        Args:
            path: The secondary's image; made if missing.
            image_format: As the guest file has it.
            size_bytes: Size of the primary's disk as the guest sees it.
            wanted: The identity that it gets, with the primary's generation; its role is set to secondary.
            overwrite: The operator says that it may hold anything.

        Raises:
            HypervisorError: It must not be overwritten, is of another size, or cannot be made. It is untouched then.
        """
        reason = "" if overwrite else self.why_not_overwrite(path, wanted)
        if reason:
            raise HypervisorError(f"{reason}; overwrite_secondary = true would allow to overwrite it")
        if _is_there(path):
            found = await self.size_bytes(path, image_format)
            if found != size_bytes:
                raise HypervisorError(
                    f"{path} has {found} bytes, the primary's {wanted.disk} has {size_bytes}; remove it or make it anew"
                )
        else:
            await self.create(path, image_format, size_bytes)
        self.write_identity(path, replace(wanted, role=ReplicationMode.SECONDARY))

    # --- Inside --------------------------------------------------------------------------------------------------

    def _identity_file(self, path: Path) -> Path:
        with suppress(FileNotFoundError):
            if stat.S_ISBLK(path.stat().st_mode):
                return self._state / (str(path).strip("/").replace("/", "-") + _SUFFIX)
        return path.with_name(path.name + _SUFFIX)

    async def _run(self, *arguments: str, timeout_s: float | None = None) -> bytes:
        limit = self._deadline_s if timeout_s is None else timeout_s
        try:
            process = await asyncio.create_subprocess_exec(
                self._qemu_img,
                *arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            raise HypervisorError(f"{self._qemu_img} cannot be started: {error.strerror}") from error
        try:
            async with asyncio.timeout(limit):
                output, words = await process.communicate()
        except TimeoutError:
            raise HypervisorError(f"{self._qemu_img} {arguments[0]} did not end within {limit:g} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await asyncio.shield(process.wait())
        if process.returncode != 0:
            said = " ".join(words.decode(errors="replace").split()) or f"status {process.returncode}"
            raise HypervisorError(said.removeprefix("qemu-img: "))
        return output


def free_bytes(directory: Path) -> int:
    """Return the room that is free for us where `directory` is, or where its nearest existing parent is."""
    facts = os.statvfs(_existing(directory))
    return facts.f_bavail * facts.f_frsize


def is_volatile(directory: Path) -> bool:
    """Tell whether what lies in `directory` is in memory and lost at a reboot."""
    place = str(_existing(directory).resolve())
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, found, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if (place + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best):
            best, kind = mount, found
    return kind in _VOLATILE


def _is_there(path: Path) -> bool:
    return path.exists()


def _existing(directory: Path) -> Path:
    while not directory.exists():
        directory = directory.parent
    return directory
