"""Whatever bytes come as a migration stream: an error with its place, or a stream; never anything else, never a hang.

A fuzzer that sees which code an input reaches looks for more. Its inputs are kept in ``corpus/xen_stream``, those that
once broke something among them, under names that say what.
"""

from __future__ import annotations

import base64
import importlib.util
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.testbeds.rounds import LONG, rounds

HERE = Path(__file__).parent
CORPUS = HERE / "corpus" / "xen_stream"
RUN_S = rounds(20, 900)
MOST_CHARACTERS = 2000

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheels for this Python"
)


def fuzz(script: Path, *arguments: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run a fuzzer to its end."""
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
        check=False,
    )


def complaint(done: subprocess.CompletedProcess[str], inputs: list[Path]) -> str:
    """Return what a fuzzer found: in its first line the error with its place, then the inputs, then its last words."""
    # The Python half writes to stdout; libFuzzer, to stderr, what ended the process.
    *_, error = done.stdout.partition("=== Uncaught Python exception: ===\n")
    lines = error.splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    if places:
        last = places[-1]
        first = f"{lines[0]} <- {' '.join(line.strip() for line in lines[last : last + 2])}"
    else:
        ended = [line for line in done.stderr.splitlines() if "SUMMARY: " in line]
        first = f"status {done.returncode}: {ended[-1] if ended else 'the fuzzer has not said why'}"
    packed = {path.name: base64.b64encode(zlib.compress(path.read_bytes(), 9)).decode() for path in inputs}
    told = [f"{name}, base64 of zlib: {data[:MOST_CHARACTERS]}" for name, data in packed.items()]
    return "\n".join([first, *told, error[-MOST_CHARACTERS:] or done.stderr[-MOST_CHARACTERS:]])


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 120)
def test_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    found, broken = tmp_path / "found", tmp_path / "broken"
    found.mkdir()
    done = fuzz(
        HERE / "xen_stream.py",
        str(found),
        str(CORPUS),
        f"-runs={rounds(8000, 500_000)}",
        f"-max_total_time={RUN_S}",
        "-max_len=6000",
        "-timeout=60",
        "-report_slow_units=60",
        "-rss_limit_mb=512",
        f"-artifact_prefix={broken}-",
        limit_s=RUN_S + 100,
    )
    inputs = sorted(tmp_path.glob("broken-*"))
    if done.returncode or inputs:
        for path in inputs:
            shutil.copy(path, Path.cwd() / f"xen_stream-{path.name}")
        pytest.fail(f"{complaint(done, inputs)}\nthe inputs are to be kept in {CORPUS}")
    assert "Done " in done.stderr, done.stderr[-1000:]
    if LONG:
        assert any(found.iterdir())


@pytest.mark.parametrize(
    ("body", "begins"),
    [
        (
            "assert given != b'ab', 'what is\\nwrong'",
            "AssertionError: what is <- File \"{script}\", line 3, in examine assert given != b'ab', ",
        ),
        ("import time; time.sleep(9)", "status 70: SUMMARY: libFuzzer: timeout"),
    ],
    ids=["error", "timeout"],
)
def test_a_finding_is_told_in_the_first_line(tmp_path: Path, body: str, begins: str) -> None:
    script, corpus = tmp_path / "script.py", tmp_path / "corpus"
    script.write_text(
        "import sys, atheris\ndef examine(given):\n"
        f"    {body}\natheris.Setup(sys.argv, examine)\natheris.Fuzz()\n"
    )
    corpus.mkdir()
    (corpus / "one").write_bytes(b"ab")
    done = fuzz(
        script, str(corpus), "-runs=4", "-timeout=1", f"-artifact_prefix={tmp_path}/broken-", limit_s=50
    )
    told = complaint(done, sorted(tmp_path.glob("broken-*"))).splitlines()
    assert told[0].startswith(begins.format(script=script))
    packed = told[1].partition("base64 of zlib: ")[2]
    assert told[1].startswith("broken-")
    assert zlib.decompress(base64.b64decode(packed)) in {b"ab", b""}


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
    if done.returncode:
        error = done.stderr.splitlines()[-1:]
        pytest.fail(f"{' '.join(error)} after {done.stdout.split()[-1:]}\n{done.stderr[-MOST_CHARACTERS:]}")
    assert len(done.stdout.split()) == len(list(CORPUS.iterdir())) > 10
