"""The machine that tests share, with a pytest inside that runs them as they are named to it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.testbeds.machine import BedMachine, MachineDied
from tests.testbeds.post import LineClosed, Post

__all__ = ["ORDERED", "Bed", "ModuleBed", "NotCollected", "NotPrepared"]

END_S: Final = 15.0
ORDERED: Final = "UNDERSTUDY_BED_PYTEST"  #: tells pytest inside that it is the inner half


class NotCollected(RuntimeError):
    """The tests cannot be collected inside."""


class NotPrepared(RuntimeError):
    """What the tests want done outside could not be done."""


@dataclass(frozen=True)
class Bed:
    """What must be known of a bed to run tests in it.

    Args:
        name: of the bed and of the marker.
        missing: says what it lacks here.
        runs_inside: says of a marked test whether it runs inside.
        sizes: what a test may ask more of by its marker, with the defaults.
        boot: starts a machine with a command, a directory, an environment and sizes; returns it with the outer end of
            its line.
        inside: returns the inner end.
        boot_s: deadline of boot, imports and collection.
        shared: whether the tests of all modules share one machine.
        plugins: the only plugins that pytest loads inside; all that are installed by default.
    """

    name: str
    missing: Callable[[], list[str]]
    runs_inside: Callable[[pytest.Mark], bool]
    sizes: Mapping[str, int]
    boot: Callable[[Sequence[str], Path, Mapping[str, str], Mapping[str, int]], tuple[BedMachine, Post]]
    inside: Callable[[], Post]
    boot_s: float
    shared: bool = False
    plugins: tuple[str, ...] | None = None


class ModuleBed:
    """One machine, with a pytest inside that waits for orders.

    Args:
        bed: whose machine it is.
        config: of the outer pytest.
        modules: whose tests it shall run.
        sizes: of the machine.
    """

    def __init__(
        self, bed: Bed, config: pytest.Config, modules: Sequence[Path], sizes: Mapping[str, int]
    ) -> None:
        self.modules = modules
        self._bed = bed
        self._config = config
        self._busy = False
        kept = {key: value for key, value in os.environ.items() if key.startswith("UNDERSTUDY_")}
        env = {**kept, ORDERED: "1", "COVERAGE_FILE": "/run/coverage"}
        if bed.plugins is not None:
            # Coverage comes first, else what is imported before it is not counted.
            covered = ("pytest_cov.plugin",) if _coverage_arguments(config) else ()
            env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            env["PYTEST_PLUGINS"] = ",".join((*covered, *bed.plugins))
        command = [sys.executable, "-m", "pytest", *self._arguments()]
        self.machine, self._post = bed.boot(command, config.rootpath, env, sizes)

    def _arguments(self) -> list[str]:
        config = self._config
        arguments = [*map(str, self.modules), f"--rootdir={config.rootpath}"]
        arguments += ["-p", "no:cacheprovider", "-p", "no:xdist"]
        if config.inipath is not None:
            arguments += ["-c", str(config.inipath)]
        arguments += [f"--tb={config.option.tbstyle}", f"--capture={config.option.capture}"]
        if config.option.showlocals:
            arguments.append("--showlocals")
        if config.option.verbose > 0:
            arguments.append("-" + "v" * config.option.verbose)
        for each in config.option.override_ini or ():
            arguments += ["-o", each]
        for each in config.option.pythonwarnings or ():
            arguments += ["-W", each]
        if getattr(config.option, "timeout", None) is not None:
            arguments.append(f"--timeout={config.option.timeout}")
        arguments += _coverage_arguments(config)
        return arguments

    def ready(self) -> None:
        """Wait until the tests are collected inside.

        Raises:
            MachineDied: the machine died, or pytest inside did not get that far in time.
            NotCollected: a module that can be imported outside cannot be imported inside.
        """
        late = f"pytest inside was not ready after {self._bed.boot_s:g} s"
        message = self._receive(time.monotonic() + self._bed.boot_s, late)
        if message["errors"]:
            raise NotCollected("\n".join(["pytest inside the bed cannot collect it:", *message["errors"]]))

    def run(
        self, item: pytest.Item, following: pytest.Item | None, timeout_s: float
    ) -> Iterator[pytest.TestReport]:
        """Run one test and yield the report of each phase as it ends.

        Args:
            item: the test.
            following: the test that this machine runs next: fixtures that both share stay.
            timeout_s: until its last phase has ended.

        Raises:
            MachineDied: the machine died meanwhile, or was killed because the time was over.
        """
        deadline = time.monotonic() + timeout_s
        over = f"the test with its fixtures did not end within {timeout_s:g} s"
        self._busy = True
        try:
            self._post.send({"run": item.nodeid, "next": following and following.nodeid})
        except LineClosed:
            raise self._ended() from None
        while "done" not in (message := self._receive(deadline, over)):
            yield self._report(message["report"])
        self._busy = False

    def _receive(self, deadline: float, over: str) -> Any:
        try:
            return self._post.receive(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            self.machine.kill()
            raise self.machine.died(f"was killed: {over}") from None
        except LineClosed:
            raise self._ended() from None

    def _report(self, data: dict[str, Any]) -> pytest.TestReport:
        # JSON has made lists of the tuples; that a skip's reason is a tuple, for one, is relied upon.
        for name in ("longrepr", "location"):
            if isinstance(data[name], list):
                data[name] = tuple(data[name])
        for name in ("sections", "user_properties"):
            data[name] = [tuple(each) for each in data[name]]
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        assert isinstance(report, pytest.TestReport)
        return report

    def _ended(self) -> MachineDied:
        try:
            return self.machine.died(f"ended, and pytest in it with status {self.machine.wait(END_S)}")
        except MachineDied as problem:
            return problem

    def close(self) -> None:
        """End the machine, in peace if it can be, and take the coverage data along."""
        try:
            # A test that still runs was interrupted by Ctrl-C; pytest inside would not listen before its end.
            if not self._busy:
                self._post.send(None)
                self.machine.wait(END_S)
        except (LineClosed, MachineDied):
            pass  # its last test has told
        finally:
            self._fetch_coverage()
            self.machine.close()

    def _fetch_coverage(self) -> None:
        made = self.machine.run / "coverage"
        plugin = self._config.pluginmanager.getplugin("_cov")
        if made.exists() and plugin is not None and plugin.cov_controller is not None:
            # pytest-cov combines what lies beside its own file when it ends.
            shutil.copy(made, f"{plugin.cov_controller.cov.config.data_file}.{self.machine.run.name}")


def _coverage_arguments(config: pytest.Config) -> list[str]:
    options = config.option
    if config.pluginmanager.getplugin("_cov") is None or options.no_cov:
        return []
    sources = [f"--cov={source}" for source in options.cov_source or ()] or ["--cov"]
    branch = ["--cov-branch"] if options.cov_branch else []
    return [*sources, *branch, f"--cov-config={options.cov_config}", "--cov-report="]
