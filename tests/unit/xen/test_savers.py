"""Helpers of other toolstacks are told from all else, and the one that saves the domain is ended."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy_xen.execs import Execs
from understudy_xen.savers import Savers, helper_directories, restored_by, saved_by, saves

HELPER = "/usr/lib/xen-4.17/bin/libxl-save-helper"


def _line(*words: str) -> bytes:
    return b"".join(word.encode() + b"\0" for word in words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((HELPER, "--save-domain", "8", "9", "7", "0", "1"), True),
        (("libxl-save-helper", "--save-domain", "8", "9", "7"), True),
        ((HELPER, "--save-domain", "8", "9", "70"), False),
        ((HELPER, "--save-domain", "7", "7", "8"), False),
        ((HELPER, "--restore-domain", "8", "9", "7"), False),
        ((HELPER, "--save-domain"), False),
        (("vi", HELPER, "--save-domain", "8", "9", "7"), False),
        ((), False),
    ],
)
def test_a_command_line_is_told(words: tuple[str, ...], expected: bool) -> None:
    assert saves(_line(*words), 7) is expected


def test_who_works_on_a_domain_is_found_by_what_he_does(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    _look_like(tmp_path, 5, HELPER, "--restore-domain", "8", "9", "7", "1", "0")
    _place(tmp_path, 6, 8)
    assert [restored_by(domid, proc=tmp_path) for domid in (7, 8)] == [5, 0]
    assert [saved_by(domid, proc=tmp_path) for domid in (7, 8)] == [0, 6]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as running:
        yield running
        running.kill()


def _place(proc: Path, pid: int, domid: int) -> None:
    _look_like(proc, pid, HELPER, "--save-domain", "8", "9", str(domid), "0")


def _look_like(proc: Path, pid: int, *words: str) -> None:
    (proc / str(pid)).mkdir(parents=True, exist_ok=True)
    (proc / str(pid) / "cmdline").write_bytes(_line(*words))


def _kernel_tells() -> bool:
    try:
        Execs("libxl-save-helper", ()).close()
    except OSError:
        return False
    return True


told_by_the_kernel = pytest.mark.skipif(not _kernel_tells(), reason="fanotify needs CAP_SYS_ADMIN")


@pytest.fixture
def helper(tmp_path: Path) -> Path:
    """A program of the helper's name in a directory of its own; it sleeps."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "proc").mkdir()
    return Path(shutil.copy(shutil.which("sleep") or "", tmp_path / "bin" / "libxl-save-helper"))


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def savers(helper: Path, told: list[str]) -> Iterator[Savers]:
    """Told by the kernel of `helper`; what its processes look like is in a directory of the test."""
    savers = Savers(7, told.append, proc=helper.parent.parent / "proc", directories=[helper.parent])
    yield savers
    savers.close()


