"""The pytest plugin of the kernel bed: tests marked ``kernel`` run inside it and are reported here, one by one.

A module's marked tests share one kernel. Not one for the whole session: what a test leaves in a kernel (interfaces,
modules, DRBD minors) cannot be swept as reliably as by a new kernel, modules can be run in any order and by several
workers, and each may ask for its own memory. Not one for each test: two seconds each. The tests are named to the
inner pytest one at a time, with the one that follows, as pytest-xdist does it: so fixtures of modules work, ``-x``,
``-k`` and node ids mean what they always mean, and a test that takes its kernel along costs no other its result. The
next one gets a new kernel.

A test has its ordinary timeout inside. If it does not even end then, its kernel is killed `GRACE_S` later.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from tests.testbeds.bed import need
from tests.testbeds.kernel.inside import Inside
from tests.testbeds.kernel.machine import INSIDE, MEMORY_MIB, KernelDied, Machine, missing_for_kernel
from tests.testbeds.kernel.post import LineClosed, Post, inside, outside

BOOT_S: Final = 60.0  # deadline of boot, imports and collection: 4 s on an idle machine
GRACE_S: Final = 10.0
END_S: Final = 15.0
ORDERED: Final = "UNDERSTUDY_BED_PYTEST"  # tells pytest inside that it is the inner half


class Bed:
    """One kernel, with a pytest inside that waits for orders.

    Args:
        config: of the outer pytest.
        module: whose tests it shall run.
        memory_mib: of the kernel.
    """

    def __init__(self, config: pytest.Config, module: Path, memory_mib: int) -> None:
        self.module = module
        self._config = config
        kept = {key: value for key, value in os.environ.items() if key.startswith("UNDERSTUDY_")}
        self.machine = Machine(
            [sys.executable, "-m", "pytest", *self._arguments()],
            cwd=config.rootpath,
            env={**kept, ORDERED: "1", "COVERAGE_FILE": "/run/tmp/coverage"},
            memory_mib=memory_mib,
        )
        self.post: Post = outside(self.machine.line.fileno(), self.machine.run)

    def _arguments(self) -> list[str]:
        config = self._config
        arguments = [
            str(self.module),
            f"--rootdir={config.rootpath}",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
        ]
        if config.inipath is not None:
            arguments += ["-c", str(config.inipath)]
        arguments += [f"--tb={config.option.tbstyle}", f"--capture={config.option.capture}"]
        if config.option.showlocals:
            arguments.append("--showlocals")
        if config.option.verbose > 0:
            arguments.append("-" + "v" * config.option.verbose)
        if getattr(config.option, "timeout", None) is not None:
            arguments.append(f"--timeout={config.option.timeout}")
        arguments += _coverage_arguments(config)
        return arguments

    def ready(self) -> None:
        """Wait until the tests are collected inside.

        Raises:
            KernelDied: the kernel died, or pytest inside did not get that far in time.
        """
        self.receive(BOOT_S)

    def receive(self, timeout_s: float) -> Any:
        """Return the next message from inside.

        Raises:
            KernelDied: none came; the kernel is dead now.
        """
        try:
            return self.post.receive(timeout_s)
        except TimeoutError:
            self.machine.kill()
            raise self.machine.died(f"was killed: it said nothing more for {timeout_s:.0f} s") from None
        except LineClosed:
            raise self._ended() from None

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
        self.order({"run": item.nodeid, "next": following.nodeid if following is not None else None})
        while True:
            message = self.receive(max(0.0, deadline - time.monotonic()))
            if "done" in message:
                return
            if "unknown" in message:
                raise KernelDied(
                    "\n".join(["pytest inside the bed did not find this test", *message["errors"]])
                )
            yield self._report(message["report"])

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

    def order(self, message: Any) -> None:
        """Send a message to the inside.

        Raises:
            KernelDied: nobody is there.
        """
        try:
            self.post.send(message)
        except LineClosed:
            raise self._ended() from None

    def _ended(self) -> KernelDied:
        try:
            return self.machine.died(f"ended, and pytest in it with status {self.machine.wait(END_S)}")
        except KernelDied as problem:
            return problem

    def close(self) -> None:
        """End the kernel, in peace if it can be, and take the coverage data along."""
        try:
            self.post.send(None)
            self.machine.wait(END_S)
        except (LineClosed, KernelDied):
            pass  # its last test has told
        finally:
            self._fetch_coverage()
            self.machine.close()

    def _fetch_coverage(self) -> None:
        made = self.machine.run / "coverage"
        plugin = self._config.pluginmanager.getplugin("_cov")
        if made.exists() and plugin is not None:
            # pytest-cov combines what lies beside its own file when it ends.
            shutil.copy(made, f"{plugin.cov_controller.cov.config.data_file}.{self.machine.run.name}")


def _coverage_arguments(config: pytest.Config) -> list[str]:
    options = config.option
    if config.pluginmanager.getplugin("_cov") is None or options.no_cov:
        return []
    sources = [f"--cov={source}" for source in options.cov_source or ()] or ["--cov"]
    branch = ["--cov-branch"] if options.cov_branch else []
    return [*sources, *branch, f"--cov-config={options.cov_config}", "--cov-report="]


class Outside:
    """Runs in the pytest process outside."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._bed: Bed | None = None
        self._broken: dict[Path, KernelDied] = {}
        self._timeout_s: dict[str, float] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Run a marked test inside; let pytest do as ever where the bed is missing, which skips it."""
        if not _is_ours(item) or missing_for_kernel():
            return None
        following = (
            nextitem if nextitem is not None and _is_ours(nextitem) and nextitem.path == item.path else None
        )
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item, following):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if following is None:
            self._close()
        # The test before may have left what it shares with this one, which was never set up here, standing.
        item.session._setupstate.teardown_exact(nextitem)
        return True

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip or fail a marked test where the bed is missing."""
        if _is_ours(item):
            need("kernel", missing_for_kernel())

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        """Take note of the timeout: the clock runs inside, and here only after it."""
        if not _is_ours(item):
            return None
        self._timeout_s[item.nodeid] = settings.timeout
        return True

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """End the last kernel before pytest-cov, around this, gathers its data."""
        try:
            return (yield)
        finally:
            self._close()

    def _reports(self, item: pytest.Item, following: pytest.Item | None) -> Iterator[pytest.TestReport]:
        began = time.monotonic()
        phase: Literal["setup", "call", "teardown"] = "setup"
        try:
            bed = self._bed_for(item)
            timeout_s = self._timeout_s.get(item.nodeid, math.inf)
            for report in bed.run(item, following, timeout_s + GRACE_S):
                phase = "call" if report.when == "setup" and report.passed else "teardown"
                yield report
        except KernelDied as problem:
            self._close()
            took_s = time.monotonic() - began
            yield _failure(item, phase, str(problem), took_s)
            if phase != "teardown":
                yield _failure(item, "teardown", None, 0.0)

    def _bed_for(self, item: pytest.Item) -> Bed:
        if item.path in self._broken:
            raise self._broken[item.path]
        if self._bed is not None and self._bed.module != item.path:
            self._close()
        if self._bed is None:
            marks = (
                each.get_closest_marker("kernel") for each in item.session.items if each.path == item.path
            )
            sizes = [mark.kwargs.get("memory_mib", MEMORY_MIB) for mark in marks if mark is not None]
            self._bed = Bed(self._config, item.path, max(sizes))
            try:
                self._bed.ready()
            except KernelDied as problem:
                self._broken[item.path] = problem
                raise
        return self._bed

    def _close(self) -> None:
        bed, self._bed = self._bed, None
        if bed is not None:
            bed.close()


def _is_ours(item: pytest.Item) -> bool:
    return item.get_closest_marker("kernel") is not None


def _failure(
    item: pytest.Item, phase: Literal["setup", "call", "teardown"], text: str | None, took_s: float
) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="passed" if text is None else "failed",
        longrepr=text,
        when=phase,
        duration=took_s,
    )


def pytest_configure(config: pytest.Config) -> None:
    """Be the outer half, or inside the bed the inner one, or inside at a developer's prompt nothing at all."""
    if os.environ.pop(ORDERED, None):
        config.pluginmanager.register(Inside(config, inside()), "understudy-kernel-inside")
    elif INSIDE not in os.environ:
        config.pluginmanager.register(Outside(config), "understudy-kernel-outside")
