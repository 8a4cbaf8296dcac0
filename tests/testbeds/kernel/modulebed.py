"""The kernel that one module's tests share, with a pytest inside that runs them as they are named to it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.testbeds.kernel.machine import KernelDied, Machine
from tests.testbeds.kernel.post import outside
from tests.testbeds.machine import MachineDied
from tests.testbeds.post import LineClosed

__all__ = ["ORDERED", "ModuleBed", "NotCollected", "NotPrepared"]

BOOT_S: Final = 60.0  # deadline of boot, imports and collection: 4 s on an idle machine
END_S: Final = 15.0
ORDERED: Final = "UNDERSTUDY_BED_PYTEST"  #: tells pytest inside that it is the inner half


class NotCollected(RuntimeError):
    """The tests cannot be collected inside."""


class NotPrepared(RuntimeError):
    """What the tests want done outside could not be done."""


class ModuleBed:
    """One kernel, with a pytest inside that waits for orders.

    Args:
        config: of the outer pytest.
        module: whose tests it shall run.
        memory_mib: of the kernel.
    """

    def __init__(self, config: pytest.Config, module: Path, memory_mib: int) -> None:
        self.module = module
        self._config = config
        self._busy = False
        kept = {key: value for key, value in os.environ.items() if key.startswith("UNDERSTUDY_")}
        self.machine = Machine(
            [sys.executable, "-m", "pytest", *self._arguments()],
            cwd=config.rootpath,
            env={**kept, ORDERED: "1", "COVERAGE_FILE": "/run/tmp/coverage"},
            memory_mib=memory_mib,
        )
        self._post = outside(self.machine.line.fileno(), self.machine.run)

    def _arguments(self) -> list[str]:
        config = self._config
        arguments = [str(self.module), f"--rootdir={config.rootpath}"]
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
            KernelDied: the kernel died, or pytest inside did not get that far in time.
            NotCollected: a module that can be imported outside cannot be imported inside.
        """
        message = self._receive(time.monotonic() + BOOT_S, f"pytest inside was not ready after {BOOT_S:g} s")
        if message["errors"]:
            raise NotCollected("\n".join(["pytest inside the bed cannot collect it:", *message["errors"]]))

    def run(
        self, item: pytest.Item, following: pytest.Item | None, timeout_s: float
    ) -> Iterator[pytest.TestReport]:
        """Run one test and yield the report of each phase as it ends.

        Args:
            item: the test.
            following: the test that this kernel runs next: fixtures that both share stay.
            timeout_s: until its last phase has ended.

        Raises:
            KernelDied: the kernel died meanwhile, or was killed because the time was over.
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
        except KernelDied as problem:
            return problem

    def close(self) -> None:
        """End the kernel, in peace if it can be, and take the coverage data along."""
        try:
            # A test that still runs was interrupted by Ctrl-C; pytest inside would not listen before its end.
            if not self._busy:
                self._post.send(None)
                self.machine.wait(END_S)
        except (LineClosed, KernelDied):
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
