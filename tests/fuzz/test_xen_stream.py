"""Whatever bytes come as a migration stream: an error with its place, or a stream; never anything else, never a hang.

A fuzzer that sees which code an input reaches looks for more. Its inputs are kept in ``corpus/xen_stream``, those that
once broke something among them, under names that say what.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testbeds.rounds import LONG, rounds

HERE = Path(__file__).parent
CORPUS = HERE / "corpus" / "xen_stream"
RUN_S = rounds(20, 900)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheels for this Python"
)


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 120)
def test_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    found, broken = tmp_path / "found", tmp_path / "broken"
    found.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "xen_stream.py"),
            str(found),
            str(CORPUS),
            f"-runs={rounds(8000, 500_000)}",
            f"-max_total_time={RUN_S}",
            "-max_len=6000",
            "-timeout=60",
            "-report_slow_units=60",
            "-rss_limit_mb=512",
            f"-artifact_prefix={broken}-",
        ],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=RUN_S + 100,
        check=False,
    )
    inputs = sorted(tmp_path.glob("broken-*"))
    if done.returncode or inputs:
        for path in inputs:
            shutil.copy(path, Path.cwd() / f"xen_stream-{path.name}")
        pytest.fail(
            f"{done.stderr[-3000:]}\ninputs, to be kept in {CORPUS}: {[path.name for path in inputs]}"
        )
    assert "Done " in done.stderr, done.stderr[-1000:]
    if LONG:
        assert any(found.iterdir())


def test_the_corpus_is_examined_without_a_fuzzer() -> None:
    program = (
        "import pathlib, sys; from tests.fuzz.xen_stream import examine\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()): examine(path.read_bytes()); print(path.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(CORPUS)],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == len(list(CORPUS.iterdir())) > 10
