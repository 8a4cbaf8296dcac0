"""The guests that this host has files for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from understudy.config import AgentConfig
from understudy.device import Mode
from understudy.errors import ConfigError, GuestNotFound, UnderstudyError
from understudy.guestfile import GuestFile, parse_guest, read_guest
from understudy.hypervisor import GuestConfig, Hypervisor

__all__ = ["GuestFiles"]


class GuestFiles:
    """The guest files of this host, read anew whenever they are asked for.

    Args:
        config: Where they are.
        hypervisors: By name.
    """

    def __init__(self, config: AgentConfig, hypervisors: Mapping[str, Hypervisor]) -> None:
        self._config = config
        self._hypervisors = hypervisors
        # Path → what it was when it was read, and what it said. A table of a hundred guests must not stall the rest.
        self._known: dict[Path, tuple[tuple[int, ...], tuple[GuestConfig, Hypervisor] | UnderstudyError]] = {}

    def load(
        self,
        name: str,
        *,
        mode: Mode | None = None,
        interval_ms: int | None = None,
        allow_unsafe: bool = False,
    ) -> tuple[GuestConfig, Hypervisor]:
        """Return a guest's configuration and its hypervisor.

        Args:
            name: The guest.
            mode: Instead of the file's.
            interval_ms: Milliseconds between checkpoints, instead of the file's policy.
            allow_unsafe: Unsafe findings may be taken for warnings, also where the file does not say so.

        Raises:
            GuestNotFound: No file describes it.
            ConfigError: Its file is wrong, or names a hypervisor that is not installed.
        """
        file = self._file(name)
        if allow_unsafe:
            file = replace(file, protection=replace(file.protection, allow_unsafe=True))
        return self._parse(file, mode, interval_ms)

    def all(self) -> tuple[dict[str, tuple[GuestConfig, Hypervisor]], list[str]]:
        """Return all guests whose files are right, and what is wrong with the others."""
        good: dict[str, tuple[GuestConfig, Hypervisor]] = {}
        problems: list[str] = []
        paths = self._paths()
        for path in paths:
            said = self._recall(path)
            if isinstance(said, UnderstudyError):
                problems.append(str(said))
            elif said[0].name in good:
                also = good[said[0].name][0].source
                problems.append(str(ConfigError(str(path), "name", f"{said[0].name!r} is also in {also}")))
            else:
                good[said[0].name] = said
        for gone in set(self._known).difference(paths):
            del self._known[gone]
        return good, problems

    def _recall(self, path: Path) -> tuple[GuestConfig, Hypervisor] | UnderstudyError:
        try:
            stat = path.stat()
        except OSError as error:
            return ConfigError(str(path), "", f"cannot be read: {error.strerror}")
        mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = self._known.get(path)
        if known is not None and known[0] == mark:
            return known[1]
        said: tuple[GuestConfig, Hypervisor] | UnderstudyError
        try:
            said = self._parse(self._read(path), None, None)
        except UnderstudyError as error:
            said = error.with_traceback(None)
        self._known[path] = (mark, said)
        return said

    def digest(self, name: str) -> str:
        """Return a digest of a guest's file, to compare it with the other host's.

        Raises:
            GuestNotFound: No file describes it.
        """
        return hashlib.sha256(self._file(name).source.read_bytes()).hexdigest()[:16]

    def _paths(self) -> list[Path]:
        return sorted(self._config.directories.guests.glob("*.toml"))

    def _read(self, path: Path) -> GuestFile:
        return read_guest(path, self._config.host, {self._config.host, *self._config.peers})

    def _file(self, name: str) -> GuestFile:
        wrong: ConfigError | None = None
        # The file that has the guest's name is looked at first: its error is what the user wants to see.
        for path in sorted(self._paths(), key=lambda path: path.stem != name):
            try:
                file = self._read(path)
            except ConfigError as error:
                if path.stem == name:
                    raise
                wrong = wrong or error
                continue
            if file.name == name:
                return file
        hint = f" ({wrong})" if wrong else ""
        raise GuestNotFound(f"no file in {self._config.directories.guests} describes a guest {name!r}{hint}")

    def _parse(
        self, file: GuestFile, mode: Mode | None, interval_ms: int | None
    ) -> tuple[GuestConfig, Hypervisor]:
        hypervisor = self._hypervisors.get(file.hypervisor)
        if hypervisor is None:
            known = ", ".join(sorted(self._hypervisors)) or "none is installed"
            raise ConfigError(str(file.source), "hypervisor", f"{file.hypervisor!r} is not installed", known)
        protection = file.protection
        if interval_ms is not None:
            options = MappingProxyType({"period_ms": float(interval_ms)})
            protection = replace(protection, interval="fixed", interval_options=options)
        if mode is not None:
            protection = replace(protection, mode=mode)
        file = replace(file, mode=mode or file.mode, protection=protection)
        return parse_guest(file, hypervisor), hypervisor
