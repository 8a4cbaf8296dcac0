"""``understudy stream``, as it is called."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.unit.xen.streams.samples import DATA, capture, libxc_record, pages, remus, saved
from understudy.cli.program import program
from understudy_xen.streams.verifier import Verifier


def run(*args: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(program, ["stream", *args], input=stdin)


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "stream"
    path.write_bytes(remus(checkpoints=3))
    return path


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_verify_what_is_right(stream: Path) -> None:
    result = run("verify", str(stream))
    assert result.exit_code == 0, result.output
    assert "xl stream of an x86 HVM guest from Xen 4.17" in result.stdout
    assert "3 checkpoints, ends with a whole checkpoint, without END" in result.stdout
    facts = json.loads(run("verify", str(stream), "--format", "json").stdout)
    assert (facts["form"], facts["checkpoints"], facts["ended"]) == ("xl", 3, False)
    assert facts["checkpoint_end"] == facts["bytes"] == stream.stat().st_size
    assert "error" not in facts


@pytest.mark.parametrize("name", ["pvh-save.gz", "pvh-remus.gz"])
def test_verify_compressed(name: str) -> None:
    assert run("verify", str(DATA / name)).exit_code == 0


def test_verify_what_is_wrong(tmp_path: Path) -> None:
    good = remus(checkpoints=2)
    path = write(tmp_path / "bad", good + b"\x77" * 8)
    result = run("verify", str(path))
    assert result.exit_code == 1
    assert f"offset {len(good)}: libxc record 0x77777777" in result.stderr
    facts = json.loads(run("verify", str(path), "--format", "json").stdout)
    assert facts["checkpoints"] == 2
    error = facts["error"]
    assert (error["kind"], error["exit"], error["offset"]) == ("StreamError", 1, len(good))
    assert (error["layer"], error["start"]) == ("libxc", len(good))


def test_verify_what_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "cut", saved()[:-3])
    result = run("verify", str(path), "--format", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "StreamCut"


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_what_cannot_be_read(tmp_path: Path, command: str) -> None:
    gone = tmp_path / "gone"
    whole = (DATA / "pvh-save.gz").read_bytes()
    short, noise = (
        write(tmp_path / "short.gz", whole[:500]),
        write(tmp_path / "noise.gz", whole[:10] + b"\xff" * 50),
    )
    for path, reason in (
        (gone, "No such file"),
        (tmp_path, "directory"),
        (short, "compression"),
        (noise, "compression"),
    ):
        result = run(command, str(path))
        assert result.exit_code == 1, path
        assert reason in result.stderr
        assert str(path) in result.stderr
    assert json.loads(run(command, str(gone), "--format", "json").stdout)["error"]["kind"] == "SourceError"


def test_the_form_can_be_demanded(stream: Path) -> None:
    assert run("verify", "--form", "xl", str(stream)).exit_code == 0
    assert run("verify", "--form", "libxc", str(stream)).exit_code == 1
    assert run("verify", "--form", "qemu", str(stream)).exit_code == 2


def test_bytes_after_the_end_are_remarked(tmp_path: Path) -> None:
    path = write(tmp_path / "more", saved() + b"hello")
    result = run("verify", str(path))
    assert result.exit_code == 0
    assert "remark: 5 bytes follow the stream's END" in result.stderr


def test_inspect_text(stream: Path) -> None:
    result = run("inspect", str(stream))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["offset", "bytes", "layer", "record"]
    assert any(line.split()[2:4] == ["libxc", "PAGE_DATA"] and "5 pages of 6 pfns" in line for line in lines)
    assert [line.split(":")[0] for line in lines if line.startswith("checkpoint")] == [
        "checkpoint 1",
        "checkpoint 2",
        "checkpoint 3",
    ]
    assert any("pages per checkpoint, without the first: 2 to 3, 2.5 in the mean" in line for line in lines)
    short = run("inspect", "--checkpoints", str(stream)).stdout
    assert "PAGE_DATA" not in short
    assert "checkpoint 3" in short


def test_inspect_json(tmp_path: Path) -> None:
    data = remus(checkpoints=2) + libxc_record(pages([1, 2]))
    path = write(tmp_path / "stream", data + b"\x77" * 8)
    result = run("inspect", "--format", "json", str(path))
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert [part["checkpoint"] for part in told["parts"]] == [1, 2, None]
    assert [part["pages"] for part in told["parts"]] == [5, 2, 2]
    at = 0
    for part in told["parts"]:
        assert part["offset"] == at
        for record in part["records"]:
            assert record["offset"] == at
            at += record["bytes"]
        assert at == part["offset"] + part["bytes"]
    assert told["error"]["offset"] == at == len(data)
    without = json.loads(run("inspect", "--checkpoints", "--format", "json", str(path)).stdout)
    assert [part["records"] for part in without["parts"]] == [[], [], []]


def test_inspect_what_is_no_stream(tmp_path: Path) -> None:
    for data in (b"", b"x", b"GIF89a and so on"):
        path = write(tmp_path / "x", data)
        told = json.loads(run("inspect", "--format", "json", str(path)).stdout)
        assert told["parts"] == []
        assert told["error"]["offset"] == min(len(data), 0 if len(data) > 8 else len(data))


def test_split_by_layer(stream: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("split", str(stream), str(out))
    assert result.exit_code == 0, result.output
    parts = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(parts) == {"config.json", "xl-preamble.bin", "libxl.bin", "libxc.bin"}
    assert json.loads(parts["config.json"])["c_info"]["name"] == "web"
    assert sum(len(part) for name, part in parts.items() if name != "config.json") == stream.stat().st_size
    verifier = Verifier()
    verifier.feed(parts["libxc.bin"])
    again = run("split", str(stream), str(out))
    assert again.exit_code == 1
    assert "File exists" in again.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == parts


def test_split_by_checkpoint(stream: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("split", str(stream), str(out), "--by", "checkpoint", "--format", "json")
    assert result.exit_code == 0, result.output
    names = [f"checkpoint-{number:06}.bin" for number in (1, 2, 3)]
    assert list(json.loads(result.stdout)["files"]) == names
    assert b"".join((out / name).read_bytes() for name in names) == stream.read_bytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_split_into_a_plain_stream(tmp_path: Path, *, compressed: bool) -> None:
    data = capture("pvh-remus.gz")
    path = write(tmp_path / "stream", gzip.compress(data) if compressed else data)
    last, second = tmp_path / "last", tmp_path / "second"
    assert run("split", str(path), str(last), "--by", "plain").exit_code == 0
    assert run("split", str(path), str(second), "--by", "plain", "--checkpoint", "2").exit_code == 0
    for out, count in ((last, 24 + 27), (second, 24 + 9)):
        facts = json.loads(run("verify", str(out / "plain.xl"), "--format", "json").stdout)
        assert (facts["ended"], facts["checkpoints"], facts["pages"]) == (True, 0, count)


def test_what_a_dead_sender_left_becomes_plain(tmp_path: Path) -> None:
    data = remus(checkpoints=2)
    for tail in (libxc_record(pages([1]))[:-9], b"\x77" * 30):
        path = write(tmp_path / "stream", data + tail)
        out = tmp_path / f"out-{len(tail)}"
        assert run("split", str(path), str(out)).exit_code == 1
        assert not out.exists()
        result = run("split", str(path), str(out), "--by", "plain")
        assert result.exit_code == 0, result.output
        assert "remark: " in result.stderr
        assert run("verify", str(out / "plain.xl")).exit_code == 0


def test_split_that_cannot_be(stream: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("split", str(stream), str(out), "--checkpoint", "1").exit_code == 2
    assert run("split", str(stream), str(out), "--by", "plain", "--checkpoint", "4").exit_code == 2
    plain = write(tmp_path / "plain", saved())
    assert run("split", str(plain), str(out), "--by", "plain").exit_code == 2
    assert run("split", str(stream), str(stream / "below")).exit_code == 1
    assert not out.exists()


def test_standard_input_and_a_pipe(tmp_path: Path) -> None:
    out, command = tmp_path / "out", str(Path(sys.executable).with_name("understudy"))
    data = remus(checkpoints=3)
    for args in (["verify", "-"], ["inspect", "-"], ["split", "-", str(out), "--by", "plain"]):
        done = subprocess.run(
            [command, "stream", *args], input=data, capture_output=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == ["plain.xl"]
    done = subprocess.run(
        [command, "stream", "verify", "-"],
        input=gzip.compress(data)[:-20],
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    assert b"compression is damaged" in done.stderr


def _on_a_terminal(*args: str) -> bytes:
    mine, its = pty.openpty()
    with subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=its) as process:
        os.close(its)
        told = io.BytesIO()
        while True:
            try:
                piece = os.read(mine, 4096)
            except OSError:  # a terminal that nobody has open any longer
                break
            told.write(piece)
        os.close(mine)
        assert process.wait(30) == 0
    return told.getvalue()


def test_progress_is_for_terminals(tmp_path: Path) -> None:
    path = tmp_path / "stream.gz"
    many = libxc_record(pages([1], 0xF)) * 80_000
    path.write_bytes(gzip.compress(saved().replace(libxc_record(pages([9], 0xF)), many), 1))
    command = str(Path(sys.executable).with_name("understudy"))
    told = _on_a_terminal(command, "stream", "verify", str(path))
    assert b"MiB" in told
    assert told.endswith(b"\r\x1b[K")
    done = subprocess.run(
        [command, "stream", "verify", str(path)], capture_output=True, check=True, timeout=30
    )
    assert done.stderr == b""


def test_every_option_is_in_the_reference() -> None:
    reference = (Path(__file__).parents[4] / "docs/reference/stream.md").read_text()
    group: Any = program.get_command(None, "stream")  # type: ignore[arg-type]
    for name, command in group.commands.items():
        assert f"understudy stream {name}" in reference
        for option in command.params:
            for word in option.opts:
                assert not word.startswith("--") or f"`{word}" in reference, f"{name} {word}"