def test_one_that_runs_already_is_ended_and_told_once(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    _place(tmp_path, process.pid, 7)
    told: list[str] = []
    savers = Savers(7, told.append, proc=tmp_path, directories=())
    try:
        found = savers.look()
        assert process.wait(10) == -9
        assert f"begun to save domain 7 (libxl-save-helper, pid {process.pid})" in found
        assert (savers.look(), told) == (found, [found])  # nobody may forget it
    finally:
        savers.close()
        savers.close()
    assert savers.fileno() == -1


def test_one_of_another_domain_goes_on(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    _place(tmp_path, process.pid, 8)
    (tmp_path / "self").mkdir()
    savers = Savers(7, pytest.fail, proc=tmp_path, directories=())
    try:
        assert savers.look() == ""
        assert process.poll() is None
    finally:
        savers.close()


def test_one_that_begins_when_nobody_looks_any_more_goes_on(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    savers = Savers(7, pytest.fail, proc=tmp_path, directories=())
    assert savers.look() == ""
    savers.close()
    _place(tmp_path, process.pid, 7)
    assert savers.look() == ""  # a checkpoint that is still under way, or a timer
    assert process.poll() is None


@told_by_the_kernel
@pytest.mark.parametrize("is_collected", [True, False], ids=["gone", "zombie"])
def test_one_that_came_and_went_is_taken_for_one_of_the_domain(
    helper: Path, savers: Savers, told: list[str], is_collected: bool
) -> None:
    assert savers.look() == ""
    with subprocess.Popen([helper, "0"]) as ended:
        with open(f"/proc/{ended.pid}/stat", "rb") as stat:  # noqa: PTH123 - outlives the process
            while b") Z " not in stat.read():
                stat.seek(0)
        if is_collected:
            ended.wait(10)
        found = savers.look()
    assert f"a libxl-save-helper (pid {ended.pid}) came and went" in found
    assert told == [found]


@told_by_the_kernel
def test_one_is_judged_when_it_looks_like_it(
    helper: Path, savers: Savers, told: list[str], tmp_path: Path
) -> None:
    with subprocess.Popen([helper, "60"]) as begun:
        try:
            _look_like(tmp_path / "proc", begun.pid, "xl", "save", "web", "/srv/web.save")
            assert (savers.look(), savers.waiting) == ("", True)
            _place(tmp_path / "proc", begun.pid, 7)
            found = savers.look()
            assert begun.wait(10) == -9
        finally:
            begun.kill()
    assert f"begun to save domain 7 (libxl-save-helper, pid {begun.pid})" in found
    assert (savers.waiting, told) == (False, [found])


@told_by_the_kernel
def test_what_does_no_harm_is_not_told(helper: Path, savers: Savers, told: list[str], tmp_path: Path) -> None:
    other = shutil.copy(helper, helper.with_name("pygrub"))
    subprocess.run([other, "0"], check=True)
    begun = [subprocess.Popen([helper, "60"]) for _ in range(2)]
    try:
        _place(tmp_path / "proc", begun[0].pid, 8)
        _look_like(tmp_path / "proc", begun[1].pid, HELPER, "--restore-domain", "8", "9", "7")
        assert (savers.look(), savers.waiting) == ("", False)
        assert [process.poll() for process in begun] == [None, None]
    finally:
        for process in begun:
            process.kill()
            process.wait(10)
    assert savers.look() == ""  # that they ended is nothing new
    assert not told


@told_by_the_kernel
def test_one_that_the_kernel_cannot_tell_of_is_taken_for_one_of_the_domain(
    helper: Path, savers: Savers, told: list[str]
) -> None:
    assert savers.look() == ""
    subprocess.run([helper, "0"], check=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        found = savers.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "the kernel could not tell of a libxl-save-helper" in found
    assert (savers.look(), told) == (found, [found])


@told_by_the_kernel
def test_each_one_is_told_also_if_hardly_a_file_may_be_opened_any_more(helper: Path) -> None:
    execs = Execs(helper.name, [helper.parent])
    begun = [subprocess.Popen([helper, "0"]) for _ in range(3)]
    for process in begun:
        process.wait(10)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = os.dup(0)  # the lowest number that is free
    os.close(room)
    resource.setrlimit(resource.RLIMIT_NOFILE, (room + 1, limits[1]))
    try:
        assert sorted(execs.begun()) == sorted(process.pid for process in begun)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        execs.close()


@told_by_the_kernel
def test_a_program_that_was_put_in_the_place_of_the_first_one_is_seen(helper: Path, savers: Savers) -> None:
    anew = Path(shutil.copy(helper, helper.with_name("new")))
    anew.replace(helper)
    subprocess.run([helper, "0"], check=True)
    assert "came and went" in savers.look()


def test_where_the_helper_is_found(tmp_path: Path) -> None:
    for place in ("usr/lib/xen-4.17/bin", "usr/libexec/xen/bin", "usr/local/lib/xen/bin", "usr/lib/xen/bin"):
        (tmp_path / place).mkdir(parents=True)
        if place != "usr/lib/xen/bin":
            (tmp_path / place / "libxl-save-helper").touch()
    found = {str(place.relative_to(tmp_path)) for place in helper_directories(tmp_path)}
    assert found == {"usr/lib/xen-4.17/bin", "usr/libexec/xen/bin", "usr/local/lib/xen/bin"}


def test_where_the_kernel_does_not_tell_a_dead_one_is_known_by_its_name(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    # One that has been dead since before is nobody's matter.
    told: list[str] = []
    savers = Savers(7, told.append, proc=tmp_path, directories=())
    try:
        assert savers.look() == ""
        _look_like(tmp_path, process.pid)
        (tmp_path / str(process.pid) / "comm").write_bytes(b"libxl-save-help\n")
        assert "came and went" in savers.look()
    finally:
        savers.close()
    later = Savers(7, pytest.fail, proc=tmp_path, directories=())
    try:
        assert later.look() == ""
    finally:
        later.close()
