"""The inner half of the pytest plugin: runs the tests that the outer half names, and reports each phase to it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.testbeds.post import LineClosed, Post


class Inside:
    """Runs in the pytest process inside the bed, in the place of pytest's own loop over all tests."""

    def __init__(self, config: pytest.Config, post: Post) -> None:
        self._config, self._post = config, post
        self._errors: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember what could not be collected here; outside it could."""
        if report.failed:
            self._errors.append(str(report.longrepr))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run tests by their names until the other side hangs up or says that it was the last one."""
        items = {item.nodeid: item for item in session.items}
        self._post.send({"ready": True, "errors": self._errors})
        while True:
            try:
                order = self._post.receive()
            except LineClosed:
                return True
            if order is None:
                return True
            item = items.get(order["run"])
            if item is None:
                raise pytest.UsageError(f"{order['run']} exists outside the bed only")
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=items.get(order["next"]))
            self._post.send({"done": item.nodeid})

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Send a phase's report."""
        data: Any = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._post.send({"report": data})

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Hand out the coverage data, which was kept on a file system that locks as a database expects it."""
        made = Path(os.environ["COVERAGE_FILE"])
        if made.exists():
            shutil.copy(made, Path(os.environ["BED_RUN"], "coverage"))
