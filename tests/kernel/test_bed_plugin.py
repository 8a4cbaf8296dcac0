"""What the plugin of the kernel bed makes of tests that pass, fail, hang and kill their kernel, seen from outside.

Each test runs a pytest of its own, on modules in a directory of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.testbeds.bed import need
from tests.testbeds.kernel.machine import missing_for_kernel

pytestmark = pytest.mark.timeout(180)

ROOT: Final = Path(__file__).parents[2]
INI: Final = f"""
[pytest]
pythonpath = . {ROOT}
addopts = --import-mode=importlib --strict-markers
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
timeout = 20
markers = kernel
"""
CONFTEST: Final = """
pytest_plugins = ("tests.testbeds.kernel.plugin",)

def pytest_configure():
    from tests.testbeds import plugin
    plugin.GRACE_S = 1.0
"""


class Project:
    """A directory with test modules, and a pytest run on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tmp").mkdir()
        (root / "pytest.ini").write_text(INI)
        (root / "conftest.py").write_text(CONFTEST)

    def module(self, name: str, text: str) -> None:
        """Write a module."""
        (self.root / name).write_text(
            "import os, signal, subprocess, time\nimport pytest\n" + textwrap.dedent(text)
        )

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start pytest."""
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=junit.xml", *arguments],
            cwd=self.root,
            # Run directories of its kernels are made in TMPDIR: so what is left of them can be told from others'.
            env={**os.environ, "TMPDIR": str(self.root / "tmp"), "UNDERSTUDY_REQUIRE": "", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, status: int = 0, **env: str) -> str:
        """Run pytest to its end and return what it says."""
        process = self.start(*arguments, **env)
        try:
            said, _ = process.communicate(timeout=100)
        finally:
            process.kill()
        assert process.returncode == status, said
        assert self.left() == [], said
        return said

    def cases(self) -> dict[str, ET.Element]:
        """Return the test cases of the JUnit file by name."""
        tree = ET.parse(self.root / "junit.xml")  # noqa: S314 - as above
        return {case.attrib["name"]: case for case in tree.iter("testcase")}

    def left(self) -> list[str]:
        """Return run directories and kernels that are there."""
        found = [
            str(path) for path in (self.root / "tmp").iterdir() if path.name.startswith("understudy-bed-")
        ]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:
                continue
            if words.startswith(b"linux.uml") and str(self.root).encode() in words:
                found.append(path.parent.name)
        return found


@pytest.fixture
def project(tmp_path: Path) -> Project:
    need("kernel", missing_for_kernel())
    return Project(tmp_path)


def outcome(case: ET.Element) -> str:
    return case[0].tag if len(case) and case[0].tag in ("failure", "error", "skipped") else "passed"


@pytest.mark.slow
def test_every_outcome(project: Project) -> None:
    project.module(
        "test_one.py",
        """
        made = []

        @pytest.fixture(scope="module")
        def shared():
            made.append(1)
            yield len(made)

        @pytest.mark.kernel
        def test_passes(shared, record_property):
            record_property("kernel", os.uname().nodename)
            assert shared == 1

        def test_outside():
            assert "UNDERSTUDY_BED" not in os.environ

        @pytest.mark.kernel
        async def test_fails(shared):
            import asyncio
            print("said inside")
            await asyncio.sleep(0.01)
            assert os.environ["UNDERSTUDY_BED"] == "elsewhere"

        @pytest.mark.kernel
        @pytest.mark.parametrize("number", [1, 2])
        def test_parameter(number):
            if number == 2:
                pytest.skip("two is too many")

        @pytest.mark.kernel
        @pytest.mark.xfail(reason="known")
        def test_expected():
            assert False

        @pytest.fixture
        def breaks():
            yield
            raise OSError("not swept")

        @pytest.mark.kernel
        def test_torn_down(breaks):
            pass

        @pytest.mark.kernel
        @pytest.mark.timeout(1)
        def test_hangs():
            time.sleep(100)

        @pytest.mark.kernel
        @pytest.mark.timeout(1)
        def test_hangs_beyond_signals():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            time.sleep(100)

        @pytest.mark.kernel
        def test_panics():
            with open("/proc/sysrq-trigger", "w") as trigger:
                trigger.write("c")
            time.sleep(100)

        @pytest.mark.kernel
        def test_after_it():
            assert os.uname().nodename == "bed"
        """,
    )
    project.module(
        "test_two.py",
        """
        @pytest.fixture(scope="module")
        def outer():
            yield
            raise OSError("not swept outside")

        def test_outside_too(outer): pass

        @pytest.mark.kernel
        def test_other_module(): pass
        """,
    )
    said = project.run(status=1)
    assert "4 failed, 7 passed, 1 skipped, 1 xfailed, 2 errors" in said
    cases = project.cases()
    assert {name: outcome(case) for name, case in cases.items()} == {
        "test_passes": "passed",
        "test_outside": "passed",
        "test_fails": "failure",
        "test_parameter[1]": "passed",
        "test_parameter[2]": "skipped",
        "test_expected": "skipped",
        "test_torn_down": "error",
        "test_hangs": "failure",
        "test_hangs_beyond_signals": "failure",
        "test_panics": "failure",
        "test_after_it": "passed",
        "test_outside_too": "passed",
        "test_other_module": "error",
    }
    assert cases["test_passes"].find("properties/property[@value='bed']") is not None
    assert float(cases["test_fails"].attrib["time"]) >= 0.01
    assert "AssertionError: assert 'kernel' == 'elsewhere'" in said
    assert "said inside" in said
    assert "OSError: not swept\n" in said
    assert "OSError: not swept outside\n" in said
    assert "Timeout (>1.0s) from pytest-timeout" in said
    assert "the kernel of the bed was killed: the test with its fixtures did not end within 2 s" in said
    assert "Kernel panic - not syncing: sysrq triggered crash" in (cases["test_panics"][0].text or "")
    assert cases["test_parameter[2]"][0].attrib["message"] == "two is too many"


@pytest.mark.slow
def test_choice_of_tests(project: Project) -> None:
    project.module(
        "test_choice.py",
        """
        pytestmark = pytest.mark.kernel
        def test_first(): pass
        def test_second(): assert False
        def test_third(): pass
        class TestMore:
            def test_fourth(self): pass
        """,
    )
    assert "4 tests collected" in project.run("--collect-only", "-q")
    project.run("-x", status=1)
    assert list(project.cases()) == ["test_first", "test_second"]
    project.run("-k", "not first", "test_choice.py::test_first", "test_choice.py::TestMore")
    assert list(project.cases()) == ["test_fourth"]
    # By several workers, each with a kernel of its own.
    assert "1 failed, 3 passed" in project.run("-n", "2", status=1)


@pytest.mark.slow
def test_coverage_is_merged(project: Project) -> None:
    (project.root / "covered.py").write_text("def asked(who):\n    if who:\n        return 1\n    return 2\n")
    project.module(
        "test_covered.py",
        """
        import covered
        @pytest.mark.kernel
        def test_inside(): assert covered.asked("UNDERSTUDY_BED" in os.environ) == 1
        """,
    )
    project.run("--cov=covered", "--cov-report=json")
    report = json.loads((project.root / "coverage.json").read_text())
    assert report["files"]["covered.py"]["executed_lines"] == [1, 2, 3]
    assert report["files"]["covered.py"]["missing_lines"] == [4]
    assert not list(project.root.glob(".coverage.*"))


def test_what_cannot_be_collected_inside_says_so(project: Project) -> None:
    project.module(
        "test_import.py",
        """
        if "UNDERSTUDY_BED" in os.environ:
            import no_such_module
        @pytest.mark.kernel
        def test_a(): pass
        @pytest.mark.kernel
        def test_b(): pass
        """,
    )
    said = project.run(status=1)
    assert "2 errors" in said
    assert said.count("No module named 'no_such_module'") >= 2


def test_a_missing_bed_is_a_reason_to_skip_unless_it_is_demanded(project: Project) -> None:
    project.module("test_missing.py", "@pytest.mark.kernel\ndef test_a(): pass\n")
    # There is a Python on this path, but no kernel.
    assert "testbed kernel needs the program linux.uml" in project.run("-rs", PATH="/bin/none")
    said = project.run(status=1, PATH="/bin/none", UNDERSTUDY_REQUIRE="qemu,kernel")
    assert "and UNDERSTUDY_REQUIRE demands it" in said


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_pytest_itself_is_ended(project: Project, sent: signal.Signals) -> None:
    project.module(
        "test_long.py",
        """
        from pathlib import Path
        @pytest.mark.kernel
        def test_long():
            Path(os.environ["BED_RUN"], "inside").touch()
            time.sleep(15)
        """,
    )
    process = project.start()
    try:
        until(lambda: list(project.root.glob("tmp/*/inside")) != [])
        assert len(project.left()) >= 2
        process.send_signal(sent)
        process.communicate(timeout=30)
        # A killed pytest cannot remove directories; the kernel at least goes by itself.
        until(lambda: not [each for each in project.left() if each.isdecimal()])
        assert sent is signal.SIGKILL or project.left() == []
    finally:
        process.kill()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.05)


def test_what_is_done_outside_before_the_boot(project: Project) -> None:
    made = project.root / "made"
    project.module(
        "test_prepared.py",
        f"""
        from pathlib import Path
        def build():
            Path({str(made)!r}).write_text("outside")
        @pytest.mark.kernel(outside=build)
        def test_it():
            assert Path({str(made)!r}).read_text() == "outside"
        """,
    )
    project.module(
        "test_unprepared.py",
        """
        def build():
            raise ValueError("no such thing to build")
        @pytest.mark.kernel(outside=build)
        def test_not_begun():
            raise AssertionError("begun")
        """,
    )
    said = project.run("test_prepared.py", "test_unprepared.py", status=1)
    assert made.read_text() == "outside"
    assert "1 passed, 1 error" in said
    assert "no such thing to build" in said
    assert "begun" not in said.replace("test_not_begun", "")
